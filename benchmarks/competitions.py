"""Which competition of texts makes the best segments, on images with the names of the classes that they show.

    python benchmarks/competitions.py voc21:DATA/voc_layout coco_object:DATA/coco100:train2017

The embedded model, the data set's prompts and the presence gate. Prints a Markdown table: mIoU with the background
over the images at even and at odd positions, and how many present classes that pass the gate have no pixel.
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
    """The highest raw value, with a threshold on the stretched maximum of all maps."""
    classes = torch.arange(len(raw_maps))
    classes[list(background)] = -1
    kept = present | (classes == -1)
    if not kept.any():
        return torch.full(size, -1)
    threshold = None if background else threshold
    return argmax_label_map(raw_maps[kept], size, classes[kept], threshold)[0]


def each_stretched(raw_maps, size, present, threshold, background):
    """The highest map, each stretched to [0, 1]."""
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
    asked_texts = [*texts, *background]
    folds = {rule: [MeanIoU(max(dataset.class_ids) + 1, True) for _ in range(2)] for rule in RULES}
    hidden, asked = dict.fromkeys(RULES, 0), 0
    explanations = engine.run((sample.image for sample in dataset), asked_texts, batch_size=1)
    for position, (sample, explanation) in enumerate(zip(dataset, explanations)):
        rows = np.flatnonzero(np.isin(labels, sample.class_ids))
        names = np.append(labels[rows], 0)  # the last for the label -1
        rows = [*rows.tolist(), *range(len(texts), len(asked_texts))]
        present = torch.tensor(explanation.present)[rows]
        shown = set(names[:-1][present[: len(names) - 1].numpy()].tolist())
        asked += len(shown)
        others = range(len(names) - 1, len(rows))
        for rule, compete in RULES.items():
            found = compete(explanation.raw_maps[rows], sample.size, present, 0.5, others).numpy()
            predicted = names[found]
            folds[rule][position % 2].update(predicted, sample.label_map)
            hidden[rule] += len(shown - set(np.unique(predicted).tolist()))
    scores = {rule: [fold.compute()["miou"] for fold in pair] for rule, pair in folds.items()}
    return [[rule, *(f"{score:.2f}" for score in scores[rule]), f"{hidden[rule]} of {asked}"] for rule in RULES]


def main():
    parser = command_line(__doc__)
    parser.add_argument("data", nargs="+", metavar="NAME:FOLDER[:SPLIT]", help="data sets of load_segmentation")
    rows = []
    for data in parser.parse_args().data:
        dataset = load_segmentation(*data.split(":"))
        forms = {"plain": (False, []), "refined": (True, []), "background texts": (False, BACKGROUND)}
        for form, options in forms.items():
            rows += [[dataset.name, form, *row] for row in measure(dataset, *options)]
    print(table(["data set", "maps", "rule", "mIoU %, even", "mIoU %, odd", "without a pixel"], rows))


if __name__ == "__main__":
    main()
