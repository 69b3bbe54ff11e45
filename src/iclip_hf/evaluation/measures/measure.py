"""What a measure is, and what it sees of an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ...data.segmentation import SegmentationSample
from ...similarity import resize_and_normalize, reverse
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
        heatmaps = resize_and_normalize(self.raw_maps[method], self.sample.size)
        return reverse(heatmaps) if is_reversed else heatmaps  # stretching the negative would round differently


class Measure(ABC):
    """
    A measure of maps or scores over a data set. The parameters of a subclass are its options.

    [`evaluate`] calls `prepare` once, then for each batch of images of one shape `see` in the thread of the model, for each image and
    method `count` in any thread, `add` with the result in the order of images, and at the end `report` with the sums of all processes.

    Attributes:
        name (`str`): its name in `measures=` and `--measures`.
        needs (`frozenset`): what it needs of each image: `"scores"`, `"maps"`.
        figures (`dict`): for each figure of `report` that tables show, its heading and number of digits.
        by_method (`bool`): whether methods differ in it. Otherwise `count` is called once for each image, with the method None.
        image_size (`dict`, *optional*): a `size` of the processor that the measure prefers.
        totals (`dict`): for each method, sums with a function `merge`.
    """

    name: str
    needs: frozenset[str] = frozenset()
    figures: dict[str, tuple[str, int]]
    by_method = True
    image_size: dict[str, int] | None = None

    def prepare(self, run) -> None:
        """Prepares for the data set and methods of an [`~evaluate.EvaluationRun`]. Raises `ValueError` if these cannot be measured."""
        self.run = run
        self.totals = {method: self.new_totals() for method in (run.methods if self.by_method else [None])}

    @abstractmethod
    def new_totals(self):
        """Returns empty sums."""

    def see(self, images: list[EvaluatedImage]) -> list[Any]:
        """Runs the model on images of one shape, if the measure needs more than `needs` offers. Returns one result for each."""
        return [None] * len(images)

    @abstractmethod
    def count(self, image: EvaluatedImage, method: str | None, heatmaps: torch.Tensor | None) -> Any:
        """Counts one image. `heatmaps` are those of [`EvaluatedImage.heatmaps`], if the measure needs maps."""

    @abstractmethod
    def add(self, method: str | None, counts: Any) -> None:
        """Adds the result of `count` to the totals."""

    @abstractmethod
    def report(self, method: str | None) -> tuple[dict, dict[int, dict]]:
        """
        Returns the figures of a method, and for each class id a row of figures. A figure without data is None; `left_out` is the
        number of items without a figure, by reason.
        """

    def protocol(self) -> dict:
        """Returns what is needed to repeat the measurement."""
        return {}

    def cells(self, figures: dict) -> list[str]:
        """Formats the `figures` of a method for a table."""
        return [rounded(figures[name], digits) for name, (_, digits) in self.figures.items()]


class PairMeasure(Measure):
    """
    A measure of pairs of a map and the mask of its class.

    Args:
        aggregate (`str`): `"image"` or `"pixel"`, see [`MeanMaxIoU`].
    """

    needs = frozenset({"maps"})
    metric: type  # of `evaluation.metrics`

    def __init__(self, aggregate: str = "image"):
        self.aggregate = aggregate

    def new_totals(self):
        return self.metric(self.aggregate)

    def count(self, image: EvaluatedImage, method: str, heatmaps: torch.Tensor) -> list[tuple]:
        pairs = zip(heatmaps, image.masks, image.sample.labels)
        return [(self.metric.count(*pair, image.sample.void), pair[-1]) for pair in pairs]

    def add(self, method: str, counts: list[tuple]) -> None:
        for of_pair in counts:
            self.totals[method].add_counts(*of_pair)

    def protocol(self) -> dict:
        return {
            "aggregate": self.aggregate,
            "maps": "bicubic to the image's size, then min-max; foreground is M > t for t in 0, 0.01, ..., 1",
        }


class RegionMeasure(Measure):
    """A measure that compares the maps of an image on the regions of its classes."""

    needs = frozenset({"maps"})
    metric: type

    def new_totals(self):
        return self.metric()

    def count(self, image: EvaluatedImage, method: str, heatmaps: torch.Tensor) -> tuple:
        sample = image.sample
        return self.metric.count(heatmaps, image.masks, sample.labels, sample.void), sample.labels

    def add(self, method: str, counts: tuple) -> None:
        self.totals[method].add_counts(*counts)


class MeansMeasure(Measure):
    """
    A measure whose figures are means over the images of a class, then over the classes. A figure that is NaN is left out.

    Attributes:
        columns (`tuple`): the names of the F figures of a pair of an image and a class.
    """

    needs = frozenset({"maps"})
    new_totals = ClassMeans
    columns: tuple

    def see(self, images: list[EvaluatedImage]) -> list[dict[str, np.ndarray] | None]:
        return [
            {method: figures.double().cpu().numpy() for method, figures in self.measure(image).items()}
            if image.sample.labels
            else None
            for image in images
        ]

    def measure(self, image: EvaluatedImage) -> dict[str, torch.Tensor]:
        """Returns the figures `(T, F)` of each method for an image that shows a class."""
        raise NotImplementedError

    def count(self, image: EvaluatedImage, method: str, heatmaps: torch.Tensor) -> tuple[tuple, np.ndarray]:
        seen = image.seen[self.name]
        return image.sample.labels, [] if seen is None else seen[method]

    def add(self, method: str, counts: tuple) -> None:
        for label, figures in zip(*counts):
            self.totals[method].update(figures, label)

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
