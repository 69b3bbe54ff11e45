"""Faults at the door of metrics. See faults.py."""

from collections.abc import Callable

import numpy as np
import torch
from faults import WORKS, Cases, test_of_cases

from iclip_hf.evaluation.metrics import (
    MeanForegroundMinusBackground,
    MeanMaxIoU,
    TextContrast,
)


CASES = Cases()


HEATMAP, LABELS = (
    np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4),
    np.array([[1] * 4, [0] * 4, [255] * 4], np.uint8),
)
BAD_PAIRS = {
    "map above 1": (HEATMAP * 1.01, LABELS, 1),
    "map below 0": (HEATMAP - 0.01, LABELS, 1),
    "map with NaN": (np.where(HEATMAP == 1, np.nan, HEATMAP), LABELS, 1),
    "map with infinity": (np.where(HEATMAP == 1, np.inf, HEATMAP), LABELS, 1),
    "map of 0 to 255": ((HEATMAP * 255).astype(np.uint8), LABELS, 1),
    "complex map": (HEATMAP.astype(complex), LABELS, 1),
    "map of strings": (HEATMAP.astype(str), LABELS, 1),
    "map of another size": (HEATMAP[:2], LABELS, 1),
    "map turned round": (HEATMAP.T, LABELS, 1),
    "map of one dimension": (HEATMAP[0], LABELS[0], 1),
    "batch of maps": (HEATMAP[None], LABELS[None], 1),
    "empty map": (HEATMAP[:0], LABELS[:0], 1),
    "map that is none": (None, LABELS, 1),
    "ragged map": ([[0.1], [0.2, 0.3]], LABELS, 1),
    "mask of floats": (HEATMAP, LABELS.astype(np.float32), 1),
    "mask of strings": (HEATMAP, LABELS.astype(str), 1),
    "mask of colours": (HEATMAP, np.stack([LABELS] * 3, -1), 1),
    "mask that is none": (HEATMAP, None, 1),
    "class that is void": (HEATMAP, LABELS, 255),
    "class with a fraction": (HEATMAP, LABELS, 1.5),
    "class by name": (HEATMAP, LABELS, "dog"),
    "no class": (HEATMAP, LABELS, None),
}
BORNE_PAIRS = {
    "all void": (HEATMAP, np.full_like(LABELS, 255), 1),
    "no foreground": (HEATMAP, np.zeros_like(LABELS), 1),
    "no background": (HEATMAP, np.ones_like(LABELS), 1),
    "a class beyond the mask's numbers": (HEATMAP, LABELS, 10**6),
    "signed mask": (HEATMAP, LABELS.astype(np.int64) - 1, -1),
    "hard map": ((HEATMAP > 0.5), LABELS, 1),
    "constant map": (HEATMAP * 0, LABELS, 1),
    "one pixel": (HEATMAP[:1, :1], LABELS[:1, :1], 1),
    "half precision": (HEATMAP.astype(np.float16), LABELS, 1),
    "tensors": (torch.from_numpy(HEATMAP), torch.from_numpy(LABELS), 1),
}


def measured(metric) -> Callable:
    def run(world, folder, pair):
        metric_of_pair = metric()
        metric_of_pair.update(*pair)
        return metric_of_pair.compute()

    return run


def measured_as_image(world, folder, pair):
    heatmap, mask, label = pair
    return measured(TextContrast)(world, folder, ([heatmap], mask, [label]))


for door, run in {
    "MeanMaxIoU": measured(MeanMaxIoU),
    "MeanForegroundMinusBackground": measured(MeanForegroundMinusBackground),
    "TextContrast": measured_as_image,
}.items():
    CASES.add(door, BAD_PAIRS, run)
    CASES.add(door, BORNE_PAIRS, run, WORKS)


test_a_fault_is_borne_or_refused_in_one_clear_sentence = test_of_cases(CASES)
