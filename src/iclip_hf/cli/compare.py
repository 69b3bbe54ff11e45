"""`iclip compare`: a figure with one row for each text and one column for each method."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..model.presence import presence_text
from ..utils.files import free_name
from ..utils.published import public_name
from ..utils.tables import table
from .inputs import load_model, load_named_image
from .options import DATASET, MODEL, PREPARATION, SHARED, add_shared
from .output import (
    PICTURE_SUFFIXES,
    check_output_file,
    cut,
    model_folders,
    name_for,
    print_lines,
    resolution,
    save_picture,
)


if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image", metavar="IMAGE", help="image file or URL, or with --dataset the name or path of one of its images"
    )
    model_help = f"{SHARED['--model']['help']}; repeat the option to compare several"
    add_shared(parser, "--model", action="append", dest="models", default=None, help=model_help)
    add_shared(parser, "--text", "--methods", *MODEL[1:], *PREPARATION, "--refine", "--multi-scale")
    truth = parser.add_argument_group(
        "ground truth",
        "if a data set contains IMAGE, the masks of its classes are shown, and --text defaults to these classes",
    )
    add_shared(truth, *DATASET)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="picture to write (default: photo-comparison.png for photo.jpg, with a number if it exists)",
    )
    add_shared(parser, "--colormap", "--json")


def run(args: argparse.Namespace) -> None:
    output = args.output or Path(name_for(args.image, "comparison.png"))
    check_output_file(output, PICTURE_SUFFIXES)
    # Two paths of one folder name the same model.
    names_by_path = {os.path.realpath(name): name for name in args.models or ["embedded"]}
    models = list(names_by_path.values())
    methods = list(dict.fromkeys(args.methods or [None]))
    # Without --output, the name gets a number if it exists.
    image, true_masks, templates = _open(args, args.output or free_name(output), models)
    texts = list(dict.fromkeys(args.texts or true_masks))
    if not texts:
        raise ValueError("There is nothing to look for: give --text, or a --dataset whose IMAGE shows a class.")
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from ..explainers.explain import explain
    from ..plots.sheets import at_picture_size, comparison_sheet

    dpi = resolution(output)
    small_image = at_picture_size(image, dpi)
    columns, presence_words = {}, {}  # by the title of a column; the ground truth has no presence
    if true_masks:
        shrunk = {
            text: np.asarray(Image.fromarray(mask).resize(small_image.size, Image.Resampling.NEAREST), dtype=float)
            for text, mask in true_masks.items()
        }
        columns["ground truth"] = [shrunk.get(text) for text in texts]
    model_titles = _model_titles(models)
    text_entries = [{"text": text, "scores": {}, "presence": {}} for text in texts]
    notes = [[] for _ in texts]
    for name in models:
        model = load_model(name, args)
        for method in tqdm(methods, desc=name, unit="method", delay=2):
            explanation = explain(
                model,
                [image],
                texts,
                method,
                templates=templates,
                target_sizes=[(small_image.height, small_image.width)],
                image_size=args.image_size,
                refine=args.refine,
                multi_scale=args.multi_scale,
            )[0]
            model_line = f"{model_titles[name]}\n" if len(models) > 1 else ""
            column_title = f"{model_line}{explanation.made_by}"
            columns[column_title] = explanation.maps.numpy()
            presence_words[column_title] = explanation.presence_words
        # Scores and presence do not depend on the method: all explanations of a model have the same.
        scored = zip(text_entries, notes, explanation.scores.tolist(), explanation.presences)
        for text_entry, text_notes, score, presence in scored:
            text_entry["scores"][name] = round(score, 4)
            text_entry["presence"][name] = presence
            text_notes.append(" · ".join(filter(None, [presence_text(presence), f"score {score:.2f}"])))
    row_titles = [f"{text}\n{', '.join(text_notes)}" for text, text_notes in zip(texts, notes)]
    sheet = comparison_sheet(small_image, columns, row_titles, presence_words, colormap=args.colormap, dpi=dpi)
    output = save_picture(sheet, output, dpi, replace=args.output is not None)
    if args.json:
        map_titles = [title.replace("\n", ", ") for title in presence_words]
        entry = {"image": args.image, "picture": str(output), "maps": map_titles, "texts": text_entries}
        print_lines(json.dumps(entry, indent=2, ensure_ascii=False))
        return
    print_lines(f"{args.image} -> {output}")
    rows = []
    for text_entry in text_entries:
        for name in models:
            model_cell = cut(name) if len(models) > 1 else ""
            presence, score = text_entry["presence"][name], text_entry["scores"][name]
            rows.append([cut(text_entry["text"]), presence_text(presence), f"{score:.3f}", model_cell])
    print_lines(*table(["text", "presence", "score", "model"], rows))


def _model_titles(models: list[str]) -> dict[str, str]:
    """Returns the title of each model in a picture, with a number if two are equal without their folders."""
    titles = {name: public_name(name) for name in models}
    are_distinct = len(set(titles.values())) == len(models)
    return titles if are_distinct else {name: f"{title} ({i})" for i, (name, title) in enumerate(titles.items(), 1)}


def _open(
    args: argparse.Namespace, output: Path, models: list[str]
) -> tuple[Image.Image, dict[str, np.ndarray], Sequence[str] | None]:
    """
    Returns the image and, of the data set that contains it, the masks of those texts that are its classes, and the
    templates. Raises an error if the output is a file that is read.
    """
    from ..data.segmentation import load_segmentation
    from ..utils.files import check_outputs

    inputs = [args.image, args.overrides, *(folder for model in models for folder in model_folders(model))]
    if (args.dataset is None) != (args.data_root is None):
        raise ValueError("--dataset and --data-root belong together: give both.")
    if args.dataset is None:
        check_outputs([output], inputs)
        return load_named_image(args.image), {}, args.templates
    dataset = load_segmentation(args.dataset, args.data_root, args.split, args.overrides)
    sample = _named_sample(dataset, args)
    check_outputs([output], [*inputs, *dataset.files])
    ids = dict(zip(dataset.class_names, dataset.class_ids))
    texts = args.texts or [dataset.class_names[class_id - 1] for class_id in sample.class_ids]
    true_masks = {text: sample.mask(ids[text]) == ids[text] for text in texts if text in ids}
    return sample.image, true_masks, args.templates or dataset.templates


def _named_sample(dataset, args: argparse.Namespace):
    """Returns the one sample that the user named by its image file, its name or the end of its path."""
    path = Path(args.image)

    def is_named(sample) -> bool:
        if os.path.isfile(path):  # False also for a name that no file can have
            return sample.image_path.samefile(path)
        return sample.name == args.image or sample.image_path.parts[-len(path.parts) :] == path.parts

    found = [sample for sample in dataset if is_named(sample)]
    if not found:
        raise ValueError(
            f"{args.image} is none of the images in {args.data_root}, such as {dataset[0].name}: name one of them."
        )
    if len(found) > 1:
        paths = " and ".join(str(sample.image_path) for sample in found[:2])
        raise ValueError(f"{args.image} is the name of {len(found)} images, such as {paths}: name the path of one.")
    return found[0]
