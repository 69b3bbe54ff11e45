"""Stuff contrast: whether the map of a text of the background, such as "sky", marks the background."""

from __future__ import annotations

from statistics import fmean

from ..metrics import RegionRanking
from .measure import RegionMeasure


class StuffContrast(RegionMeasure):
    """
    The share of a class's own pixels that its map ranks above the pixels of the other classes in the image, in percent, see
    [`RegionRanking`]: the mean over the classes of the background (`stuff_contrast`) and of objects (`thing_contrast`).

    50 is chance. Unlike text contrast, it takes one map at a time. So a map of saliency, which does not depend on the text, is above
    50 for things and equally far below for stuff; only both figures together tell a good map. Rows: `ranking`. For data sets that
    name the background.
    """

    name = "stuff_contrast"
    figures = {"stuff_contrast": ("stuff contrast %", 2), "thing_contrast": ("thing contrast %", 2)}
    metric = RegionRanking

    def prepare(self, run) -> None:
        if not run.dataset.stuff:
            raise ValueError(
                f"Expected a data set that names the background for {self.name}, got {run.dataset.name!r}: use camvid, coco_stuff, "
                "ade20k or cityscapes."
            )
        super().prepare(run)

    def report(self, method: str) -> tuple[dict, dict[int, dict]]:
        scores, stuff = self.totals[method].compute(), self.run.dataset.stuff

        def mean(is_stuff: bool) -> float | None:
            values = [score for label, score in scores["per_class"].items() if (label in stuff) == is_stuff]
            return fmean(values) if values else None

        figures = {"stuff_contrast": mean(True), "thing_contrast": mean(False), "left_out": scores["left_out"]}
        return figures, {label: {"ranking": score} for label, score in scores["per_class"].items()}

    def protocol(self) -> dict:
        return {
            "stuff_contrast": "P(M_i at i > M_i at j) for classes i, j of an image, ties half; mean over a class's images and "
            "partners, then over the classes of each kind"
        }
