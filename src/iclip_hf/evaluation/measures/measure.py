"""What a measure is, and what it gets of an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ...data.segmentation import SegmentationSample
from ...similarity import resize_and_normalize
from ..metrics import ClassMeans
from ..results import measured, rounded


@dataclass
class EvaluatedImage:
    """One image of a data set on its way through an evaluation. T is the number of classes that it shows, K that of the data set."""

    index: int  # position in the data set
    sample: SegmentationSample
    pixel_values: torch.Tensor  # (1, 3, H, W), prepared
    scores: torch.Tensor | None = None  # (K,), cosines with all classes, if a measure needs scores
    presence: torch.Tensor | None = None  # (K,), likewise
    raw_maps: dict[str, torch.Tensor] = field(default_factory=dict)  # by method, (T, h, w), if a measure needs maps
    outputs: dict[str, Any] = field(
        default_factory=dict
    )  # what `Measure.forward` returned, by the name of the measure

    @cached_property
    def masks(self) -> np.ndarray:
        """The mask of each shown class, `(T, height, width)`."""
        masks = [self.sample.mask(label) for label in self.sample.labels]
        return np.array(masks, np.min_scalar_type(self.sample.void)).reshape(-1, *self.sample.size)

    def heatmaps(self, method: str, is_reversed: bool) -> torch.Tensor:
        """Returns the maps of a method at the size of the image, stretched to [0, 1], `(T, height, width)`."""
        return resize_and_normalize(self.raw_maps[method], self.sample.size, is_reversed)


class Measure(ABC):
    """
    A measure of maps or scores over a data set. The parameters of a subclass are its options.

    [`evaluate`] calls `prepare` once, then for each batch of images of one shape `forward` in the thread of the model, for each image and
    method `count` in any thread, then in the order of images `add_counts` of the sums, and at the end `report` with the sums of all
    processes.

    Attributes:
        name (`str`): its name in `measures=` and `--measures`.
        needs (`frozenset`): what it needs of each image: `"scores"`, `"maps"`.
        scores (`dict`): for each score of `report` that tables show, its heading and number of digits.
        by_method (`bool`): whether methods differ in it. Otherwise `count` is called once for each image, with the method None.
        image_size (`dict`, *optional*): a `size` of the processor that the measure prefers.
        metric (`type`): class of the sums, with `add_counts` and `merge`.
        row (`str`): name of the score of a class in its row, if `report` is the default.
        totals (`dict`): for each method, the sums.
    """

    name: str
    needs: frozenset[str] = frozenset()
    scores: dict[str, tuple[str, int]]
    by_method = True
    image_size: dict[str, int] | None = None
    metric: type
    row: str

    def prepare(self, run) -> None:
        """Prepares for the data set and methods of an [`~evaluate.EvaluationRun`]. Raises `ValueError` if these cannot be measured."""
        self.run = run
        self.totals = {method: self.new_totals() for method in (run.methods if self.by_method else [None])}

    def new_totals(self):
        """Returns empty sums; a `metric` by default."""
        return self.metric()

    def forward(self, images: list[EvaluatedImage]) -> list[Any]:
        """Runs the model on images of one shape, if the measure needs more than `needs` offers. Returns one result for each."""
        return [None] * len(images)

    @abstractmethod
    def count(self, image: EvaluatedImage, method: str | None, heatmaps: torch.Tensor | None) -> list[tuple]:
        """
        Counts one image. `heatmaps` are those of [`EvaluatedImage.heatmaps`], if the measure needs maps. Returns the arguments of some
        calls of `add_counts` of the sums.
        """

    def report(self, method: str | None) -> tuple[dict, dict[int, dict]]:
        """
        Returns the scores of a method, and for each class id a row of scores. A score without data is None; `left_out` is the
        number of items without a score, by reason. By default the score of `metric` with the measure's name, and its classes as `row`.
        """
        scores = self.totals[method].compute()
        reported = {self.name: measured(scores[self.name.lower()]), "left_out": scores["left_out"]}
        return reported, {label: {self.row: score} for label, score in scores["per_class"].items()}

    def protocol(self) -> dict:
        """Returns what is needed to repeat the measurement."""
        return {}

    def cells(self, reported: dict) -> list[str]:
        """Formats the `scores` of a method for a table."""
        return [rounded(reported[name], digits) for name, (_, digits) in self.scores.items()]


class MeansMeasure(Measure):
    """
    A measure whose scores are means over the images of a class, then over the classes. A score that is NaN is left out. A subclass
    implements `measure` if it runs the model itself, and otherwise `count`, which returns `(scores, label)` of each shown class.

    Attributes:
        columns (`tuple`): the names of the F scores of a pair of an image and a class; those of `scores` if not given.
    """

    needs = frozenset({"maps"})
    metric = ClassMeans
    columns: tuple = ()

    def prepare(self, run) -> None:
        super().prepare(run)
        self.columns = self.columns or tuple(self.scores)

    def measure(self, image: EvaluatedImage) -> dict[str, torch.Tensor]:
        """Returns the scores `(T, F)` of each method for an image that shows a class."""
        return {}

    def forward(self, images: list[EvaluatedImage]) -> list[dict[str, np.ndarray]]:
        found = [self.measure(image) if image.sample.labels else {} for image in images]
        return [{method: part.double().cpu().numpy() for method, part in of_image.items()} for of_image in found]

    def count(self, image: EvaluatedImage, method: str, heatmaps: torch.Tensor) -> list[tuple]:
        return list(zip(image.outputs[self.name].get(method, ()), image.sample.labels))

    def named(self, values: np.ndarray | None) -> dict:
        """Names F scores; None for those without data."""
        values = [None] * len(self.columns) if values is None else map(measured, values)
        return dict(zip(self.columns, values))

    def report(self, method: str) -> tuple[dict, dict[int, dict]]:
        means = self.totals[method].compute()
        left_out = np.zeros(len(self.columns), int) if means["left_out"] is None else means["left_out"]
        counted = {"pairs": means["pairs"], "left_out": {"no_value": int(left_out.max(initial=0))}}
        rows = {label: self.named(values) for label, values in means["per_class"].items()}
        return self.named(means["means"]) | counted, rows
