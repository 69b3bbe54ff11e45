"""mMIoU (Eq. 7), overlap of map and object at the best threshold, and mFMB (Eq. 8), mean of the map on the object minus its mean elsewhere."""

import torch

from ..metrics import MeanForegroundMinusBackground, MeanMaxIoU
from ..results import measured
from .measure import EvaluatedImage, Measure


class PairMeasure(Measure):
    """
    A measure of pairs of a map and the mask of its class.

    Args:
        aggregate (`str`): `"image"` or `"pixel"`, see [`MeanMaxIoU`].
    """

    needs = frozenset({"maps"})

    def __init__(self, aggregate: str = "image"):
        self.aggregate = aggregate

    def new_totals(self):
        return self.metric(self.aggregate)

    def count(self, image: EvaluatedImage, method: str, heatmaps: torch.Tensor) -> list[tuple]:
        pairs = zip(heatmaps, image.masks, image.sample.labels)
        return [(self.metric.count(*pair, image.sample.void), pair[-1]) for pair in pairs]

    def protocol(self) -> dict:
        return {
            "aggregate": self.aggregate,
            "maps": "bicubic to the image's size, then min-max; foreground is M > t for t in 0, 0.01, ..., 1",
        }


class MMIoU(PairMeasure):
    """mMIoU, and as `floor` the mMIoU of a map that marks every pixel, both in percent. Rows: `MIoU` and its best `threshold`."""

    name = "mMIoU"
    scores = {"mMIoU": ("mMIoU %", 2), "floor": ("floor %", 2)}
    metric = MeanMaxIoU

    def report(self, method: str) -> tuple[dict, dict[int, dict]]:
        scores = self.totals[method].compute()
        reported = {"mMIoU": measured(scores["mmiou"]), "floor": measured(scores["floor"]), "pairs": scores["pairs"]}
        best = scores["thresholds"]
        rows = {label: {"MIoU": iou, "threshold": best[label]} for label, iou in scores["per_class"].items()}
        return reported | {"left_out": scores["left_out"]}, rows


class MFMB(PairMeasure):
    """mFMB, in [-1, 1]. Rows: `FMB`."""

    name = "mFMB"
    scores = {"mFMB": ("mFMB", 4)}
    metric = MeanForegroundMinusBackground
    row = "FMB"
