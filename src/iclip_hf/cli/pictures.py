"""Shared parts of the commands that write a picture of each image."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..presence import MIN_PRESENCE, presence_word
from .common import (
    PICTURES,
    add_method_option,
    add_model_options,
    add_overwrite_option,
    add_refine_option,
    add_text_option,
    check_file,
    check_folder,
    echo,
    load_silently,
    one_line,
    printable,
    share,
)


def add_image_options(
    command: argparse.ArgumentParser, *, images: str, absent: str, output: str, refine: bool = False
) -> None:
    """
    Adds what the commands share that explain image files.

    Args:
        images: help of the images.
        absent: what an absent text gets.
        output: help of `--output`.
        refine: default of `--refine`.
    """
    command.add_argument("images", nargs="+", metavar="IMAGE", help=images)
    add_text_option(
        command,
        "what to look for; it is inserted into the prompts; repeat the option for several texts",
        required=True,
    )
    add_model_options(command)
    add_method_option(command)
    add_refine_option(command, default=refine)
    command.add_argument(
        "--min-presence",
        type=share,
        default=MIN_PRESENCE,
        metavar="NUMBER",
        help=f"a text with a lower presence counts as absent and gets {absent}; 0 to 1 (default: {MIN_PRESENCE})",
    )
    command.add_argument("--output", type=Path, metavar="PATH", help=output)
    add_overwrite_option(command)


def pictures_to_write(
    options: argparse.Namespace, file: str, folder: str, beside: Callable[[Path], Path] | None = None
) -> list[tuple[str, Path | None]]:
    """
    Returns those of `options.images` that are files, each with the path of its picture, or None where only JSON was asked for. Prints
    errors for the others on stderr, before the model is loaded.

    Args:
        options: parsed options with `command`, `images`, `output`, `json` and `overwrite`, and `npz` if the command has it.
        file, folder: default output for one image, and for several.
        beside: returns, for a picture, another file that is written with it.

    Raises:
        `ValueError`: `options.output` is not a file name for one image, or not a folder for several. `FileExistsError`: as
        [`iclip_hf.utils.files.check_outputs`].
    """
    from ..images import require_file
    from ..utils.files import check_outputs

    found = []  # before the output is checked, which may only look wrong because an image does not exist
    for image in options.images:
        try:
            require_file(image)
            found.append(image)
        except (ValueError, FileNotFoundError) as error:
            print(f"iclip {options.command}: {one_line(error)}", file=sys.stderr)
    if not found:
        return []
    if len(options.images) == 1:
        pictures = [options.output or Path(file)]
        check_file("--output", pictures[0], PICTURES)
    else:
        output = options.output or Path(folder)
        check_folder("--output", output)
        pictures = [output / name for name in file_names(options.images)]
    if options.json and options.output is None and not getattr(options, "npz", False):
        written, pictures = [], [None] * len(pictures)
    else:
        written = [*pictures, *map(beside, pictures)] if beside else pictures
    thresholds = [options.threshold] if isinstance(options.threshold, Path) else []
    check_outputs(written, [*options.images, *thresholds], options.overwrite)
    return [(image, picture) for image, picture in zip(options.images, pictures) if image in found]


def file_names(images: Sequence[str]) -> list[str]:
    """Returns a unique name for each picture, because a/dog.jpg and b/dog.jpg must not write the same file."""
    taken = {}
    for stem in (Path(image).stem for image in images):
        name, number = stem, 2
        while name.casefold() in taken:  # file systems may not tell upper from lower case
            name, number = f"{stem}-{number}", number + 1
        taken[name.casefold()] = f"{name}.png"
    return list(taken.values())


def make_localizer(options: argparse.Namespace, texts: Sequence[str], words: str | None = None):
    """Loads the model and returns the [`Localizer`] of the options for these texts."""
    from ..localization.localizer import Localizer

    return Localizer(
        load_silently(options.model, options),
        texts,
        method=options.method,
        templates=options.templates,
        threshold=options.threshold,
        min_presence=options.min_presence,
        image_size=options.image_size,
        refine=options.refine,
        words=words,
    )


def write_pictures(
    command: str, localizer, images: Sequence[tuple[str, Path | None]], write: Callable, batch_size: int = 4
) -> list[dict]:
    """
    Explains images. A thread loads images and writes pictures while the model runs.

    Args:
        command: name of the command, for errors.
        localizer: a [`Localizer`].
        images: result of `pictures_to_write`, at least one.
        write: function of an image, its explanation and the path of its picture. It returns a `dict` for the report.
        batch_size: images in one forward pass.

    Returns:
        For each image, a `dict` with its name `image`, the path `picture` if there is one, and what `write` returned. An image that
        cannot be read is left out, with an error on stderr.
    """
    from tqdm import tqdm

    from ..images import load_image
    from ..utils.prefetch import prefetch_map

    def written(item) -> dict | None:
        (name, image, explanation), picture = item
        if image is None:
            tqdm.write(f"iclip {command}: {printable(name)}", file=sys.stderr)  # above the progress bar
            return None
        written_to = {} if picture is None else {"picture": str(picture)}
        return {"image": name, **written_to, **write(image, explanation, picture)}

    names, pictures = zip(*images)
    with ThreadPoolExecutor(1) as beside:
        explained = localizer.explain_all(lambda path: (path, load_image(path)), names, beside, batch_size)
        report = prefetch_map(beside, written, zip(explained, pictures), 4)
        report = list(tqdm(report, total=len(images), unit="image", delay=2, disable=len(images) == 1))
    return [entry for entry in report if entry is not None]


def print_report(
    options: argparse.Namespace, report: Sequence[dict], texts: str, describe: Callable[[dict], str]
) -> int:
    """
    Prints the result of `write_pictures`: JSON Lines, or for each image its files and a line for each text.

    Args:
        options: parsed options with `images`, `min_presence` and `json`.
        report: the entries of the images.
        texts: key of the texts of an entry.
        describe: the end of the line of a text.

    Returns:
        The exit code.
    """
    width = max((len(printable(row["text"])) for entry in report for row in entry[texts]), default=0)
    for entry in report:
        if options.json:
            echo(json.dumps(entry, ensure_ascii=False))
            continue
        files = [printable(entry[name]) for name in ("picture", "labels") if name in entry]
        echo(f"{printable(entry['image'])} -> {', '.join(files)}")
        for row in entry[texts]:
            presence = presence_column(row["presence"], options.min_presence)
            echo(f"  {printable(row['text']):<{width}}  {row['score']:+.4f}  {presence}  {describe(row)}")
    return 0 if len(report) == len(options.images) else 2


def presence_column(value: float, min_presence: float) -> str:
    """
    Returns a presence as a word and a number. The number is cut, not rounded: an unsure 0.898 must not look like the 0.90 from which a
    text is present.
    """
    return f"{presence_word(value, min_presence):<7}  presence {f'{value:.4f}'[:4]}"


def picture_dpi(path: Path) -> int:
    """Returns the resolution of a picture in dots per inch: that of print for a PDF, otherwise that of screens."""
    return 300 if path.suffix.lower() == ".pdf" else 120
