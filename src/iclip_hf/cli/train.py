"""`iclip train`: trains a model on image-text pairs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..training.settings import Settings, add_settings, read_settings
from ..utils.hub_ids import is_hub_id
from .output import print_lines


if TYPE_CHECKING:
    from ..training.inputs import Inputs


def add_options(command: argparse.ArgumentParser) -> None:
    command.allow_abbrev = False
    add_settings(command)


def run(options: argparse.Namespace) -> None:
    overrides = {name: value for name, value in vars(options).items() if name not in ("command", "run")}
    if overrides.get("model") and not (overrides.get("data") or overrides.get("config")):
        raise ValueError(
            f"data: name pairs to train {overrides['model']} on, as in `iclip train pairs.csv`, or a config."
        )
    settings, inputs = _prepare(overrides)  # before torch is loaded and processes wait for each other

    from huggingface_hub.errors import StrictDataclassError

    from ..training.train import train

    try:
        train(settings, inputs)
    except (FloatingPointError, StrictDataclassError) as error:
        raise ValueError(str(error)) from error


def _prepare(overrides: Mapping) -> tuple[Settings, Inputs]:
    """
    Returns the settings of a run, chosen by the number of its pairs unless a config is named, and its open inputs.
    """
    from ..training.inputs import check_run, open_inputs, open_pairs
    from ..training.preset import choose_settings

    opened, preset = None, {}
    if overrides.get("config") or not overrides.get("data"):
        settings = read_settings(overrides)
    else:
        if overrides.get("pairs_per_epoch") and any(map(is_hub_id, overrides["data"])):
            raise ValueError(
                "config: name one for a stream, whose pairs are not counted, or leave pairs_per_epoch out."
            )
        pairs = open_pairs(overrides["data"], overrides, streaming=False)
        preset, opened = choose_settings(overrides, pairs)
        settings = Settings(**{**preset, **overrides})
    _check_effects(overrides, settings)
    check_run(settings)
    inputs = open_inputs(settings, opened)
    if preset and os.environ.get("RANK", "0") == "0":
        print_lines("Chosen by the number of pairs; what you give takes precedence, and --config takes a recipe:")
        print_lines(*(f"  {name:<20}  {value}" for name, value in preset.items()))
    return settings, inputs


def _check_effects(given: Mapping, settings: Settings) -> None:
    """Raises `ValueError` for a given setting that has no effect by the others."""
    sources = (*settings.data, *settings.validation_data)
    asked = {name for name, value in given.items() if value and (name, value) != ("crop_scale", 1)}  # whole images
    for names, has_effect, where in (
        ("eval_root eval_split", settings.eval_dataset != "none", "without eval_dataset"),
        ("pictures", settings.validation_data or settings.validation_share, "without validation pairs"),
        (
            "crop_scale auto_augment random_erasing",
            not settings.cache_features,
            "on cached features of whole images, which --cache_features '' turns off",
        ),
        ("pairs_per_epoch", any(map(is_hub_id, settings.data)), "on local pairs"),
        (
            "split",
            any(is_hub_id(name) or Path(name, "dataset_dict.json").is_file() for name in sources),
            "without a dataset that has splits: one of the Hub, or a saved one",
        ),
        ("epochs", not settings.max_steps, "with max_steps"),
    ):
        if not has_effect and (name := next(filter(asked.__contains__, names.split()), None)):
            raise ValueError(f"{name}: it has no effect {where}; leave it out.")
