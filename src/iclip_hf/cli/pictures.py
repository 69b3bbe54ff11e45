"""What `iclip explain` and `iclip segment` share: a picture and a report of each image."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..explainers import METHODS
from ..model.downloads import is_url
from ..model.presence import MIN_PRESENCE, presence_text
from ..utils.tables import table
from .inputs import image_names, load_model, load_named_image
from .options import DEFAULT_METHOD, MODEL, PROMPTS, add_shared, method, share
from .output import (
    PICTURES,
    check_file,
    check_folder,
    cut,
    model_files,
    name_for,
    print_error,
    print_lines,
)


if TYPE_CHECKING:
    from ..model.batches import PreparedImage
    from ..model.engine import Engine
    from ..model.explanation import Explanation


def add_image_options(command: argparse.ArgumentParser, *, output: str, **text) -> None:
    """Adds the shared options. `output` is the help of `--output`, and `text` changes the option of the texts."""
    command.set_defaults(npz=False, report=None, background=[])
    command.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, URLs, or folders of images with their subfolders"
    )
    add_shared(command, "--text", **text)
    add_shared(command, *MODEL, *PROMPTS)
    methods = f"method that computes the maps, one of {', '.join(METHODS)} (default: {DEFAULT_METHOD})"
    command.add_argument("--method", type=method, metavar="METHOD", help=methods)
    add_shared(command, "--refine", "--multi-scale")
    command.add_argument(
        "--threshold",
        type=share,
        default=0.5,
        metavar="NUMBER",
        help="a mask holds the pixels whose map, stretched to [0, 1], is greater; 0 to 1 (default: 0.5)",
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
    add_shared(command, "--batch-size", default=4, help="images in one forward pass (default: 4)")


def explain_files(options: argparse.Namespace, ending: str, write: Callable) -> int:
    """
    Writes a picture of each image, prints its report as soon as it is there, and returns the exit code. The reports of
    several images are also written to a file of JSON lines. Pictures end in `ending`, as `photo-explanation.png`.
    `write` takes the name of an image, its explanation and the path of its picture, if one is wanted, and returns the
    entry of the report, perhaps with a "problem" for stderr.
    """
    from tqdm import tqdm

    from ..utils.files import write_new
    from ..utils.prefetch import ThreadPool, prefetch_map

    images = image_names(options.images)
    alone = images == options.images and len(images) == 1
    picture, folder = _places(options, ending, images, alone)
    is_writing = bool(picture or folder)
    engine = _load_engine(options)
    # After the checks, because these import torch.
    from ..backends.embedded import encoded_vocabulary, vocabulary
    from ..explainers.explain import NOUNS

    def read(path: str) -> tuple[str, PreparedImage | None]:
        """Returns the name of an image and what the engine takes, or why it cannot be read and None."""
        try:
            return path, engine.prepare(load_named_image(path))
        except (ValueError, OSError) as error:
            return " ".join(str(error).split()), None

    def written(item: tuple[tuple[str, PreparedImage | None], Explanation | None]) -> dict:
        (image, _), explanation = item
        if explanation is None:
            return {"problem": image}
        explanation = replace(explanation, threshold=options.threshold, min_presence=options.min_presence)
        if not is_writing:
            return {"image": image, **write(image, explanation, None)}
        path = picture or folder / name_for(image, f"{ending}.png")
        return {"image": image, **write(image, explanation, path)}

    explained = 0
    with ExitStack() as stack:
        thread = stack.enter_context(ThreadPool(1))  # loads images and writes pictures while the model runs
        named, prepared = itertools.tee(prefetch_map(thread, read, images, options.batch_size))
        # Without texts: what is in each image?
        texts, best = (options.texts + options.background, None) if options.texts else (vocabulary(), NOUNS)
        headings = (
            ("text", "presence") if options.texts else (f"best of {len(texts):,} nouns", "presence at its prior")
        )
        encoded = encoded_vocabulary(engine.model, engine.templates) if best else None
        explanations = engine.run((image for _, image in prepared), texts, options.batch_size, best, encoded)
        entries, lines = prefetch_map(thread, written, zip(named, explanations), 4), None
        for entry in tqdm(entries, total=len(images), unit="image", disable=alone or None):
            problem = entry.pop("problem", None)
            text = json.dumps(entry, ensure_ascii=False)
            if entry and is_writing and not alone:
                if lines is None:
                    path = write_new(folder / f"{ending.removesuffix('s')}s.jsonl")
                    # A byte of a name that is not UTF-8 is written as JSON escapes it.
                    lines = stack.enter_context(path.open("a", encoding="utf-8", errors="backslashreplace"))
                print(text, file=lines, flush=True)
            with tqdm.external_write_mode():  # above the bar
                if problem:
                    print_error(options.command, problem)
                if entry:
                    explained += 1
                    print_lines(*([text] if options.json else _report(entry, headings, options.min_presence)))
        if lines is not None and not options.json:
            print_lines(f"{explained} image{'s' if explained > 1 else ''} -> {lines.name}")
    return 0 if explained == len(images) else 2


def _places(
    options: argparse.Namespace, ending: str, images: list[str], alone: bool
) -> tuple[Path | None, Path | None]:
    """
    Returns the picture that the user named, or else the folder for pictures; neither if only JSON or a report is asked
    for. Checks the single image and what is written, before the model is loaded.
    """
    from ..model.images import open_image
    from ..utils.files import check_outputs, free_name

    if alone and not is_url(images[0]):
        open_image(images[0], decode=False)
    output = options.output
    if output is None and (options.json or options.report) and not options.npz:
        return None, None
    picture, folder = None, output
    if output is None:
        folder = Path() if alone else Path(f"{ending.removesuffix('s')}s")
    elif alone and output.suffix and not output.is_dir():
        picture, folder = output, None
        check_file(output, PICTURES)
    else:
        check_folder(output)
    check_outputs([picture or free_name(folder / "new")], [*images, *model_files(options.model)])
    return picture, folder


def _load_engine(options: argparse.Namespace) -> Engine:
    from ..explainers import make_explainer
    from ..model.engine import Engine

    explainer = make_explainer(load_model(options.model, options), options.method)
    settings = options.templates, options.image_size, options.refine, options.multi_scale
    return Engine(explainer.model, explainer.model.processor, explainer, *settings)


def _report(entry: dict, headings: Sequence[str], min_presence: float) -> list[str]:
    """Returns the printed lines of an image. `headings` are those of texts and presence."""
    files = ", ".join(entry[name] for name in ("picture", "labels", "arrays") if name in entry)
    is_segmentation = "segments" in entry
    headings = [*headings, "score", "share of the image" if is_segmentation else "regions"]
    rows = [
        [
            cut(f"{row['text']} (background)" if row.get("id") == 0 else row["text"]),
            presence_text(row["presence"], min_presence),
            f"{row['score']:.3f}",
            f"{100 * row['area']:.1f} %" if is_segmentation else str(len(row["regions"])),
        ]
        for row in entry.get("segments") or entry["texts"]
    ]
    return [f"{entry['image']} -> {files}", *table(headings, rows)]
