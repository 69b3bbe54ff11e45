"""`iclip install-metrics`: the metric modules for `evaluate.load`."""

from __future__ import annotations

import argparse

from .common import echo


def add_options(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..hub.metrics import install_metrics

    names = list(install_metrics())
    echo(f"installed: {', '.join(names)}. Next, in Python:\n  import evaluate; evaluate.load({names[0]!r})")
    return 0
