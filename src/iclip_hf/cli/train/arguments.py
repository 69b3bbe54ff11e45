"""The arguments of `iclip train`, for `HfArgumentParser`: of the model, the data, the evaluation and the training."""

# ruff: noqa: RUF009 (`argument` makes a field)

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import yaml
from transformers import HfArgumentParser

from ...data.layouts import DATASETS
from ...hub.configs import config_folder, parse_options
from ...training.arguments import MAP_METRICS, RETRIEVAL_METRICS, ICLIPTrainingArguments, argument


RUNS = "runs"  # folder of the runs, if no other is named


@dataclass
class ModelArguments:
    """Which model is trained: a trained one, or two towers with new projections."""

    config: str = argument(
        "",
        "name of a shipped configuration, a folder with a train.yaml, or the train.yaml itself; if not given, the "
        "number of pairs decides the arguments, or without data the configuration is iclip-vit-b16",
    )
    model: str = argument("", 'ICLIP model to train further (folder, Hub id or "embedded"), instead of two towers')
    vision: str = argument("", 'image tower: a folder, a Hub id, or "embedded" for that of the embedded model')
    text: str = argument("", 'text tower: a folder, a Hub id, or "embedded" for that of the embedded model')
    feature_tower: str = argument(
        "",
        'second image tower, a convolutional backbone of timm: a folder, a Hub id, or "embedded"; none if not given',
    )
    model_options: list[str] = argument(
        [], "options that override those of config.json, as name=value", action="extend"
    )
    lock_text: bool = argument(False, "freeze the text tower")
    image_size: int = argument(0, "height and width of images in pixels; 0 for those of the model")


@dataclass
class DataArguments:
    """The pairs to train on."""

    data: list[str] = argument(
        [],
        "training pairs in any format of the guide (docs/guide/train.md): for example a .csv table with the columns "
        "`image` and `caption`, a folder with a subfolder of images for each class, or a Hub dataset",
        action="extend",
    )
    image_column: str = argument("", "column of the images, if it has no usual name")
    caption_column: str = argument("", "column of the captions, if it has no usual name")
    split: str = argument("train", "split of a Hub dataset or of a saved one")
    pairs_per_epoch: int = argument(0, "with --config, pairs in an epoch of a single Hub dataset, which is streamed")
    max_bad_share: float = argument(0.05, "largest share of broken pairs; the run stops above it")
    nouns: str = argument(
        "",
        "text file with a noun in each line, 'sky (background)' for one of the background; nouns in captions become "
        "prompts",
    )
    crop_scale: float = argument(0.08, "smallest area of a random crop, as a share of the image")
    auto_augment: str = argument("rand-m9-mstd0.5-inc1", "name of an augmentation policy of timm; empty for none")
    random_erasing: float = argument(0.25, "probability of erasing a rectangle")
    cache_features: str = argument("", "folder for features of locked towers, which are computed once")


@dataclass
class EvaluationArguments:
    """The pairs and the segmentation data set to measure on."""

    validation_data: list[str] = argument([], "local validation pairs", action="extend")
    validation_share: float = argument(
        0.0, "share of the pairs to hold out for validation, instead of validation_data"
    )
    eval_dataset: str = argument("none", "segmentation data set to evaluate maps on", choices=["none", *DATASETS])
    eval_root: str = argument("", "folder of eval_dataset")
    eval_split: str = argument("", "split of eval_dataset; the validation split if not given")


@dataclass
class RunArguments(ICLIPTrainingArguments):
    """The arguments of the trainer, and how a run is resumed."""

    output_dir: str | None = argument(
        None,
        f"new or empty folder for the model and its checkpoints; if not given, {RUNS}/NAME, with the name of the "
        "first data or of the configuration",
    )
    metric_for_best_model: str | None = argument(
        None,
        "metric that selects the best model; if not given, text_to_image, or mMIoU without held-out pairs, or loss "
        "with fewer than 100 held-out pairs and without --config",
    )
    resume: bool = argument(False, "resume from the last checkpoint in output_dir, if there is one")
    resume_from_checkpoint: str | None = field(default=None, init=False)  # for scripts; the command has `resume`


class Arguments(NamedTuple):
    """All arguments of `iclip train`."""

    model: ModelArguments
    data: DataArguments
    evaluation: EvaluationArguments
    training: RunArguments


# The smallest and the largest value of arguments that Transformers does not check, or after what depends on them.
_RANGES = {
    "num_train_epochs": (1e-6, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "chunk_size": (1, math.inf),
    "keep_presence": (0, math.inf),
    "max_bad_share": (0, 1),
    "random_erasing": (0, 1),
    "crop_scale": (1e-6, 1),
}
_DATACLASSES = (ModelArguments, DataArguments, EvaluationArguments, RunArguments)


def argument_parser(**kwargs) -> HfArgumentParser:
    """Returns a parser of all arguments. An argument that is not given is absent from the parsed ones."""
    parser = HfArgumentParser(_DATACLASSES, allow_abbrev=False, **kwargs)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser.add_argument(
        "data", nargs="*", action="extend", default=argparse.SUPPRESS, metavar="DATA", help="the same as --data"
    )
    return parser


def read_arguments(given: Mapping) -> Arguments:
    """
    Returns the arguments of a training: those `given` by the user, then those of the `train.yaml` that `config` names,
    then the defaults. Raises `FileNotFoundError` if there is no such file, and `ValueError` for an invalid argument.
    """
    file = Path(given.get("config") or "iclip-vit-b16")
    if not file.is_file():
        file = config_folder(file) / "train.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file; the arguments of a training are in a train.yaml.")
    values = read_train_yaml(file)
    # Arguments of the user, and those of the file that they replace.
    for names, replaced in (
        (("model",), ("vision", "text", "feature_tower", "image_size")),
        (("vision", "text"), ("model",)),
        (("validation_share",), ("validation_data",)),
        (("validation_data",), ("validation_share",)),
    ):
        if any(map(given.get, names)):
            values = {name: value for name, value in values.items() if name not in replaced}
    return resolve_arguments(values, {**given, "config": str(file)})


def resolve_arguments(values: Mapping, given: Mapping = MappingProxyType({})) -> Arguments:
    """
    Returns arguments. Those that are `given` override other `values`. Arguments that depend on others get their
    defaults. Raises `ValueError` for a wrong value, or for values that contradict each other.
    """
    values = {**values, **given}
    if "output_dir" not in values:
        values["output_dir"] = f"{RUNS}/{Path(values['config']).resolve().parent.name}"
    values.setdefault("report_to", "none")
    for name, (low, high) in _RANGES.items():
        if name in values and not low <= values[name] <= high:
            raise ValueError(f"{name}: {values[name]} is not in [{low}, {high}].")
    values = _with_evaluation(values, given)
    arguments = Arguments(*HfArgumentParser(_DATACLASSES).parse_dict(values))
    _check(arguments)
    return arguments


def _with_evaluation(values: Mapping, given: Mapping) -> dict:
    """Adds the defaults for evaluations and for the choice of the best model, if the training is evaluated."""
    has_pairs = bool(values.get("validation_data") or values.get("validation_share"))
    has_maps = values.get("eval_dataset", "none") != "none"
    if not (has_pairs or has_maps):
        return dict(values)
    defaults = {"eval_strategy": "steps", "load_best_model_at_end": True, "eval_on_start": bool(values.get("model"))}
    defaults["metric_for_best_model"] = "text_to_image" if has_pairs else "mMIoU"
    values = {**defaults, **values}
    measured = [*(RETRIEVAL_METRICS if has_pairs else ()), *(MAP_METRICS if has_maps else ())]
    if (best := values["metric_for_best_model"]).removeprefix("eval_") not in measured:
        raise ValueError(f"metric_for_best_model: {best!r:.50} is not measured; choose one of {', '.join(measured)}.")
    # The best model can be loaded only if its evaluation has a checkpoint. A number of steps does not fit a share.
    eval_steps, save_steps = values.get("eval_steps") or 1000, values.get("save_steps", 1000)
    fits = save_steps % eval_steps == 0 and (save_steps < 1) == (eval_steps < 1)
    if values["load_best_model_at_end"] and not fits and "save_steps" not in given:
        values["save_steps"] = eval_steps
    return values


def _check(arguments: Arguments) -> None:
    """Raises `ValueError` for values that are missing or contradict each other."""
    model, data = arguments.model, arguments.data
    parse_options(model.model_options)  # raises for one that is not name=value
    if not data.data:
        raise ValueError("data: name training pairs, such as a folder of webdataset shards.")
    if arguments.evaluation.validation_data and arguments.evaluation.validation_share:
        raise ValueError("validation_data, validation_share: give one of them.")
    towers = model.vision, model.text
    if any(towers) if model.model else not all(towers):
        raise ValueError(
            f"model={model.model!r}, vision={model.vision!r}, text={model.text!r}: set either model, or vision and "
            "text."
        )
    if model.model and (model.image_size or model.feature_tower):
        raise ValueError("image_size, feature_tower: a trained model has its own; leave them out.")
    if arguments.training.keep_presence and not (model.model and model.lock_text):
        raise ValueError("keep_presence: it needs a model to train further and lock_text; leave it out.")


def read_train_yaml(file: Path) -> dict:
    """Returns the arguments in a `train.yaml`, without names that have no value."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        named_values = {name: value for name, value in content.items() if value is not None}
    except (AttributeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: write the arguments in YAML as `name: value`; reading failed: {error}") from error
    command_line: list[str] = []
    for name, value in named_values.items():
        if isinstance(value, list):
            command_line += [f"--{name}", *map(str, value)]
        else:
            command_line.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    try:
        parsed, unknown = argument_parser(exit_on_error=False).parse_known_args(command_line)
    except argparse.ArgumentError as error:
        raise ValueError(f"{file}: {error}") from error
    if unknown:
        name = unknown[0].removeprefix("--").partition("=")[0]
        raise ValueError(f"{file}: {name!r:.100} is no argument.")
    values = vars(parsed)
    if (nouns := file.parent / values.get("nouns", "")).is_file():
        values["nouns"] = str(nouns)
    return values


def parse_arguments(command_line: Sequence[str]) -> Arguments:
    """Returns the arguments of a command line that names a configuration."""
    return read_arguments(vars(argument_parser().parse_args(command_line)))
