"""The arguments of `iclip train`, for `HfArgumentParser`: of the model, the data, the evaluation and the training."""

# ruff: noqa: RUF009 (`argument` makes a field)

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import yaml
from transformers import HfArgumentParser

from ...data.layouts import DATASETS
from ...hub.configs import config_folder, parse_options
from ...model.configuration_iclip import ICLIPConfig
from ...training.arguments import MAP_METRICS, RETRIEVAL_METRICS, ICLIPTrainingArguments, argument


RUNS = "runs"  # folder of the runs, if no other is named


@dataclass
class ModelArguments:
    """Which model is trained: a trained one, or two towers with new projections."""

    config: str = argument(
        "",
        "name of a shipped configuration, or a folder with a train.yaml, or this file; without one, arguments are "
        "chosen by the number of pairs, and without data it is iclip-vit-b16",
    )
    model: str = argument("", 'ICLIP model to train further (folder, Hub id or "embedded"), instead of two towers')
    vision: str = argument("", 'image tower: a folder, a Hub id, or "embedded" for that of the embedded model')
    text: str = argument("", 'text tower: a folder, a Hub id, or "embedded" for that of the embedded model')
    feature_tower: str = argument(
        "",
        'second image tower, a convolutional backbone of timm: a folder, a Hub id, or "embedded"; none if not given',
    )
    model_options: list[str] = argument([], "options that override those of config.json, as name=value")
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
    pairs_per_epoch: int = argument(0, "pairs in an epoch of a single Hub dataset, which then is streamed")
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

    validation_data: list[str] = argument([], "validation pairs, local")
    validation_share: float = argument(0.0, "share of the pairs to validate on instead, which are not trained on")
    eval_dataset: str = argument("none", "segmentation data set to evaluate maps on", choices=["none", *DATASETS])
    eval_root: str = argument("", "folder of eval_dataset")
    eval_split: str = argument("", "split of eval_dataset; the validation split if not given")


@dataclass
class RunArguments(ICLIPTrainingArguments):
    """The arguments of the trainer, and how a run is resumed."""

    resume: bool = argument(False, "resume from the last checkpoint in output_dir, if there is one")
    resume_from_checkpoint: str | None = field(default=None, init=False)  # an argument of scripts, which is `resume`


class Arguments(NamedTuple):
    """What `iclip train` is given."""

    model: ModelArguments
    data: DataArguments
    evaluation: EvaluationArguments
    training: RunArguments


_DATACLASSES = (ModelArguments, DataArguments, EvaluationArguments, RunArguments)
_OTHER_NAMES = {
    "batch_size": "per_device_train_batch_size, the pairs of each process",
    "epochs": "num_train_epochs",
    "warmup_epochs": "warmup_steps, or below 1 their share of all steps",
    "clip_grad_norm": "max_grad_norm",
    "mixed_precision": "bf16 or fp16",
    "num_workers": "dataloader_num_workers",
    "log_steps": "logging_steps",
    "checkpoint_steps": "save_steps",
    "best_metric": "metric_for_best_model",
    "resume_from_checkpoint": "resume, which takes the last checkpoint in output_dir",
}


def argument_parser(**kwargs) -> HfArgumentParser:
    """Returns a parser of all arguments. Those that are not given are absent from its result."""
    parser = HfArgumentParser(_DATACLASSES, allow_abbrev=False, **kwargs)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser.add_argument(
        "data", nargs="*", action="extend", default=argparse.SUPPRESS, metavar="DATA", help="the same as --data"
    )
    return parser


def cure_of(name: str) -> str:
    """Returns what a name that is no argument may mean: another name of one, or an option of the model."""
    if name in _OTHER_NAMES:
        return f"; use {_OTHER_NAMES[name]}"
    if name in ICLIPConfig.__annotations__:
        return f"; an option of the model is set by --model_options {name}=VALUE"
    return ""


def read_arguments(given: Mapping) -> Arguments:
    """
    Returns the arguments of a training. An argument that is `given`, such as by the parser, overrides the `train.yaml`
    that `config` names, and this overrides the default. Raises `ValueError` for an invalid one.
    """
    file = Path(given.get("config") or "iclip-vit-b16")
    if not file.is_file():
        file = config_folder(file) / "train.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file; the arguments of a training are in a train.yaml.")
    values = read_file(file)
    for names, instead in (
        (("model",), ("vision", "text", "feature_tower", "image_size")),
        (("vision", "text"), ("model",)),
        (("validation_share",), ("validation_data",)),
        (("validation_data",), ("validation_share",)),
    ):
        if any(map(given.get, names)):
            values = {name: value for name, value in values.items() if name not in instead}
    return resolve_arguments(values, {**given, "config": str(file)})


def resolve_arguments(values: Mapping, given: Mapping = MappingProxyType({})) -> Arguments:
    """
    Returns arguments, those that are `given` before other `values`, with those that depend on others. Raises
    `ValueError` for a combination that cannot be.
    """
    values = {**values, **given}
    validated = bool(values.get("validation_data") or values.get("validation_share"))
    maps = values.get("eval_dataset", "none") != "none"
    values.setdefault("output_dir", f"{RUNS}/{run_name(values)}")
    values.setdefault("report_to", "none")
    if validated or maps:
        usual = {"eval_strategy": "steps", "load_best_model_at_end": True, "eval_on_start": bool(values.get("model"))}
        usual["metric_for_best_model"] = "text_to_image" if validated else "mMIoU"
        values = {**usual, **values}
        measured = [*(RETRIEVAL_METRICS if validated else ()), *(MAP_METRICS if maps else ())]
        if (best := values["metric_for_best_model"]).removeprefix("eval_") not in measured:
            raise ValueError(f"metric_for_best_model: {best!r:.50} is not measured; choose of {', '.join(measured)}.")
        # The best model needs a checkpoint. Steps and shares of all steps do not mix.
        eval_steps, save_steps = values.get("eval_steps") or 1000, values.get("save_steps", 1000)
        fits = save_steps % eval_steps == 0 and (save_steps < 1) == (eval_steps < 1)
        if values["load_best_model_at_end"] and not fits and "save_steps" not in given:
            values["save_steps"] = eval_steps
    arguments = Arguments(*HfArgumentParser(_DATACLASSES).parse_dict(values))
    model, data = arguments.model, arguments.data
    parse_options(model.model_options)  # raises for one that is not name=value
    batches = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    for name in ("num_train_epochs", *batches, "chunk_size"):
        if getattr(arguments.training, name) <= 0:
            raise ValueError(f"{name}: {getattr(arguments.training, name)} is not above 0.")
    if arguments.training.keep_presence < 0:
        raise ValueError(f"keep_presence: {arguments.training.keep_presence} is not a weight of at least 0.")
    if not 0 < data.crop_scale <= 1:
        raise ValueError(f"crop_scale: {data.crop_scale} is not in (0, 1].")
    if not data.data:
        raise ValueError("data: name training pairs, such as a folder of webdataset shards.")
    if arguments.evaluation.validation_data and arguments.evaluation.validation_share:
        raise ValueError("validation_data, validation_share: give one of them.")
    if bool(model.model) == bool(model.vision and model.text):
        raise ValueError(
            f"model={model.model!r}, vision={model.vision!r}, text={model.text!r}: set either model, or vision and "
            "text."
        )
    if model.model and model.image_size:
        raise ValueError("image_size: the images of a model have the size of its processor; leave it out.")
    if model.model and model.feature_tower:
        raise ValueError("feature_tower: a trained model has its own towers; leave it out.")
    if arguments.training.keep_presence and not (model.model and model.lock_text):
        raise ValueError("keep_presence: it needs a model to train further and lock_text; leave it out.")
    return arguments


def run_name(values: Mapping) -> str:
    """Returns the name of a model by its folder or configuration."""
    if values.get("output_dir"):
        return Path(values["output_dir"]).name
    return Path(values["config"]).resolve().parent.name


def read_file(file: Path) -> dict:
    """Returns the arguments in a `train.yaml`. `name:` without a value leaves the default."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        given = [(name, value) for name, value in content.items() if value is not None]
    except (AttributeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: arguments are written in YAML as `name: value`, but: {error}") from error
    words: list[str] = []
    for name, value in given:
        words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    try:
        values, unknown = argument_parser(exit_on_error=False).parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(f"{file}: {error}") from error
    if unknown:
        name = unknown[0].removeprefix("--").partition("=")[0]
        raise ValueError(f"{file}: {name!r:.100} is no argument{cure_of(name)}.")
    values = vars(values)
    if (nouns := file.parent / values.get("nouns", "")).is_file():
        values["nouns"] = str(nouns)
    return values


def parse_arguments(words: Sequence[str]) -> Arguments:
    """Returns the arguments of a command line that names a configuration."""
    return read_arguments(vars(argument_parser().parse_args(words)))
