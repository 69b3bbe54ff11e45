"""`iclip train`: trains a model on image-text pairs."""

from __future__ import annotations

import argparse
import os
from contextlib import AbstractContextManager, nullcontext

from ..training.settings import Settings, add_settings, read_settings
from .output import print_lines


def add_options(command: argparse.ArgumentParser) -> None:
    command.allow_abbrev = False
    add_settings(command)


def run(options: argparse.Namespace) -> None:
    from ..training.preset import check_run, choose_settings

    given = {name: value for name, value in vars(options).items() if name not in ("command", "run")}
    if given.get("model") and not (given.get("data") or given.get("config")):
        raise ValueError(f"data: name pairs to train {given['model']} on, as in `iclip train pairs.csv`, or a config.")
    if given.get("data") and not given.get("config"):
        with _main_process_first():  # it reads the images, and caches their digests for the others
            chosen = choose_settings(given)
        settings = Settings(**{**chosen, **given})
    else:
        chosen, settings = {}, read_settings(given)
    check_run(settings)  # all of this before torch is loaded
    if chosen and os.environ.get("RANK", "0") == "0":
        print_lines("Chosen by the number of pairs; what you give takes precedence, and --config takes a recipe:")
        print_lines(*(f"  {name:<20}  {value}" for name, value in chosen.items()))

    from huggingface_hub.errors import StrictDataclassError

    from ..training.train import train

    try:
        train(settings)
    except (FloatingPointError, StrictDataclassError) as error:
        raise ValueError(str(error)) from error


def _main_process_first() -> AbstractContextManager:
    if os.environ.get("WORLD_SIZE", "1") == "1":  # without torch
        return nullcontext()
    from ..utils.distributed import partial_state

    return partial_state("train").main_process_first()
