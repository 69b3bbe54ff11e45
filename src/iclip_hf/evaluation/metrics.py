"""mMIoU (Eq. 7), mFMB (Eq. 8) and multi-label mAP: from maps and masks to small mergeable sums to scores.

One *pair* is one image and one class: a map (H, W) in [0, 1], a label mask (H, W) of integers, and the class id whose
pixels are the foreground. Pixels equal to `ignore_index` count nowhere, all others are background. Every sum is an
integer, so the result is the same to the last bit for any order of the pairs and any way of merging partial results.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from fractions import Fraction

import numpy as np


# The grid of mMIoU. A pixel is predicted where M > t, strictly, with t rounded to the map's dtype.
THRESHOLDS = np.arange(101) / 100

_LEVELS = 1 + len(THRESHOLDS)  # "every pixel", then one level a threshold
_VOID_CODE = 255  # above the 2 * _LEVELS codes of background and foreground
_BLOCK = 2**16  # pixels at a time: small temporaries stay cached, those of a whole map are mapped in anew each time
_UNIT = 2**53  # fixed point of a ratio in [0, 1]: the grid on which float64 has both x and 1 - x


def _to_numpy(array) -> np.ndarray:
    return array.detach().cpu().numpy() if hasattr(array, "detach") else np.asarray(array)


def _class_id(value, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"Expected `{name}` to be an integer class id, got {value!r}.") from None


def _pair_blocks(heatmap, mask, label, ignore_index):
    """Checks one pair, then yields its map values, foreground and void, flat and a block at a time."""
    heatmap, mask = _to_numpy(heatmap), _to_numpy(mask)
    label, ignore_index = _class_id(label, "label"), _class_id(ignore_index, "ignore_index")
    if label == ignore_index:
        raise ValueError(f"Expected `label` to be a class, got {label}, which is the `ignore_index`.")
    if heatmap.dtype.kind in "biu":
        heatmap = heatmap.astype(np.float32)  # a hard map of zeros and ones; other integers are refused below
    if heatmap.dtype not in (np.float16, np.float32, np.float64):
        raise TypeError(f"Expected a map of float16, float32 or float64, got {heatmap.dtype}.")
    if mask.dtype.kind not in "biu":
        raise TypeError(f"Expected a label mask of integers, got {mask.dtype}.")
    if heatmap.ndim != 2 or heatmap.shape != mask.shape or not heatmap.size:
        raise ValueError(
            f"Expected a map and a label mask of one shape (H, W), got {heatmap.shape} and {mask.shape}. "
            "Resize the map to the mask."
        )
    low, high = heatmap.min(), heatmap.max()
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise ValueError(f"Expected map values in [0, 1], got {low} to {high}. Min-max normalise or clip the map.")
    heatmap, mask = heatmap.ravel(), mask.ravel()
    for start in range(0, heatmap.size, _BLOCK):
        block = mask[start : start + _BLOCK]
        yield heatmap[start : start + _BLOCK], block == label, block == ignore_index


def threshold_counts(heatmap, mask, label: int, ignore_index: int = 255) -> np.ndarray:
    """Counts the pixels above every threshold, in one pass over the map.

    Args:
        heatmap: (H, W) array or tensor of float16, float32 or float64 in [0, 1]; integers 0 and 1 are taken too.
        mask: (H, W) array or tensor of integers; pixels equal to `label` are foreground.
        label: the class id.
        ignore_index: mask value of the pixels that count nowhere.

    Returns:
        (2, 102) int64, background and foreground pixels: all of them, then those with M > 0, M > 0.01, ..., M > 1.
        So at `THRESHOLDS[i]` the false positives are `[0, 1 + i]` and the true positives `[1, 1 + i]`.

    Raises:
        TypeError: the map is not of a dtype above, or the mask, `label` or `ignore_index` not of integers.
        ValueError: shapes differ or are not (H, W), map values are NaN or outside [0, 1], `label` is `ignore_index`.
    """
    histogram = np.zeros(256, dtype=np.int64)
    for values, foreground, void in _pair_blocks(heatmap, mask, label, ignore_index):
        # The bin of a value is the number of thresholds below it: the nearest grid index, or one more. An exact
        # comparison decides, because index / 100 in the map's dtype is the threshold rounded to that dtype.
        nearest = values * 100
        np.rint(nearest, out=nearest)
        codes = nearest.astype(np.uint8)
        nearest /= 100
        codes += values > nearest
        codes += foreground * np.uint8(_LEVELS)
        np.copyto(codes, _VOID_CODE, where=void)
        histogram += np.bincount(codes, minlength=len(histogram))
    bins = histogram[: 2 * _LEVELS].reshape(2, _LEVELS)
    return bins[:, ::-1].cumsum(axis=1)[:, ::-1]


def _fixed_point_sum(values: np.ndarray, region: np.ndarray) -> int:
    """Sum of a block's values over a region, in units of 2**-53, each value rounded as 1 - M rounds it."""
    if values.dtype == np.float64:
        steps = np.rint(values * 2.0**53)
        high = np.floor(steps / 2**27)  # float64 sums 27-bit halves exactly
        low = steps - high * 2**27
        return int(high.sum(where=region)) * 2**27 + int(low.sum(where=region))
    steps = np.rint(values.astype(np.float32, copy=False) * 2.0**24)
    return int(steps.sum(where=region, dtype=np.float64)) * 2 ** (53 - 24)


def region_means(heatmap, mask, label: int, ignore_index: int = 255) -> np.ndarray:
    """Means of the map over the background and over the foreground, in fixed point.

    Values are rounded to multiples of 2**-24 (float16, float32) or 2**-53 (float64), as the subtraction 1 - M rounds
    them, and then summed exactly. So the means of 1 - M, taken in float32 or float64, are exactly 1 minus those of M.

    Arguments and errors are those of `threshold_counts`.

    Returns:
        (2, 2) int64, background and foreground: number of pixels, and mean in units of 2**-53 (0 of no pixel).
    """
    pixels, totals = [0, 0], [0, 0]
    for values, foreground, void in _pair_blocks(heatmap, mask, label, ignore_index):
        for row, region in enumerate((~(foreground | void), foreground)):
            pixels[row] += int(np.count_nonzero(region))
            totals[row] += _fixed_point_sum(values, region)
    return np.array([(n, round(Fraction(total, n)) if n else 0) for n, total in zip(pixels, totals)], dtype=np.int64)


def average_precision(scores: np.ndarray, presence: np.ndarray) -> float:
    """Area under precision over recall as a step function, ties taken together, as scikit-learn defines it.

    Args:
        scores: (B,) floats, higher for more likely.
        presence: (B,) zeros and ones, at least one of them 1.

    Returns:
        Average precision in [0, 1].
    """
    order = np.argsort(-scores)
    scores = scores[order]
    cuts = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # last item of each group of ties
    true_positives = presence[order].cumsum()[cuts]
    precision = true_positives / (cuts + 1)
    return float((np.diff(true_positives, prepend=0) * precision).sum() / true_positives[-1])


def _mean(values) -> float:
    """Mean that does not depend on the order; NaN of nothing."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


class _PairMetric:
    """Sums over pairs, a few integers a class. A subclass says how counts become sums and sums become scores.

    Args:
        aggregate: `"image"` takes each image's ratio and averages over the images of a class; `"pixel"` pools the
            pixels of a class over its images. Classes are averaged in both.
        ignore_index: mask value of the pixels that count nowhere.
    """

    _reasons: tuple[str, ...]  # why a pair has no value, tried in this order

    def __init__(self, aggregate: str = "image", ignore_index: int = 255):
        if aggregate not in ("image", "pixel"):
            raise ValueError(f"Expected `aggregate` to be one of ('image', 'pixel'), got {aggregate!r}.")
        self.aggregate = aggregate
        self.ignore_index = _class_id(ignore_index, "ignore_index")
        self._sums: dict[int, np.ndarray] = {}
        self._pairs = 0
        self._left_out = Counter()

    def update(self, heatmap, mask, label: int) -> None:
        """Adds one pair. Arguments and errors are those of `threshold_counts`."""
        self.add_counts(self.count(heatmap, mask, label, self.ignore_index), label)

    def add_counts(self, counts: np.ndarray, label: int) -> None:
        """Adds one pair by its counts, which `count` has taken before, perhaps in another process."""
        background, foreground = (int(pixels) for pixels in counts[:, 0])
        missing = {
            "all_void": not (background or foreground),
            "no_foreground": not foreground,
            "no_background": not background,
        }
        reason = next((reason for reason in self._reasons if missing[reason]), None)
        if reason:
            self._left_out[reason] += 1
        else:
            self._pairs += 1
            self._add(_class_id(label, "label"), self._summands(counts))

    def merge(self, other: _PairMetric) -> None:
        """Adds all pairs of another metric. ValueError if it is of another type or has other settings."""
        mine, theirs = ((type(metric), metric.aggregate, metric.ignore_index) for metric in (self, other))
        if mine != theirs:
            raise ValueError(f"Expected a metric like this one, {mine}, got {theirs}.")
        self._pairs += other._pairs
        self._left_out.update(other._left_out)
        for label, sums in other._sums.items():
            self._add(label, sums)

    def _add(self, label: int, sums: np.ndarray) -> None:
        self._sums[label] = self._sums.get(label, 0) + sums

    def _pair_numbers(self) -> dict:
        return {"pairs": self._pairs, "left_out": {reason: self._left_out[reason] for reason in self._reasons}}


class MeanMaxIoU(_PairMetric):
    """mMIoU (Eq. 7): the IoU of M > t at the best threshold t of each class, averaged over the classes.

    With `aggregate="image"` the IoU of a class at one threshold is the mean of its images' IoU; with `"pixel"`
    intersections and unions are pooled over its images. A pair without foreground is left out.

    Example:
        >>> metric = MeanMaxIoU()
        >>> metric.update(np.array([[0.9, 0.2], [0.6, 0.1]]), np.array([[7, 0], [0, 255]]), label=7)
        >>> metric.compute()["mmiou"]
        100.0
    """

    _reasons = ("all_void", "no_foreground")
    count = staticmethod(threshold_counts)

    def _summands(self, counts: np.ndarray) -> np.ndarray:
        """(2, 102) Python integers, numerator and denominator of the IoU of every pixel and at each threshold."""
        background, foreground = counts
        iou = np.stack([foreground, foreground[0] + background])
        if self.aggregate == "image":
            iou = np.stack([np.rint(iou[0] / iou[1] * _UNIT).astype(np.int64), np.full(_LEVELS, _UNIT)])
        return iou.astype(object)

    def compute(self) -> dict:
        """Returns the scores of all pairs so far.

        - **mmiou** -- mean over classes, percent (NaN without any pair).
        - **per_class** -- {class id: best IoU in percent}.
        - **thresholds** -- {class id: its best threshold, the lowest of equals}.
        - **floor** -- the same mean when every pixel is predicted, percent.
        - **pairs**, **left_out** -- number of pairs in the mean, and {reason: number} of those that are not.
        """
        iou = {label: 100 * (sums[0] / sums[1]).astype(float) for label, sums in sorted(self._sums.items())}
        best = {label: int(curve[1:].argmax()) for label, curve in iou.items()}
        per_class = {label: float(iou[label][1 + i]) for label, i in best.items()}
        return {
            "mmiou": _mean(per_class.values()),
            "per_class": per_class,
            "thresholds": {label: float(THRESHOLDS[i]) for label, i in best.items()},
            "floor": _mean(float(curve[0]) for curve in iou.values()),
            **self._pair_numbers(),
        }


class MeanForegroundMinusBackground(_PairMetric):
    """mFMB (Eq. 8): mean of the map over the foreground minus its mean over the background, averaged over the classes.

    With `aggregate="image"` the difference is averaged over the images of a class; with `"pixel"` both means are over
    the pixels of all its images. A pair without foreground or without background is left out. The score of the
    reversed maps 1 - M, taken in float32 or float64, is exactly the negative.

    Example:
        >>> metric = MeanForegroundMinusBackground()
        >>> metric.update(np.array([[1.0, 0.25], [0.0, 0.5]]), np.array([[7, 0], [0, 255]]), label=7)
        >>> metric.compute()["mfmb"]
        0.875
    """

    _reasons = ("all_void", "no_foreground", "no_background")
    count = staticmethod(region_means)

    def _summands(self, counts: np.ndarray) -> np.ndarray:
        """(2, 2) Python integers, background and foreground: weight, and weighted mean in units of 2**-53."""
        weights = counts[:, 0] if self.aggregate == "pixel" else (1, 1)
        return np.array([(int(w), int(w) * int(mean)) for w, mean in zip(weights, counts[:, 1])], dtype=object)

    def compute(self) -> dict:
        """Returns the scores of all pairs so far.

        - **mfmb** -- mean over classes, in [-1, 1] (NaN without any pair).
        - **per_class** -- {class id: its difference}.
        - **pairs**, **left_out** -- number of pairs in the mean, and {reason: number} of those that are not.
        """
        per_class = {}
        for label, sums in sorted(self._sums.items()):
            background, foreground = (Fraction(total, weight) for weight, total in sums)
            per_class[label] = float((foreground - background) / _UNIT)
        return {"mfmb": _mean(per_class.values()), "per_class": per_class, **self._pair_numbers()}


class MultiLabelAveragePrecision:
    """mAP: average precision of each class over the images, averaged over the classes that some image shows.

    Keeps the scores, nine bytes an image and class, because a ranking cannot be summed. Column k is class id k + 1.

    Example:
        >>> metric = MultiLabelAveragePrecision()
        >>> metric.update(np.array([[0.9, 0.1], [0.8, 0.3]]), np.array([[1, 0], [0, 1]]))
        >>> metric.compute()["map"]
        100.0
    """

    def __init__(self):
        self._scores: list[np.ndarray] = []
        self._presence: list[np.ndarray] = []

    def update(self, scores, presence) -> None:
        """Adds images.

        Args:
            scores: (B, K) array or tensor, higher for more likely.
            presence: (B, K) array or tensor of zeros and ones.

        Raises:
            ValueError: shapes are not one (B, K), K is not that of earlier images, NaN scores, presence not 0 or 1.
        """
        scores, presence = np.array(_to_numpy(scores), dtype=np.float64), _to_numpy(presence)
        if scores.ndim != 2 or scores.shape != presence.shape:
            raise ValueError(
                f"Expected scores and presence of one shape (B, K), got {scores.shape} and {presence.shape}."
            )
        self._check_classes(scores.shape[1])
        if np.isnan(scores).any():
            raise ValueError("Expected scores that can be ranked, got NaN.")
        if not np.isin(presence, (0, 1)).all():
            raise ValueError(f"Expected presence of 0 or 1, got values from {presence.min()} to {presence.max()}.")
        self._scores.append(scores)
        self._presence.append(presence.astype(bool))

    def merge(self, other: MultiLabelAveragePrecision) -> None:
        """Adds all images of another metric. ValueError if it has another number of classes."""
        if other._scores:
            self._check_classes(other._scores[0].shape[1])
        self._scores.extend(other._scores)
        self._presence.extend(other._presence)

    def _check_classes(self, number: int) -> None:
        if self._scores and number != self._scores[0].shape[1]:
            raise ValueError(f"Expected {self._scores[0].shape[1]} classes as before, got {number}.")

    def compute(self) -> dict:
        """Returns the scores of all images so far.

        - **map** -- mean over classes, percent (NaN without any positive).
        - **per_class** -- {class id: average precision in percent}.
        - **images**, **left_out** -- number of images, and {"no_positive": number of classes that no image shows}.
        """
        if not self._scores:
            return {"map": math.nan, "per_class": {}, "images": 0, "left_out": {"no_positive": 0}}
        scores, presence = np.concatenate(self._scores), np.concatenate(self._presence)
        shown = np.flatnonzero(presence.any(axis=0))
        per_class = {int(k) + 1: 100 * average_precision(scores[:, k], presence[:, k]) for k in shown}
        return {
            "map": _mean(per_class.values()),
            "per_class": per_class,
            "images": len(scores),
            "left_out": {"no_positive": scores.shape[1] - len(shown)},
        }
