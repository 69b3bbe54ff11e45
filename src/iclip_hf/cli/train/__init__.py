"""`iclip train`: trains a model on image-text pairs, with [`ICLIPTrainer`]."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...backends import check_model_name
from ...training.arguments import START_FILE, ICLIPTrainingArguments
from ...utils.files import check_outside
from .arguments import Arguments, argument_parser, read_arguments, resolve_arguments
from .chosen_arguments import few_pairs_arguments
from .data import open_pairs


def parents() -> list[argparse.ArgumentParser]:
    return [argument_parser(add_help=False)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.allow_abbrev = False


def run(args: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    if given.get("model") and not (given.get("data") or given.get("config")):
        raise ValueError(f"data: name pairs to train {given['model']} on, as in `iclip train pairs.csv`, or a config.")
    pairs, chosen = None, {}
    if given.get("config") or not given.get("data"):
        arguments = read_arguments(given)
    else:
        pairs = open_pairs(given["data"], {"seed": ICLIPTrainingArguments.seed, **given})
        chosen = few_pairs_arguments(given, pairs)
        arguments = resolve_arguments(chosen, given)
    check_output_dir(arguments)
    from .training import train  # imports all that a training needs

    train(arguments, pairs, chosen)


def check_output_dir(arguments: Arguments) -> None:
    """
    Raises `FileExistsError` unless the folder of a run is new or empty, or holds a training of ICLIP to resume. Also
    raises it if the run would write into the folder of the model or of a tower. Checks that `model` is an ICLIP model.
    """
    folder, model = Path(arguments.training.output_dir), arguments.model
    for source in (model.model, model.vision, model.text, model.feature_tower):
        for output in filter(None, (folder, arguments.data.cache_features)):
            if source and source != "embedded":
                check_outside(output, source)
    if model.model:
        check_model_name(model.model, ("iclip",))
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names and not (arguments.training.resume and START_FILE in names):
        raise FileExistsError(
            f"{folder}: this folder holds files already; name another by --output_dir, or add --resume to continue a "
            "training from its last checkpoint."
        )
