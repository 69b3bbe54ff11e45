"""`iclip explain`: pictures, scores, boxes, points and masks of images."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import SHARED, add_shared
from .output import resolution, save_picture
from .pictures import add_image_options, explain_files


def add_options(command: argparse.ArgumentParser) -> None:
    add_image_options(
        command,
        output="picture to write, or the folder for pictures (default: photo-explanation.png for photo.jpg, with a "
        "number if it exists; of several images in the folder explanations)",
        help=f"{SHARED['--text']['help']} (default: the nouns that match each image best)",
    )
    add_shared(command, "--colormap")
    command.add_argument(
        "--npz", action="store_true", help="also write scores, raw maps and masks to an .npz file beside each picture"
    )


def run(options: argparse.Namespace) -> int:
    def write(name: str, explanation, picture: Path | None) -> dict:
        from ..plots.sheets import draw

        files = {}
        if picture is not None:
            dpi = resolution(picture)
            save_picture(draw(explanation, explanation.image, colormap=options.colormap, dpi=dpi), picture, dpi)
            if options.npz:
                files = {"arrays": str(_save_arrays(explanation, picture.with_suffix(".npz")))}
        return files | explanation.to_dict()

    return explain_files(options, "explanation", write)


def _save_arrays(explanation, path: Path) -> Path:
    """Writes scores, raw maps and masks to a new file, and returns its path."""
    import numpy as np

    from ..utils.files import atomic_write, new_file

    path = new_file(path)
    # An open file, because numpy would add a suffix to a file name.
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **explanation.arrays())
    return path
