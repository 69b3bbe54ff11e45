"""The common part of `iclip explain` and `iclip segment`, which write a picture and print an entry of each image."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..model.images import is_url
from ..model.presence import is_present, presence_text
from ..utils.tables import table
from .inputs import image_names, load_model, load_named_image
from .options import MODEL, PREPARATION, add_shared, fraction
from .output import (
    PICTURE_SUFFIXES,
    check_output_file,
    check_output_folder,
    cut,
    model_folders,
    name_for,
    print_lines,
    print_to_stderr,
)


if TYPE_CHECKING:
    from ..model.batches import PreparedImage
    from ..model.engine import Engine
    from ..model.outputs import ICLIPTextFeatures


def add_image_options(parser: argparse.ArgumentParser, *, output_help: str, **text_changes) -> None:
    """Adds the shared options. `text_changes` are keywords of `add_argument` that `--text` has in this command."""
    # Options that only one of the commands has.
    parser.set_defaults(npz=False, report=None, background=[], words=False)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, URLs, or folders of images with their subfolders"
    )
    add_shared(parser, "--text", **text_changes)
    add_shared(parser, *MODEL, *PREPARATION)
    add_shared(parser, "--method", "--refine", "--multi-scale")
    parser.add_argument(
        "--threshold",
        type=fraction,
        default=0.5,
        metavar="NUMBER",
        help="a mask has the pixels whose map, in [0, 1], exceeds this number (default: %(default)s)",
    )
    parser.add_argument(
        "--min-presence",
        type=fraction,
        metavar="NUMBER",
        help="a text with a lower presence, in [0, 1], counts as absent and gets an empty mask (default: 0.5; 0 for "
        "models like SigLIP, whose presence is at the prior of their training)",
    )
    parser.add_argument("--output", type=Path, metavar="PATH", help=output_help)
    json_help = "print a line of JSON for each image, with run-length masks, and write only what other options ask for"
    add_shared(parser, "--json", help=json_help)
    add_shared(parser, "--batch-size", default=4)


class _Texts(NamedTuple):
    """The texts to look for in all images, and the headings of texts and presence in printed tables."""

    labels: list[str] | dict[str, float]  # with their priors
    best: int | None  # number of texts to explain for each image, see `Engine.run`
    encoded: ICLIPTextFeatures | None
    headings: tuple[str, str]


def explain_files(args: argparse.Namespace, kind: str, write: Callable) -> int:
    """
    Explains the images of a command, and returns the exit code. Each image gets a picture, such as
    `photo-explanation.png` of the `kind` "explanation", and an entry, which is printed at once. The entries of several
    images are also written to a file of JSON lines, if there is a folder for pictures.

    `write` takes the name of an image, its explanation and the path of its picture, which is None if no picture is
    wanted. It writes the picture and returns the entry, which may have a `"problem"` for stderr.
    """
    from tqdm import tqdm

    from ..model.images import open_image
    from ..utils.files import free_name

    names = image_names(args.images)
    is_single = names == args.images and len(names) == 1
    if is_single and not is_url(names[0]):
        open_image(names[0], decode=False)  # raises before the model is loaded
    plural = f"{kind.removesuffix('s')}s"  # name of the folder, and of the file of entries, of several images
    picture, folder = _outputs(args, plural, names, is_single)

    # Imported after the files are checked, because these import torch.
    from ..explainers import make_explainer
    from ..model.engine import Engine
    from ..model.words import explain_words

    explainer = make_explainer(load_model(args.model, args), args.method)
    settings = args.templates, args.image_size, args.refine, args.multi_scale
    engine = Engine(explainer.model, explainer.model.processor, explainer, *settings)
    if args.min_presence is None:
        args.min_presence = engine.model.min_presence
    texts = _texts(args, engine)
    problems = {}

    def prepared(name: str) -> PreparedImage | None:
        try:
            return engine.prepare(load_named_image(name))
        except (ValueError, OSError) as error:
            problems[name] = " ".join(str(error).split())
            return None

    images = map(prepared, names)
    explanations = engine.run(images, texts.labels, args.batch_size, texts.best, texts.encoded, args.min_presence)
    num_explained, entries_file = 0, None
    for name, explanation in zip(names, tqdm(explanations, total=len(names), unit="image", disable=is_single or None)):
        entry, line = {}, ""
        if explanation is not None:
            if args.words:
                explanation = explain_words(explanation)
            explanation = replace(explanation, threshold=args.threshold, min_presence=args.min_presence)
            path = folder / name_for(name, f"{kind}.png") if folder else picture
            entry = {"image": name, **write(name, explanation, path)}
        problem = entry.pop("problem", problems.get(name))
        if entry:
            num_explained += 1
            line = json.dumps(entry, ensure_ascii=False)
        if entry and folder and not is_single:
            entries_file = entries_file or free_name(folder / f"{plural}.jsonl")
            # Bytes of a name that are not UTF-8 become escapes.
            with entries_file.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{line}\n")
        with tqdm.external_write_mode():  # above the bar
            if problem:
                print_to_stderr(args.command, problem)
            if entry:
                print_lines(*([line] if args.json else _printed(entry, texts, args.min_presence)))
    if entries_file is not None and not args.json:
        print_lines(f"{num_explained} image{'s' if num_explained > 1 else ''} -> {entries_file}")
    return 0 if num_explained == len(names) else 2


def _texts(args: argparse.Namespace, engine: Engine) -> _Texts:
    """Returns the texts that the user named, or else all nouns, of which only the best are explained."""
    if args.words:
        if len(args.texts or []) != 1:
            raise ValueError(r"--words takes one --text, a sentence whose commas are written \,.")
        from ..model.words import without_each_word

        return _Texts(without_each_word(args.texts[0]), None, None, ("word", "presence"))
    if args.texts:
        return _Texts(args.texts + args.background, None, None, ("text", "presence"))
    from ..backends.embedded import encoded_vocabulary, vocabulary
    from ..explainers.explain import NOUNS

    nouns, encoded = vocabulary(), encoded_vocabulary(engine.model, engine.templates)
    priors = sorted(set(nouns.values()), reverse=True)
    presence_heading = f"presence (prior {' or '.join(map(str, priors))})"
    return _Texts(nouns, NOUNS, encoded, (f"best of {len(nouns):,} nouns", presence_heading))


def _outputs(
    args: argparse.Namespace, plural: str, names: Sequence[str], is_single: bool
) -> tuple[Path | None, Path | None]:
    """
    Returns the picture that the user named and None, or None and the folder for pictures. Returns None twice if only
    JSON or a report is wanted. Raises an error for an output that cannot be written or is an input.
    """
    from ..utils.files import check_outputs, free_name

    output = args.output
    if output is None and (args.json or args.report) and not args.npz:
        return None, None
    picture, folder = None, output
    if output is None:
        folder = Path() if is_single else Path(plural)
    elif is_single and output.suffix and not output.is_dir():
        picture, folder = output, None
        check_output_file(output, PICTURE_SUFFIXES)
    else:
        check_output_folder(output)
    check_outputs([picture or free_name(folder / "new")], [*names, *model_folders(args.model)])
    return picture, folder


def _printed(entry: dict, texts: _Texts, min_presence: float) -> list[str]:
    files = ", ".join(entry[name] for name in ("picture", "labels", "arrays") if name in entry)
    is_segmentation = "segments" in entry
    headings = [*texts.headings, "score", "share of the image" if is_segmentation else "regions"]
    rows = []
    for result in entry["segments" if is_segmentation else "texts"]:
        label = f"{result['text']} (background)" if result.get("id") == 0 else result["text"]
        presence = presence_text(result["presence"], min_presence)
        extent = f"{100 * result['area']:.1f} %" if is_segmentation else str(len(result["regions"]))
        rows.append([cut(label), presence, f"{result['score']:.3f}", extent])
    first_line = f"{entry['image']} -> {files}" if files else entry["image"]
    lines = [first_line, *table(headings, rows)]
    if texts.best and not any(is_present(result["presence"], min_presence) for result in entry["texts"]):
        lines.append("None of the nouns is present: name what you look for by --text.")
    return lines
