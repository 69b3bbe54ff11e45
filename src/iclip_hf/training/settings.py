"""Settings of a training run, from defaults, a `train.yaml` and the command line. Does not import torch."""

# ruff: noqa: RUF009 (`setting` makes a field)

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path

import yaml

from ..data.class_names import DATASETS
from ..hub.configs import config_folder
from ..utils.hub_ids import RUNS


# Metrics of [`evaluate_model`] that a run logs and can select its best model by.
MAP_METRICS = ("mAP", "mMIoU", "mFMB", "text_contrast")
RETRIEVAL_METRICS = ("text_to_image", "image_to_text", "val_loss")
# Those of Accelerate, by the names of their packages.
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")

POSITIVE = 1e-99  # the lowest value of what must not be 0

# Settings that change no result, so that a run may resume with others. `eval_steps` decides which model is kept.
FREE = "config output_dir resume num_workers report_to log_steps pictures checkpoint_steps".split()
# Places, which may change too: their content is compared.
PLACES = "model vision text data validation_data nouns cache_features eval_root".split()


def setting(default, help: str, low: float = -math.inf, high: float = math.inf, choices: Sequence[str] = ()):
    """A field of [`Settings`], with its description for the command line, and the range of a number or the choices of a text."""
    is_list = isinstance(default, list)
    make = {"default_factory": default.copy} if is_list else {"default": default}
    kind = str if is_list else type(default)
    return field(
        **make, metadata={"help": help, "range": (low, high), "kind": kind, "is_list": is_list, "choices": choices}
    )


@dataclass
class Settings:
    """Settings of a run. The defaults are the recipe of the paper, and of GroupViT and DeiT, to which the paper refers."""

    config: str = setting(
        "",
        "name of a shipped configuration, or a train.yaml beside the model's config.json; without one, settings are chosen by the "
        "number of pairs, and without data it is iclip-vit-b16",
    )
    output_dir: str = setting("", "folder of the run and the model; runs/<name of configuration or data> if not given")
    resume: bool = setting(False, "resume from the last checkpoint in output_dir, if there is one")

    # model
    model: str = setting("", 'ICLIP model to train further (folder, Hub id or "embedded"), instead of two towers')
    vision: str = setting("", 'image tower: a folder, a Hub id, or "embedded" for that of the embedded model')
    text: str = setting("", 'text tower: a folder, a Hub id, or "embedded" for that of the embedded model')
    model_options: list[str] = setting([], "options that override those of config.json, as name=value")
    lock_text: bool = setting(False, "freeze the text tower")
    image_size: int = setting(
        0,
        "height and width of images in pixels; 0 for those of processor_config.json; a model has its own size",
        0,
    )

    # data
    data: list[str] = setting(
        [],
        "training pairs: a .csv or .tsv table with the columns `image` and `caption`, a folder of images with metadata.jsonl or "
        "metadata.csv, or with a subfolder for each class, tar shards, Parquet, a saved dataset, or a Hub dataset",
    )
    image_column: str = setting("", "column of the images, if it has no usual name")
    caption_column: str = setting("", "column of the captions, if it has no usual name")
    validation_data: list[str] = setting([], "validation pairs, local")
    validation_share: float = setting(0.0, "share of the pairs to validate on instead, which are not trained on", 0, 1)
    split: str = setting("train", "split of a Hub dataset")
    pairs_per_epoch: int = setting(
        0, "pairs in an epoch of a single Hub dataset, which then is streamed; without effect on local pairs", 0
    )
    max_bad_share: float = setting(0.05, "largest share of broken pairs; the run stops above it", 0, 1)
    crop_scale: float = setting(0.08, "smallest area of a random crop, as a share of the image", 0, 1)
    auto_augment: str = setting("rand-m9-mstd0.5-inc1", "name of an augmentation policy of timm; empty for none")
    random_erasing: float = setting(0.25, "probability of erasing a rectangle", 0, 1)
    nouns: str = setting(
        "",
        "text file with a noun in each line, 'sky (background)' for one of the background; nouns in captions become prompts",
    )
    num_workers: int = setting(4, "number of loading processes for each training process", 0)
    cache_features: str = setting("", "folder for features of locked towers, which are computed once")

    # optimisation
    epochs: int = setting(30, "number of passes over the pairs", 1)
    max_steps: int = setting(0, "number of steps of the run and its schedule; 0 for all epochs", 0)
    batch_size: int = setting(1024, "number of pairs in a batch, over all processes", 1)
    chunk_size: int = setting(256, "number of pairs in one forward pass of a tower, which limits the memory", 1)
    learning_rate: float = setting(1.25e-4, "peak of the learning rate, for any batch_size", POSITIVE, 1e30)
    warmup_learning_rate: float = setting(1e-6, "first learning rate of the warm-up", 0)
    min_learning_rate: float = setting(1e-5, "last learning rate", 0)
    warmup_epochs: float = setting(2.0, "number of epochs of linear warm-up, before the cosine decay", 0)
    weight_decay: float = setting(0.05, "weight decay of matrices; biases, norms and logit scales have none", 0)
    clip_grad_norm: float = setting(5.0, "largest norm of the gradient", POSITIVE)
    mixed_precision: str = setting(
        "auto",
        "auto: the choice of `accelerate launch`; without one, bf16 or fp16 on a GPU and no on a CPU",
        choices=("auto", "no", "fp16", "bf16"),
    )
    seed: int = setting(0, "random seed")

    # monitoring
    report_to: str = setting("tensorboard", "tracker of Accelerate, or none", choices=("none", *TRACKERS))
    log_steps: int = setting(10, "number of steps between logs", 1)
    eval_steps: int = setting(1000, "number of steps between evaluations; the last step is always evaluated", 1)
    eval_dataset: str = setting("none", "segmentation data set to evaluate maps on", choices=("none", *DATASETS))
    eval_root: str = setting("", "folder of eval_dataset")
    eval_split: str = setting("", "split of eval_dataset; the validation split if not given")
    best_metric: str = setting(
        "auto",
        "metric that selects the best model; auto: text_to_image, or mMIoU without validation_data",
        choices=("auto", *RETRIEVAL_METRICS, *MAP_METRICS),
    )
    pictures: int = setting(4, "number of validation images whose maps are drawn at each evaluation", 0)
    checkpoint_steps: int = setting(1000, "number of steps between checkpoints", 1)

    def __post_init__(self):
        self.output_dir = self.output_dir or f"{RUNS}/{self.name}"
        for entry in fields(self):
            value, (low, high) = getattr(self, entry.name), entry.metadata["range"]
            if isinstance(value, (int, float)) and not (low <= value <= high and math.isfinite(value)):
                raise ValueError(f"{entry.name}: {value} is not a number from {low} to {high}.")
        parse_options(self.model_options)
        if self.validation_data and self.validation_share:
            raise ValueError("validation_data, validation_share: give one of them.")
        validated, maps = bool(self.validation_data or self.validation_share), self.eval_dataset != "none"
        if self.best_metric == "auto":
            self.best_metric = "mMIoU" if maps and not validated else "text_to_image"
        elif not (validated if self.best_metric in RETRIEVAL_METRICS else maps):
            raise ValueError(f"best_metric: {self.best_metric} needs validation_data, or eval_dataset for maps.")
        if not self.data:
            raise ValueError("data: name training pairs, such as a folder of webdataset shards.")
        if bool(self.model) == bool(self.vision and self.text):
            raise ValueError(
                f"model={self.model!r}, vision={self.vision!r}, text={self.text!r}: set either model, or vision and text."
            )
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


def parse_options(model_options: Sequence[str]) -> dict[str, object]:
    """Returns `model_options` by name."""
    parsed = {}
    for option in model_options:
        try:
            name, value = option.split("=", 1)
            parsed[name] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError):
            raise ValueError(f"model_options: {option!r} is not name=value.") from None
    return parsed


# --------------------------------------------------------------------------------------------------------- sources


def add_settings(parser: argparse.ArgumentParser) -> None:
    """
    Adds every setting as an option, with underscores or dashes, and `data` also as positional arguments. Settings that are not given
    are absent from the result.
    """
    for entry in fields(Settings):
        kind, is_list, choices = (entry.metadata[key] for key in ("kind", "is_list", "choices"))
        options = {"nargs": "?", "const": True} if kind is bool else {}
        if is_list:
            options = {"nargs": "+", "action": "extend"}
        default = "" if entry.default in ("", False) or is_list else f" (default: {entry.default})"
        parser.add_argument(
            *dict.fromkeys([f"--{entry.name}", f"--{entry.name.replace('_', '-')}"]),
            type=partial(_parse, entry.name),
            default=argparse.SUPPRESS,
            metavar="|".join(choices) or entry.name.upper(),
            help=f"{entry.metadata['help']}{default}",
            **options,
        )
    parser.add_argument(
        "data", nargs="*", action="extend", default=argparse.SUPPRESS, metavar="DATA", help="the same as --data"
    )


def read_settings(given: Mapping) -> Settings:
    """
    Merges the settings of a run. `given`, such as the result of the parser of [`add_settings`], has precedence over the `train.yaml` that
    `config` names, and this over the defaults. Raises `ValueError` for an invalid setting.
    """
    file = _config_file(given.get("config") or "iclip-vit-b16")
    named = read_file(file)
    if given.get("model"):  # instead of the towers that the file names, and their size
        named = {name: value for name, value in named.items() if name not in ("vision", "text", "image_size")}
    if given.get("vision") or given.get("text"):
        named.pop("model", None)
    if given.get("validation_share"):
        named.pop("validation_data", None)
    elif given.get("validation_data"):
        named.pop("validation_share", None)
    return Settings(**{**named, **given, "config": str(file)})


def parse_settings(arguments: Sequence[str]) -> Settings:
    """Parses the settings of a run from command-line arguments that name a configuration."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_settings(parser)
    return read_settings(vars(parser.parse_args(arguments)))


def _config_file(config: str) -> Path:
    """Returns the `train.yaml` that `config` names: a file, the one in a folder, or the one of a shipped configuration."""
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
    settings = {}
    for name, value in content.items():
        if name not in Settings.__dataclass_fields__ or name == "config":
            raise ValueError(f"{file}: {name!r:.100} is no setting.")
        if value is None:
            continue
        is_list = Settings.__dataclass_fields__[name].metadata["is_list"]
        values = value if is_list and isinstance(value, list) else [value]
        try:
            parsed = [_parse(name, item) for item in values]
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{file}: {error}") from error
        settings[name] = parsed if is_list else parsed[0]
    if (nouns := file.parent / settings.get("nouns", "")).is_file():
        settings["nouns"] = str(nouns)
    return settings


def _parse(name: str, value):
    """Converts text, or a value of YAML, to the type of a setting. Raises `argparse.ArgumentTypeError` for another."""
    kind, choices = (Settings.__dataclass_fields__[name].metadata[key] for key in ("kind", "choices"))
    if isinstance(value, (list, dict)):
        raise argparse.ArgumentTypeError(f"{name}: this is a {type(value).__name__} instead of one value.")
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: f"one of {', '.join(choices)}"}
    try:
        parsed = {"true": True, "false": False}[str(value).lower()] if kind is bool else kind(str(value))
        if choices and parsed not in choices:
            raise ValueError
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{name}: {str(value)!r:.100} is not {expected[kind]}") from None
    return parsed


def changed_settings(settings: Settings, before: Mapping) -> list[str]:
    """Returns the names of settings that must not change on resume, but differ from `before`."""
    changed = []
    for entry in fields(settings):
        # of a setting that the run began without
        usual = entry.default_factory() if entry.default is MISSING else entry.default
        now, then = getattr(settings, entry.name), before.get(entry.name, usual)
        differs = bool(now) != bool(then) if entry.name in PLACES else now != then
        if differs and entry.name not in FREE:
            changed.append(entry.name)
    return changed
