"""What a measure is, and what it gets of an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any

import numpy as np
import torch

from ...data.segmentation import SegmentationSample
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

    def pairs(self, heatmaps: torch.Tensor) -> Iterator[tuple]:
        """Returns map, mask and label of each shown class."""
        return zip(heatmaps, self.masks, self.sample.labels)


class Measure(ABC):
    """
    A measure of maps or scores over a data set. The parameters of a subclass are its options, and its attributes.

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
        rows (`dict`): for each score in the row of a class, its name in `compute` of the sums, if `report` is the default.
        definition (`dict`): what `protocol` says besides the options.
        totals (`dict`): for each method, the sums.
    """

    name: str
    needs: frozenset[str] = frozenset()
    scores: dict[str, tuple[str, int]]
    by_method = True
    image_size: dict[str, int] | None = None
    metric: type
    rows: dict[str, str]
    definition: dict[str, Any] = {}

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
        Counts one image. `heatmaps` are the maps of the method at the size of the image, stretched to [0, 1], `(T, height, width)`, if the
        measure needs maps. Returns the arguments of some calls of `add_counts` of the sums.
        """

    def report(self, method: str | None) -> tuple[dict, dict[int, dict]]:
        """
        Returns the scores of a method, and for each class id a row of scores. A score without data is None; `left_out` is the
        number of items without a score, by reason. By default `scores` and `rows` as `metric` computes them.
        """
        found = self.totals[method].compute()
        reported = {name: measured(found[name.lower()]) for name in self.scores}
        rows = {label: {row: found[name][label] for row, name in self.rows.items()} for label in found["per_class"]}
        return {**reported, "left_out": found["left_out"]}, rows

    def protocol(self) -> dict:
        """Returns what is needed to repeat the measurement."""
        return {option: getattr(self, option) for option in signature(type(self)).parameters} | self.definition

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
    columns: tuple = ()

    def new_totals(self) -> ClassMeans:
        self.columns = self.columns or tuple(self.scores)
        return ClassMeans(len(self.columns))

    def measure(self, image: EvaluatedImage) -> dict[str, torch.Tensor]:
        """Returns the scores `(T, F)` of each method for an image that shows a class."""
        return {}

    def forward(self, images: list[EvaluatedImage]) -> list[dict[str, np.ndarray]]:
        found = [self.measure(image) if image.sample.labels else {} for image in images]
        return [{method: part.double().cpu().numpy() for method, part in of_image.items()} for of_image in found]

    def count(self, image: EvaluatedImage, method: str, heatmaps: torch.Tensor) -> list[tuple]:
        return list(zip(image.outputs[self.name].get(method, ()), image.sample.labels))

    def named(self, values: np.ndarray) -> dict:
        """Names F scores; None for those without data."""
        return dict(zip(self.columns, map(measured, values)))

    def report(self, method: str) -> tuple[dict, dict[int, dict]]:
        found = self.totals[method].compute()
        counted = {"pairs": found["pairs"], "left_out": {"no_value": int(found["left_out"].max(initial=0))}}
        rows = {label: self.named(values) for label, values in found["per_class"].items()}
        return self.named(found["means"]) | counted, rows
