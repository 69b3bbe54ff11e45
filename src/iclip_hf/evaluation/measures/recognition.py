"""mAP, recognition by the scores of all classes, and presence, how well it tells the classes that an image shows from the others."""

import numpy as np
import torch

from ...presence import MIN_PRESENCE
from ..metrics import MultiLabelAveragePrecision
from ..results import measured
from .measure import EvaluatedImage, Measure


class AveragePrecision(Measure):
    """Zero-shot multi-label mAP of the cosines, see [`MultiLabelAveragePrecision`]. It is the same for all methods."""

    name = "mAP"
    needs = frozenset({"scores"})
    figures = {"mAP": ("mAP %", 2)}
    by_method = False
    metric = MultiLabelAveragePrecision
    row = "AP"

    def count(self, image: EvaluatedImage, method: None, heatmaps: None) -> list[tuple]:
        return [(image.scores[None], np.isin(self.run.dataset.labels, image.sample.labels)[None])]


class _PresenceSums:
    def __init__(self):
        # For absent and for shown classes: the number of all, and of those with a presence of at least MIN_PRESENCE.
        self.gate = np.zeros((2, 2), np.int64)
        self.ranked = MultiLabelAveragePrecision()

    def add_counts(self, presence: torch.Tensor, shown: np.ndarray) -> None:
        enough = presence.numpy() >= MIN_PRESENCE
        self.gate += [[(shown == which).sum(), (enough & (shown == which)).sum()] for which in (False, True)]
        self.ranked.add_counts(presence, shown)

    def merge(self, other) -> None:
        self.gate += other.gate
        self.ranked.merge(other.ranked)


class Presence(Measure):
    """
    `kept`, the share of the shown classes whose presence is at least `MIN_PRESENCE`, `passed`, the same share of the other classes,
    and the mAP of images ranked by presence, all in percent. They are the same for all methods.
    """

    name = "presence"
    needs = frozenset({"scores"})
    figures = {}  # a line below the table, see `EvaluationResult.table`
    by_method = False
    metric = _PresenceSums

    def count(self, image: EvaluatedImage, method: None, heatmaps: None) -> list[tuple]:
        return [(image.presence[None], np.isin(self.run.dataset.labels, image.sample.labels)[None])]

    def report(self, method: None) -> tuple[dict, dict[int, dict]]:
        totals = self.totals[method]
        passed, kept = (100 * some / all_ if all_ else None for all_, some in totals.gate.tolist())
        ap = measured(totals.ranked.compute()["map"])
        return {"presence": {"min_presence": MIN_PRESENCE, "passed": passed, "kept": kept, "mAP": ap}}, {}
