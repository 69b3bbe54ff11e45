"""
mMIoU (Eq. 7), mFMB (Eq. 8), text contrast, the pointing game and multi-label mAP. Maps and masks become sums that can be merged.

A *pair* is one image and one class: a map (H, W) in [0, 1], a label mask (H, W) of integers, and the class id whose pixels are the
foreground. Pixels equal to `ignore_index` are ignored, all others are background. Text contrast compares all pairs of an image.
Sums are float64, so results agree to about 1e-12 for any order of adding and merging.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import numpy as np

from ..utils.arrays import to_numpy


# The thresholds of mMIoU. A pixel is predicted where M > t, with t rounded to the map's dtype.
THRESHOLDS = np.arange(101) / 100

_LEVELS = 1 + len(THRESHOLDS)  # all pixels, then those above each threshold
_VOID_CODE = 255  # above the 2 * _LEVELS codes of background and foreground
_BLOCK = 2**16  # pixels in one block, whose temporary arrays fit into the processor's cache
_LEVELS_OF_CONTRAST = 2**12  # a power of two, so that scaling a float32 map has no rounding error


def _check_map(heatmap) -> np.ndarray:
    """Returns a map as an array of floats. Raises `ValueError` unless its values are in [0, 1], because others are counted wrongly."""
    heatmap = to_numpy(heatmap)
    if heatmap.dtype.kind != "f":
        heatmap = heatmap.astype(np.float32)  # a map of zeros and ones
    if heatmap.size and not (heatmap.min() >= 0 and heatmap.max() <= 1):  # NaN fails too
        raise ValueError(f"Map values must be in [0, 1], not {heatmap.min()} to {heatmap.max()}: normalise the map.")
    return heatmap


def _check_label(label: int, ignore_index: int) -> None:
    """Raises `ValueError` if the pixels of a class are ignored, as in masks of 0 and 255."""
    if label == ignore_index:
        raise ValueError(f"The class id {label} is the value of ignored pixels: set another ignore_index, such as -1.")


def _pair_blocks(heatmap, mask, label, ignore_index):
    """Yields map values, foreground and void of one pair in flat blocks."""
    heatmap, mask, label = _check_map(heatmap), to_numpy(mask), operator.index(label)
    if heatmap.shape != mask.shape:
        raise ValueError(f"Map and label mask must have one shape, not {heatmap.shape} and {mask.shape}.")
    _check_label(label, ignore_index)
    heatmap, mask = heatmap.ravel(), mask.ravel()
    for start in range(0, heatmap.size, _BLOCK):
        block = mask[start : start + _BLOCK]
        yield heatmap[start : start + _BLOCK], block == label, block == ignore_index


def threshold_counts(heatmap, mask, label: int, ignore_index: int = 255) -> np.ndarray:
    """
    Counts the pixels above each threshold in one pass over the map.

    Args:
        heatmap (`np.ndarray` or `torch.Tensor` of shape `(H, W)`): map of floats in [0, 1], or of integers 0 and 1.
        mask (`np.ndarray` or `torch.Tensor` of shape `(H, W)`): integers; pixels equal to `label` are foreground.
        label (`int`), ignore_index (`int`): class id, and mask value of the pixels that are ignored.

    Returns:
        `np.ndarray` of shape `(2, 102)`, int64: numbers of background and foreground pixels: all, then those with M > 0,
        M > 0.01, ..., M > 1.

    Raises:
        `ValueError`: shapes differ, map values are NaN or outside [0, 1], or the class id is `ignore_index`.
    """
    histogram = np.zeros(256, dtype=np.int64)
    for values, foreground, void in _pair_blocks(heatmap, mask, label, ignore_index):
        codes = _thresholds_below(values)
        codes += foreground * np.uint8(_LEVELS)
        np.copyto(codes, _VOID_CODE, where=void)
        histogram += np.bincount(codes, minlength=len(histogram))
    bins = histogram[: 2 * _LEVELS].reshape(2, _LEVELS)
    return bins[:, ::-1].cumsum(axis=1)[:, ::-1]


def _thresholds_below(values: np.ndarray) -> np.ndarray:
    """Returns the number of thresholds below each value in [0, 1], uint8."""
    # The index of the nearest threshold, or one more. The comparison is exact, because index / 100 in the dtype of the values is
    # the threshold rounded to that dtype.
    nearest = values * 100
    np.rint(nearest, out=nearest)
    codes = nearest.astype(np.uint8)
    nearest /= 100
    codes += values > nearest
    return codes


def region_means(heatmap, mask, label: int, ignore_index: int = 255) -> np.ndarray:
    """
    Computes the number of pixels and the mean of the map (0 without pixels) for background and foreground, `(2, 2)` float64. Arguments
    and errors are those of [`threshold_counts`].
    """
    sums = np.zeros((2, 2))
    for values, foreground, void in _pair_blocks(heatmap, mask, label, ignore_index):
        # Most pixels are background. Subtracting the sum of the others from the total is faster than selecting them.
        inside, nowhere = values[foreground], values[void]
        total, high, void_total = (part.sum(dtype=np.float64) for part in (values, inside, nowhere))
        outside = values.size - inside.size - nowhere.size
        sums += (outside, total - high - void_total), (inside.size, high)
    sums[:, 1] /= sums[:, 0].clip(1)
    return sums


def contrast_counts(maps, mask, labels, ignore_index: int = 255, both_maps: bool = True) -> np.ndarray:
    """
    Compares each map of an image on the pixels of its own class and of the other classes.

    For classes i and j, a_ij = P(M_i at a pixel of i > M_i at a pixel of j), where ties count half, and c_ij = (a_ij + a_ji) / 2.
    Pixels of both classes or of neither are left out. Maps are first rounded to multiples of 1 / 4096, and equal rounded values are
    ties. The error of c_ij is at most half the share of such pixel pairs (about 1e-5 for smooth maps).

    Args:
        maps (`np.ndarray` or `torch.Tensor` of shape `(K, H, W)`): floats in [0, 1], the map of each class.
        mask (`np.ndarray` or `torch.Tensor` of shape `(H, W)` or `(K, H, W)`): integers, the class of each pixel; or one mask for
            each class, whose pixels equal to the label belong to the class. These masks can overlap.
        labels (`Sequence[int]`): K different class ids.
        ignore_index (`int`): mask value of the pixels that are ignored, in the mask or in any of the K masks.
        both_maps (`bool`): whether to compare the maps of both classes, c; otherwise only that of the class itself, a.

    Returns:
        `np.ndarray` of shape `(2, K)`, float64: for each class, the number of its partners and the sum of c or a over them. Two
        classes of the image are partners if each has a pixel that does not belong to the other.

    Raises:
        `ValueError`: as [`threshold_counts`]; or the number of labels is not K.
    """
    maps, mask, labels = _check_map(maps), to_numpy(mask), [operator.index(label) for label in labels]
    if mask.shape[-2:] != maps.shape[-2:]:
        raise ValueError(f"Maps and label mask must have one height and width, not {maps.shape} and {mask.shape}.")
    for label in labels:
        _check_label(label, ignore_index)
    masks, number = np.broadcast_to(mask, maps.shape), len(maps)
    void = (masks == ignore_index).any(0)
    regions = [(own_mask == label) & ~void for own_mask, label in zip(masks, labels, strict=True)]
    pixels = [np.flatnonzero(region) for region in regions]
    shared = {(i, j): np.flatnonzero(regions[i] & regions[j]) for i in range(number) for j in range(i)}

    # Twice the number of pairs of a pixel of i and one of j where M_i is greater at i, plus the ties; and of all these pairs.
    wins, pairs = np.zeros((2, number, number), np.int64)
    for i, heatmap in enumerate(maps):
        heatmap = heatmap.ravel()
        histograms = [_histogram(heatmap[of_class]) for of_class in pixels]
        for j in range(number):
            if i != j:
                both = _histogram(heatmap[shared[max(i, j), min(i, j)]])
                own, other = histograms[i] - both, histograms[j] - both
                wins[i, j] = own @ (2 * other.cumsum() - other)
                pairs[i, j] = own.sum() * other.sum()
    wins = wins + wins.T if both_maps else 2 * wins  # integers, so that equal maps have exactly one half
    return np.stack([(pairs > 0).sum(1), (wins / (4 * pairs.clip(1))).sum(1)])


def pointing_shares(heatmap, mask, label: int, ignore_index: int = 255) -> np.ndarray:
    """
    Plays the pointing game (Zhang et al. 2018) and the energy-based one (Wang et al. 2020). Arguments and errors are those of
    [`threshold_counts`].

    Returns:
        `np.ndarray` of shape `(3,)`, float64, in [0, 1]: whether the map's highest pixel belongs to the class (if several are equal,
        the share that does); the share of the map's sum on the class; the share of the class in the image, which is the score of a
        constant map in both games. Ignored pixels are not counted. NaN without a pixel of the class.
    """
    counts, peak = np.zeros((2, 3)), -1.0  # background and foreground: highest pixels, sum, all pixels
    for values, foreground, void in _pair_blocks(heatmap, mask, label, ignore_index):
        for row, region in enumerate((values[~(foreground | void)], values[foreground])):
            if region.size and region.max() > peak:
                counts[:, 0], peak = 0, region.max()
            counts[row] += (region == peak).sum(), region.sum(dtype=np.float64), region.size
    total = counts.sum(0)
    if not counts[1, 2]:
        return np.full(3, np.nan)
    shares = counts[1] / np.where(total, total, 1)
    return np.where(total, shares, shares[2])  # a map of zeros counts as constant


def _histogram(values: np.ndarray) -> np.ndarray:
    """Returns the number of values at each level of a quantised map, int64."""
    levels = np.rint(values * values.dtype.type(_LEVELS_OF_CONTRAST)).astype(np.intp)
    return np.bincount(levels, minlength=_LEVELS_OF_CONTRAST + 1)


def average_precision(scores: np.ndarray, shown: np.ndarray) -> float:
    """
    Computes the area under the precision-recall step function, in [0, 1], with ties grouped, as in scikit-learn, from scores `(B,)`
    and whether each item is shown `(B,)`, zeros and at least one 1.
    """
    order = np.argsort(-scores)
    scores = scores[order]
    cuts = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # last item of each group of ties
    true_positives = shown[order].cumsum()[cuts]
    precision = true_positives / (cuts + 1)
    return float((np.diff(true_positives, prepend=0) * precision).sum() / true_positives[-1])


def roc_auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """
    Computes the area under the ROC curve from the scores of positive and negative items: the share of pairs of them where the positive
    one is higher, ties half, in [0, 1]. NaN without either.
    """
    ordered = np.sort(negatives)
    below, up_to = (np.searchsorted(ordered, positives, side) for side in ("left", "right"))
    pairs = 2 * len(positives) * len(negatives)
    return int((below + up_to).sum()) / pairs if pairs else math.nan


def reliability(probabilities: np.ndarray, shown: np.ndarray, bins: int = 10) -> dict[str, np.ndarray]:
    """
    Groups probabilities `(N,)` into bins of equal width, of which the last includes 1 (Guo et al. 2017). Returns the mean probability
    (NaN in an empty bin), the share of `shown` (likewise) and the number of items of each bin, as `mean`, `shown` and `items`.
    """
    index = np.minimum((probabilities * bins).astype(np.intp), bins - 1)
    items = np.bincount(index, minlength=bins)
    number = np.where(items, items, np.nan)
    mean, share = (np.bincount(index, weights, bins) / number for weights in (probabilities, shown))
    return {"mean": mean, "shown": share, "items": items}


def _mean(values) -> float:
    """Returns the mean; NaN without values."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


class Sums:
    """Sums of arrays by key, such as the class. Those of several processes merge."""

    def __init__(self):
        self.sums: dict[Hashable, np.ndarray] = {}
        self.items = Counter()  # numbers of items: "counted", and those left out by reason

    def _add(self, counts: np.ndarray, key: Hashable) -> None:
        self.sums[key] = self.sums.get(key, 0) + counts

    add_counts = _add  # of one item; a metric adds what it makes of them

    def merge(self, other: Sums) -> None:
        """Adds the sums of another object of the same type and settings."""
        self.items.update(other.items)
        for key, counts in other.sums.items():
            self._add(counts, key)


class _MaskMetric(Sums):
    """Scores of maps against masks. Pixels of the mask whose value is `ignore_index` are ignored."""

    _reasons: tuple[str, ...]  # why items are left out, in the order of the checks
    count: Callable[..., np.ndarray]  # from the arguments of `update` and `ignore_index` to the counts of an item

    def __init__(self, ignore_index: int = 255):
        super().__init__()
        self.ignore_index = ignore_index

    def update(self, maps, mask, labels) -> None:
        """Adds one item. Arguments and errors are those of [`threshold_counts`] for a pair, of [`contrast_counts`] for an image."""
        self.add_counts(self.count(maps, mask, labels, self.ignore_index), labels)

    def _numbers(self, counted: str) -> dict:
        return {counted: self.items["counted"], "left_out": {reason: self.items[reason] for reason in self._reasons}}


class _PairMetric(_MaskMetric):
    """
    Scores of pairs of an image and a class.

    Args:
        aggregate (`str`, defaults to `"image"`): `"image"` averages the ratios of the images of a class. `"pixel"` pools the pixels
            of a class over its images. Both average over the classes.
    """

    def __init__(self, aggregate: str = "image", ignore_index: int = 255):
        if aggregate not in ("image", "pixel"):
            raise ValueError(f"aggregate is 'image' or 'pixel', not {aggregate!r}.")
        super().__init__(ignore_index)
        self.aggregate = aggregate

    def add_counts(self, counts: np.ndarray, label: int) -> None:
        background, foreground = counts[:, 0] > 0
        shown = {"all_void": background or foreground, "no_foreground": foreground, "no_background": background}
        reason = next((reason for reason in self._reasons if not shown[reason]), "counted")
        self.items[reason] += 1
        if reason == "counted":
            self._add(self._summands(counts), operator.index(label))


class MeanMaxIoU(_PairMetric):
    """
    mMIoU (Eq. 7): the IoU of M > t at the best threshold t of each class, averaged over the classes. With `aggregate="pixel"`,
    intersections and unions are pooled over the images of a class. A pair without foreground is left out.

    Example:
        >>> metric = MeanMaxIoU()
        >>> metric.update(np.array([[0.9, 0.2], [0.6, 0.1]]), np.array([[7, 0], [0, 255]]), 7)
        >>> metric.compute()["mmiou"]
        100.0
    """

    _reasons = ("all_void", "no_foreground")
    count = staticmethod(threshold_counts)

    def _summands(self, counts: np.ndarray) -> np.ndarray:
        """Returns (2, 102) float64, numerator and denominator of the IoU of all pixels and at each threshold."""
        background, foreground = counts
        intersection, union = foreground, foreground[0] + background
        if self.aggregate == "image":
            intersection, union = intersection / union, np.ones(_LEVELS)
        return np.array([intersection, union], dtype=np.float64)

    def compute(self) -> dict:
        """
        Returns the scores of all pairs so far.

        - **mmiou** -- mean over classes, percent (NaN without any pair).
        - **per_class** -- {class id: best IoU in percent}.
        - **thresholds** -- {class id: its best threshold, the lowest if several are equal}.
        - **floor** -- the same mean for a map that marks every pixel, percent.
        - **pairs**, **left_out** -- number of pairs in the mean, and {reason: number} of the others.
        """
        iou = {label: 100 * sums[0] / sums[1] for label, sums in sorted(self.sums.items())}
        # The lowest of equal thresholds, also if rounding of the sums makes them differ slightly.
        best = {label: int((curve[1:] >= curve[1:].max() - 1e-9).argmax()) for label, curve in iou.items()}
        per_class = {label: float(iou[label][1 + i]) for label, i in best.items()}
        return {
            "mmiou": _mean(per_class.values()),
            "per_class": per_class,
            "thresholds": {label: float(THRESHOLDS[i]) for label, i in best.items()},
            "floor": _mean(float(curve[0]) for curve in iou.values()),
            **self._numbers("pairs"),
        }


class MeanForegroundMinusBackground(_PairMetric):
    """
    mFMB (Eq. 8): mean of the map over the foreground minus its mean over the background, averaged over the classes. A pair without
    foreground or without background is left out. The score of the reversed maps 1 - M is the negative.

    Example:
        >>> metric = MeanForegroundMinusBackground()
        >>> metric.update(np.array([[1.0, 0.25], [0.0, 0.5]]), np.array([[7, 0], [0, 255]]), 7)
        >>> metric.compute()["mfmb"]
        0.875
    """

    _reasons = ("all_void", "no_foreground", "no_background")
    count = staticmethod(region_means)

    def _summands(self, counts: np.ndarray) -> np.ndarray:
        """Returns (2, 2) float64, background and foreground: weight, and weighted mean."""
        weights, means = counts.T if self.aggregate == "pixel" else (np.ones(2), counts[:, 1])
        return np.stack([weights, weights * means], axis=1)

    def compute(self) -> dict:
        """
        Returns the scores of all pairs so far.

        - **mfmb** -- mean over classes, in [-1, 1] (NaN without any pair).
        - **per_class** -- {class id: difference}.
        - **pairs**, **left_out** -- number of pairs in the mean, and {reason: number} of the others.
        """
        means = {label: sums[:, 1] / sums[:, 0] for label, sums in sorted(self.sums.items())}
        per_class = {label: float(foreground - background) for label, (background, foreground) in means.items()}
        return {"mfmb": _mean(per_class.values()), "per_class": per_class, **self._numbers("pairs")}


class TextContrast(_MaskMetric):
    """
    Text contrast: how much the map of a class prefers its own pixels to those of the other classes in the image.

    The value of a class is the mean of c_ij, see [`contrast_counts`], over all its images and partners. The score is the mean over the
    classes. It is exactly 50 for maps that do not depend on the text, and 100 - x for reversed maps. An image without two classes
    that each have pixels of their own is left out.

    Example:
        >>> metric = TextContrast()
        >>> maps, mask = np.array([[[0.9, 0.2]], [[0.1, 0.5]]]), np.array([[7, 8]])
        >>> metric.update(maps, mask, [7, 8])
        >>> metric.compute()["text_contrast"]
        100.0
    """

    _reasons, _name = ("fewer_than_two_classes",), "text_contrast"
    count = staticmethod(contrast_counts)

    def add_counts(self, counts: np.ndarray, labels: Sequence[int]) -> None:
        paired = [(operator.index(label), sums) for label, sums in zip(labels, counts.T) if sums[0]]
        self.items["counted" if paired else "fewer_than_two_classes"] += 1
        for label, sums in paired:
            self._add(sums, label)

    def compute(self) -> dict:
        """
        Returns the scores of all images so far.

        - **text_contrast**, or **region_ranking** -- mean over classes, percent (NaN without any image).
        - **per_class** -- {class id: mean over images and partners, percent}.
        - **images**, **left_out** -- number of images in the mean, and {"fewer_than_two_classes": number of the others}.
        """
        per_class = {label: float(100 * total / number) for label, (number, total) in sorted(self.sums.items())}
        return {self._name: _mean(per_class.values()), "per_class": per_class, **self._numbers("images")}


class RegionRanking(TextContrast):
    """
    The share of a class's own pixels that its map ranks above the pixels of the other classes: P(M_i at i > M_i at j), ties half, mean
    over the images and partners of a class, then over the classes (the area under the ROC curve of two regions). 50 is chance.
    """

    _name = "region_ranking"
    count = staticmethod(partial(contrast_counts, both_maps=False))


class ClassMeans(Sums):
    """
    Means of F scores of pairs: over the images of a class, then over the classes. A score that is NaN is left out.

    Args:
        number (`int`): F.
    """

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def add_counts(self, scores, label: int) -> None:
        """Adds the scores of one pair, F floats."""
        scores = np.asarray(scores, dtype=np.float64)
        known = ~np.isnan(scores)
        self.items["counted"] += 1
        self._add(np.array([known, np.where(known, scores, 0)]), label)

    def compute(self) -> dict:
        """
        Returns the means of all pairs so far.

        - **means** -- mean over classes, `(F,)` (NaN without any value).
        - **per_class** -- {class id: mean over images, `(F,)`}.
        - **pairs**, **left_out** -- number of pairs, and number of values that were NaN, `(F,)`.
        """
        per_class = {
            label: total / np.where(number, number, np.nan) for label, (number, total) in sorted(self.sums.items())
        }
        columns = np.array([*per_class.values()]).reshape(-1, self.number).T
        means = np.array([_mean(column[~np.isnan(column)]) for column in columns])
        known = sum((number for number, _ in self.sums.values()), np.zeros(self.number)).astype(int)
        pairs = self.items["counted"]
        return {"means": means, "per_class": per_class, "pairs": pairs, "left_out": pairs - known}


class MeanIoU:
    """
    mIoU of label maps: TP / (TP + FP + FN) of each class over the pixels of all images, averaged over the classes.

    Args:
        num_classes (`int`): number of classes K, with the background; class ids are 0..K-1.
        background (`bool`): whether the background, class 0, is one of the classes of the mean.
        ignore_index (`int`, defaults to 255): value of the pixels of the reference that are ignored.

    Example:
        >>> metric = MeanIoU(num_classes=2)
        >>> metric.update(np.array([[1, 1, 0]]), np.array([[1, 0, 0]]))
        >>> metric.compute()["miou"]
        50.0
    """

    def __init__(self, num_classes: int, background: bool = True, ignore_index: int = 255):
        self.num_classes, self.background, self.ignore_index = num_classes, background, ignore_index
        self.areas = np.zeros((3, self.num_classes, 1), np.int64)

    def count(self, prediction, reference, confidence=None) -> np.ndarray:
        """
        Counts the pixels of each class in a predicted and a reference label map.

        Args:
            prediction (`np.ndarray` or `torch.Tensor` of shape `(H, W)`): class ids 0..K-1; 0 is the background.
            reference (`np.ndarray` or `torch.Tensor` of shape `(H, W)`): class ids; pixels equal to `ignore_index` are ignored.
            confidence (`np.ndarray` or `torch.Tensor` of shape `(H, W)`, *optional*): floats in [0, 1]. If given, the prediction is
                counted at each of `THRESHOLDS`: a pixel whose confidence is not greater is background.

        Returns:
            `np.ndarray` of shape `(3, K, L)`, int64: pixels of each class in both maps, in the prediction and in the reference, at
            L thresholds: 101, or 1 without confidence.
        """
        prediction, reference = to_numpy(prediction), to_numpy(reference)
        confidence = None if confidence is None else to_numpy(confidence)
        counted = reference != self.ignore_index
        prediction, reference = prediction[counted].astype(np.intp), reference[counted].astype(np.intp)
        levels = 1 if confidence is None else _LEVELS
        codes = prediction * levels
        if confidence is not None:
            codes += _thresholds_below(confidence[counted])

        def above(pixels: np.ndarray | slice) -> np.ndarray:
            """Counts (K, L) of these pixels by predicted class, at each threshold those above it."""
            bins = np.bincount(codes[pixels], minlength=self.num_classes * levels).reshape(-1, levels)
            return bins if confidence is None else bins[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]

        in_both, predicted = above(prediction == reference), above(slice(None))
        referenced = np.bincount(reference, minlength=self.num_classes)
        # Pixels of no class above the threshold are background.
        in_both[0] = referenced[0] - above(reference == 0)[1:].sum(axis=0)
        predicted[0] = reference.size - predicted[1:].sum(axis=0)
        return np.stack([in_both, predicted, np.broadcast_to(referenced[:, None], predicted.shape)])

    def update(self, prediction, reference, confidence=None) -> None:
        """Adds one image. Arguments and errors are those of `count`."""
        self.add_counts(self.count(prediction, reference, confidence))

    def add_counts(self, areas: np.ndarray) -> None:
        """Adds one image by its counts from `count`, which may come from another process. All images have confidences, or none."""
        self.areas = self.areas + areas

    def curve(self) -> np.ndarray:
        """Returns the mIoU at each threshold, `(L,)`, percent (NaN without pixels)."""
        iou = self._iou()
        known = ~np.isnan(iou)
        return np.where(known, iou, 0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)

    def compute(self) -> dict:
        """
        Returns the scores of all images so far, at the lowest threshold.

        - **miou** -- mean over classes, percent (NaN without pixels).
        - **pixel_accuracy** -- share of the pixels with the right class, percent.
        - **per_class** -- {class id: IoU in percent}. A class that is neither predicted nor in the reference is left out.
        - **per_class_accuracy** -- {class id: share of its pixels that are predicted, percent}.
        - **floor**, **floor_class** -- the best mIoU of a map with one class everywhere, percent, and this class.
        - **pixels**, **left_out** -- number of pixels, and {"no_pixels": number of classes without any}.
        """
        first = 0 if self.background else 1
        in_both, _, referenced = self.areas[:, first:, 0]
        iou = self._iou()[:, 0]
        shown, pixels = np.flatnonzero(referenced), int(referenced.sum())
        floor = 100 * referenced / (pixels or math.nan) / (len(shown) or math.nan)
        return {
            "miou": float(self.curve()[0]),
            "pixel_accuracy": 100 * int(in_both.sum()) / (pixels or math.nan),
            "per_class": {first + int(k): float(iou[k]) for k in np.flatnonzero(~np.isnan(iou))},
            "per_class_accuracy": {first + int(k): 100 * int(in_both[k]) / int(referenced[k]) for k in shown},
            "floor": float(floor.max()),
            "floor_class": first + int(referenced.argmax()),
            "pixels": pixels,
            "left_out": {"no_pixels": int(np.isnan(iou).sum())},
        }

    def _iou(self) -> np.ndarray:
        """Returns the IoU of each class of the mean at each threshold, percent; NaN for a class without pixels."""
        in_both, predicted, referenced = self.areas[:, 0 if self.background else 1 :]
        union = predicted + referenced - in_both
        return 100 * in_both / np.where(union, union, np.nan)


class MultiLabelAveragePrecision:
    """
    mAP: average precision of each class over the images, averaged over the classes that occur in some image.

    Stores all scores, nine bytes for each image and class, because a ranking cannot be summed. Column k is class id k + 1.

    Example:
        >>> metric = MultiLabelAveragePrecision()
        >>> metric.update(np.array([[0.9, 0.1], [0.8, 0.3]]), np.array([[1, 0], [0, 1]]))
        >>> metric.compute()["map"]
        100.0
    """

    def __init__(self):
        self._images: list[tuple[np.ndarray, np.ndarray]] = []

    def update(self, scores, shown) -> None:
        """Adds images: scores, and whether the class is shown (zeros and ones), arrays or tensors of shape `(B, K)`."""
        self._images.append((to_numpy(scores).astype(np.float64), to_numpy(shown).astype(bool)))

    add_counts = update  # scores are their own counts

    def merge(self, other: MultiLabelAveragePrecision) -> None:
        """Adds all images of another metric."""
        self._images += other._images

    def images(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the scores of all images so far, and whether the classes are shown, `(B, K)` each."""
        scores, shown = zip(*self._images)
        return np.concatenate(scores), np.concatenate(shown)

    def compute(self) -> dict:
        """
        Returns the scores of all images so far.

        - **map** -- mean over classes, percent (NaN without any positive).
        - **per_class** -- {class id: average precision in percent}.
        - **images**, **left_out** -- number of images, and {"no_positive": number of classes without an image}.
        """
        scores, shown = self.images()
        classes = np.flatnonzero(shown.any(axis=0))
        per_class = {int(k) + 1: 100 * average_precision(scores[:, k], shown[:, k]) for k in classes}
        return {
            "map": _mean(per_class.values()),
            "per_class": per_class,
            "images": len(scores),
            "left_out": {"no_positive": scores.shape[1] - len(classes)},
        }
