"""`iclip export`: a model to a folder that needs nothing but Transformers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .common import add_command, silence_transformers


def register(commands) -> None:
    command = add_command(commands, "export", run, "write a model with its code and card, ready for the Hub")
    add_source_options(command)
    command.add_argument("directory", type=Path, metavar="DIR", help="new folder to write")


def add_source_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="ICLIP model, a folder or Hub id")
    command.add_argument(
        "--results", type=Path, help="JSON file of `iclip evaluate`, whose figures the model card shows"
    )


def run(options: argparse.Namespace) -> int:
    print(export(options, options.directory))
    return 0


def export(options: argparse.Namespace, directory: Path, name: str | None = None) -> Path:
    """Writes what the options name."""
    from ..hub import export_model, load_iclip

    silence_transformers()
    metrics = None
    if options.results is not None:
        try:
            metrics = json.loads(options.results.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--results {options.results}: expected JSON of `iclip evaluate`: {error}") from error
    model, processor = load_iclip(options.model)
    return export_model(model, processor, directory, name=name, source=options.model, metrics=metrics)
