"""`iclip export`: a model folder with its code for Transformers, or an ONNX folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from .common import add_command, check_model, checked, echo, silence_transformers


def register(commands) -> None:
    command = add_command(
        commands, "export", run, "write a model folder with code and model card for the Hub, or an ONNX folder"
    )
    add_source_options(command)
    command.add_argument("directory", type=Path, metavar="DIR", help="new folder to write")
    command.add_argument(
        "--format",
        choices=("transformers", "onnx", "onnx-bfloat16", "onnx-int8"),
        default="transformers",
        help="onnx: two graphs for ONNX Runtime, with float32 weights unless the format names another type (default: "
        "transformers)",
    )


def add_source_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", type=checked(check_model), metavar="MODEL", help="folder or Hub id of an ICLIP model"
    )
    command.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="JSON file of `iclip evaluate --output`; its scores are written into the model card",
    )


def run(options: argparse.Namespace) -> int:
    if options.format == "transformers":
        echo(export(options, options.directory))
        return 0
    if options.results is not None:
        raise ValueError(
            "Expected no --results, because an ONNX folder has no model card, got {options.results}: leave it out."
        )
    from ..models.loading import load_iclip
    from ..models.onnx import export_onnx

    silence_transformers()
    _, _, weights = options.format.partition("-")
    echo(export_onnx(*load_iclip(options.model, dtype="float32"), options.directory, weights or "float32"))
    return 0


def export(options: argparse.Namespace, directory: Path, name: str | None = None) -> Path:
    """Exports the model that the options name, with results on its card."""
    metrics = None
    if options.results is not None:
        try:
            metrics = json.loads(options.results.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            metrics = None
        if not (isinstance(metrics, dict) and {"protocol", "results"} <= metrics.keys()):
            raise ValueError(
                f"--results {options.results}: expected the JSON that `iclip evaluate --output` writes, but got other "
                "content; evaluate again."
            )
    from ..hub.folders import export_model
    from ..models.loading import load_iclip

    silence_transformers()
    model, processor = load_iclip(options.model)
    if metrics is not None and isinstance(metrics.get("protocol"), Mapping):
        check_measured(metrics["protocol"], model, options.results)
    return export_model(model, processor, directory, name=name, source=options.model, metrics=metrics)


def check_measured(protocol: Mapping, model, file: Path) -> None:
    """
    Checks that results were measured with the weights of a model.

    Raises:
        `ValueError`: the results are of other weights, or do not name the weights.
    """
    import torch

    from ..utils.digests import weights_digest

    dtype = getattr(torch, str(protocol.get("dtype")), None)  # the dtype in which the weights were measured
    own = weights_digest(model, dtype if isinstance(dtype, torch.dtype) else None)
    if (measured := protocol.get("weights")) != own:
        raise ValueError(
            f"--results {file}: expected figures of weights {own}, got those of {measured or 'weights that it does not name'}; "
            "measure this model by `iclip evaluate --output`."
        )
