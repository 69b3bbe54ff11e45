"""`iclip install-metrics` and `iclip export-metric`: the metric modules of `evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import add_command


def register(commands) -> None:
    add_command(
        commands,
        "install-metrics",
        _install,
        'make evaluate.load work for "mmiou", "mfmb" and "text_contrast" in any folder',
    )
    space = add_command(commands, "export-metric", _export, "write the files of a Space that computes a metric")
    space.add_argument("metric", choices=("mfmb", "mmiou", "text_contrast"), help="name of the metric")
    space.add_argument("directory", type=Path, metavar="DIR", help="folder to write into")


def _install(options: argparse.Namespace) -> int:
    from ..hub.metrics import install_metrics

    print(f"installed: {', '.join(install_metrics())}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from ..hub.metrics import export_space

    print(export_space(options.metric, options.directory))
    return 0
