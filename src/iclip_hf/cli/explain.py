"""`iclip explain`: pictures, scores, boxes, points and masks of images."""

from __future__ import annotations

import argparse
from functools import partial
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
        from ..utils.files import write_new

        files = {}
        if picture is not None:
            dpi = resolution(picture)
            sheet = draw(explanation, colormap=options.colormap, dpi=dpi)
            picture = save_picture(sheet, picture, dpi, picture == options.output)
            files["picture"] = str(picture)
            if options.npz:
                arrays = write_new(picture.with_suffix(".npz"), partial(_save_arrays, explanation))
                files["arrays"] = str(arrays)
        return files | explanation.to_dict()

    return explain_files(options, "explanation", write)


def _save_arrays(explanation, path: Path) -> None:
    """Writes scores, raw maps and masks."""
    import numpy as np

    with path.open("wb") as file:  # numpy would add a suffix to a file name
        np.savez_compressed(file, **explanation.arrays())
