"""`iclip segment`: pictures, label maps and segments of images, each pixel with the text that matches it best."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..presence import ABSENT, presence_word
from .common import printable, save_figure, share, texts
from .pictures import add_image_options, explain_files


def add_options(command: argparse.ArgumentParser) -> None:
    add_image_options(
        command,
        images="image files",
        absent="no pixel",
        output="picture to write (default: segmentation.png); for several images, the folder to write to (default: segmentations); "
        "label maps are written to the folder labels beside the pictures",
        refine=True,
    )
    command.add_argument(
        "--background",
        action="extend",
        type=texts,
        default=[],
        metavar="TEXT",
        help="what else the image shows, such as sky; it competes like the texts, and its pixels are background; several like --text",
    )
    command.add_argument(
        "--threshold",
        type=share,
        default=0.5,
        metavar="NUMBER",
        help="a text competes for the pixels whose map, stretched to [0, 1], is greater (default: 0.5)",
    )
    command.add_argument(
        "--json",
        action="store_true",
        help="print JSON instead of text, one line for each image, with run-length masks; writes no files unless --output is given",
    )


def run(options: argparse.Namespace) -> int:
    def write(name: str, image, explanation, picture: Path | None, dpi: int) -> dict:
        from tqdm import tqdm

        from ..plots.sheets import label_sheet
        from ..regions import MIN_AREA, run_lengths

        background = range(len(options.texts), len(explanation.labels))
        labels = explanation.label_map(background=background).numpy()
        words = [presence_word(value, options.min_presence) for value in explanation.presence.tolist()]
        segments = [
            {
                "id": index + 1,
                "text": text,
                "score": round(explanation.scores[index].item(), 4),
                "presence": explanation.presence[index].item(),
                "area": round((labels == index).mean().item(), 4),
                "mask": run_lengths(labels == index),
            }
            for index, text in enumerate(options.texts)
        ]
        hidden = [
            text
            for index, text in enumerate(options.texts)
            if words[index] != ABSENT and (labels == index).mean() < MIN_AREA
        ]
        if hidden:
            problem = f"{name}: present, but covered by the other texts: {', '.join(hidden)}"
            tqdm.write(f"iclip segment: {printable(problem)}; look at the maps with iclip explain", file=sys.stderr)
        entry = {"height": explanation.size[0], "width": explanation.size[1], "segments": segments}
        if picture is None:
            return entry
        label_file = _label_file(picture)
        save_figure(label_sheet(image, labels, options.texts, words, dpi=dpi), picture, dpi)
        _save_labels(labels, len(options.texts), label_file)
        return {"labels": str(label_file), **entry}

    def describe(row: dict) -> str:
        return f"{100 * row['area']:5.1f} % of the image"

    return explain_files(options, "segmentation", [*options.texts, *options.background], write, describe, _label_file)


def _label_file(picture: Path) -> Path:
    return picture.parent / "labels" / f"{picture.stem}.png"


def _save_labels(labels, num_texts: int, path: Path) -> None:
    """
    Writes a label map as a PNG: 0 is background, and id i the i-th text. Up to 254 texts have 8 bits and a palette, more have 16 bits.
    So the highest value, with which other programs mark void pixels, is never an id.
    """
    import numpy as np
    from PIL import Image

    from ..plots.colors import label_colors
    from ..utils.files import atomic_write

    few = num_texts < 255
    image = Image.fromarray((labels + 1).astype(np.uint8 if few else np.uint16))
    if few:
        image.putpalette(label_colors(256).tobytes())
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")
