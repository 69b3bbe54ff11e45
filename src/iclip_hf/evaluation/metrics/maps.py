"""
Metrics of maps against masks. This module does not import torch.

- mMIoU (Eq. 7): overlap at the best threshold.
- mFMB (Eq. 8): mean of the map on the object minus its mean elsewhere.
- Text contrast: whether the maps of different texts differ.
- Stuff contrast: whether the map of stuff, such as "sky", marks its pixels.
- Pointing game: whether the highest pixel lies on the object.
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..functional import (
    NUM_COUNTS,
    THRESHOLDS,
    batch_items,
    contrast_counts,
    pointing_shares,
    region_means,
    threshold_counts,
)
from .metric import CannotMeasure, ClassMeans, EvaluatedImage, Metric, mean


if TYPE_CHECKING:
    import torch


class MaskMetric(Metric):
    """
    A metric of maps and masks, computed from counts of each item. A subclass can be a module of `evaluate`, see
    [`~evaluate_modules.MetricModule`].

    Args:
        ignore_index (`int`, defaults to 255): pixels of the mask with this value are ignored. [`evaluate_model`] takes
            the value of the data set.
    """

    count_item: Callable[..., np.ndarray]  # takes the arguments of `update` and `ignore_index`
    reasons: tuple[str, ...]  # why items are left out, in the order of the checks
    map_dimensions = 2  # of the maps of one item

    def __init__(self, ignore_index: int = 255):
        super().__init__()
        self.ignore_index = ignore_index

    def update(self, maps, mask, class_ids) -> None:
        """
        Adds one image-class pair as for [`threshold_counts`], or one image as for [`contrast_counts`]; or a batch of
        them, with one more dimension in front: maps, masks and class ids.
        """
        for item in batch_items(maps, mask, class_ids, self.map_dimensions):
            self.add_counts(self.count_item(*item, self.ignore_index), item[-1])

    @abstractmethod
    def add_counts(self, counts: np.ndarray, class_ids) -> None:
        """Adds one item by its counts from `count_item`."""

    def item_counts(self, name: str) -> dict:
        """Returns the number of items in the mean, by this name, and `left_out`."""
        num_items = self.state.num_items
        return {name: num_items["counted"], "left_out": {reason: num_items[reason] for reason in self.reasons}}


class ImageClassMetric(MaskMetric):
    """
    A [`MaskMetric`] whose items are image-class pairs.

    Args:
        aggregate (`str`, defaults to `"image"`): `"image"` averages over the images of a class, `"pixel"` pools the
            pixels of all its images. Both then average over the classes.
        ignore_index (`int`): see [`MaskMetric`].
    """

    definition = "maps: bicubic to the image's size, then min-max; foreground is M > t for t in 0, 0.01, ..., 1"

    def __init__(self, aggregate: str = "image", ignore_index: int = 255):
        if aggregate not in ("image", "pixel"):
            raise ValueError(f"aggregate is 'image' or 'pixel', not {aggregate!r}.")
        super().__init__(ignore_index)
        self.aggregate = aggregate

    @abstractmethod
    def summands(self, counts: np.ndarray) -> np.ndarray:
        """Returns what the counts of an image-class pair add to the sums of the class."""

    def add_counts(self, counts: np.ndarray, class_id: int) -> None:
        has_background, has_foreground = counts[:, 0] > 0
        applies = {
            "all_void": not (has_background or has_foreground),
            "no_foreground": not has_foreground,
            "no_background": not has_background,
        }
        reason = next((reason for reason in self.reasons if applies[reason]), None)
        self.state.num_items[reason or "counted"] += 1
        if reason is None:
            self.state.add(self.summands(counts), operator.index(class_id))


class MeanMaxIoU(ImageClassMetric):
    """
    mMIoU (Eq. 7): the IoU of M > t at the best threshold t of each class, averaged over the classes. With
    `aggregate="pixel"`, intersections and unions are pooled over the images of a class. An image without foreground is
    left out of the class.

    Example:
        >>> metric = MeanMaxIoU()
        >>> metric.update(np.array([[0.9, 0.2], [0.6, 0.1]]), np.array([[7, 0], [0, 255]]), 7)
        >>> metric.compute()["mmiou"]
        100.0
    """

    name = "mMIoU"
    columns = {"mmiou": ("mMIoU %", 2), "floor": ("floor %", 2)}
    legend = (
        "mMIoU: overlap of map and object, the IoU at the best threshold of each class. Floor: the mMIoU of a map "
        "that marks every pixel."
    )
    rows = {"IoU": "per_class", "threshold": "thresholds"}
    reasons = ("all_void", "no_foreground")
    count_item = staticmethod(threshold_counts)

    def summands(self, counts: np.ndarray) -> np.ndarray:
        """
        Returns numerator and denominator of the IoU, `(2, 102)` float64: for a map that marks every pixel, then at
        each threshold.
        """
        background, foreground = counts
        intersection, union = foreground, foreground[0] + background
        if self.aggregate == "image":
            intersection, union = intersection / union, np.ones(NUM_COUNTS)
        return np.array([intersection, union], dtype=np.float64)

    def compute(self) -> dict:
        """
        Returns the scores of all image-class pairs so far.

        - **mmiou** -- mean over classes, percent (NaN without any).
        - **per_class** -- {class id: best IoU in percent}.
        - **thresholds** -- {class id: its best threshold, the lowest if several are equal}.
        - **floor** -- the same mean for a map that marks every pixel, percent.
        - **pairs**, **left_out** -- number of image-class pairs in the mean, and {reason: number} of the others.
        """
        # For each class, the IoU of a map that marks every pixel, then the IoU at each threshold.
        iou = {class_id: 100 * sums[0] / sums[1] for class_id, sums in sorted(self.state.sums.items())}
        # The lowest of equal thresholds, also if rounding of the sums makes them differ slightly.
        best_index = {class_id: int((curve[1:] >= curve[1:].max() - 1e-9).argmax()) for class_id, curve in iou.items()}
        per_class = {class_id: float(iou[class_id][1 + index]) for class_id, index in best_index.items()}
        return {
            "mmiou": mean(per_class.values()),
            "per_class": per_class,
            "thresholds": {class_id: float(THRESHOLDS[index]) for class_id, index in best_index.items()},
            "floor": mean(float(curve[0]) for curve in iou.values()),
            **self.item_counts("pairs"),
        }


class MeanForegroundMinusBackground(ImageClassMetric):
    """
    mFMB (Eq. 8): mean of the map over the foreground minus its mean over the background, averaged over the classes. An
    image without foreground or without background is left out of the class. Reversed maps, 1 - M, have the negative
    score.

    Example:
        >>> metric = MeanForegroundMinusBackground()
        >>> metric.update(np.array([[1.0, 0.25], [0.0, 0.5]]), np.array([[7, 0], [0, 255]]), 7)
        >>> metric.compute()["mfmb"]
        0.875
    """

    name = "mFMB"
    columns = {"mfmb": ("mFMB", 4)}
    legend = "mFMB: mean of the map on the object minus its mean elsewhere, -1 to 1."
    rows = {"FMB": "per_class"}
    reasons = ("all_void", "no_foreground", "no_background")
    count_item = staticmethod(region_means)

    def summands(self, counts: np.ndarray) -> np.ndarray:
        """Returns weight and weighted mean of background and of foreground, `(2, 2)` float64."""
        weights, means = counts.T if self.aggregate == "pixel" else (np.ones(2), counts[:, 1])
        return np.stack([weights, weights * means], axis=1)

    def compute(self) -> dict:
        """
        Returns the scores of all image-class pairs so far.

        - **mfmb** -- mean over classes, in [-1, 1] (NaN without any).
        - **per_class** -- {class id: difference}.
        - **pairs**, **left_out** -- number of image-class pairs in the mean, and {reason: number} of the others.
        """
        means = {class_id: sums[:, 1] / sums[:, 0] for class_id, sums in sorted(self.state.sums.items())}
        per_class = {class_id: float(foreground - background) for class_id, (background, foreground) in means.items()}
        return {"mfmb": mean(per_class.values()), "per_class": per_class, **self.item_counts("pairs")}


class TextContrast(MaskMetric):
    """
    Text contrast: how well the map of a class ranks the pixels of this class above those of the other classes in the
    image.

    The value of a class is the mean of c_ij, see [`contrast_counts`], over all its images and partners. The score is
    the mean over the classes. The score is exactly 50 for maps that do not depend on the text. If maps have the score
    x, the reversed maps have 100 - x. An image is left out if no two of its classes are partners.

    Example:
        >>> metric = TextContrast()
        >>> maps, mask = np.array([[[0.9, 0.2]], [[0.1, 0.5]]]), np.array([[7, 8]])
        >>> metric.update(maps, mask, [7, 8])
        >>> metric.compute()["text_contrast"]
        100.0
    """

    name = "text_contrast"
    columns = {"text_contrast": ("text contrast %", 2)}
    legend = (
        "Text contrast: how often the map of a class is brighter on its own pixels than on those of another class in "
        "the image. 50 for a map that does not depend on the text."
    )
    rows = {"contrast": "per_class"}
    definition = (
        "c_ij = (P(M_i at i > M_i at j) + P(M_j at j > M_j at i)) / 2 for classes i, j of an image, ties half, "
        "without pixels of both; mean over a class's images and partners, then over classes"
    )
    reasons = ("fewer_than_two_classes",)
    map_dimensions = 3
    count_item = staticmethod(contrast_counts)

    def add_counts(self, counts: np.ndarray, class_ids: Sequence[int]) -> None:
        paired = [(class_id, sums) for class_id, sums in zip(class_ids, counts.T) if sums[0]]  # with a partner
        self.state.num_items["counted" if paired else "fewer_than_two_classes"] += 1
        for class_id, sums in paired:
            self.state.add(sums, operator.index(class_id))

    def update_from(self, image: EvaluatedImage, method: str, maps: torch.Tensor) -> None:
        self.update(maps, image.masks, image.sample.class_ids)

    def compute(self) -> dict:
        """
        Returns the scores of all images so far.

        - **text_contrast** -- mean over classes, percent (NaN without any image).
        - **per_class** -- {class id: mean over images and partners, percent}.
        - **images**, **left_out** -- number of images in the mean, and {"fewer_than_two_classes": number of the
          others}.
        """
        sums = sorted(self.state.sums.items())
        per_class = {class_id: float(100 * total / count) for class_id, (count, total) in sums}
        return {"text_contrast": mean(per_class.values()), "per_class": per_class, **self.item_counts("images")}


class StuffContrast(TextContrast):
    """
    Stuff contrast and thing contrast: how well the map of a class of stuff, or of things, ranks the pixels of this
    class above those of the other classes in the image.

    The value of a class is the mean of P(M_i at i > M_i at j), ties half, over all its images and partners. Each
    probability is the area under the ROC curve of the pixels of two classes. The scores are the means over the classes
    of stuff and over the classes of things, in percent. 50 is chance.

    Text contrast compares the maps of two classes; these scores take one map. A map of saliency, which does not depend
    on the text, is above 50 for things and below 50 for stuff. Good maps have both scores above 50.

    Args:
        stuff: the ids of the classes of stuff, such as sky. [`evaluate_model`] takes those of the data set.
        ignore_index (`int`): see [`MaskMetric`].
    """

    name = "stuff_contrast"
    columns = {"stuff_contrast": ("stuff contrast %", 2), "thing_contrast": ("thing contrast %", 2)}
    legend = (
        "Stuff and thing contrast: how well the map of a class of stuff (such as sky) or things ranks its own pixels "
        "above those of another class. 50 is chance."
    )
    rows = {"ranking": "per_class"}
    definition = (
        "P(M_i at i > M_i at j) for classes i, j of an image, ties half; mean over a class's images and partners, "
        "then over the classes of each kind"
    )
    count_item = staticmethod(partial(contrast_counts, both_maps=False))

    def __init__(self, stuff: Collection[int] = (), ignore_index: int = 255):
        super().__init__(ignore_index)
        self.stuff = stuff

    def prepare(self, run) -> None:
        if not run.dataset.stuff:
            raise CannotMeasure(
                f"{self.name} needs a data set with classes of stuff, such as sky and road, and {run.dataset.name} "
                "has none."
            )
        super().prepare(run)
        self.stuff = run.dataset.stuff

    def compute(self) -> dict:
        """
        Returns the scores of all images so far.

        - **stuff_contrast**, **thing_contrast** -- mean over the classes of each kind, percent (NaN without any).
        - **per_class**, **images**, **left_out** -- see [`TextContrast`].
        """
        scores = super().compute()
        del scores["text_contrast"]
        by_kind = {}
        for name, is_stuff in (("stuff_contrast", True), ("thing_contrast", False)):
            values = [score for class_id, score in scores["per_class"].items() if (class_id in self.stuff) == is_stuff]
            by_kind[name] = mean(values)
        return by_kind | scores


class PointingGame(ClassMeans):
    """
    The pointing game and the energy-based pointing game, in percent, see [`pointing_shares`]. `foreground` is the
    score of a constant map in both.
    """

    name = "pointing_game"
    columns = {
        "pointing_game": ("pointing game %", 1),
        "energy_pointing_game": ("energy-based %", 1),
        "foreground": ("a constant map %", 1),
    }
    legend = (
        "Pointing game: share of maps whose highest pixel is on the object. Energy-based: share of the sum of the "
        "map that is on the object. A constant map has the share of the object in the image. All are means over the "
        "classes."
    )

    def __init__(self, ignore_index: int = 255):
        super().__init__()
        self.ignore_index = ignore_index

    def update(self, heatmap, mask, class_id: int) -> None:
        """Adds one image-class pair, or a batch of them. Arguments and errors are those of [`pointing_shares`]."""
        for item in batch_items(heatmap, mask, class_id, dimensions=2):
            super().update(100 * pointing_shares(*item, self.ignore_index), operator.index(item[-1]))
