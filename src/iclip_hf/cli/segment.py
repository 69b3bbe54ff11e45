"""`iclip segment`: pictures, label maps and segments of images, each pixel with the text that matches it best."""

from __future__ import annotations

import argparse
import sys
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
from .pictures import picture_dpi, pictures_to_write, print_json_lines, write_pictures


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
        help="what else the image shows, such as sky; it competes like the texts, and its pixels are background; repeat the option for "
        "several texts",
    )
    add_model_options(command)
    add_method_option(command)
    add_refine_option(command, default=True)
    command.add_argument(
        "--threshold",
        type=share,
        default=0.5,
        metavar="NUMBER",
        help="a text competes for the pixels whose map, stretched to [0, 1], is greater (default: 0.5)",
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
    command.add_argument(
        "--json",
        action="store_true",
        help="print JSON instead of text, one line for each image, with run-length masks; writes no files unless --output is given",
    )


def run(options: argparse.Namespace) -> int:
    images = pictures_to_write(options, "segmentation.png", "segmentations", _label_file)
    if not images:
        return 2
    from ..figures.sheets import at_picture_size, label_sheet
    from ..localization.localizer import Localizer
    from ..regions import run_lengths

    localizer = Localizer(
        load_silently(options.model, options),
        [*options.texts, *options.background],
        method=options.method,
        templates=options.templates,
        threshold=options.threshold,
        min_presence=options.min_presence,
        image_size=options.image_size,
        refine=options.refine,
    )
    background = range(len(options.texts), len(localizer.texts))

    def write(image, explanation, picture: Path | None) -> dict:
        labels = explanation.label_map(background=background).numpy()
        segments = [
            {
                "id": index + 1,
                "text": text,
                "score": round(explanation.scores[index].item(), 4),
                "presence": round(explanation.presence[index].item(), 4),
                "area": round((labels == index).mean().item(), 4),
                "mask": run_lengths(labels == index),
            }
            for index, text in enumerate(options.texts)
        ]
        entry = {"height": explanation.size[0], "width": explanation.size[1], "segments": segments}
        if picture is None:
            return entry
        dpi, label_file = picture_dpi(picture), _label_file(picture)
        drawn = at_picture_size(image, dpi)
        shown = replace(explanation, size=(drawn.height, drawn.width)).label_map(background=background)
        save_figure(label_sheet(drawn, shown.numpy(), options.texts, dpi=dpi), picture, dpi, options.overwrite)
        _save_labels(labels, len(options.texts), label_file, options.overwrite)
        return {"labels": str(label_file), **entry}

    report = write_pictures(options.command, localizer, images, write)
    for entry in report:
        hidden = [
            row["text"] for row in entry["segments"] if row["presence"] >= options.min_presence and not row["area"]
        ]
        if hidden:
            problem = f"{entry['image']}: present, but covered by the other texts: {', '.join(hidden)}"
            print(f"iclip segment: {printable(problem)}; look at the maps with iclip explain", file=sys.stderr)
    if options.json:
        print_json_lines(report)
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
