"""
Trains ICLIP: `accelerate launch train.py --config hub_configs/<name>/train.yaml`, or `python train.py` on one device.

A `train.yaml` holds settings, the `config.json` beside it the model's options; any setting can be given on the command line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, set_seed
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from iclip_hf import ICLIPConfig, ICLIPModel, ICLIPProcessor
from iclip_hf.data.pairs import PairStream, load_pairs
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.demo.towers import embedded_towers
from iclip_hf.evaluation import evaluate
from iclip_hf.feature_cache import CachedPairs, branch_poolings, cache_images, cache_texts, distinct
from iclip_hf.training import (
    AugmentedImage,
    BatchLoader,
    PairModel,
    TrainingPairs,
    TrainingStream,
    WholeImage,
    checkpoints,
    cosine_schedule,
    derive_seed,
    draw_examples,
    export,
    keep_learning_weights_only,
    load_checkpoint,
    parameter_groups,
    save_checkpoint,
    validate,
)


# ----------------------------------------------------------------------------------------------------------- settings


def setting(default, help: str):
    options = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**options, metadata={"help": help})


@dataclass
class Settings:
    """The paper's recipe by default; where it leaves things open, GroupViT's and DeiT's, which it follows."""

    config: str = setting("hub_configs/iclip-vit-b16/train.yaml", "settings; the model's config.json lies beside")
    output_dir: str = setting("", "folder of the run, runs/<name of the config's folder> by default")
    resume: bool = setting(False, "go on from the last checkpoint in output_dir, if there is one")

    # model
    model: str = setting("", "ICLIP model to train further (folder or Hub id), instead of two towers")
    vision: str = setting("", 'image tower (folder or Hub id), or "embedded" for the one of the demo')
    text: str = setting("", 'text tower, likewise')
    model_options: list[str] = setting([], "options of the model over those of config.json, as name=value")
    lock_text: bool = setting(False, "train the projections only")
    image_size: int = setting(224, "height and width in pixels")

    # data
    data: list[str] = setting([], "training pairs: tar shards, image folders, .csv or .tsv tables, or one Hub dataset")
    validation_data: list[str] = setting([], "pairs to validate on, local")
    split: str = setting("train", "split of a Hub dataset")
    pairs_per_epoch: int = setting(0, "of a Hub dataset, which is streamed and does not tell its length")
    max_bad_share: float = setting(0.05, "the run stops if more of the pairs are broken")
    crop_scale: float = setting(0.08, "smallest area of a random crop, as a share of the image")
    auto_augment: str = setting("rand-m9-mstd0.5-inc1", "timm's name of an augmentation policy, or empty")
    random_erasing: float = setting(0.25, "probability of erasing a rectangle")
    num_workers: int = setting(4, "processes that load pairs, for each training process")
    cache_features: str = setting("", "folder for features of locked towers, computed once and trained from")
    views: int = setting(1, "views of an image in that cache: the whole image, then augmented ones")

    # optimisation
    epochs: int = setting(30, "passes over the pairs")
    max_steps: int = setting(0, "stop after so many steps, the schedule with them")
    batch_size: int = setting(1024, "pairs in a batch of all processes together")
    chunk_size: int = setting(256, "pairs that a tower sees at once in a process; the memory it needs, not the result")
    learning_rate: float = setting(1.25e-4, "at the peak, for a batch of 1024; all three rates follow the batch size")
    warmup_learning_rate: float = setting(1e-6, "at the start")
    min_learning_rate: float = setting(1e-5, "at the end")
    warmup_epochs: float = setting(2.0, "linear warm-up, then half a cosine")
    weight_decay: float = setting(0.05, "of matrices; not of biases, norms and logit scales")
    adam_betas: list[float] = setting([0.9, 0.999], "AdamW's two betas")
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon")
    clip_grad_norm: float = setting(5.0, "largest norm of the gradient")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = setting(
        "auto", "what Accelerate was told, else bf16 or fp16 as the GPU prefers, none on a CPU"
    )
    max_bad_steps: int = setting(30, "stop after so many steps in a row without a finite loss and gradient")
    seed: int = setting(0, "of everything random")

    # watching
    report_to: str = setting("tensorboard", "Accelerate's name of a tracker, or none")
    log_steps: int = setting(10, "steps between two logs")
    eval_steps: int = setting(1000, "steps between two evaluations; there is one at the end in any case")
    eval_dataset: Literal["none", "voc2012", "coco2017", "folder"] = setting("none", "segmentation to evaluate maps on")
    eval_root: str = setting("", "its folder")
    eval_split: str = setting("", "its split, if not the official one")
    best_metric: Literal["text_to_image", "image_to_text", "mAP", "mMIoU", "mFMB"] = setting(
        "text_to_image", "what the kept best model is best in"
    )
    pictures: int = setting(4, "validation images to draw the maps of at each evaluation")
    checkpoint_steps: int = setting(1000, "steps between two checkpoints")
    keep_checkpoints: int = setting(2, "how many to keep")

    def __post_init__(self):
        self.output_dir = self.output_dir or f"runs/{Path(self.config).parent.name}"
        at_least_one = "image_size views epochs batch_size chunk_size max_bad_steps log_steps eval_steps checkpoint_steps"
        limits = dict.fromkeys([*at_least_one.split(), "keep_checkpoints"], 1)
        limits |= dict.fromkeys("num_workers max_steps pairs_per_epoch pictures warmup_epochs weight_decay".split(), 0)
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_grad_norm", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("crop_scale", "random_erasing", "max_bad_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if len(self.adam_betas) != 2:
            raise ValueError(f"adam_betas must be two numbers, got {self.adam_betas}")
        if not self.data:
            raise ValueError("data must name training pairs, such as a folder of webdataset shards")
        if bool(self.model) == bool(self.vision and self.text):
            raise ValueError("either model must be given, or vision and text")


def read_settings(arguments: list[str]) -> Settings:
    """Defaults, then `train.yaml`, then the command line; one line on stderr and exit code 2 if one of them is wrong."""
    parser = HfArgumentParser(Settings, prog="train.py", description=__doc__, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"train.py: {message}\n")
    config, _ = parser.parse_known_args([a for a in arguments if a not in ("-h", "--help")])
    try:
        from_file = yaml.safe_load(Path(config.config).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"{config.config}: cannot be read as YAML settings: {' '.join(str(error).split())}")
    if not isinstance(from_file, dict):
        parser.error(f"{config.config}: expected settings as `name: value`, got {type(from_file).__name__}")
    # A file says what a command line would, so it goes the same way, ahead of the real one.
    command = []
    for name, value in from_file.items():
        if name not in Settings.__dataclass_fields__ or name == "config":
            parser.error(f"{config.config}: there is no setting {name!r}")
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    try:
        return parser.parse_args_into_dataclasses([*command, *arguments], look_for_args_file=False)[0]
    except ValueError as error:
        parser.error(str(error))


# -------------------------------------------------------------------------------------------------------------- model


def load_model(settings: Settings) -> tuple[ICLIPModel, ICLIPProcessor]:
    """The model to train and its processor: of a trained model, or of two towers."""
    options = {name: yaml.safe_load(value) for name, _, value in (o.partition("=") for o in settings.model_options)}
    if settings.model:
        return ICLIPModel.from_pretrained(settings.model, **options), ICLIPProcessor.from_pretrained(settings.model)
    towers = {"vision": settings.vision, "text": settings.text}
    if "embedded" in towers.values():
        embedded = dict(zip(towers, map(str, embedded_towers())))
        towers = {side: embedded[side] if tower == "embedded" else tower for side, tower in towers.items()}
    ...


if __name__ == "__main__":
    main(sys.argv[1:])
