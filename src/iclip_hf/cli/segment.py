"""`iclip segment`: pictures, label maps and segments of images, each pixel with the text that matches it best."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from ..presence import MIN_PRESENCE
from ..prompts import check_text
from .common import (
    add_method_option,
    add_model_options,
    add_overwrite_option,
    add_refine_option,
    add_text_option,
    checked,
    echo,
    load_silently,
    printable,
    save_figure,
    share,
    software_exif,
)
from .pictures import picture_dpi, pictures_to_write, write_pictures


def add_options(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run)
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    add_text_option(
        command,
        "what to look for; it is inserted into the prompts; repeat the option for several texts",
        required=True,
    )
    command.add_argument(
        "--background",
        action="append",
        type=checked(check_text),
        default=[],
        metavar="TEXT",
        help="what else the image shows, such as sky; its pixels are background; repeat the option for several texts",
    )
    add_model_options(command)
    add_method_option(command)
    add_refine_option(command)
    command.add_argument(
        "--threshold",
        type=share,
        metavar="NUMBER",
        help="pixels are background up to this value of their best map, which is stretched to [0, 1] (default: 0.5; none with "
        "--background)",
    )
    command.add_argument(
        "--min-presence",
        type=share,
        default=MIN_PRESENCE,
        metavar="NUMBER",
        help=f"a text with a lower presence counts as absent and gets no pixel; 0 to 1 (default: {MIN_PRESENCE})",
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="picture to write (default: segmentation.png); for several images, the folder to write to (default: "
        "segmentations); label maps are written to the folder labels beside the pictures",
    )
    add_overwrite_option(command)
    command.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(options: argparse.Namespace) -> int:
    images = pictures_to_write(options, "segmentation.png", "segmentations", _label_file)
    if not images:
        return 2
    threshold = options.threshold
    if threshold is None and not options.background:
        threshold = 0.5
    from ..figures.sheets import at_picture_size, label_sheet
    from ..localization.localizer import Localizer

    localizer = Localizer(
        load_silently(options.model, options),
        [*options.texts, *options.background],
        method=options.method,
        templates=options.templates,
        min_presence=options.min_presence,
        image_size=options.image_size,
        refine=options.refine,
    )
    rule = {"threshold": threshold, "background": range(len(options.texts), len(localizer.texts))}

    def write(image, explanation, picture: Path) -> dict:
        labels = explanation.label_map(**rule).numpy()
        label_file = _label_file(picture)
        segments = [
            {
                "id": index + 1,
                "text": text,
                "score": round(explanation.scores[index].item(), 4),
                "presence": round(explanation.presence[index].item(), 4),
                "area": round((labels == index).mean().item(), 4),
            }
            for index, text in enumerate(options.texts)
        ]
        dpi = picture_dpi(picture)
        drawn = at_picture_size(image, dpi)
        shown = replace(explanation, size=(drawn.height, drawn.width)).label_map(**rule)
        save_figure(label_sheet(drawn, shown.numpy(), options.texts, dpi=dpi), picture, dpi, options.overwrite)
        _save_labels(labels, len(options.texts), label_file, options.overwrite)
        return {"labels": str(label_file), "segments": segments}

    report = write_pictures(options.command, localizer, images, write)
    if options.json:
        echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print_table(report, options.min_presence)
    return 0 if len(report) == len(options.images) else 2


def _label_file(picture: Path) -> Path:
    return picture.parent / "labels" / f"{picture.stem}.png"


def _save_labels(labels, num_texts: int, path: Path, overwrite: bool = False) -> None:
    """
    Writes a label map as a PNG: 0 is background, and id i the i-th text. Up to 254 texts have 8 bits and a palette, more have 16 bits.
    So the highest value, with which other programs mark void pixels, is never an id.
    """
    import numpy as np
    from PIL import Image

    from ..figures.colors import label_colors
    from ..utils.files import new_file

    few = num_texts < 255
    image = Image.fromarray((labels + 1).astype(np.uint8 if few else np.uint16))
    if few:
        image.putpalette(label_colors(256).tobytes())
    with new_file(path, overwrite) as partial:
        image.save(partial, format="PNG", exif=software_exif())


def _print_table(report: list[dict], min_presence: float) -> None:
    from ..presence import presence_word

    width = max((len(printable(row["text"])) for entry in report for row in entry["segments"]), default=0)
    for entry in report:
        echo(f"{printable(entry['image'])} -> {printable(entry['picture'])}, {printable(entry['labels'])}")
        for row in entry["segments"]:
            echo(
                f"  {printable(row['text']):<{width}}  {row['score']:+.4f}  {presence_word(row['presence'], min_presence):<7}  "
                f"presence {row['presence']:.2f}  "
                f"{100 * row['area']:5.1f} % of the image"
            )
