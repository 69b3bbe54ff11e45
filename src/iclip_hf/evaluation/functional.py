"""
The arithmetic of the metrics on single images, in numpy.

Most functions compare the map (H, W) in [0, 1] of one class with a label mask (H, W) of integers. The pixels of the
class are the foreground, pixels equal to `ignore_index` are ignored, and all others are background. Text contrast
compares the maps of all classes of an image.
"""

from __future__ import annotations

import operator

import numpy as np


# The thresholds of mMIoU. A pixel is predicted where M > t, with t rounded to the map's dtype.
THRESHOLDS = np.arange(101) / 100

LEVELS = 1 + len(THRESHOLDS)  # all pixels, then those above each threshold
_VOID_CODE = 255  # above the 2 * LEVELS codes of background and foreground
_BLOCK = 2**16  # pixels in one block, whose temporary arrays fit into the processor's cache
_CONTRAST_LEVELS = 2**12  # a power of two, so that scaling a float32 map has no rounding error


def to_numpy(array) -> np.ndarray:
    """Converts an array, or a tensor on any device, to numpy. bfloat16, which numpy lacks, becomes float32."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    array = array.detach().cpu()
    return (array.float() if str(array.dtype) == "torch.bfloat16" else array).numpy()


def _check_map(heatmap) -> np.ndarray:
    """Returns a map as an array of floats. Raises `ValueError` outside [0, 1], which would be counted wrongly."""
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
    """Yields the values of a map, where the class is and where pixels are ignored, in flat blocks."""
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
        `np.ndarray` of shape `(2, 102)`, int64: numbers of background and foreground pixels: all, then those with M >
        0, M > 0.01, ..., M > 1.
    """
    histogram = np.zeros(256, dtype=np.int64)
    for values, foreground, void in _blocks(heatmap, mask, class_id, ignore_index):
        codes = _thresholds_below(values)
        codes += foreground * np.uint8(LEVELS)
        np.copyto(codes, _VOID_CODE, where=void)
        histogram += np.bincount(codes, minlength=len(histogram))
    bins = histogram[: 2 * LEVELS].reshape(2, LEVELS)
    return bins[:, ::-1].cumsum(axis=1)[:, ::-1]


def _thresholds_below(values: np.ndarray) -> np.ndarray:
    """Returns the number of thresholds below each value in [0, 1], uint8."""
    # The index of the nearest threshold, or one more. The comparison is exact, because index / 100 in the dtype of the
    # values is the threshold rounded to that dtype.
    nearest = values * 100
    np.rint(nearest, out=nearest)
    codes = nearest.astype(np.uint8)
    nearest /= 100
    codes += values > nearest
    return codes


def region_means(heatmap, mask, class_id: int, ignore_index: int = 255) -> np.ndarray:
    """
    Computes the number of pixels and the mean of the map (0 without pixels) for background and foreground, `(2, 2)`
    float64. Arguments and errors are those of [`threshold_counts`].
    """
    sums = np.zeros((2, 2))
    for values, foreground, void in _blocks(heatmap, mask, class_id, ignore_index):
        # Most pixels are background. Subtracting the sum of the others from the total is faster than selecting them.
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
        maps (`np.ndarray` or `torch.Tensor` of shape `(K, H, W)`): floats in [0, 1], the map of each class.
        mask (`np.ndarray` or `torch.Tensor` of shape `(H, W)` or `(K, H, W)`): integers, the class of each pixel; or
            one mask for each class. These can overlap.
        class_ids (`Sequence[int]`): K different class ids.
        both_maps (`bool`): whether to compare the maps of both classes, c; otherwise only that of the class itself, a.

    Returns:
        `np.ndarray` of shape `(2, K)`, float64: for each class, the number of its partners and the sum of c or a over
        them. Two classes of the image are partners if each has a pixel that does not belong to the other.
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
    regions = [(class_mask == class_id) & ~void for class_mask, class_id in zip(masks, class_ids, strict=True)]
    pixels = [np.flatnonzero(region) for region in regions]
    shared = {(i, j): np.flatnonzero(regions[i] & regions[j]) for i in range(num_classes) for j in range(i)}

    # `comparisons` counts the comparisons of a pixel of i with a pixel of j. `wins` is twice the number of those in
    # which M_i is greater at i, plus the number of ties.
    wins, comparisons = np.zeros((2, num_classes, num_classes), np.int64)
    for i, heatmap in enumerate(maps):
        heatmap = heatmap.ravel()
        histograms = [_histogram(heatmap[region]) for region in pixels]
        for j in range(num_classes):
            if i != j:
                both = _histogram(heatmap[shared[max(i, j), min(i, j)]])
                inside, outside = histograms[i] - both, histograms[j] - both
                wins[i, j] = inside @ (2 * outside.cumsum() - outside)
                comparisons[i, j] = inside.sum() * outside.sum()
    # Added as integers, so that equal maps have exactly one half.
    four_wins = (wins + wins.T) if both_maps else 2 * wins
    return np.stack([(comparisons > 0).sum(1), (four_wins / (4 * comparisons.clip(1))).sum(1)])


def pointing_shares(heatmap, mask, class_id: int, ignore_index: int = 255) -> np.ndarray:
    """
    Plays the pointing game (Zhang et al. 2018) and the energy-based one (Wang et al. 2020). Arguments are those of
    [`threshold_counts`]. Returns `(3,)` in [0, 1]: whether the map's highest pixel belongs to the class (if several
    are equal, the share that does); the share of the map's sum on the class; the share of the class in the image. NaN
    without a pixel of the class.
    """
    counts, peak = np.zeros((2, 3)), -1.0  # background and foreground: highest pixels, sum, all pixels
    for values, foreground, void in _blocks(heatmap, mask, class_id, ignore_index):
        for row, region in enumerate((values[~(foreground | void)], values[foreground])):
            if region.size and region.max() > peak:
                counts[:, 0], peak = 0, region.max()
            counts[row] += (region == peak).sum(), region.sum(dtype=np.float64), region.size
    total = counts.sum(0)
    if not counts[1, 2]:
        return np.full(3, np.nan)
    shares = counts[1] / np.where(total, total, 1)
    return np.where(total, shares, shares[2])  # without a sum, in a map of zeros, as for a constant map


def _histogram(values: np.ndarray) -> np.ndarray:
    """Returns the number of values at each level of a quantised map, int64."""
    levels = np.rint(values * values.dtype.type(_CONTRAST_LEVELS)).astype(np.intp)
    return np.bincount(levels, minlength=_CONTRAST_LEVELS + 1)


def reliability(probabilities: np.ndarray, shown: np.ndarray, bins: int = 10) -> dict[str, np.ndarray]:
    """
    Groups probabilities `(N,)` into bins of equal width; the last one includes 1 (Guo et al. 2017). Returns for the
    bins their mean probability (`mean`) and share of shown items (`shown`), both NaN in an empty bin, and their number
    of items (`items`).
    """
    index = np.minimum((probabilities * bins).astype(np.intp), bins - 1)
    items = np.bincount(index, minlength=bins)
    divisor = np.where(items, items, np.nan)
    mean, share = (np.bincount(index, weights, bins) / divisor for weights in (probabilities, shown))
    return {"mean": mean, "shown": share, "items": items}


def area_counts(prediction, reference, num_classes: int, ignore_index: int = 255, confidence=None) -> np.ndarray:
    """
    Counts the pixels of each class in a predicted and a reference label map `(H, W)`, of class ids 0..K-1, where 0 is
    the background. With `confidence` `(H, W)` in [0, 1], the prediction is counted at each of `THRESHOLDS`: a pixel
    whose confidence is not greater is background. Returns `(3, K, L)` int64: pixels in both maps, in the prediction
    and in the reference, at L thresholds: 101, or 1 without confidence.
    """
    prediction, reference = to_numpy(prediction), to_numpy(reference)
    confidence = None if confidence is None else _check_map(confidence)
    counted = reference != ignore_index
    prediction, reference = prediction[counted].astype(np.intp), reference[counted].astype(np.intp)
    levels = 1 if confidence is None else LEVELS
    codes = prediction * levels
    if confidence is not None:
        codes += _thresholds_below(confidence[counted])

    def above(pixels: np.ndarray | slice) -> np.ndarray:
        """Returns the number of these pixels above each threshold by predicted class, (K, L)."""
        bins = np.bincount(codes[pixels], minlength=num_classes * levels).reshape(-1, levels)
        return bins if confidence is None else bins[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]

    in_both, predicted = above(prediction == reference), above(slice(None))
    referenced = np.bincount(reference, minlength=num_classes)
    # A pixel counts as background unless its class is kept, which needs a confidence above the threshold.
    in_both[0] = referenced[0] - above(reference == 0)[1:].sum(axis=0)
    predicted[0] = reference.size - predicted[1:].sum(axis=0)
    return np.stack([in_both, predicted, np.broadcast_to(referenced[:, None], predicted.shape)])
