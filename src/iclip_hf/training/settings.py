"""Settings of a training run, from defaults, a `train.yaml` and the command line. Does not import torch."""

# ruff: noqa: RUF009 (`setting` makes a field)

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import yaml

from ..data.layouts import DATASETS
from ..evaluation.metrics import MAX_SEED
from ..hub.configs import config_folder, parse_options
from ..utils.prefetch import spare_processors


# Metrics of [`evaluate_model`] that a run logs and can select its best model by.
MAP_METRICS = ("mAP", "mMIoU", "mFMB", "text_contrast")
RETRIEVAL_METRICS = ("text_to_image", "image_to_text", "val_loss")

RUNS = "runs"  # folder of the runs, if no other is named

# Numbers with the lowest and the highest that they may be
AtLeast0, AtLeast1 = Annotated[int, 0, math.inf], Annotated[int, 1, math.inf]
NotNegative, Share = Annotated[float, 0, math.inf], Annotated[float, 0, 1]
Positive = Annotated[float, 1e-99, 1e30]
Seed = Annotated[int, 0, MAX_SEED]

# Settings that change no result, so that a run may resume with others, such as one that `max_bad_share` has stopped.
# `eval_steps` decides which model is kept.
MAY_CHANGE = "config output_dir resume max_bad_share num_workers report_to log_steps pictures checkpoint_steps".split()
# Places, which may change too: their content is compared.
PATHS = "model vision text data validation_data nouns cache_features eval_root".split()


def setting(default, help: str):
    """A field of [`Settings`] with its description for the command line."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    shown = "" if default in ("", False) else f" (default: {default})"
    return field(default=default, metadata={"help": help + shown})


@dataclass
class Settings:
    """
    Settings of a run. The defaults are the recipe of the paper, and of GroupViT and DeiT, to which the paper refers.
    """

    config: str = setting(
        "",
        "name of a shipped configuration, or a folder with a train.yaml, or this file; without one, settings are "
        "chosen by the number of pairs, and without data it is iclip-vit-b16",
    )
    output_dir: str = setting("", "folder of the run and the model; runs/<name of configuration or data> if not given")
    resume: bool = setting(False, "resume from the last checkpoint in output_dir, if there is one")

    # model
    model: str = setting("", 'ICLIP model to train further (folder, Hub id or "embedded"), instead of two towers')
    vision: str = setting("", 'image tower: a folder, a Hub id, or "embedded" for that of the embedded model')
    text: str = setting("", 'text tower: a folder, a Hub id, or "embedded" for that of the embedded model')
    model_options: list[str] = setting([], "options that override those of config.json, as name=value")
    lock_text: bool = setting(False, "freeze the text tower")
    keep_presence: NotNegative = setting(
        0.0, "weight of a loss that keeps the presence of common nouns as `model` has it, with locked towers"
    )
    image_size: AtLeast0 = setting(
        0, "height and width of images in pixels; 0 for those of processor_config.json; a model has its own size"
    )

    # data
    data: list[str] = setting(
        [],
        "training pairs: a .csv or .tsv table with the columns `image` and `caption`, a folder of images with "
        "metadata.jsonl or metadata.csv, or with a subfolder for each class, tar shards, Parquet, a saved dataset, or "
        "a Hub dataset",
    )
    image_column: str = setting("", "column of the images, if it has no usual name")
    caption_column: str = setting("", "column of the captions, if it has no usual name")
    validation_data: list[str] = setting([], "validation pairs, local")
    validation_share: Share = setting(0.0, "share of the pairs to validate on instead, which are not trained on")
    split: str = setting("train", "split of a Hub dataset or of a saved one")
    pairs_per_epoch: AtLeast0 = setting(
        0, "pairs in an epoch of a single Hub dataset, which then is streamed; without effect on local pairs"
    )
    max_bad_share: Share = setting(0.05, "largest share of broken pairs; the run stops above it")
    crop_scale: Share = setting(0.08, "smallest area of a random crop, as a share of the image")
    auto_augment: str = setting("rand-m9-mstd0.5-inc1", "name of an augmentation policy of timm; empty for none")
    random_erasing: Share = setting(0.25, "probability of erasing a rectangle")
    nouns: str = setting(
        "",
        "text file with a noun in each line, 'sky (background)' for one of the background; nouns in captions become "
        "prompts",
    )
    num_workers: AtLeast0 = setting(min(4, spare_processors()), "number of loading processes of each training process")
    cache_features: str = setting("", "folder for features of locked towers, which are computed once")

    # optimisation
    epochs: AtLeast1 = setting(30, "number of passes over the pairs")
    max_steps: AtLeast0 = setting(0, "number of steps of the run and its schedule; 0 for all epochs")
    batch_size: AtLeast1 = setting(1024, "number of pairs in a batch, over all processes")
    chunk_size: AtLeast1 = setting(256, "number of pairs in one forward pass of a tower, which limits the memory")
    learning_rate: Positive = setting(1.25e-4, "peak of the learning rate, for any batch_size")
    warmup_learning_rate: NotNegative = setting(1e-6, "first learning rate of the warm-up")
    min_learning_rate: NotNegative = setting(1e-5, "last learning rate")
    warmup_epochs: NotNegative = setting(2.0, "number of epochs of linear warm-up, before the cosine decay")
    weight_decay: NotNegative = setting(0.05, "weight decay of matrices; biases, norms and logit scales have none")
    clip_grad_norm: Positive = setting(5.0, "largest norm of the gradient")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = setting(
        "auto", "auto: the choice of `accelerate launch`; without one, bf16 or fp16 on a GPU and no on a CPU"
    )
    seed: Seed = setting(0, "random seed")

    # monitoring
    report_to: str = setting("tensorboard", "tracker of Accelerate, or none")
    log_steps: AtLeast1 = setting(10, "number of steps between logs")
    eval_steps: AtLeast1 = setting(1000, "number of steps between evaluations; the last step is always evaluated")
    eval_dataset: Literal[("none", *DATASETS)] = setting("none", "segmentation data set to evaluate maps on")
    eval_root: str = setting("", "folder of eval_dataset")
    eval_split: str = setting("", "split of eval_dataset; the validation split if not given")
    best_metric: Literal[("auto", *RETRIEVAL_METRICS, *MAP_METRICS)] = setting(
        "auto", "metric that selects the best model; auto: text_to_image, or mMIoU without validation pairs"
    )
    pictures: AtLeast0 = setting(4, "number of validation images whose maps are drawn at each evaluation")
    checkpoint_steps: AtLeast1 = setting(1000, "number of steps between checkpoints")

    def __post_init__(self):
        self.output_dir = self.output_dir or f"{RUNS}/{self.name}"
        for name, annotation in get_type_hints(Settings, include_extras=True).items():
            value, (low, high) = getattr(self, name), getattr(annotation, "__metadata__", (-math.inf, math.inf))
            if isinstance(value, (int, float)) and not (low <= value <= high and math.isfinite(value)):
                raise ValueError(f"{name}: {value} is not a number from {low} to {high}.")
        for name in ("warmup_learning_rate", "min_learning_rate"):
            if (rate := getattr(self, name)) > self.learning_rate:
                raise ValueError(f"{name}: {rate} is above the learning_rate of {self.learning_rate}; lower it.")
        parse_options(self.model_options)
        if self.validation_data and self.validation_share:
            raise ValueError("validation_data, validation_share: give one of them.")
        validated, maps = bool(self.validation_data or self.validation_share), self.eval_dataset != "none"
        if self.best_metric == "auto":
            self.best_metric = "mMIoU" if maps and not validated else "text_to_image"
        elif not (validated if self.best_metric in RETRIEVAL_METRICS else maps):
            raise ValueError(f"best_metric: {self.best_metric} needs validation pairs, or eval_dataset for maps.")
        if not self.data:
            raise ValueError("data: name training pairs, such as a folder of webdataset shards.")
        if bool(self.model) == bool(self.vision and self.text):
            raise ValueError(
                f"model={self.model!r}, vision={self.vision!r}, text={self.text!r}: set either model, or vision and "
                "text."
            )
        if self.keep_presence and not (self.model and self.lock_text):
            raise ValueError("keep_presence: it needs a model to train further and lock_text; leave it out.")
        if self.model and self.image_size:
            raise ValueError("image_size: the images of a model have the size of its processor; leave it out.")
        if not self.model and not self.config:
            raise ValueError(f"config: name the configuration of the model to join with vision={self.vision!r}.")

    def is_better(self, score: float, than: float | None) -> bool:
        """Whether a score in `best_metric` is better than another, if there is one."""
        if than is None:
            return True
        return score < than if self.best_metric == "val_loss" else score > than

    @property
    def name(self) -> str:
        """The name of the model: that of its configuration, or of the run's folder."""
        return Path(self.config).resolve().parent.name if self.config else Path(self.output_dir).name


# --------------------------------------------------------------------------------------------------------- sources


def add_settings(parser: argparse.ArgumentParser) -> None:
    """
    Adds every setting as an option, with underscores or dashes, and `data` also as positional arguments. Settings that
    are not given are absent from the result. As `HfArgumentParser` of Transformers does, which imports torch.
    """
    for name, annotation in get_type_hints(Settings).items():
        options = {"type": annotation}
        if annotation is bool:
            options = {"type": true_or_false, "nargs": "?", "const": True}
        elif get_origin(annotation) is list:
            options = {"nargs": "+", "action": "extend"}
        elif get_origin(annotation) is Literal:
            options = {"choices": get_args(annotation)}
        names = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        text = Settings.__dataclass_fields__[name].metadata["help"]
        parser.add_argument(*names, default=argparse.SUPPRESS, help=text, **options)
    parser.add_argument(
        "data", nargs="*", action="extend", default=argparse.SUPPRESS, metavar="DATA", help="the same as --data"
    )


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def read_settings(overrides: Mapping) -> Settings:
    """
    Merges the settings of a run. `overrides`, such as the result of the parser of [`add_settings`], has precedence
    over the `train.yaml` that `config` names, and this over the defaults. Raises `ValueError` for an invalid setting.
    """
    file = _config_file(overrides.get("config") or "iclip-vit-b16")
    from_file = read_file(file)
    if overrides.get("model"):  # instead of the towers that the file names, and their size
        from_file = {name: value for name, value in from_file.items() if name not in ("vision", "text", "image_size")}
    if overrides.get("vision") or overrides.get("text"):
        from_file.pop("model", None)
    if overrides.get("validation_share"):
        from_file.pop("validation_data", None)
    elif overrides.get("validation_data"):
        from_file.pop("validation_share", None)
    return Settings(**{**from_file, **overrides, "config": str(file)})


def parse_settings(arguments: Sequence[str]) -> Settings:
    """Parses the settings of a run from command-line arguments that name a configuration."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_settings(parser)
    return read_settings(vars(parser.parse_args(arguments)))


def _config_file(config: str) -> Path:
    """
    Returns the `train.yaml` that `config` names: a file, the one in a folder, or the one of a shipped configuration.
    """
    file = Path(config)
    if not file.is_file():
        file = config_folder(config) / "train.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file; the settings of a training are in a train.yaml.")
    return file


def read_file(file: Path) -> dict:
    """Returns the settings in a `train.yaml`. `name:` without a value leaves the default."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: settings are written in YAML, but: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: settings are written as `name: value`, but this is a {type(content).__name__}.")
    arguments = []
    for name, value in content.items():
        if name not in Settings.__dataclass_fields__ or name == "config":
            cure = f"; write it as model_options: [{name}={value}]" if is_model_option(name) else ""
            raise ValueError(f"{file}: {name!r:.100} is no setting{cure}.")
        is_list = Settings.__dataclass_fields__[name].default is MISSING
        values = value if is_list and isinstance(value, list) else [value]
        if wrong := next((item for item in values if isinstance(item, (list, dict))), None):
            raise ValueError(f"{file}: {name}: this is a {type(wrong).__name__} instead of one value.")
        arguments += [f"--{name}={item}" for item in values if item is not None]
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_settings(parser)
    try:
        settings = vars(parser.parse_args(arguments))
    except argparse.ArgumentError as error:
        raise ValueError(f"{file}: {error}") from error
    if (nouns := file.parent / settings.get("nouns", "")).is_file():
        settings["nouns"] = str(nouns)
    return settings


def is_model_option(name: str) -> bool:
    """Returns whether this is an option of the model, some of which were settings before."""
    from ..model.configuration_iclip import ICLIPConfig  # imports transformers

    return name in ICLIPConfig.__annotations__


def changed_settings(settings: Settings, before: Mapping) -> dict[str, object]:
    """Returns the settings that must not change on resume, but differ from `before`, as they were before."""
    changed, without_effect = {}, ["epochs"] if settings.max_steps else []
    for entry in fields(settings):
        # of a setting that the run began without
        usual = entry.default_factory() if entry.default is MISSING else entry.default
        now, then = getattr(settings, entry.name), before.get(entry.name, usual)
        differs = bool(now) != bool(then) if entry.name in PATHS else now != then
        if differs and entry.name not in (*MAY_CHANGE, *without_effect):
            changed[entry.name] = then
    return changed
