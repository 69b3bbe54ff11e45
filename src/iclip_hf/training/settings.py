"""The settings of `train.py`, from defaults, a `train.yaml` and the command line."""

# ruff: noqa: RUF009 (`setting` makes a field)

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser

from ..configuration_iclip import ICLIPConfig


# Results of `iclip_hf.evaluation.evaluate.evaluate` that a run logs and can select its best model by.
MAP_METRICS = ("mAP", "mMIoU", "mFMB", "text_contrast")
RETRIEVAL_METRICS = ("text_to_image", "image_to_text")
_BEST_METRICS = ("auto", *RETRIEVAL_METRICS, *MAP_METRICS)


def setting(default, help: str, same: Callable | None = lambda value: value):
    """
    A field of [`Settings`].

    Args:
        default: default value.
        help: description for the command line.
        same: function of the value. Its result must be the same when a run resumes. None if the setting changes no result.
    """
    make = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**make, metadata={"help": help, "same": same})


@dataclass
class Settings:
    """Settings of a run. The defaults are the recipe of the paper, and of GroupViT and DeiT, to which the paper refers."""

    config: str = setting(
        "hub_configs/iclip-vit-b16/train.yaml",
        "YAML file of settings, in the folder of the model's configuration",
        same=None,
    )
    output_dir: str = setting("", "output folder; runs/<name of the config's folder> if not given", same=None)
    resume: bool = setting(False, "resume from the last checkpoint in output_dir, if there is one", same=None)

    # model
    model: str = setting("", "ICLIP model to continue to train (folder or Hub id), instead of vision and text")
    vision: str = setting(
        "", 'image tower: a folder, a Hub id, a .pth file of DINO, or "embedded" for that of the embedded model'
    )
    text: str = setting("", 'text tower: a folder, a Hub id, or "embedded" for that of the embedded model')
    model_options: list[str] = setting([], "options that override those of config.json, as name=value")
    lock_text: bool = setting(False, "freeze the text tower")
    image_size: int = setting(224, "height and width of images in pixels")

    # data
    data: list[str] = setting([], "training pairs: tar shards, image folders, .csv or .tsv tables, or one Hub dataset")
    validation_data: list[str] = setting([], "validation pairs, local")
    split: str = setting("train", "split of a Hub dataset")
    pairs_per_epoch: int = setting(0, "number of pairs in an epoch of a Hub dataset, because a stream has no length")
    max_bad_share: float = setting(0.05, "largest share of broken pairs; the run stops above it")
    crop_scale: float = setting(0.08, "smallest area of a random crop, as a share of the image")
    auto_augment: str = setting("rand-m9-mstd0.5-inc1", "name of an augmentation policy of timm; empty for none")
    random_erasing: float = setting(0.25, "probability of erasing a rectangle")
    nouns: str = setting(
        "", "text file with one noun in each line; nouns that occur in captions become prompts, as in GroupViT"
    )
    noun_prompts: int = setting(3, "number of noun prompts for each pair; a noun counts once in a batch")
    noun_weight: float = setting(0.5, "share of noun prompts in the loss of noun_branches")
    noun_branches: list[str] = setting(
        ["recognition"], "branches that learn noun prompts: recognition, interpretability"
    )
    map_tokens: int = setting(16, "number of patches that represent an image with max_over=similarity")
    num_workers: int = setting(4, "number of loading processes for each training process", same=None)
    cache_features: str = setting("", "folder for features of frozen towers, which are computed once", same=bool)
    views: int = setting(1, "number of views of each image in cache_features: the whole image and augmented ones")

    # optimisation
    epochs: int = setting(30, "number of passes over the pairs")
    max_steps: int = setting(0, "number of steps of the run and its schedule; 0 for all epochs")
    batch_size: int = setting(1024, "number of pairs in a batch, over all processes")
    chunk_size: int = setting(
        256,
        "number of pairs in one forward pass of a tower; limits the memory, and changes results only if a trained tower has dropout",
        same=None,
    )
    learning_rate: float = setting(
        1.25e-4, "peak learning rate for a batch of 1024; all three rates are scaled with the batch size"
    )
    warmup_learning_rate: float = setting(1e-6, "first learning rate of the warm-up")
    min_learning_rate: float = setting(1e-5, "last learning rate")
    warmup_epochs: float = setting(2.0, "number of epochs of linear warm-up, before the cosine decay")
    weight_decay: float = setting(0.05, "weight decay of matrices; biases, norms and logit scales have none")
    adam_beta1: float = setting(0.9, "beta1 of AdamW")
    adam_beta2: float = setting(0.999, "beta2 of AdamW")
    adam_epsilon: float = setting(1e-8, "epsilon of AdamW")
    clip_grad_norm: float = setting(5.0, "largest norm of the gradient")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = setting(
        "auto",
        "auto: the choice of `accelerate launch`; without one, bf16 or fp16 on a GPU and no on a CPU",
    )
    max_bad_steps: int = setting(
        30, "number of consecutive steps without a finite loss and gradient after which the run stops", same=None
    )
    seed: int = setting(0, "random seed")

    # monitoring
    report_to: str = setting("tensorboard", "name of a tracker of Accelerate, or none", same=None)
    log_steps: int = setting(10, "number of steps between logs", same=None)
    eval_steps: int = setting(
        1000, "number of steps between evaluations; the last step is always evaluated", same=None
    )
    eval_dataset: Literal["none", "voc2012", "coco2017", "folder"] = setting(
        "none", "segmentation data set for the evaluation of maps"
    )
    eval_root: str = setting("", "folder of eval_dataset")
    eval_split: str = setting("", "split of eval_dataset; the validation split if not given")
    best_metric: Literal[_BEST_METRICS] = setting(
        "auto", "metric that selects the best model; auto: text_to_image, or mMIoU without validation_data"
    )
    pictures: int = setting(4, "number of validation images whose maps are drawn at each evaluation", same=None)
    checkpoint_steps: int = setting(1000, "number of steps between checkpoints", same=None)
    keep_checkpoints: int = setting(2, "number of checkpoints to keep", same=None)

    def __post_init__(self):
        self.output_dir = self.output_dir or f"runs/{Path(self.config).resolve().parent.name}"
        limits = dict.fromkeys(("image_size", "views", "epochs", "batch_size", "chunk_size", "max_bad_steps"), 1)
        limits |= dict.fromkeys(("log_steps", "eval_steps", "checkpoint_steps", "keep_checkpoints", "noun_prompts"), 1)
        limits["map_tokens"] = 1
        limits |= dict.fromkeys(("num_workers", "max_steps", "pairs_per_epoch", "pictures"), 0)
        limits |= dict.fromkeys(("warmup_epochs", "weight_decay", "warmup_learning_rate", "min_learning_rate"), 0)
        for name, least in limits.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"expected {name} to be at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_grad_norm", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} to be positive, got {getattr(self, name)}")
        for name in ("crop_scale", "random_erasing", "max_bad_share", "adam_beta1", "adam_beta2", "noun_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} to be from 0 to 1, got {getattr(self, name)}")
        for one in self.model_options:
            name, equals, _ = one.partition("=")
            if not equals or name not in ICLIPConfig.__annotations__:
                raise ValueError(f"expected model_options to be name=value with an option of ICLIPConfig, got {one!r}")
        branches = ("recognition", "interpretability")
        if unknown := [name for name in self.noun_branches if name not in branches]:
            raise ValueError(f"expected noun_branches to be of {', '.join(branches)}, got {unknown[0]!r}")
        given = {"validation_data": bool(self.validation_data), "eval_dataset": self.eval_dataset != "none"}
        needed = "validation_data" if self.best_metric in RETRIEVAL_METRICS else "eval_dataset"
        if self.best_metric == "auto":
            maps_alone = given["eval_dataset"] and not given["validation_data"]
            self.best_metric = "mMIoU" if maps_alone else "text_to_image"
        elif not given[needed]:
            raise ValueError(f"expected {needed} for best_metric {self.best_metric}, got none")
        if not self.data:
            raise ValueError("expected data to name training pairs, such as a folder of webdataset shards, got none")
        if bool(self.model) == bool(self.vision and self.text):
            raise ValueError(
                f"expected either model, or vision and text, got model={self.model!r}, vision={self.vision!r} and "
                f"text={self.text!r}"
            )


class _Parser(HfArgumentParser):
    """Drops the metadata `same`, which argparse does not know."""

    def add_argument(self, *names, same=None, **options):
        return super().add_argument(*names, **options)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that are not empty."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in ("", []) else super()._get_help_string(action)


def read_settings(arguments: list[str], description: str | None = None) -> Settings:
    """Reads defaults, `train.yaml` and the command line. An invalid setting ends with one line on stderr and exit code 2."""
    options = {"description": description, "allow_abbrev": False, "formatter_class": HelpFormatter}
    parser = _Parser(Settings, prog="train.py", **options)
    parser.error = lambda message: parser.exit(2, f"train.py: {message} (see train.py --help)\n")
    config, _ = parser.parse_known_args([a for a in arguments if a not in ("-h", "--help")])
    try:
        from_file = yaml.safe_load(Path(config.config).read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        parser.error(f"{config.config}: expected settings in YAML, but got: {' '.join(str(error).split())}")
    if not isinstance(from_file, dict):
        parser.error(f"{config.config}: expected settings as `name: value`, but got {type(from_file).__name__}")
    # The file is converted to arguments, which precede those of the command line.
    command = []
    for name, value in from_file.items():
        if name not in Settings.__dataclass_fields__ or name == "config":
            parser.error(f"{config.config}: expected a setting, but got {name!r:.100}")
        if value is None:  # `name:` alone leaves the default
            continue
        values = value if isinstance(value, list) else [value]
        if any(isinstance(one, (list, dict)) for one in values):
            parser.error(
                f"{config.config}: expected {name} to be a value or a list of values, but got {type(value).__name__}"
            )
        # `--name=value`, because a value can begin with a minus.
        command += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *map(str, values)]
    try:
        settings, unknown = parser.parse_args_into_dataclasses(
            [*command, *arguments], look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"expected settings and their values, got {' '.join(unknown)}")
    return settings


def changed_settings(settings: Settings, before: Mapping, fixed: Collection[str] = ()) -> list[str]:
    """
    Returns the names of settings that must not change on resume, but differ.

    Args:
        settings: settings of this run.
        before: settings of the run to resume, by name.
        fixed: names of settings that must not change, besides those whose field says so.
    """
    changed = []
    for one in fields(settings):
        same = one.metadata["same"] or (repr if one.name in fixed else None)
        if same is not None and same(getattr(settings, one.name)) != same(before.get(one.name)):
            changed.append(one.name)
    return changed
