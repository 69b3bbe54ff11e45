"""
Measures of pairs of a map and the mask of its class: mMIoU (Eq. 7), overlap at the best threshold; mFMB (Eq. 8), mean of the map on the
object minus its mean elsewhere; and the pointing game, whether the highest pixel lies on the object.
"""

import torch

from ..metrics import MeanForegroundMinusBackground, MeanMaxIoU, pointing_shares
from .measure import EvaluatedImage, MeansMeasure, Measure


class PairMeasure(Measure):
    """
    A measure whose metric takes pairs.

    Args:
        aggregate (`str`): `"image"` or `"pixel"`, see [`MeanMaxIoU`].
    """

    needs = frozenset({"maps"})
    definition = {"maps": "bicubic to the image's size, then min-max; foreground is M > t for t in 0, 0.01, ..., 1"}

    def __init__(self, aggregate: str = "image"):
        self.aggregate = aggregate

    def new_totals(self):
        return self.metric(self.aggregate)

    def count(self, image: EvaluatedImage, method: str, heatmaps: torch.Tensor) -> list[tuple]:
        return [(self.metric.count(*pair, image.sample.void), pair[-1]) for pair in image.pairs(heatmaps)]


class MMIoU(PairMeasure):
    """mMIoU, and as `floor` the mMIoU of a map that marks every pixel, both in percent. Rows: `MIoU` and its best `threshold`."""

    name = "mMIoU"
    scores = {"mMIoU": ("mMIoU %", 2), "floor": ("floor %", 2)}
    metric = MeanMaxIoU
    rows = {"MIoU": "per_class", "threshold": "thresholds"}

    def report(self, method: str) -> tuple[dict, dict[int, dict]]:
        reported, rows = super().report(method)
        return {**reported, "pairs": self.totals[method].items["counted"]}, rows


class MFMB(PairMeasure):
    """mFMB, in [-1, 1]. Rows: `FMB`."""

    name = "mFMB"
    scores = {"mFMB": ("mFMB", 4)}
    metric = MeanForegroundMinusBackground
    rows = {"FMB": "per_class"}


class PointingGame(MeansMeasure):
    """
    `pointing_game`, `energy_pointing_game` and `foreground`, the score of a constant map in both, in percent, see
    [`pointing_shares`].
    """

    name = "pointing_game"
    scores = {
        "pointing_game": ("pointing game %", 1),
        "energy_pointing_game": ("energy-based %", 1),
        "foreground": ("a constant map %", 1),
    }

    def count(self, image: EvaluatedImage, method: str, heatmaps: torch.Tensor) -> list[tuple]:
        return [(100 * pointing_shares(*pair, image.sample.void), pair[-1]) for pair in image.pairs(heatmaps)]
