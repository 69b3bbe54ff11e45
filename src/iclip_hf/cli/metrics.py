"""`iclip install-metrics` and `iclip export-metric`: the metric modules of `evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import add_command, echo


def register(commands) -> None:
    add_command(commands, "install-metrics", _install, 'make evaluate.load("mmiou") and "mfmb" work in any folder')
    space = add_command(commands, "export-metric", _export, "write the files of a metric's Space")
    space.add_argument("metric", choices=("mfmb", "mmiou"), help="which metric")
    space.add_argument("directory", type=Path, metavar="DIR", help="folder to write into")


def _install(options: argparse.Namespace) -> int:
    from ..evaluation.evaluate_modules import install_metrics

    echo(f"installed: {', '.join(install_metrics())}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from ..evaluation.evaluate_modules import export_space

    echo(export_space(options.metric, options.directory))
    return 0
