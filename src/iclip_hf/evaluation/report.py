"""The report of an evaluation: the pictures and numbers of each image-class pair."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..backends.embedded import embedded_folder
from ..data.layouts import DATASETS
from ..model.presence import is_present
from ..plots.report import ReportFolder
from .functional import threshold_counts
from .metrics.metric import EvaluatedImage, Metric
from .results import EvaluationResult, scores_by_metric


if TYPE_CHECKING:
    import torch


class _ReportState:
    """The names and numbers that the page of a report shows of some images."""

    def __init__(self):
        self.names: dict[int, str] = {}  # by image
        self.presences: dict[int, np.ndarray] = {}  # (K,) by image; empty for a model without presence
        self.areas: dict[tuple[int, int], float] = {}  # share of the image that a class covers, by image and class id
        # IoU at each threshold, by image and class id, then by method
        self.overlaps: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def merge(self, other: _ReportState) -> None:
        self.names.update(other.names)
        self.presences.update(other.presences)
        self.areas.update(other.areas)
        for image_and_class, overlaps in other.overlaps.items():
            self.overlaps.setdefault(image_and_class, {}).update(overlaps)


class Report(Metric):
    """
    A metric without a score, which saves the pictures of an evaluation in a new or empty folder and keeps the numbers
    of its page.
    """

    name = "report"
    needs = frozenset({"maps", "presence"})
    state_type = _ReportState

    def __init__(self, folder: str | Path):
        super().__init__()
        self.report_folder = ReportFolder(folder)

    def update(
        self, image: EvaluatedImage, method: str, heatmap: torch.Tensor, mask: np.ndarray, class_id: int
    ) -> None:
        """Adds the map of a method for a class, an id in 1..K."""
        inside = mask == class_id
        background, foreground = threshold_counts(heatmap, mask, class_id, image.sample.void)
        overlaps = foreground[1:] / np.maximum(foreground[0] + background[1:], 1)
        self.state.overlaps[image.index, class_id] = {method: overlaps.astype(np.float32)}
        self.state.areas[image.index, class_id] = inside.mean()
        method_index = self.run.methods.index(method)
        unrefined = image.explanations[method].unrefined_maps
        if unrefined is not None:
            unrefined = unrefined[list(image.sample.class_ids).index(class_id)]
        self.report_folder.save_map(
            image.index, class_id - 1, image.sample.image, heatmap, inside, method_index, unrefined
        )

    def update_from(self, image: EvaluatedImage, method: str, maps: torch.Tensor) -> None:
        if method == self.run.methods[0]:  # once for each image
            self.report_folder.save_image(image.index, image.sample.image)
            self.state.names[image.index] = image.sample.name
            if image.presence is not None:
                self.state.presences[image.index] = image.presence.numpy()
        for heatmap, mask, class_id in image.pairs(maps):
            self.update(image, method, heatmap, mask, class_id)

    def compute(self) -> dict:
        """Returns no score."""
        return {}

    def write(self, result: EvaluationResult, methods: list[str]) -> Path:
        """Writes the page of a result, with the IoU at the best threshold of each class, and returns its path."""
        state, class_names = self.state, self.run.dataset.class_names
        best = self._best_thresholds(methods)
        rows, alarms = [], []
        for index, class_id in sorted(state.overlaps):
            overlaps = state.overlaps[index, class_id]
            ious = [_rounded(overlaps[method][best[method, class_id]]) for method in methods]
            area = _rounded(state.areas[index, class_id])
            # Not rounded, because the page tells by it whether the class counts as present.
            presence = float(state.presences[index][class_id - 1]) if index in state.presences else None
            rows.append([index, class_id - 1, area, presence, ious])
        for index, presences in sorted(state.presences.items()):
            for class_index in np.flatnonzero(is_present(presences)).tolist():
                if (index, class_index + 1) not in state.overlaps:
                    alarms.append([index, class_index, _rounded(presences[class_index])])
        protocol = result.protocol
        names = [state.names.get(index, "") for index in range(max(state.names, default=-1) + 1)]
        model = "the embedded model" if protocol["model"] == embedded_folder().name else protocol["model"]
        return self.report_folder.write_page(
            title=f"Maps of {model} on {DATASETS[protocol['dataset']['name']].title}",
            images=names,
            texts=class_names,
            methods=methods,
            value="IoU",
            rows=rows,
            refined=self.run.engine.refine,
            alarms=alarms,
            tables=[part for table in result.tables for part in table.split("\n\n")],
            scores=_scores_of_classes(result, len(class_names)),
        )

    def _best_thresholds(self, methods: list[str]) -> dict[tuple[str, int], int]:
        """Returns for each method and class the index of the threshold with the highest mean IoU."""
        sums = {}
        for (_, class_id), overlaps in self.state.overlaps.items():
            for method in methods:
                sums[method, class_id] = sums.get((method, class_id), 0) + overlaps[method].astype(np.float64)
        return {method_and_class: int(total.argmax()) for method_and_class, total in sums.items()}


def _scores_of_classes(result: EvaluationResult, num_classes: int) -> dict[str, dict[str, list[float | None]]]:
    """
    Returns the scores that classes have, by name and method, with a number or None for each class. The IoU, which the
    pictures show, comes first. A score that is None for all classes is left out.
    """
    scores: dict[str, dict[str, list[float | None]]] = {}
    for method, rows in result.per_class.items():
        for row in rows:
            if row["id"] == 0:  # the background has no pictures
                continue
            for metric, class_scores in scores_by_metric(row).items():
                for name, score in class_scores.items():
                    numbers = scores.setdefault(f"{name} ({metric})", {}).setdefault(method, [None] * num_classes)
                    numbers[row["id"] - 1] = score
    measured = [name for name, by_method in scores.items() if {*chain(*by_method.values())} != {None}]
    return {name: scores[name] for name in sorted(measured, key=lambda name: not name.startswith("IoU"))}


def _rounded(value: float) -> float:
    return round(float(value), 4)
