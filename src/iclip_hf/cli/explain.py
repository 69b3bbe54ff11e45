"""`iclip explain`: pictures, scores, boxes, points and masks of images."""

from __future__ import annotations

import argparse
from functools import cached_property, partial
from pathlib import Path

from .options import SHARED, add_shared
from .output import file_name, print_to_stderr, resolution, save_picture
from .pictures import add_image_options, explain_files


def add_options(parser: argparse.ArgumentParser) -> None:
    add_image_options(
        parser,
        output_help="picture to write, or the folder for pictures (default: photo-explanation.png for photo.jpg, with "
        "a number if it exists; of several images in the folder explanations)",
        help=f"{SHARED['--text']['help']} (default: the nouns that match each image best)",
    )
    add_shared(parser, "--colormap")
    parser.add_argument(
        "--npz", action="store_true", help="also write scores, raw maps and masks to an .npz file beside each picture"
    )
    parser.add_argument(
        "--words",
        action="store_true",
        help="explain the words of --text, one sentence: the score and the map of each are what the "
        "sentence loses without it",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="new folder for a page, index.html, with the maps of all images, instead of a picture of each",
    )


def run(args: argparse.Namespace) -> int:
    report = None
    if args.report:
        from ..utils.files import check_new_folder, check_outside

        check_new_folder(args.report)
        for source in (*args.images, args.model):  # a later run would read the report's pictures
            check_outside(args.report, source)
        report = _Report(args.report)

    def write(name: str, explanation, picture: Path | None) -> dict:
        from ..plots.sheets import draw
        from ..utils.files import write_new

        files = {}
        if picture is not None:
            dpi = resolution(picture)
            sheet = draw(explanation, colormap=args.colormap, dpi=dpi)
            picture = save_picture(sheet, picture, dpi, picture == args.output)
            files["picture"] = str(picture)
            if args.npz:
                arrays = write_new(picture.with_suffix(".npz"), partial(_save_arrays, explanation))
                files["arrays"] = str(arrays)
        if report:
            report.add(name, explanation)
        return files | explanation.to_dict()

    try:
        return explain_files(args, "explanation", write)
    finally:  # an interrupted run reports the images so far
        if report and report.image_names:
            print_to_stderr("explain", f"wrote {report.write()}")


class _Report:
    """The report of all images of a command, see [`ReportFolder`]."""

    def __init__(self, folder: Path):
        self.folder, self.rows = folder, []
        self.image_names: list[str] = []
        self.text_indices: dict[str, int] = {}

    @cached_property
    def report_folder(self):
        from ..plots.report import ReportFolder
        from ..utils.files import check_new_folder

        check_new_folder(self.folder)  # again, because another command may have begun to write it
        return ReportFolder(self.folder)

    def add(self, name: str, explanation) -> None:
        """Writes the pictures of an image, and adds its rows to the page."""
        image_index, unrefined_maps = len(self.image_names), explanation.unrefined_maps
        self.made_by, self.refined = explanation.made_by, explanation.refined
        self.image_names.append(file_name(name))  # of a URL without its query, which may hold a token
        self.report_folder.save_image(image_index, explanation.image)
        scored = zip(explanation.labels, explanation.scores.tolist(), explanation.presences)
        for index, (text, score, presence) in enumerate(scored):
            text_index = self.text_indices.setdefault(text, len(self.text_indices))
            heatmap, mask = explanation.map_and_mask(index)
            unrefined = None if unrefined_maps is None else unrefined_maps[index]
            self.report_folder.save_map(
                image_index, text_index, explanation.image, heatmap, mask.numpy(), unrefined=unrefined
            )
            area = round(mask.float().mean().item(), 4)
            self.rows.append([image_index, text_index, area, presence, [round(score, 4)]])

    def write(self) -> Path:
        num_images = len(self.image_names)
        return self.report_folder.write_page(
            title=f"Maps of {num_images} image{'' if num_images == 1 else 's'}",
            images=self.image_names,
            texts=[*self.text_indices],
            methods=[self.made_by],
            value="score",
            rows=self.rows,
            refined=self.refined,
        )


def _save_arrays(explanation, path: Path) -> None:
    import numpy as np

    with path.open("wb") as file:  # numpy would add a suffix to a file name
        np.savez_compressed(file, **explanation.arrays())
