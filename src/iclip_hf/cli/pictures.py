"""What the commands share that write a picture of each image."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..explainers import METHODS
from ..presence import MIN_PRESENCE, presence_word
from .common import (
    MODEL,
    PICTURES,
    PROMPTS,
    add_refine,
    add_shared,
    check_file,
    check_folder,
    check_method,
    checked,
    echo,
    load_silently,
    one_line,
    printable,
    share,
)


_BAR_DELAY = 2  # seconds after which the progress bar appears


def add_image_options(
    command: argparse.ArgumentParser, *, images: str, absent: str, output: str, refine: bool = False
) -> None:
    """Adds the shared options. `images` and `output` are their help; `absent` is what an absent text gets."""
    command.set_defaults(npz=False, words=False)
    command.add_argument("images", nargs="+", metavar="IMAGE", help=images)
    add_shared(command, "--text", required=True)
    add_shared(command, *MODEL, *PROMPTS)
    command.add_argument(
        "--method",
        type=checked(check_method),
        default="itsm",
        metavar="METHOD",
        help=f"method that computes the maps, one of {', '.join(METHODS)} (default: itsm)",
    )
    add_refine(command, refine)
    command.add_argument(
        "--min-presence",
        type=share,
        default=MIN_PRESENCE,
        metavar="NUMBER",
        help=f"a text with a lower presence counts as absent and gets {absent}; 0 to 1 (default: {MIN_PRESENCE})",
    )
    command.add_argument("--output", type=Path, metavar="PATH", help=output)
    add_shared(command, "--overwrite")


def explain_files(
    options: argparse.Namespace,
    name: str,
    texts: Sequence[str],
    write: Callable,
    describe: Callable[[dict], str],
    beside: Callable[[Path], Path] | None = None,
    batch_size: int = 4,
) -> int:
    """
    Writes a picture of each image file, prints its report as soon as it is there, and returns the exit code.

    Args:
        name: stem of the default output.
        texts: what the model looks for.
        write: function of the name of an image, the image, its explanation, the path of its picture (None where only JSON was asked
            for) and its resolution in dots per inch. It returns the entry of the report, with a `dict` for each text in "texts" or "segments".
        describe: the end of the printed line of a text.
        beside: returns, for a picture, another file that is written with it.
        batch_size: images in one forward pass.
    """
    images = _pictures_to_write(options, name, beside)
    if not images:
        return 2
    localizer = make_localizer(options, texts)
    whole, width = 0, max(len(printable(text)) for text in options.texts)
    for entry in _written(options.command, localizer, images, write, batch_size):
        whole += 1
        if options.json:
            echo(json.dumps(entry, ensure_ascii=False))
            continue
        files = [printable(entry[kind]) for kind in ("picture", "labels") if kind in entry]
        echo(f"{printable(entry['image'])} -> {', '.join(files)}")
        for row in entry.get("segments") or entry["texts"]:
            presence = presence_column(row["presence"], options.min_presence)
            echo(f"  {printable(row['text']):<{width}}  {row['score']:+.4f}  {presence}  {describe(row)}")
    return 0 if whole == len(options.images) else 2


def _pictures_to_write(
    options: argparse.Namespace, name: str, beside: Callable[[Path], Path] | None
) -> list[tuple[str, Path | None]]:
    """Returns the files that begin as images, each with its picture. Checks all outputs and names the other images on stderr."""
    from ..images import open_image
    from ..utils.files import check_outputs

    found = []  # before the output is checked, which may only look wrong because an image does not exist
    for image in options.images:
        try:
            open_image(image, decode=False)
            found.append(image)
        except (ValueError, FileNotFoundError) as error:
            print(f"iclip {options.command}: {one_line(error)}", file=sys.stderr)
    if not found:
        return []
    one = len(options.images) == 1
    if one:
        pictures = [options.output or Path(f"{name}.png")]
        check_file(pictures[0], PICTURES)
    else:
        output = options.output or Path(f"{name}s")
        check_folder("--output", output)
        pictures = [output / file for file in _file_names(options.images)]
    if options.json and options.output is None and not options.npz:
        pictures = [None] * len(pictures)
    else:
        named = pictures if one and options.output else []
        chosen = [*([] if named else pictures), *(map(beside, pictures) if beside else ())]
        thresholds = [options.threshold] if isinstance(options.threshold, Path) else []
        of_model = Path(options.model).glob("*")
        check_outputs(named, [*options.images, *thresholds, *of_model], options.overwrite, chosen)
    return [(image, picture) for image, picture in zip(options.images, pictures) if image in found]


def _file_names(images: Sequence[str]) -> list[str]:
    """Returns a unique name for each picture, because a/dog.jpg and b/dog.jpg must not write the same file."""
    taken = {}
    for stem in (Path(image).stem for image in images):
        name, number = stem, 2
        while name.casefold() in taken:  # file systems may not tell upper from lower case
            name, number = f"{stem}-{number}", number + 1
        taken[name.casefold()] = f"{name}.png"
    return list(taken.values())


def make_localizer(options: argparse.Namespace, texts: Sequence[str]):
    """Loads the model and returns the [`Localizer`] of the options for these texts."""
    from ..evaluation.results import class_thresholds, read_results

    results = None
    if isinstance(options.threshold, Path):  # read before the model is loaded
        results = options.threshold
        options.threshold = class_thresholds(results, texts, options.method)
    from ..explainers.localizer import Localizer

    words = "bi_modal" if options.method == "bi_modal" else "grad_eclip"
    model = load_silently(options.model, options)
    if results and (differing := model.differs_from(read_results(results, "protocol")["protocol"])):
        raise ValueError(
            f"--threshold {results}: expected thresholds of this model, got those of other {', '.join(differing)}; measure it by "
            "`iclip evaluate --output`."
        )
    return Localizer(
        model,
        texts,
        method=options.method,
        templates=options.templates,
        threshold=options.threshold,
        min_presence=options.min_presence,
        image_size=options.image_size,
        refine=options.refine,
        words=words if options.words else None,
    )


def _written(command: str, localizer, images, write: Callable, batch_size: int) -> Iterator[dict]:
    """Yields the entry of each image that is not broken. A thread loads images and writes pictures while the model runs."""
    from tqdm import tqdm

    from ..images import load_image
    from ..utils.prefetch import prefetch_map

    def written(item) -> dict | None:
        (name, explanation), picture = item
        if explanation is None:
            tqdm.write(f"iclip {command}: {printable(name)}", file=sys.stderr)  # above the progress bar
            return None
        if picture is None:
            return {"image": name, **write(name, explanation.image, explanation, None, 0)}
        dpi = 300 if picture.suffix.lower() == ".pdf" else 120  # for print, and for screens
        return {"image": name, "picture": str(picture), **write(name, explanation.image, explanation, picture, dpi)}

    names, pictures = zip(*images)
    with ThreadPoolExecutor(1) as beside:
        explained = localizer.explain_all(lambda path: (path, load_image(path)), names, beside, batch_size)
        entries = prefetch_map(beside, written, zip(explained, pictures), 4)
        bar = tqdm(entries, total=len(images), unit="image", delay=_BAR_DELAY, disable=len(images) == 1)
        for entry in bar:
            if bar.format_dict["elapsed"] > _BAR_DELAY:
                bar.clear()  # the report takes its line
            if entry is not None:
                yield entry


def presence_column(value: float, min_presence: float) -> str:
    """
    Returns a presence as a word and a number. The number, a float32, is cut, not rounded: an unsure 0.798 must not look like the 0.80
    from which a text is present.
    """
    return f"{presence_word(value, min_presence):<7}  presence {f'{value:.9f}'[:4]}"
