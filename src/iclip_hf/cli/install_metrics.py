"""`iclip install-metrics`: the metric modules for `evaluate.load`."""

from __future__ import annotations

import argparse

from .output import print_lines


def add_options(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    from ..evaluation.evaluate_modules import install_metrics

    for name, folder in install_metrics().items():
        print_lines(f"{name} -> {folder}")
