"""mAP: recognition by the scores of all classes."""

import numpy as np
import torch

from ..metrics import MultiLabelAveragePrecision
from ..results import measured
from .measure import EvaluatedImage, Measure


class AveragePrecision(Measure):
    """Zero-shot multi-label mAP of the cosines, see [`MultiLabelAveragePrecision`]. It is the same for all methods."""

    name = "mAP"
    needs = frozenset({"scores"})
    figures = {"mAP": ("mAP %", 2)}
    by_method = False
    new_totals = MultiLabelAveragePrecision

    def count(self, image: EvaluatedImage, method: None, heatmaps: None) -> tuple[torch.Tensor, np.ndarray]:
        return image.scores[None], np.isin(self.run.dataset.labels, image.sample.labels)[None]

    def add(self, method: None, counts: tuple) -> None:
        self.totals[method].update(*counts)

    def report(self, method: None) -> tuple[dict, dict[int, dict]]:
        scores = self.totals[method].compute()
        figures = {"mAP": measured(scores["map"]), "left_out": scores["left_out"]}
        return figures, {label: {"AP": ap} for label, ap in scores["per_class"].items()}
