"""What a measure is, and what it sees of an image."""

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
    seen: dict[str, Any] = field(default_factory=dict)  # what `Measure.see` returned, by the name of the measure

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

    [`evaluate`] calls `prepare` once, then for each batch of images of one shape `see` in the thread of the model, for each image and
    method `count` in any thread, then in the order of images `add_counts` of the sums, and at the end `report` with the sums of all
    processes.

    Attributes:
        name (`str`): its name in `measures=` and `--measures`.
        needs (`frozenset`): what it needs of each image: `"scores"`, `"maps"`.
        figures (`dict`): for each figure of `report` that tables show, its heading and number of digits.
        by_method (`bool`): whether methods differ in it. Otherwise `count` is called once for each image, with the method None.
        image_size (`dict`, *optional*): a `size` of the processor that the measure prefers.
        metric (`type`): class of the sums, with `add_counts` and `merge`.
        row (`str`): name of the score of a class in its row, if `report` is the default.
        totals (`dict`): for each method, the sums.
    """

    name: str
    needs: frozenset[str] = frozenset()
    figures: dict[str, tuple[str, int]]
    by_method = True
    image_size: dict[str, int] | None = None
    metric: type
    row: str

    def prepare(self, run) -> None:
        """
        Prepares for the data set and methods of an [`~evaluate.EvaluationRun`]. Raises `ValueError` if these cannot be measured, and
        `NotImplementedError` if the class lacks an attribute or a method.
        """
        needed = {"metric": "new_totals", "row": "report"}  # an attribute that the default of a method needs
        needed = [name for name, method in needed.items() if getattr(type(self), method) is getattr(Measure, method)]
        if missing := [name for name in ("name", "figures", *needed) if not hasattr(self, name)]:
            raise NotImplementedError(
                f"Expected {type(self).__name__} to define {', '.join(missing)}, got none: see the attributes of Measure."
            )
        self.run = run
        self.totals = {method: self.new_totals() for method in (run.methods if self.by_method else [None])}

    def new_totals(self):
        """Returns empty sums; a `metric` by default."""
        return self.metric()

    def see(self, images: list[EvaluatedImage]) -> list[Any]:
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
        Returns the figures of a method, and for each class id a row of figures. A figure without data is None; `left_out` is the
        number of items without a figure, by reason. By default the score of `metric` with the measure's name, and its classes as `row`.
        """
        scores = self.totals[method].compute()
        figures = {self.name: measured(scores[self.name.lower()]), "left_out": scores["left_out"]}
        return figures, {label: {self.row: score} for label, score in scores["per_class"].items()}

    def protocol(self) -> dict:
        """Returns what is needed to repeat the measurement."""
        return {}

    def cells(self, figures: dict) -> list[str]:
        """Formats the `figures` of a method for a table."""
        return [rounded(figures[name], digits) for name, (_, digits) in self.figures.items()]


class MeansMeasure(Measure):
    """
    A measure whose figures are means over the images of a class, then over the classes. A figure that is NaN is left out. A subclass
    implements `measure` if it runs the model itself, and otherwise `count`, which returns `(figures, label)` of each shown class.

    Attributes:
        columns (`tuple`): the names of the F figures of a pair of an image and a class; those of `figures` if not given.
    """

    needs = frozenset({"maps"})
    metric = ClassMeans
    columns: tuple = ()

    def prepare(self, run) -> None:
        own = type(self)
        if own.measure is MeansMeasure.measure and own.count is MeansMeasure.count:
            raise NotImplementedError(f"Expected {own.__name__} to define measure or count, got neither: define one.")
        super().prepare(run)
        self.columns = self.columns or tuple(self.figures)

    def measure(self, image: EvaluatedImage) -> dict[str, torch.Tensor]:
        """Returns the figures `(T, F)` of each method for an image that shows a class."""
        return {}

    def see(self, images: list[EvaluatedImage]) -> list[dict[str, np.ndarray]]:
        figures = [self.measure(image) if image.sample.labels else {} for image in images]
        return [{method: part.double().cpu().numpy() for method, part in found.items()} for found in figures]

    def count(self, image: EvaluatedImage, method: str, heatmaps: torch.Tensor) -> list[tuple]:
        return list(zip(image.seen[self.name].get(method, ()), image.sample.labels))

    def named(self, values: np.ndarray | None) -> dict:
        """Names F figures; None for those without data."""
        values = [None] * len(self.columns) if values is None else map(measured, values)
        return dict(zip(self.columns, values))

    def report(self, method: str) -> tuple[dict, dict[int, dict]]:
        means = self.totals[method].compute()
        left_out = np.zeros(len(self.columns), int) if means["left_out"] is None else means["left_out"]
        counted = {"pairs": means["pairs"], "left_out": {"no_value": int(left_out.max(initial=0))}}
        rows = {label: self.named(values) for label, values in means["per_class"].items()}
        return self.named(means["means"]) | counted, rows


def check_positive(**numbers: int | None) -> None:
    """Raises `ValueError` unless all numbers that are given are at least 1."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"Expected {name} to be at least 1, got {number}: correct it.")


def check_image(pixel_values: torch.Tensor) -> None:
    """Raises `ValueError` unless `pixel_values` is one image `(C, H, W)`."""
    if pixel_values.ndim != 3 or 0 in pixel_values.shape:
        raise ValueError(
            f"Expected pixel_values (C, H, W) of one image, got {tuple(pixel_values.shape)}: pass one image."
        )
