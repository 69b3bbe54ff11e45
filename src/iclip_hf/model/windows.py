"""Windows that slide over prepared images."""

import itertools
from collections.abc import Iterable, Sequence

import torch


def sliding_windows(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]
) -> list[tuple[slice, slice]]:
    """
    Returns the rows and the columns of each window that slides over an image `(H, W)`. The last window of a row or
    column ends at the image's edge, and a window is never larger than the image.

    Args:
        size, window, stride (`tuple[int, int]`): height and width of the image and of the windows, and their distance
            along each side, in pixels; strides are at most the window.
    """
    last = (max(side - length, 0) for side, length in zip(size, window))
    starts = ([*range(0, end, step), end] for end, step in zip(last, stride))
    return [(slice(top, top + window[0]), slice(left, left + window[1])) for top, left in itertools.product(*starts)]


def mean_of_windows(
    maps: Iterable[torch.Tensor],
    windows: Sequence[tuple[slice, slice]],
    size: tuple[int, int],
    patch_size: int,
    tapered: bool = False,
) -> torch.Tensor:
    """
    Joins the raw maps of windows. The value of a patch is its mean over the windows that contain it.

    Args:
        maps: raw map of each window, `(B, T, h', w')`, with a value for each patch.
        windows: rows and columns of each window in pixels, from [`sliding_windows`].
        size (`tuple[int, int]`): height and width of the images in pixels, multiples of the patch size.
        patch_size (`int`): side of a patch in pixels.
        tapered (`bool`): whether a window's weight in the mean falls linearly from its middle to its edges, so that
            the maps have no seams where windows end. All have the same weight otherwise.

    Returns:
        `torch.Tensor` of shape `(B, T, H / patch_size, W / patch_size)`, float32.
    """
    mean = None
    for of_window, (rows, columns) in zip(maps, windows, strict=True):
        if mean is None:
            mean = of_window.new_zeros(*of_window.shape[:2], *(side // patch_size for side in size))
            weights = torch.zeros_like(mean[0, 0])
            weight = _tent(of_window) if tapered else torch.ones_like(of_window[0, 0])
        top, left = rows.start // patch_size, columns.start // patch_size
        place = (..., slice(top, top + of_window.shape[2]), slice(left, left + of_window.shape[3]))
        weights[place] += weight
        # A running mean keeps a constant map exactly constant. Min-max would stretch the rounding errors of a sum.
        mean[place] += (of_window - mean[place]) * (weight / weights[place])
    return mean


def _tent(maps: torch.Tensor) -> torch.Tensor:
    """Returns weights `(h, w)` that fall linearly from the middle of maps `(..., h, w)` to their edges, positive."""
    rows, columns = (
        torch.minimum(torch.arange(1, side + 1, device=maps.device), torch.arange(side, 0, -1, device=maps.device))
        for side in maps.shape[-2:]
    )
    return torch.outer(rows, columns).to(maps.dtype)


def half_windows(size: tuple[int, int], patch_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """
    Returns window and stride, as [`sliding_windows`] takes them, of 3x3 windows of half the height and half the width
    of an image `(H, W)` in pixels, in whole patches, each of which shares half with the next.
    """
    patches = [side // patch_size for side in size]
    window = tuple(patch_size * -(-number // 2) for number in patches)
    return window, tuple(patch_size * max(1, -(-number // 4)) for number in patches)
