"""What the commands share: options, the model they name, and checks of what they would write."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


# Names, not imports: help must not wait for torch.
METHODS = ("itsm", "reversed_itsm", "attention", "grad_cam", "bi_modal", "clip_surgery", "gem")
DATASETS = ("voc2012", "coco2017", "folder")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


def add_command(commands, name: str, run: Callable, description: str) -> argparse.ArgumentParser:
    """A command whose parsed options are given to `run`."""
    command = commands.add_parser(name, help=description, description=description[0].upper() + description[1:] + ".")
    command.set_defaults(run=run)
    return command


def add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", metavar="FOLDER_OR_ID", help="ICLIP or CLIP-like model (default: the embedded checkpoint)"
    )
    command.add_argument(
        "--template",
        action="append",
        dest="templates",
        help='prompt with one {}, repeat to average several; "{}" takes texts as they are',
    )
    command.add_argument("--image-size", type=int, help="side in pixels at which the model sees the image")


def add_dataset_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dataset", required=True, choices=DATASETS)
    command.add_argument("--data-root", required=True, type=Path, help="folder of the data set")
    command.add_argument("--split", help="default: val for VOC, val2017 for COCO")
    command.add_argument("--overrides", type=Path, help="JSON or YAML file with other class names and templates")
    command.add_argument("--limit", type=int, help="take only the first images")


def load_model(name: str | None):
    """Model and processor of a folder or Hub id, on the best device; the embedded checkpoint without a name."""
    import torch
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if name is None:
        from ..demo.checkpoint import embedded_model

        name = str(embedded_model())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModel.from_pretrained(name).to(device).eval(), AutoProcessor.from_pretrained(name)


def check_file(option: str, path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuses a file that could not be written, before the model is loaded."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} {path}: expected a file name that ends in {' or '.join(suffixes)}.")
    if path.is_dir():
        raise ValueError(f"{option} {path}: expected a file name, got a folder.")


def check_folder(option: str, path: Path) -> None:
    """Refuses a folder that could not be written into, before the model is loaded."""
    if path.suffix or (path.exists() and not path.is_dir()):
        raise ValueError(f"{option} {path}: expected a folder, got a file name.")


def save_figure(figure, path: Path) -> None:
    """Writes a figure in the form that the file name asks for; it appears whole or not at all."""
    from ..cache import written_whole

    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=120)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
