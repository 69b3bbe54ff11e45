"""`iclip explain`: pictures, scores, boxes, points and masks of images; Parquet files of whole collections."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .options import add_shared, at_least_1, refuse
from .output import check_folder, complain, echo, resolution, save_picture
from .pictures import add_image_options, explain_files, make_localizer


def add_options(command: argparse.ArgumentParser) -> None:
    add_image_options(
        command,
        images="image files, each of which gets a picture (FOLDER/*.jpg names those of a folder); or a collection, which gets Parquet files "
        "instead of pictures: a folder of images, webdataset shards (.tar) or a folder of shards",
        output="picture of one image (default: explanation.png); folder for the pictures of several images, or for the Parquet files of "
        "a collection (default: explanations)",
    )
    add_shared(command, "--colormap")
    command.add_argument(
        "--npz", action="store_true", help="also write scores, raw maps and masks to an .npz file beside each picture"
    )
    command.add_argument(
        "--words",
        action="store_true",
        help="also score which words of each text made the image match, by Grad-ECLIP or with --method bi_modal by that method",
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
    refuse(options, ["images_per_file"], "image files")

    def beside(picture: Path) -> list[Path]:
        return [picture.with_suffix(".npz")] * options.npz

    def write(name: str, image, explanation, picture: Path | None) -> dict:
        import numpy as np

        from ..plots.sheets import draw
        from ..utils.files import atomic_write

        if picture is not None:
            dpi = resolution(picture)
            save_picture(draw(explanation, image, colormap=options.colormap, dpi=dpi), picture, dpi)
            for path in beside(picture):
                # An open file, because numpy would add a suffix to a file name.
                with atomic_write(path) as temporary, temporary.open("wb") as file:
                    np.savez_compressed(
                        file,
                        texts=explanation.labels,
                        scores=explanation.scores.numpy(),
                        presence=np.array(explanation.presences, float),
                        raw_maps=explanation.raw_maps.numpy(),
                        masks=np.stack([explanation.mask(index) for index in range(len(explanation))]),
                    )
        return explanation.to_dict()

    return explain_files(options, "explanation", write, beside)


def _explain_collection(options: argparse.Namespace) -> int:
    from ..explainers.collection import explain_collection, open_images
    from ..utils.distributed import this_process

    refuse(options, ["npz", "words", "overwrite"], "a collection")
    output = options.output or Path("explanations")
    check_folder(output)
    images = open_images(options.images)
    state = this_process("collections")  # selects the device before the model is loaded
    report = explain_collection(
        make_localizer(options),
        images,
        output,
        batch_size=options.batch_size or 8,
        images_per_file=options.images_per_file or 256,
    )
    if state.is_main_process:
        for reason in report.broken:
            complain("explain", reason)
        summary = {"output": str(output), "files": len(report.files), "images": report.images}
        if options.json:
            echo(json.dumps({**summary, "broken": report.broken}, ensure_ascii=False))
        else:
            echo(
                f"{report.images} images -> {len(report.files)} Parquet files in {output}, {len(report.broken)} broken images"
            )
    state.destroy_process_group()
    return 2 if report.broken else 0
