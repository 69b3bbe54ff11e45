"""`iclip compare`: a figure with one row for each text and one column for each method."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from ..presence import MIN_PRESENCE, presence_word
from .common import (
    DATASET,
    MODEL,
    PICTURES,
    PROMPTS,
    add_picture,
    add_refine,
    add_shared,
    check_output,
    echo,
    load_silently,
    printable,
    save_figure,
)
from .pictures import presence_column


_DEFAULT = "comparison.png"


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "image", metavar="IMAGE", help="image file, or with --dataset the name or path of one of its images"
    )
    add_shared(
        command,
        "--text",
        help="what to look for, one row of the figure each; several texts between commas, or by repeating the option; \\, is a comma within a "
        "text (default: the classes that the data set's image shows)",
    )
    add_shared(
        command,
        "--model",
        action="append",
        dest="models",
        default=None,
        help='ICLIP or CLIP-like model, or "embedded"; repeat the option to compare several (default: the embedded model)',
    )
    add_shared(command, "--methods", *MODEL[1:], *PROMPTS)
    add_refine(command)
    truth = command.add_argument_group("ground truth", "a data set that contains IMAGE adds the masks of its classes")
    add_shared(truth, *DATASET)
    add_picture(command, _DEFAULT)
    add_shared(command, "--colormap", "--json")


def run(options: argparse.Namespace) -> None:
    of_models = [file for model in options.models or () for file in Path(model).glob("*")]
    check_output(options, _DEFAULT, PICTURES, [options.image, options.overrides, *of_models])
    image, truths, templates = _open(options)
    texts = list(dict.fromkeys(options.texts or truths))
    if not texts:
        raise ValueError(
            "Expected at least one --text, or a --dataset whose IMAGE shows a class, got neither: add one of them."
        )
    from ..plots.sheets import at_picture_size, comparison_sheet

    drawn = at_picture_size(image, options.dpi)
    columns, words = {}, {}  # by the title of a column
    if truths:
        columns["ground truth"] = [_shrunk(truths[text], drawn) if text in truths else None for text in texts]
    of_model = {}  # an explanation of each model; score and presence do not depend on the method
    for model, method, explanation in _explain(options, image, texts, templates, (drawn.height, drawn.width)):
        title = method if len(options.models or ()) < 2 else f"{model}\n{method}"
        columns[title] = explanation.maps.numpy()
        words[title] = [presence_word(value) for value in explanation.presence.tolist()]
        of_model[model] = explanation
    rows, titles = [], []
    for index, text in enumerate(texts):
        figures = {
            model: (found.scores[index].item(), found.presence[index].item()) for model, found in of_model.items()
        }
        scores = {model: round(score, 4) for model, (score, _) in figures.items()}
        presence = {model: present for model, (_, present) in figures.items()}
        rows.append({"text": text, "scores": scores, "presence": presence})
        notes = [f"{presence_word(present)} · score {score:.2f}" for score, present in figures.values()]
        titles.append(f"{text}\n{', '.join(notes)}")
    sheet = comparison_sheet(drawn, columns, titles, words, colormap=options.colormap, dpi=options.dpi)
    save_figure(sheet, options.output, options.dpi)
    if options.json:
        report = {"image": options.image, "picture": str(options.output), "texts": rows}
        echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    echo(f"{printable(options.image)} -> {printable(options.output)}")
    width = max(len(printable(text)) for text in texts)
    for row in rows:
        columns = [
            f"{row['scores'][model]:+.4f}  {presence_column(row['presence'][model], MIN_PRESENCE)}"
            for model in of_model
        ]
        echo(f"  {printable(row['text']):<{width}}  {'  '.join(columns)}")


def _open(options: argparse.Namespace):
    """Returns the image, the mask of each text that is a class of the data set, if there is one, and the templates."""
    from ..data.segmentation import load_segmentation
    from ..images import load_image
    from ..utils.files import check_outputs

    if (options.dataset is None) != (options.data_root is None):
        raise ValueError(
            f"Expected --dataset and --data-root together, got {options.dataset or options.data_root} alone: add the other."
        )
    if options.dataset is None:
        return load_image(options.image), {}, options.templates
    dataset = load_segmentation(options.dataset, options.data_root, options.split, options.overrides)
    names = (options.image, Path(options.image).stem)
    sample = next((sample for sample in dataset if sample.name in names), None)
    if sample is None or (os.path.isfile(options.image) and not sample.image_path.samefile(options.image)):
        raise ValueError(
            f"Expected IMAGE to be one of {options.data_root}, such as {dataset[0].name}, got {options.image}: name one of them."
        )
    check_outputs([options.output], [sample.image_path, *dataset.annotation_paths])
    ids = dict(zip(dataset.class_names, dataset.labels))
    texts = options.texts or [dataset.class_names[label - 1] for label in sample.labels]
    truths = {text: sample.mask(ids[text]) == ids[text] for text in texts if text in ids}
    return sample.image, truths, options.templates or dataset.templates


def _explain(options: argparse.Namespace, image, texts: list[str], templates, target_size: tuple[int, int]):
    """Yields model name, method and explanation for each model and method, under a progress bar."""
    from tqdm import tqdm

    from ..explainers.localizer import explain

    seen = {
        "templates": templates,
        "target_sizes": [target_size],
        "size": options.image_size,
        "refine": options.refine,
    }
    models, methods = options.models or ["embedded"], list(dict.fromkeys(options.methods))
    count = len(models) * len(methods)
    with tqdm(total=count, unit="method", delay=2, disable=count == 1) as bar:
        for name in models:
            model = load_silently(name, options)
            for method in methods:
                yield name, method, explain(model, [image], texts, method, **seen)[0]
                bar.update()


def _shrunk(mask, image):
    """Resizes a boolean mask to the size of the drawn image, as zeros and ones."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST), dtype=float)
