"""
The arithmetic of the metrics on single images, in numpy.

Most functions compare the map (H, W) in [0, 1] of one class with a label mask (H, W) of integers. The pixels of the
class are the foreground, pixels equal to `ignore_index` are ignored, and all others are background. Text contrast
compares the maps of all classes of an image.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import numpy as np


# The thresholds of mMIoU. A pixel is predicted where M > t, with t rounded to the map's dtype.
THRESHOLDS = np.arange(101) / 100

NUM_COUNTS = 1 + len(THRESHOLDS)  # counts of a region: all pixels, then those above each threshold
_VOID_CODE = 255  # above the 2 * NUM_COUNTS codes of background and foreground
_BLOCK = 2**16  # pixels in one block, whose temporary arrays fit into the processor's cache
_CONTRAST_LEVELS = 2**12  # a power of two, so that scaling a float32 map has no rounding error


def to_numpy(array) -> np.ndarray:
    """Converts an array, or a tensor on any device, to numpy. bfloat16, which numpy lacks, becomes float32."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    array = array.detach().cpu()
    return (array.float() if str(array.dtype) == "torch.bfloat16" else array).numpy()


def batch_items(maps, masks, class_ids, dimensions: int) -> Iterable[tuple]:
    """Returns the items (maps, mask, class ids) of a batch; the item itself if its maps have these `dimensions`."""
    maps = to_numpy(maps)
    is_batch = maps.ndim == dimensions + 1
    return zip(maps, masks, class_ids, strict=True) if is_batch else [(maps, masks, class_ids)]


def _check_map(heatmap) -> np.ndarray:
    """Returns a map as an array of floats. Raises `ValueError` for values outside [0, 1]."""
    heatmap = to_numpy(heatmap)
    if heatmap.dtype.kind != "f":
        heatmap = heatmap.astype(np.float32)  # a map of zeros and ones
    if heatmap.size and not (heatmap.min() >= 0 and heatmap.max() <= 1):  # NaN fails too
        raise ValueError(f"Map values must be in [0, 1], not {heatmap.min()} to {heatmap.max()}: normalise the map.")
    return heatmap


def _check_class_id(class_id: int, ignore_index: int) -> None:
    """Raises `ValueError` if the pixels of a class are ignored, as in masks of 0 and 255."""
    if class_id == ignore_index:
        raise ValueError(
            f"The class id {class_id} is the value of ignored pixels: set another ignore_index, such as -1."
        )


def _blocks(heatmap, mask, class_id, ignore_index):
    """Yields flat blocks of pixels: the values of a map, which pixels are of the class, and which are ignored."""
    heatmap = _check_map(heatmap)
    mask = to_numpy(mask)
    class_id = operator.index(class_id)
    if heatmap.shape != mask.shape:
        raise ValueError(f"Map and label mask must have one shape, not {heatmap.shape} and {mask.shape}.")
    _check_class_id(class_id, ignore_index)
    heatmap, mask = heatmap.ravel(), mask.ravel()
    for start in range(0, heatmap.size, _BLOCK):
        block = mask[start : start + _BLOCK]
        yield heatmap[start : start + _BLOCK], block == class_id, block == ignore_index


def threshold_counts(heatmap, mask, class_id: int, ignore_index: int = 255) -> np.ndarray:
    """
    Counts the pixels above each threshold in one pass over the map.

    Args:
        heatmap (`np.ndarray` or `torch.Tensor` of shape `(H, W)`): floats in [0, 1], or integers 0 and 1.
        mask (`np.ndarray` or `torch.Tensor` of shape `(H, W)`): integers; pixels equal to `class_id` are foreground.
        class_id (`int`), ignore_index (`int`): id of the class, and mask value of the pixels that are ignored.

    Returns:
        `np.ndarray` of shape `(2, 102)`, int64: for background and foreground, the number of all pixels, then of those
        with M > 0, M > 0.01, ..., M > 1.
    """
    histogram = np.zeros(256, dtype=np.int64)
    for values, foreground, void in _blocks(heatmap, mask, class_id, ignore_index):
        codes = _thresholds_below(values)
        codes += foreground * np.uint8(NUM_COUNTS)
        np.copyto(codes, _VOID_CODE, where=void)
        histogram += np.bincount(codes, minlength=len(histogram))
    return _counts_from_each(histogram[: 2 * NUM_COUNTS].reshape(2, NUM_COUNTS))


def _thresholds_below(values: np.ndarray) -> np.ndarray:
    """Returns the number of thresholds below each value in [0, 1], uint8."""
    # The number is the index of the nearest threshold, or one more if the value is above this threshold. The
    # comparison is exact, because index / 100 in the dtype of the values is the threshold rounded to that dtype.
    nearest = values * 100
    np.rint(nearest, out=nearest)
    numbers = nearest.astype(np.uint8)
    nearest /= 100
    numbers += values > nearest
    return numbers


def _counts_from_each(bins: np.ndarray) -> np.ndarray:
    """Returns for each bin in a row of `bins` the sum of this bin and all later ones in the row."""
    return bins[:, ::-1].cumsum(axis=1)[:, ::-1]


def region_means(heatmap, mask, class_id: int, ignore_index: int = 255) -> np.ndarray:
    """
    Computes the number of pixels and the mean of the map (0 without pixels) for background and foreground, `(2, 2)`
    float64. Arguments and errors are those of [`threshold_counts`].
    """
    sums = np.zeros((2, 2))
    for values, foreground, void in _blocks(heatmap, mask, class_id, ignore_index):
        # Most pixels are background. Subtracting the sum of the others from the total is faster than selecting the
        # background.
        inside, ignored = values[foreground], values[void]
        total, inside_total, ignored_total = (part.sum(dtype=np.float64) for part in (values, inside, ignored))
        num_outside = values.size - inside.size - ignored.size
        sums += (num_outside, total - inside_total - ignored_total), (inside.size, inside_total)
    sums[:, 1] /= sums[:, 0].clip(1)
    return sums


def contrast_counts(maps, mask, class_ids, ignore_index: int = 255, both_maps: bool = True) -> np.ndarray:
    """
    Compares each map of an image on the pixels of its own class and of the other classes.

    For classes i and j, a_ij = P(M_i at a pixel of i > M_i at a pixel of j), where ties count half, and c_ij = (a_ij +
    a_ji) / 2. Pixels of both classes or of neither are left out. Maps are first rounded to multiples of 1 / 4096.

    Args:
        maps (`np.ndarray` or `torch.Tensor` of shape `(T, H, W)`): floats in [0, 1], the map of each class.
        mask (`np.ndarray` or `torch.Tensor` of shape `(H, W)` or `(T, H, W)`): integers, the class of each pixel; or
            one mask for each class, if classes overlap.
        class_ids (`Sequence[int]`): T different class ids.
        both_maps (`bool`): True for c, which takes the maps of both classes; False for a, which takes only the map of
            the class itself.

    Returns:
        `np.ndarray` of shape `(2, T)`, float64: for each class, the number of its partners, and the sum of c or a over
        its partners. Two classes of the image are partners if each has a pixel that does not belong to the other.
    """
    maps = _check_map(maps)
    mask = to_numpy(mask)
    class_ids = [operator.index(class_id) for class_id in class_ids]
    if mask.shape[-2:] != maps.shape[-2:]:
        raise ValueError(f"Maps and label mask must have one height and width, not {maps.shape} and {mask.shape}.")
    for class_id in class_ids:
        _check_class_id(class_id, ignore_index)
    masks = np.broadcast_to(mask, maps.shape)
    num_classes = len(maps)
    void = (masks == ignore_index).any(0)
    is_class = [(class_mask == class_id) & ~void for class_mask, class_id in zip(masks, class_ids, strict=True)]
    pixels = [np.flatnonzero(in_class) for in_class in is_class]
    shared = {(i, j): np.flatnonzero(is_class[i] & is_class[j]) for i in range(num_classes) for j in range(i)}

    # `comparisons` counts the comparisons of a pixel of i with a pixel of j. `double_wins` is twice the number of
    # comparisons in which M_i is greater at i, plus the number of ties.
    double_wins, comparisons = np.zeros((2, num_classes, num_classes), np.int64)
    for i, heatmap in enumerate(maps):
        heatmap = heatmap.ravel()
        histograms = [_histogram(heatmap[class_pixels]) for class_pixels in pixels]
        for j in range(num_classes):
            if i != j:
                in_both = _histogram(heatmap[shared[max(i, j), min(i, j)]])
                inside, outside = histograms[i] - in_both, histograms[j] - in_both
                double_wins[i, j] = inside @ (2 * outside.cumsum() - outside)
                comparisons[i, j] = inside.sum() * outside.sum()
    # The wins are added as integers, so that equal maps have exactly one half.
    quadruple_wins = (double_wins + double_wins.T) if both_maps else 2 * double_wins
    return np.stack([(comparisons > 0).sum(1), (quadruple_wins / (4 * comparisons.clip(1))).sum(1)])


def pointing_shares(heatmap, mask, class_id: int, ignore_index: int = 255) -> np.ndarray:
    """
    Computes the scores of the pointing game (Zhang et al. 2018) and of the energy-based one (Wang et al. 2020).
    Arguments and errors are those of [`threshold_counts`].

    Returns:
        `np.ndarray` of shape `(3,)`, float64, in [0, 1]: whether the highest pixel of the map belongs to the class (if
        several are equal, the share of them in the class); the share of the map's sum on the class; and the share of
        the class in the image. All are NaN without a pixel of the class.
    """
    sums, peak = np.zeros((2, 3)), -1.0  # of background and foreground: highest pixels, values, all pixels
    for values, foreground, void in _blocks(heatmap, mask, class_id, ignore_index):
        for index, selected in enumerate((values[~(foreground | void)], values[foreground])):
            if selected.size and selected.max() > peak:
                sums[:, 0], peak = 0, selected.max()
            sums[index] += (selected == peak).sum(), selected.sum(dtype=np.float64), selected.size
    total, class_sums = sums.sum(0), sums[1]
    if not class_sums[2]:
        return np.full(3, np.nan)
    shares = class_sums / np.where(total, total, 1)
    return np.where(total, shares, shares[2])  # a map of zeros has no sum: the share of a constant map


def _histogram(values: np.ndarray) -> np.ndarray:
    """Returns the number of values at each level of a quantised map, int64."""
    levels = np.rint(values * values.dtype.type(_CONTRAST_LEVELS)).astype(np.intp)
    return np.bincount(levels, minlength=_CONTRAST_LEVELS + 1)


def reliability(probabilities: np.ndarray, shown: np.ndarray, bins: int = 10) -> dict[str, np.ndarray]:
    """
    Groups probabilities `(num_items,)` into bins of equal width; the last one includes 1 (Guo et al. 2017). Returns
    for each bin the mean probability (`mean`) and the share of shown items (`shown`), both NaN in an empty bin, and
    the number of items (`items`).
    """
    index = np.minimum((probabilities * bins).astype(np.intp), bins - 1)
    items = np.bincount(index, minlength=bins)
    divisor = np.where(items, items, np.nan)
    mean, share = (np.bincount(index, weights, bins) / divisor for weights in (probabilities, shown))
    return {"mean": mean, "shown": share, "items": items}


def area_counts(prediction, reference, num_classes: int, ignore_index: int = 255, confidence=None) -> np.ndarray:
    """
    Counts the pixels of each class in a predicted and a reference label map `(H, W)`, of class ids 0..K, where 0 is
    the background; `num_classes` is K + 1. With `confidence` `(H, W)` in [0, 1], the prediction is counted at each of
    `THRESHOLDS`: a pixel whose confidence is not above the threshold is background. Returns `(3, K + 1, 101)` int64,
    or `(3, K + 1, 1)` without confidence: pixels in both maps, in the prediction and in the reference.
    """
    prediction, reference = to_numpy(prediction), to_numpy(reference)
    confidence = None if confidence is None else _check_map(confidence)
    counted = reference != ignore_index
    prediction, reference = prediction[counted].astype(np.intp), reference[counted].astype(np.intp)
    codes_per_class = 1 if confidence is None else NUM_COUNTS
    codes = prediction * codes_per_class
    if confidence is not None:
        codes += _thresholds_below(confidence[counted])

    def count_above(selected_codes: np.ndarray) -> np.ndarray:
        """Returns the pixels of each predicted class, in all or above each threshold, `(K + 1, 1 or 101)`."""
        bins = np.bincount(selected_codes, minlength=num_classes * codes_per_class).reshape(-1, codes_per_class)
        return bins if confidence is None else _counts_from_each(bins)[:, 1:]

    in_both, predicted = count_above(codes[prediction == reference]), count_above(codes)
    referenced = np.bincount(reference, minlength=num_classes)
    # A pixel keeps its class only if its confidence is above the threshold. All other pixels are background.
    in_both[0] = referenced[0] - count_above(codes[reference == 0])[1:].sum(axis=0)
    predicted[0] = reference.size - predicted[1:].sum(axis=0)
    return np.stack([in_both, predicted, np.broadcast_to(referenced[:, None], predicted.shape)])
