"""Which rule of competition between texts gives the best segments, if the texts are the classes that an image shows.

    python benchmarks/competitions.py voc21:DATA/voc_layout coco_object:DATA/coco100:train2017

The embedded model, the data set's prompts, only texts that are present. Prints a Markdown table: mIoU with the
background over the images at even and at odd positions, and how many of the shown classes that are present get no
pixel.
"""

import numpy as np
import torch
from measuring import command_line, table

from iclip_hf import load
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.evaluation.argmax import argmax_label_map
from iclip_hf.evaluation.metrics import MeanIoU
from iclip_hf.model.engine import Engine
from iclip_hf.model.label_maps import label_map
from iclip_hf.model.similarity import resize_and_normalize


BACKGROUND = ["sky", "grass", "wall", "road"]


def stretched_maximum(raw_maps, size, present, threshold, background):
    """The text with the highest raw value. The threshold applies to the maximum of all maps, stretched to [0, 1]."""
    classes = torch.arange(len(raw_maps))
    classes[list(background)] = -1
    kept = present | (classes == -1)
    if not kept.any():
        return torch.full(size, -1)
    threshold = None if background else threshold
    return argmax_label_map(raw_maps[kept], size, classes[kept], threshold)[0]


def each_stretched(raw_maps, size, present, threshold, background):
    """The text with the highest map, each stretched to [0, 1]."""
    maps = resize_and_normalize(raw_maps, size)
    maps[~present] = -1
    best, labels = torch.cat([maps, torch.zeros(1, *size)]).max(0)
    return labels.masked_fill((best <= threshold) | torch.isin(labels, torch.tensor(list(background))), -1)


RULES = {"stretched maximum": stretched_maximum, "masks": label_map, "each stretched": each_stretched}


def measure(dataset, refine: bool, background: list[str]) -> list[list]:
    model = load("embedded")
    texts = [text for synonyms in dataset.synonyms for text in synonyms]
    labels = np.array([label for label, names in zip(dataset.class_ids, dataset.synonyms) for _ in names])
    engine = Engine(model, model.processor, templates=dataset.templates, refine=refine)
    all_texts = [*texts, *background]
    folds = {rule: [MeanIoU(max(dataset.class_ids) + 1, True) for _ in range(2)] for rule in RULES}
    without_pixel, num_present = dict.fromkeys(RULES, 0), 0
    explanations = engine.run((sample.image for sample in dataset), all_texts, batch_size=1)
    for position, (sample, explanation) in enumerate(zip(dataset, explanations)):
        shown = np.flatnonzero(np.isin(labels, sample.class_ids))  # indices of the texts of the shown classes
        class_ids = np.append(labels[shown], 0)  # the last one is for pixels without a text, -1
        competing = [*shown.tolist(), *range(len(texts), len(all_texts))]
        present = torch.tensor(explanation.present)[competing]
        present_classes = set(labels[shown][present[: len(shown)].numpy()].tolist())
        num_present += len(present_classes)
        background_indices = range(len(shown), len(competing))
        for rule, compete in RULES.items():
            segments = compete(explanation.raw_maps[competing], sample.size, present, 0.5, background_indices).numpy()
            predicted = class_ids[segments]
            folds[rule][position % 2].update(predicted, sample.label_map)
            without_pixel[rule] += len(present_classes - set(np.unique(predicted).tolist()))
    scores = {rule: [fold.compute()["miou"] for fold in pair] for rule, pair in folds.items()}
    return [
        [rule, *(f"{score:.2f}" for score in scores[rule]), f"{without_pixel[rule]} of {num_present}"]
        for rule in RULES
    ]


def main():
    parser = command_line(__doc__)
    parser.add_argument("data", nargs="+", metavar="NAME:FOLDER[:SPLIT]", help="data sets of load_segmentation")
    rows = []
    for data in parser.parse_args().data:
        dataset = load_segmentation(*data.split(":"))
        forms = {"plain": (False, []), "refined": (True, []), "background texts": (False, BACKGROUND)}
        for form, (refine, background) in forms.items():
            rows += [[dataset.name, form, *row] for row in measure(dataset, refine, background)]
    print(table(["data set", "maps", "rule", "mIoU %, even", "mIoU %, odd", "without a pixel"], rows))


if __name__ == "__main__":
    main()
