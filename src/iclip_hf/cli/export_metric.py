"""`iclip export-metric`: a metric module of `evaluate` as a Space."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_shared
from .output import echo_space


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("metric", choices=("mfmb", "mmiou", "text_contrast"), help="name of the metric")
    command.add_argument("directory", type=Path, metavar="DIR", help="folder to write into")
    add_shared(command, "--overwrite")


def run(options: argparse.Namespace) -> None:
    from ..hub.metric_modules import export_space

    echo_space(export_space(options.metric, options.directory, options.overwrite))
