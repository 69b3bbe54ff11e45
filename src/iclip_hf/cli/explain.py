"""`iclip explain`: pictures, scores, boxes, points and masks of images; Parquet files of whole collections."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .common import add_shared, at_least_1, check_folder, echo, printable, save_figure, share
from .pictures import add_image_options, explain_files, make_localizer


def add_options(command: argparse.ArgumentParser) -> None:
    add_image_options(
        command,
        images="image files, each of which gets a picture (FOLDER/*.jpg names those of a folder); or a collection, which gets Parquet files "
        "instead of pictures: a folder of images, webdataset shards (.tar) or a folder of shards",
        absent="an empty mask",
        output="picture of one image (default: explanation.png); folder for the pictures of several images, or for the Parquet files of "
        "a collection (default: explanations)",
    )
    command.add_argument(
        "--threshold",
        type=_number_or_file,
        default=0.5,
        metavar="NUMBER_OR_FILE",
        help="a mask holds the pixels whose map is greater; a number in [0, 1], or the file of `iclip evaluate --output` for the "
        "best threshold of each class (default: 0.5)",
    )
    add_shared(command, "--colormap")
    command.add_argument(
        "--npz", action="store_true", help="also write scores, raw maps and masks to an .npz file beside each picture"
    )
    command.add_argument(
        "--json",
        action="store_true",
        help="print JSON instead of text, for image files one line each with boxes, points and run-length masks; writes no pictures "
        "unless --output or --npz is given",
    )
    command.add_argument(
        "--words",
        action="store_true",
        help="also score which words of each text made the image match, coloured in the picture; by Grad-ECLIP, or with "
        "--method bi_modal by that method",
    )
    add_shared(command, "--batch-size", help="images in one forward pass (default: 4; of a collection 8)")
    command.add_argument(
        "--images-per-file",
        type=at_least_1,
        metavar="N",
        help="rows in each Parquet file of a collection (default: 256)",
    )


def run(options: argparse.Namespace) -> int:
    if any(Path(image).is_dir() or str(image).lower().endswith(".tar") for image in options.images):
        return _explain_collection(options)
    return _explain_images(options)


def _number_or_file(text: str) -> float | Path:
    try:
        float(text)
    except ValueError:
        return Path(text)
    return share(text)


def _explain_images(options: argparse.Namespace) -> int:
    if options.images_per_file is not None:
        raise ValueError("--images-per-file applies to collections, but got image files: leave it out.")

    def write(name: str, image, explanation, picture: Path | None, dpi: int) -> dict:
        from ..plots.sheets import draw

        if picture is not None:
            sheet = draw(explanation, image, colormap=options.colormap, dpi=dpi)
            save_figure(sheet, picture, dpi)
            if options.npz:
                _save_arrays(explanation, _array_file(picture))
        return explanation.to_dict()

    beside = _array_file if options.npz else None
    return explain_files(options, "explanation", options.texts, write, _describe, beside, options.batch_size or 4)


def _explain_collection(options: argparse.Namespace) -> int:
    from ..explainers.collection import explain_collection, open_images
    from ..utils.distributed import this_process

    if given := [f"--{name}" for name in ("npz", "words", "overwrite") if getattr(options, name)]:
        raise ValueError(
            f"{' and '.join(given)} applies to image files, but got a collection, whose Parquet files contain raw maps and masks and "
            "replace no files: leave it out."
        )
    output = options.output or Path("explanations")
    check_folder("--output", output)
    images = open_images(options.images)
    state = this_process("collections")  # selects the device before the model is loaded
    report = explain_collection(
        make_localizer(options, options.texts),
        images,
        output,
        batch_size=options.batch_size or 8,
        images_per_file=options.images_per_file or 256,
    )
    if state.is_main_process:
        for reason in report.broken:
            print(f"iclip explain: {printable(reason)}", file=sys.stderr)
        summary = {"output": str(output), "files": len(report.files), "images": report.images}
        if options.json:
            echo(json.dumps({**summary, "broken": report.broken}, ensure_ascii=False))
        else:
            echo(
                f"{report.images} images -> {len(report.files)} Parquet files in {output}, {len(report.broken)} broken images"
            )
    state.destroy_process_group()
    return 2 if report.broken else 0


def _array_file(picture: Path) -> Path:
    return picture.with_suffix(".npz")


def _save_arrays(explanation, path: Path) -> None:
    import numpy as np

    from ..utils.files import atomic_write

    # An open file, because numpy would add a suffix to a file name.
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            texts=explanation.labels,
            scores=explanation.scores.numpy(),
            presence=explanation.presence.numpy(),
            raw_maps=explanation.raw_maps.numpy(),
            masks=np.stack([explanation.mask(index) for index in range(len(explanation.labels))]),
        )


def _describe(row: dict) -> str:
    regions = f"{len(row['regions'])} region{'' if len(row['regions']) == 1 else 's'}"
    words = "  ".join(f"{printable(word['word'])} {word['score']:.2f}" for word in row.get("words", ()))
    return f"{regions}\n    {words}" if "words" in row else regions
