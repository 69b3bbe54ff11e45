"""`iclip train`: trains a model on image-text pairs."""

from __future__ import annotations

import argparse

from ..training.settings import add_settings, read_settings
from .common import add_command, report_error


def register(commands) -> None:
    command = add_command(commands, "train", run, "train a model on image-text pairs")
    command.allow_abbrev = False
    add_settings(command)


def run(options: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(options).items() if name not in ("command", "run")}
    settings = read_settings(given)

    from huggingface_hub.errors import StrictDataclassError

    from ..training.run import train

    try:
        train(settings)
    except (FloatingPointError, StrictDataclassError) as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt as interruption:
        from accelerate import PartialState

        report_error("train", interruption, printed=PartialState().is_main_process)
        return 130
    return 0
