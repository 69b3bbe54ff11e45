"""`iclip train`: trains a model on image-text pairs."""

from __future__ import annotations

import argparse
import os
from contextlib import AbstractContextManager, nullcontext

from ..training.settings import Settings, add_settings, read_settings
from .output import echo


def add_options(command: argparse.ArgumentParser) -> None:
    command.allow_abbrev = False
    add_settings(command)


def run(options: argparse.Namespace) -> None:
    from ..training.checks import check_run
    from ..training.plan import choose_settings

    given = {name: value for name, value in vars(options).items() if name not in ("command", "run")}
    if given.get("model") and not (given.get("data") or given.get("config")):
        raise ValueError(f"data: name pairs to train {given['model']} on, as in `iclip train pairs.csv`, or a config.")
    chosen = {}
    if given.get("data") and not given.get("config"):
        with _main_process_first():  # it reads the images, and caches their digests for the others
            chosen = choose_settings(given)
    choices = {name: value for name, (value, _) in chosen.items()}
    settings = Settings(**{**choices, **given}) if chosen else read_settings(given)
    check_run(settings)  # all of this before torch is loaded
    if chosen and os.environ.get("RANK", "0") == "0":
        echo("Chosen for these pairs; what you give takes precedence, and --config takes a recipe:")
        width = max(map(len, chosen))
        echo(*(f"  {name:<{width}}  {value}  ({why})" for name, (value, why) in chosen.items()))

    from huggingface_hub.errors import StrictDataclassError

    from ..training.run import train

    try:
        train(settings)
    except (FloatingPointError, StrictDataclassError) as error:
        raise ValueError(str(error)) from error


def _main_process_first() -> AbstractContextManager:
    if os.environ.get("WORLD_SIZE", "1") == "1":  # without torch
        return nullcontext()
    from ..utils.distributed import this_process

    return this_process("train").main_process_first()
