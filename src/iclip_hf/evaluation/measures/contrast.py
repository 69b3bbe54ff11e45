"""Text contrast, whether the maps of different texts differ, and stuff contrast, whether a map of "sky" marks the background."""

from __future__ import annotations

from statistics import fmean

import torch

from .. import metrics
from .measure import EvaluatedImage, Measure


class RegionMeasure(Measure):
    """A measure that compares the maps of an image on the regions of its classes."""

    needs = frozenset({"maps"})

    def count(self, image: EvaluatedImage, method: str, heatmaps: torch.Tensor) -> list[tuple]:
        sample = image.sample
        return [(self.metric.count(heatmaps, image.masks, sample.labels, sample.void), sample.labels)]


class TextContrast(RegionMeasure):
    """Text contrast in percent; 50 for maps that do not depend on the text. Rows: `text_contrast`."""

    name = "text_contrast"
    scores = {"text_contrast": ("text contrast %", 2)}
    metric = metrics.TextContrast
    rows = {"text_contrast": "per_class"}
    definition = {
        "text_contrast": "c_ij = (P(M_i at i > M_i at j) + P(M_j at j > M_j at i)) / 2 for classes i, j of an image, ties half, "
        "without pixels of both; mean over a class's images and partners, then over classes"
    }


class StuffContrast(RegionMeasure):
    """
    The share of a class's own pixels that its map ranks above the pixels of the other classes in the image, in percent, see
    [`~metrics.RegionRanking`]: the mean over the classes of the background (`stuff_contrast`) and of objects (`thing_contrast`).

    50 is chance. Unlike text contrast, it takes one map at a time. So a map of saliency, which does not depend on the text, is above
    50 for things and equally far below for stuff; only both scores together tell a good map. Rows: `ranking`. For data sets
    with classes of stuff.
    """

    name = "stuff_contrast"
    scores = {"stuff_contrast": ("stuff contrast %", 2), "thing_contrast": ("thing contrast %", 2)}
    metric = metrics.RegionRanking
    definition = {
        "stuff_contrast": "P(M_i at i > M_i at j) for classes i, j of an image, ties half; mean over a class's images and "
        "partners, then over the classes of each kind"
    }

    def prepare(self, run) -> None:
        if not run.dataset.stuff:
            raise ValueError(
                f"{self.name} needs a data set with classes of stuff, such as sky and road, and {run.dataset.name} has none."
            )
        super().prepare(run)

    def report(self, method: str) -> tuple[dict, dict[int, dict]]:
        scores, stuff = self.totals[method].compute(), self.run.dataset.stuff

        def mean(is_stuff: bool) -> float | None:
            values = [score for label, score in scores["per_class"].items() if (label in stuff) == is_stuff]
            return fmean(values) if values else None

        reported = {"stuff_contrast": mean(True), "thing_contrast": mean(False), "left_out": scores["left_out"]}
        return reported, {label: {"ranking": score} for label, score in scores["per_class"].items()}
