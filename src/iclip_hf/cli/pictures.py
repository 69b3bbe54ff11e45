"""What `iclip explain` and `iclip segment` share: a picture and a report of each image."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..explainers import METHODS
from ..model.presence import MIN_PRESENCE
from .options import MODEL, PROMPTS, add_shared, load_model, method, option_type, share
from .output import PICTURES, check_file, check_folder, complain, echo, model_files, presence_column, printable


def add_image_options(command: argparse.ArgumentParser, *, images: str, output: str, refine: bool = False) -> None:
    """Adds the shared options. `images` and `output` are their help."""
    command.set_defaults(npz=False, words=False, background=[])
    command.add_argument("images", nargs="+", metavar="IMAGE", help=images)
    add_shared(command, "--text", required=True)
    add_shared(command, *MODEL, *PROMPTS)
    methods = f"method that computes the maps, one of {', '.join(METHODS)} (default: itsm)"
    command.add_argument("--method", type=method, default="itsm", metavar="METHOD", help=methods)
    add_shared(command, "--refine", default=refine)
    command.add_argument(
        "--threshold",
        type=_number_or_file,
        default=0.5,
        metavar="NUMBER_OR_FILE",
        help="a mask holds the pixels whose map, stretched to [0, 1], is greater; a number in [0, 1], or the file of `iclip evaluate "
        "--output` for the best threshold of each class (default: 0.5)",
    )
    command.add_argument(
        "--min-presence",
        type=share,
        default=MIN_PRESENCE,
        metavar="NUMBER",
        help=f"a text with a lower presence counts as absent and gets an empty mask; 0 to 1 (default: {MIN_PRESENCE})",
    )
    command.add_argument("--output", type=Path, metavar="PATH", help=output)
    lines = (
        "print a line of JSON for each image, with run-length masks, and write only what --output or --npz asks for"
    )
    add_shared(command, "--json", help=lines)
    add_shared(command, "--batch-size", help="images in one forward pass (default: 4, of a folder 8)")
    add_shared(command, "--overwrite")


@option_type
def _number_or_file(text: str) -> float | Path:
    try:
        float(text)
    except ValueError:
        return Path(text)
    return share(text)


def explain_files(
    options: argparse.Namespace, name: str, write: Callable, beside: Callable[[Path], list[Path]]
) -> int:
    """
    Writes a picture of each image file, prints its report as soon as it is there, and returns the exit code.

    Args:
        name: stem of the default output.
        write: function of the name of an image, the image, its explanation and the path of its picture, None where only JSON was asked for.
            It returns the entry of the report: a `dict` for each text in "texts" or "segments", and perhaps a "problem" for stderr.
        beside: returns, for a picture, the other files that are written with it.
    """
    from tqdm import tqdm

    from ..model.images import load_image, open_image
    from ..utils.prefetch import prefetch_map

    images = options.images
    if folder := next(filter(os.path.isdir, images), None):
        raise ValueError(f"{folder} is a folder: name its images, such as {folder}/*.jpg.")
    if len(images) == 1:
        open_image(images[0], decode=False)  # before the model is loaded
    pictures = _pictures_to_write(options, name, beside)
    localizer = make_localizer(options)

    def written(item) -> dict:
        (image_name, explanation), picture = item
        if explanation is None:
            return {"problem": image_name}
        files = {"picture": str(picture)} if picture else {}
        return {"image": image_name, **files, **write(image_name, explanation.image, explanation, picture)}

    whole = 0
    with ThreadPoolExecutor(1) as thread:  # loads images and writes pictures while the model runs
        loaded = localizer.explain_all(lambda path: (path, load_image(path)), images, thread, options.batch_size or 4)
        entries = prefetch_map(thread, written, zip(loaded, pictures), 4)
        for entry in tqdm(entries, total=len(images), unit="image", disable=len(images) == 1 or None):
            with tqdm.external_write_mode():  # above the bar
                if problem := entry.pop("problem", None):
                    complain(options.command, problem)
                if "image" in entry:
                    whole += 1
                    lines = [json.dumps(entry, ensure_ascii=False)] if options.json else _report(entry, options)
                    echo(*lines)
    return 0 if whole == len(images) else 2


def _report(entry: dict, options: argparse.Namespace) -> list[str]:
    """Returns the printed lines of an image."""
    width = max(len(printable(text)) for text in options.texts)
    lines = [f"{entry['image']} -> {', '.join(entry[kind] for kind in ('picture', 'labels') if kind in entry)}"]
    for row in entry.get("segments") or entry["texts"]:
        if "area" in row:
            found = f"{100 * row['area']:5.1f} % of the image"
        else:
            found = f"{len(row['regions'])} region{'' if len(row['regions']) == 1 else 's'}"
        presence = presence_column(row["presence"], options.min_presence)
        lines.append(f"  {printable(row['text']):<{width}}  {row['score']:+.4f}  {presence}  {found}")
        if "words" in row:
            lines.append("  ".join(["  ", *(f"{word['word']} {word['score']:.2f}" for word in row["words"])]))
    return lines


def _pictures_to_write(
    options: argparse.Namespace, name: str, beside: Callable[[Path], list[Path]]
) -> list[Path | None]:
    """Returns the picture of each image, or None where only JSON was asked for. Checks all outputs."""
    from ..utils.files import check_outputs

    if options.json and options.output is None and not options.npz:
        return [None] * len(options.images)
    named = []
    if len(options.images) == 1:
        pictures = [options.output or Path(f"{name}.png")]
        check_file(pictures[0], PICTURES)
        named = pictures if options.output else []
    else:
        folder = options.output or Path(f"{name}s")
        check_folder(folder)
        pictures = [folder / file for file in _file_names(options.images)]
    chosen = [file for picture in pictures for file in [*([] if named else [picture]), *beside(picture)]]
    thresholds = [options.threshold] if isinstance(options.threshold, Path) else []
    inputs = [*options.images, *thresholds, *model_files(options.model)]
    check_outputs(named, inputs, options.overwrite, chosen)
    return pictures


def _file_names(images: Sequence[str]) -> list[str]:
    """Returns a unique name for each picture, because a/dog.jpg and b/dog.jpg must not write the same file."""
    taken = {}
    for stem in (Path(image).stem for image in images):
        name, number = stem, 2
        while name.casefold() in taken:  # file systems may not tell upper from lower case
            name, number = f"{stem}-{number}", number + 1
        taken[name.casefold()] = f"{name}.png"
    return list(taken.values())


def make_localizer(options: argparse.Namespace):
    """Loads the model and returns the [`Localizer`] of the options."""
    from ..evaluation.results import class_thresholds, read_results

    texts, threshold, results = [*options.texts, *options.background], options.threshold, None
    if isinstance(threshold, Path):  # read before the model is loaded
        results, threshold = threshold, class_thresholds(threshold, texts, options.method)
    from ..explainers.localizer import Localizer

    model = load_model(options.model, options)
    if results:
        protocol = read_results(results, "protocol")["protocol"]
        if differing := model.differs_from(protocol):
            raise ValueError(
                f"--threshold {results} has thresholds of another model, by its {', '.join(differing)}: measure this one by `iclip "
                "evaluate --output`."
            )
        # The default of `segment` is not that of `evaluate`.
        if (refined := bool(protocol.get("refine"))) != options.refine:
            complain(
                options.command,
                f"--threshold {results} has thresholds of maps that were {'' if refined else 'not '}refined, and these are "
                f"{'not' if refined else 'refined'}: add --{'' if refined else 'no-'}refine, or measure by `iclip evaluate "
                f"{'--no-refine' if refined else '--refine'} --output`.",
            )
    return Localizer(
        model,
        texts,
        method=options.method,
        templates=options.templates,
        threshold=threshold,
        min_presence=options.min_presence,
        image_size=options.image_size,
        refine=options.refine,
    )
