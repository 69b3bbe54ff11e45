"""`iclip compare`: a figure with one row for each text and one column for each method."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..model.presence import presence_text
from ..utils.files import free_name
from ..utils.hub_ids import public_name
from ..utils.tables import table
from .inputs import load_model, load_named_image
from .options import DATASET, MODEL, PROMPTS, SHARED, add_shared
from .output import PICTURES, check_output_file, cut, model_files, name_for, print_lines, resolution, save_picture


if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "image", metavar="IMAGE", help="image file or URL, or with --dataset the name or path of one of its images"
    )
    models = f"{SHARED['--model']['help']}; repeat the option to compare several"
    add_shared(command, "--model", action="append", dest="models", default=None, help=models)
    add_shared(command, "--text", "--methods", *MODEL[1:], *PROMPTS, "--refine", "--multi-scale")
    truth = command.add_argument_group(
        "ground truth",
        "a data set that contains IMAGE adds the masks of its classes, and --text defaults to the classes",
    )
    add_shared(truth, *DATASET)
    command.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="picture to write (default: photo-comparison.png for photo.jpg, with a number if it exists)",
    )
    add_shared(command, "--colormap", "--json")


class _Opened(NamedTuple):
    """The image of the command, with the masks and the prompts of the data set that contains it."""

    image: Image.Image
    truths: dict[str, np.ndarray]  # masks of the texts that are classes of the data set
    templates: list[str] | None


def run(args: argparse.Namespace) -> None:
    output = args.output or Path(name_for(args.image, "comparison.png"))
    check_output_file(output, PICTURES)
    # Each model and each method once, also if a model is named by two paths.
    models = list({os.path.realpath(name): name for name in args.models or ["embedded"]}.values())
    methods = list(dict.fromkeys(args.methods or [None]))
    # Without --output, the name gets a number if it exists.
    image, truths, templates = _open(args, args.output or free_name(output), models)
    texts = list(dict.fromkeys(args.texts or truths))
    if not texts:
        raise ValueError("There is nothing to look for: give --text, or a --dataset whose IMAGE shows a class.")
    from tqdm import tqdm

    from ..explainers.explain import explain
    from ..plots.sheets import at_picture_size, comparison_sheet

    dpi = resolution(output)
    small = at_picture_size(image, dpi)
    columns, presence_words = {}, {}  # by the title of a column; the ground truth has no presence
    if truths:
        columns["ground truth"] = [_shrunk(truths[text], small) if text in truths else None for text in texts]
    model_titles = _model_titles(models)
    rows = [{"text": text, "scores": {}, "presence": {}} for text in texts]
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
                target_sizes=[(small.height, small.width)],
                image_size=args.image_size,
                refine=args.refine,
                multi_scale=args.multi_scale,
            )[0]
            title = f"{model_titles[name]}\n{explanation.made_by}" if len(models) > 1 else explanation.made_by
            columns[title] = explanation.maps.numpy()
            presence_words[title] = explanation.presence_words
        # Score and presence do not depend on the method, so those of the last explanation are those of the model.
        for index, (score, presence) in enumerate(zip(explanation.scores.tolist(), explanation.presences)):
            rows[index]["scores"][name], rows[index]["presence"][name] = round(score, 4), presence
            notes[index].append(" · ".join(filter(None, [presence_text(presence), f"score {score:.2f}"])))
    titles = [f"{text}\n{', '.join(model_notes)}" for text, model_notes in zip(texts, notes)]
    sheet = comparison_sheet(small, columns, titles, presence_words, colormap=args.colormap, dpi=dpi)
    output = save_picture(sheet, output, dpi, replace=args.output is not None)
    if args.json:
        maps = [title.replace("\n", ", ") for title in presence_words]
        entry = {"image": args.image, "picture": str(output), "maps": maps, "texts": rows}
        print_lines(*json.dumps(entry, indent=2, ensure_ascii=False).split("\n"))
        return
    print_lines(f"{args.image} -> {output}")
    cells = []
    for row in rows:
        for name in models:
            model_cell = cut(name) if len(models) > 1 else ""
            presence, score = presence_text(row["presence"][name]), f"{row['scores'][name]:.3f}"
            cells.append([cut(row["text"]), presence, score, model_cell])
    print_lines(*table(["text", "presence", "score", "model"], cells))


def _model_titles(models: list[str]) -> dict[str, str]:
    """Returns names of models for a picture: without their paths, unless two models have the same name."""
    titles = {name: public_name(name) for name in models}
    return titles if len({*titles.values()}) == len(models) else dict(zip(models, models))


def _open(args: argparse.Namespace, output: Path, models: list[str]) -> _Opened:
    """Opens the image, and the data set if there is one. Checks that the output is none of the files that are read."""
    from ..data.segmentation import load_segmentation
    from ..utils.files import check_outputs

    inputs = [args.image, args.overrides, *(file for model in models for file in model_files(model))]
    sample = None
    if (args.dataset is None) != (args.data_root is None):
        raise ValueError("--dataset and --data-root belong together: give both.")
    if args.dataset is not None:
        dataset = load_segmentation(args.dataset, args.data_root, args.split, args.overrides)
        sample = _named_sample(dataset, args)
        inputs += dataset.files
    check_outputs([output], inputs)
    if sample is None:
        return _Opened(load_named_image(args.image), {}, args.templates)
    ids = dict(zip(dataset.class_names, dataset.class_ids))
    texts = args.texts or [dataset.class_names[class_id - 1] for class_id in sample.class_ids]
    truths = {text: sample.mask(ids[text]) == ids[text] for text in texts if text in ids}
    return _Opened(sample.image, truths, args.templates or dataset.templates)


def _named_sample(dataset, args: argparse.Namespace):
    """
    Returns the sample that the user named by its image file, its name or the end of its path. Raises `ValueError` if
    there is none, or several.
    """
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


def _shrunk(mask, image):
    """Resizes a boolean mask to the size of an image, as zeros and ones."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST), dtype=float)
