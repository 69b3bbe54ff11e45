"""`iclip segment`: pictures, label maps and segments of images, each pixel with the text that matches it best."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .options import texts
from .output import name_for, print_lines, resolution, save_picture
from .pictures import add_image_options, explain_files


if TYPE_CHECKING:
    import numpy as np


def add_options(parser: argparse.ArgumentParser) -> None:
    add_image_options(
        parser,
        output_help="picture to write, or the folder for pictures (default: photo-segments.png for photo.jpg, with a "
        "number if it exists; of several images in the folder segments); the label map is written beside it, as "
        "photo-labels.png",
        required=True,
    )
    parser.add_argument(
        "--background",
        action="extend",
        type=texts,
        metavar="TEXT",
        help="text of the background, such as sky; it competes like the texts, and its pixels are background; "
        "separate several texts as for --text",
    )


def run(args: argparse.Namespace) -> int:
    def write(name: str, explanation, picture: Path | None) -> dict:
        from ..plots.sheets import label_sheet

        num_texts = len(args.texts)  # the texts of the background follow
        segments, covered, label_map = _segments(explanation, num_texts)
        entry = {**explanation.settings(), "segments": segments}
        if covered:
            names = " and ".join(args.texts[index] for index in covered)
            entry["problem"] = f"{name}: other texts cover {names}; iclip explain shows each map"
        if picture is None:
            return entry
        dpi = resolution(picture)
        sheet = label_sheet(
            explanation.image,
            label_map,
            args.texts,
            explanation.presence_words,
            args.background,
            explanation.made_by,
            dpi=dpi,
        )
        is_named = picture == args.output
        picture = save_picture(sheet, picture, dpi, is_named)
        if is_named:
            label_map_name = name_for(picture, "labels.png")
        else:  # photo-labels-2.png belongs to photo-segments-2.png
            label_map_name = "labels".join(picture.stem.rsplit("segments", 1)) + ".png"
        label_map[label_map >= num_texts] = -1  # a text of the background counts like no text
        label_map_file = _save_label_map(label_map, num_texts, picture.with_name(label_map_name))
        return {"picture": str(picture), "labels": str(label_map_file), **entry}

    code = explain_files(args, "segments", write)
    if not args.json:
        print_lines("Maps are often wrong, and segments with them: check the pictures.")
    return code


def _segments(explanation, num_texts: int) -> tuple[list[dict], list[int], np.ndarray]:
    """
    Returns the entries of the segments, the indices of the texts that other texts cover, and the label map with the
    index of a text for each pixel, or -1. The texts after the first `num_texts` are background.
    """
    import numpy as np

    from ..model.regions import run_lengths

    segments, covered, label_map = [], [], np.full(explanation.size, -1)
    for index, (text, segment, is_covered) in enumerate(explanation.segments()):
        mask = segment.numpy()
        label_map[mask] = index
        if is_covered and index < num_texts:
            covered.append(index)
        segments.append(
            {
                "id": index + 1 if index < num_texts else 0,  # 0 is the background
                "text": text,
                "score": round(explanation.scores[index].item(), 4),
                "presence": explanation.presences[index],
                "area": round(mask.mean().item(), 4),
                "mask": run_lengths(mask),
            }
        )
    return segments, covered, label_map


def _save_label_map(label_map: np.ndarray, num_texts: int, path: Path) -> Path:
    """
    Writes a label map as a new PNG file, and returns its path. In the file, 0 is background, and i the i-th text. It
    has 8 bits and a palette for up to 254 texts, otherwise 16 bits, because the highest value marks void pixels.
    """
    import numpy as np
    from PIL import Image

    from ..plots.colors import label_colors
    from ..utils.files import write_new

    has_palette = num_texts < 255
    image = Image.fromarray((label_map + 1).astype(np.uint8 if has_palette else np.uint16))
    if has_palette:
        image.putpalette(label_colors(256).tobytes())
    return write_new(path, partial(image.save, format="PNG"))
