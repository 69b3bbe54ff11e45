"""`iclip export`: a model to a folder that needs nothing but Transformers, or nothing but ONNX Runtime."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .common import add_command, echo, silence_transformers


def register(commands) -> None:
    command = add_command(
        commands, "export", run, "write a model with its code and card, ready for the Hub, or as ONNX"
    )
    add_source_options(command)
    command.add_argument("directory", type=Path, metavar="DIR", help="new folder to write")
    command.add_argument(
        "--format",
        choices=("transformers", "onnx", "onnx-bfloat16", "onnx-int8"),
        default="transformers",
        help="onnx: two graphs for ONNX Runtime, with float32 weights if not said otherwise (default: transformers)",
    )


def add_source_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="ICLIP model, a folder or Hub id")
    command.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="JSON file of `iclip evaluate`, whose figures the model card shows",
    )


def run(options: argparse.Namespace) -> int:
    if options.format == "transformers":
        echo(export(options, options.directory))
        return 0
    from ..models.loading import load_iclip
    from ..models.onnx import export_onnx

    if options.results is not None:
        raise ValueError("--results fills a model card, which an ONNX folder does not have: leave it out.")
    silence_transformers()
    _, _, weights = options.format.partition("-")
    echo(export_onnx(*load_iclip(options.model, dtype="float32"), options.directory, weights or "float32"))
    return 0


def export(options: argparse.Namespace, directory: Path, name: str | None = None) -> Path:
    """Writes what the options name."""
    from ..hub.folders import export_model
    from ..models.loading import load_iclip

    silence_transformers()
    metrics = None
    if options.results is not None:
        try:
            metrics = dict(json.loads(options.results.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"--results {options.results}: expected JSON of `iclip evaluate`: {error}") from error
    model, processor = load_iclip(options.model)
    return export_model(model, processor, directory, name=name, source=options.model, metrics=metrics)
