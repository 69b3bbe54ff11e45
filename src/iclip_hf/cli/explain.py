"""`iclip explain`: pictures, scores, boxes, points and masks of images; Parquet files of whole collections."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..presence import MIN_PRESENCE
from .common import (
    add_colormap_option,
    add_method_option,
    add_model_options,
    add_overwrite_option,
    add_refine_option,
    add_text_option,
    at_least_1,
    check_folder,
    echo,
    load_silently,
    printable,
    save_figure,
    share,
)
from .pictures import picture_dpi, pictures_to_write, print_json_lines, write_pictures


def add_options(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run)
    command.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, or a collection: a folder of images, webdataset shards (.tar) or a folder of shards",
    )
    add_text_option(
        command,
        "what to look for; it is inserted into the prompts; repeat the option for several texts",
        required=True,
    )
    add_model_options(command)
    add_method_option(command)
    add_refine_option(command)
    command.add_argument(
        "--threshold",
        type=_number_or_file,
        default=0.5,
        metavar="NUMBER_OR_FILE",
        help="a mask holds the pixels whose map is greater; a number in [0, 1], or the file of `iclip evaluate --output` for the "
        "best threshold of each class (default: 0.5)",
    )
    command.add_argument(
        "--min-presence",
        type=share,
        default=MIN_PRESENCE,
        metavar="NUMBER",
        help=f"a text with a lower presence counts as absent and gets an empty mask; 0 to 1 (default: {MIN_PRESENCE})",
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="picture to write (default: explanation.png); for several images or a collection, the folder to write "
        "pictures or Parquet files to (default: explanations)",
    )
    add_overwrite_option(command)
    add_colormap_option(command)
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
    command.add_argument(
        "--batch-size",
        type=at_least_1,
        metavar="N",
        help="images in one forward pass (default: 4; of a collection 8)",
    )
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


def _localizer(options: argparse.Namespace):
    from ..regions import class_thresholds

    if isinstance(options.threshold, Path):  # read before the model is loaded
        options.threshold = class_thresholds(options.threshold, options.texts, options.method)
    from ..localization.localizer import Localizer

    return Localizer(
        load_silently(options.model, options),
        options.texts,
        method=options.method,
        templates=options.templates,
        threshold=options.threshold,
        min_presence=options.min_presence,
        image_size=options.image_size,
        refine=options.refine,
        words=("bi_modal" if options.method == "bi_modal" else "grad_eclip") if options.words else None,
    )


def _explain_images(options: argparse.Namespace) -> int:
    if options.images_per_file is not None:
        raise ValueError("--images-per-file applies to collections, but got image files: leave it out.")
    arrays = _array_file if options.npz else None
    images = pictures_to_write(options, "explanation.png", "explanations", arrays)
    if not images:
        return 2
    localizer = _localizer(options)
    from ..figures.sheets import draw

    def write(image, explanation, picture: Path | None) -> dict:
        if picture is not None:
            dpi = picture_dpi(picture)
            sheet = draw(explanation, image, colormap=options.colormap, dpi=dpi)
            save_figure(sheet, picture, dpi, options.overwrite)
            if options.npz:
                _save_arrays(explanation, _array_file(picture), options.overwrite)
        return explanation.to_dict()

    report = write_pictures(options.command, localizer, images, write, options.batch_size or 4)
    if options.json:
        print_json_lines(report)
    else:
        _print_table(report, options.min_presence)
    return 0 if len(report) == len(options.images) else 2


def _explain_collection(options: argparse.Namespace) -> int:
    from ..localization.collection import explain_collection, open_images
    from ..utils.distributed import this_process

    if options.npz:
        raise ValueError(
            "--npz applies to image files, but got a collection, whose Parquet files contain raw maps and masks: leave it out."
        )
    if options.words:
        raise ValueError("--words applies to image files, but got a collection: leave it out.")
    if options.overwrite:
        raise ValueError(
            "--overwrite applies to image files, but got a collection, which replaces no files: leave it out."
        )
    output = options.output or Path("explanations")
    check_folder("--output", output)
    images = open_images(options.images)
    state = this_process("collections")  # selects the device before the model is loaded
    report = explain_collection(
        _localizer(options),
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
            echo(json.dumps({**summary, "broken": report.broken}, indent=2, ensure_ascii=False))
        else:
            echo(
                f"{report.images} images -> {len(report.files)} files in {output}, {len(report.broken)} broken images"
            )
    state.destroy_process_group()
    return 2 if report.broken else 0


def _array_file(picture: Path) -> Path:
    return picture.with_suffix(".npz")


def _save_arrays(explanation, path: Path, overwrite: bool) -> None:
    import zipfile

    import numpy as np

    from ..utils.files import SOFTWARE, new_file

    # An open file, because numpy would add a suffix to a file name.
    with new_file(path, overwrite) as partial, partial.open("w+b") as file:
        np.savez_compressed(
            file,
            texts=explanation.labels,
            scores=explanation.scores.numpy(),
            presence=explanation.presence.numpy(),
            raw_maps=explanation.raw_maps.numpy(),
            masks=np.stack([explanation.mask(index) for index in range(len(explanation.labels))]),
        )
        with zipfile.ZipFile(file, "a") as archive:
            archive.comment = SOFTWARE.encode()


def _print_table(report: list[dict], min_presence: float) -> None:
    from ..presence import presence_word

    width = max((len(printable(row["text"])) for entry in report for row in entry["texts"]), default=0)
    for entry in report:
        echo(f"{printable(entry['image'])} -> {printable(entry['picture'])}")
        for row in entry["texts"]:
            regions = f"{len(row['regions'])} region{'' if len(row['regions']) == 1 else 's'}"
            echo(
                f"  {printable(row['text']):<{width}}  {row['score']:+.4f}  {presence_word(row['presence'], min_presence):<7}  "
                f"presence {row['presence']:.2f}  {regions}"
            )
            if "words" in row:
                echo("    " + "  ".join(f"{printable(one['word'])} {one['score']:.2f}" for one in row["words"]))
