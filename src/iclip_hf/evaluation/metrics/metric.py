"""The base classes of metrics, their sums, and the images of an evaluation."""

from __future__ import annotations

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    import torch

    from ...data.mask_formats.sample import SegmentationSample
    from ...model.batches import PreparedImage
    from ...model.explanation import Explanation


@dataclass
class EvaluatedImage:
    """One image of an evaluation, which shows T of the K classes of the data set."""

    index: int  # position in the data set
    sample: SegmentationSample
    prepared: PreparedImage
    scores: torch.Tensor | None = None  # (K,), cosines with all classes, if a metric needs scores
    presence: torch.Tensor | None = None  # (K,), if a metric needs presence
    explanations: dict[str, Explanation] = field(default_factory=dict)  # by method, of T texts, if a metric needs maps
    outputs: dict[str, Any] = field(default_factory=dict)  # by the name of a metric, from `Metric.run_model`

    @cached_property
    def masks(self) -> np.ndarray:
        """
        The mask of each shown class, `(T, height, width)`: the id of the class on its pixels, `void` on ignored
        pixels, and 0 on all others.
        """
        masks = [self.sample.mask(class_id) for class_id in self.sample.class_ids]
        return np.array(masks, np.min_scalar_type(self.sample.void)).reshape(-1, *self.sample.size)

    def pairs(self, maps: torch.Tensor) -> Iterator[tuple]:
        """Returns map, mask and class id of each shown class. `maps` are those of the T shown classes."""
        return zip(maps, self.masks, self.sample.class_ids)


class Sums:
    """
    Sums of arrays, one for each key, such as a class id. The order of the additions changes them by about 1e-12 at
    most.
    """

    def __init__(self):
        self.sums: dict[Hashable, np.ndarray] = {}
        self.num_items = Counter()  # "counted", and for each reason those left out

    def add(self, values: np.ndarray, key: Hashable) -> None:
        self.sums[key] = self.sums.get(key, 0) + values

    def merge(self, other: Sums) -> None:
        self.num_items.update(other.num_items)
        for key, total in other.sums.items():
            self.add(total, key)


class CannotMeasure(ValueError):
    """The data set or the model does not have what a metric measures. An optional metric is then left out."""


class Metric(ABC):
    """
    A metric with `update` and `compute`. The parameters of a subclass are its options, which it keeps as attributes of
    the same names.

    Without [`evaluate_model`], call `update` to add an item, `merge` to add the items of another metric, `compute` for
    the scores, and `reset` to begin again. [`evaluate_model`] calls

    - `prepare` once;
    - `run_model` for each batch of images of one shape, in the thread of the model;
    - `update_from` for each image and method, in any thread, on an empty copy of the metric;
    - `merge` with each of these copies, in the order of the images.

    Attributes:
        name (`str`): its name in `metrics=`, in `--metrics` and in results.
        columns (`dict`): heading and number of decimals of each score of `compute` that tables show. With None as the
            number of decimals, a score is shown as it is.
        legend (`str`): a line below the table that explains the columns.
        rows (`dict`): the scores that each class has, such as `{"IoU": "per_class"}`: the name of a score in the row
            of a class, and its name in `compute`, which returns it as a `dict` by class id.
        needs (`frozenset`): what the metric needs of each image: `"scores"`, `"presence"`, `"maps"`.
        by_method (`bool`): whether the scores depend on the method. Otherwise `update_from` is called once for each
            image, with the method None.
        image_size (`dict`, *optional*): the `size` of the processor that the metric prefers.
        definition (`str`): what the protocol of a result states besides the options.
        optional (`bool`): whether an evaluation leaves the metric out if `prepare` raises [`CannotMeasure`]. The
            metrics of a task are optional.
        ignore_index (`int`): value of ignored pixels in masks. [`evaluate_model`] takes the value of the data set.
        state: what `update` adds to and `merge` merges.
    """

    name: str
    columns: dict[str, tuple[str, int | None]] = {}
    legend = ""
    rows: dict[str, str] = {}
    needs: frozenset[str] = frozenset({"maps"})
    by_method = True
    image_size: dict[str, int] | None = None
    definition = ""
    optional = False
    ignore_index = 255
    state_type: type = Sums

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Removes all items."""
        self.state = self.state_type()

    @abstractmethod
    def update(self, *item) -> None:
        """Adds one item."""

    @abstractmethod
    def compute(self) -> dict:
        """
        Returns the scores of all items so far. A score without data is NaN or None; `left_out` counts items without a
        score, by reason.
        """

    def merge(self, other: Metric) -> None:
        """Adds the items of another metric that has the same options."""
        self.state.merge(other.state)

    def empty(self) -> Metric:
        """Returns a copy without items."""
        other = copy.copy(self)
        other.reset()
        return other

    def prepare(self, run) -> None:
        """
        Prepares for the data set and the methods of an [`~evaluate.EvaluationRun`]. Raises `ValueError` if they do not
        fit.
        """
        self.run, self.ignore_index = run, run.dataset.void

    def run_model(self, images: list[EvaluatedImage]) -> list[Any]:
        """
        Runs the model on images of one shape, for what `needs` does not offer. Returns for each image the output that
        `image.outputs` has in `update_from`.
        """
        return [None] * len(images)

    def update_from(self, image: EvaluatedImage, method: str | None, maps: torch.Tensor | None) -> None:
        """
        Adds one image, by default each of its image-class pairs. If the metric needs maps, `maps` `(T, height, width)`
        are those of the method, resized to the image and stretched to [0, 1].
        """
        for heatmap, mask, class_id in image.pairs(maps):
            self.update(heatmap, mask, class_id)

    def scores_and_rows(self) -> tuple[dict, dict[int, dict]]:
        """Returns the scores of `compute`, with None for NaN, in two parts: of all items, and of each class."""
        scores = self.compute()
        by_name = {name: scores.pop(key) for name, key in self.rows.items()}  # for each name, values by class id
        class_ids = dict.fromkeys(itertools.chain(*by_name.values()))
        rows = {
            class_id: _without_nan({name: values.get(class_id) for name, values in by_name.items()})
            for class_id in class_ids
        }
        return _without_nan(scores), rows

    def settings(self) -> dict:
        """Returns what is needed to repeat the measurement: the options and the definition."""
        options = {option: getattr(self, option) for option in signature(type(self)).parameters}
        return options | ({"definition": self.definition} if self.definition else {})

    def table_scores(self, scores: Mapping) -> list:
        """Returns the scores of a method in the order of `columns`."""
        return [scores[name] for name in self.columns]

    def tables(self, scores: Mapping) -> list[str]:
        """Returns further tables of the scores, in Markdown."""
        return []


class ClassMeans(Metric):
    """
    A metric whose scores are means over the images of a class, then over the classes. A score that is NaN is left out.
    A subclass implements `update_from`, which calls `update` for each shown class.

    Attributes:
        names (`tuple`): the names of the F scores of an image-class pair; those of `columns` if not given.
    """

    names: tuple = ()

    def update(self, scores, class_id: int) -> None:
        """Adds the scores of one image-class pair, F floats."""
        scores = np.asarray(scores, dtype=np.float64)
        known = ~np.isnan(scores)
        self.state.num_items["counted"] += 1
        self.state.add(np.array([known, np.where(known, scores, 0)]), class_id)

    def compute(self) -> dict:
        """
        Returns the scores of all image-class pairs so far: for each name the mean over classes, None without any.

        - **per_class** -- {class id: {name: mean over images}}.
        - **pairs** -- number of image-class pairs.
        - **left_out** -- {"no_value": number of pairs without a value, for the score that most pairs lack}.
        """
        sums, num_scores = self.state.sums, len(self.names or self.columns)
        per_class = {
            class_id: total / np.where(count, count, np.nan) for class_id, (count, total) in sorted(sums.items())
        }
        by_score = np.array([*per_class.values()]).reshape(-1, num_scores).T
        means = np.array([mean(values[~np.isnan(values)]) for values in by_score])
        num_known = sum((count for count, _ in sums.values()), np.zeros(num_scores)).astype(int)
        num_pairs = self.state.num_items["counted"]
        return {
            **self.named(means),
            "per_class": {class_id: self.named(values) for class_id, values in per_class.items()},
            "pairs": num_pairs,
            "left_out": {"no_value": int((num_pairs - num_known).max(initial=0))},
        }

    def scores_and_rows(self) -> tuple[dict, dict[int, dict]]:
        scores = self.compute()
        return scores, scores.pop("per_class")

    def named(self, values: np.ndarray) -> dict:
        """Returns F scores by name, with None for NaN."""
        return dict(zip(self.names or self.columns, map(none_if_nan, values)))


class MeasuredClassMeans(ClassMeans):
    """A [`ClassMeans`] that runs the model itself, in `measure`, and needs nothing else of an image."""

    needs = frozenset()

    @abstractmethod
    def measure(self, image: EvaluatedImage) -> dict[str, torch.Tensor]:
        """Returns the scores `(T, F)` of each method for an image that shows a class."""

    def run_model(self, images: list[EvaluatedImage]) -> list[dict[str, np.ndarray]]:
        outputs = []
        for image in images:
            scores = self.measure(image) if image.sample.class_ids else {}
            outputs.append({method: values.cpu().double().numpy() for method, values in scores.items()})
        return outputs

    def update_from(self, image: EvaluatedImage, method: str, maps: torch.Tensor | None) -> None:
        for scores, class_id in zip(image.outputs[self.name].get(method, ()), image.sample.class_ids):
            self.update(scores, class_id)


def mean(values: Iterable[float]) -> float:
    """Returns the mean; NaN without values."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def _without_nan(scores: Mapping) -> dict:
    """Returns scores by name, with None for NaN."""
    return {name: none_if_nan(score) if isinstance(score, float) else score for name, score in scores.items()}


def none_if_nan(value: float) -> float | None:
    """Converts NaN, which JSON does not have, to None."""
    return None if math.isnan(value) else float(value)
