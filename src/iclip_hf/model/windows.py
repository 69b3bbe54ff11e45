"""
Tilings. A tiling divides a prepared image into views, the whole image or windows, and joins the maps and the scores of
the views.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch.nn import functional as F

from .similarity import resize_maps


# Sharpness of the smooth maximum of the windows' scores. It is close to the scale of the model's logits, so the smooth
# maximum nearly averages the odds of the windows.
WINDOW_SHARPNESS = 20.0


class Tiling:
    """A tiling with one view, the whole prepared image. It is the base class of other tilings."""

    def prepared_size(self, view_size: dict[str, int]) -> dict[str, int]:
        """Returns the size that images are resized to, so that their views have the size `view_size`."""
        return view_size

    def views(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Returns the pixel values of each view of images `(B, 3, H, W)`."""
        return [pixel_values]

    def join_maps(self, maps: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """
        Joins the raw maps of the views, `(B, T, h, w)` each, float32. `size` is the height and width of the prepared
        images in pixels.
        """
        return maps[0]

    def join_scores(self, scores: Sequence[torch.Tensor]) -> torch.Tensor:
        """Joins the scores of the views, `(B, T)` each."""
        return scores[0]


class TwoScales(Tiling):
    """
    Ten views at two scales. One view is the whole image. The others are nine windows of the same size in the image at
    twice the height and width. Neighbouring windows overlap by half. The value of a patch is the mean of both scales.
    The weight of a window falls towards its edges, so that the map has no seams. The score is the mean of the score of
    the whole image and log(mean(exp(20 s))) / 20, where s are the scores of the windows.

    Args:
        patch_size (`int`): side of a patch in pixels.
    """

    def __init__(self, patch_size: int):
        self.patch_size = patch_size

    def prepared_size(self, view_size: dict[str, int]) -> dict[str, int]:
        return {name: 2 * side for name, side in view_size.items()}

    def views(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        size = pixel_values.shape[2:]
        whole = F.interpolate(pixel_values, self._window_size(size), mode="bicubic", antialias=True)
        return [whole, *(pixel_values[..., rows, columns] for rows, columns in self._windows(size))]

    def join_maps(self, maps: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        whole, *windows = maps
        joined = mean_of_windows(windows, self._windows(size), size, self.patch_size, tapered=True)
        return (resize_maps(whole, joined.shape[2:]) + joined) / 2

    def join_scores(self, scores: Sequence[torch.Tensor]) -> torch.Tensor:
        whole, *windows = scores
        smooth_maximum = (WINDOW_SHARPNESS * torch.stack(windows)).logsumexp(0) - math.log(len(windows))
        return (whole + smooth_maximum / WINDOW_SHARPNESS) / 2

    def _window_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns half the height and width of an image, rounded up to whole patches."""
        return tuple(self.patch_size * math.ceil(side / (2 * self.patch_size)) for side in size)

    def _windows(self, size: tuple[int, int]) -> list[tuple[slice, slice]]:
        """Returns windows at a distance of a quarter of the height and width, rounded up to whole patches."""
        stride = tuple(self.patch_size * math.ceil(side / (4 * self.patch_size)) for side in size)
        return sliding_windows(size, self._window_size(size), stride)


def sliding_windows(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]
) -> list[tuple[slice, slice]]:
    """
    Returns the slices along height and width of each window that slides over an image of `size` (H, W). The last
    windows end at the image's edge. Slices of an image that is smaller than the window end beyond its edge.
    """
    last_starts = (max(side - length, 0) for side, length in zip(size, window))
    tops, lefts = ([*range(0, last, step), last] for last, step in zip(last_starts, stride))
    return [(slice(top, top + window[0]), slice(left, left + window[1])) for top in tops for left in lefts]


def mean_of_windows(
    maps: Iterable[torch.Tensor],
    windows: Sequence[tuple[slice, slice]],
    size: tuple[int, int],
    patch_size: int,
    tapered: bool = False,
) -> torch.Tensor:
    """
    Joins the raw maps `(B, T, h', w')` of windows. The value of a patch is its mean over the windows that contain it.
    With `tapered`, the mean is weighted, and the weights fall linearly from the middle of a window to its edges. Maps
    are resized if their grid is not the patch grid, such as maps of ProxyCLIP.
    """
    mean = None
    for window_maps, window in zip(maps, windows, strict=True):
        grid = [(min(span.stop, side) - span.start) // patch_size for span, side in zip(window, size)]
        if [*window_maps.shape[2:]] != grid:
            window_maps = resize_maps(window_maps, grid)
        if mean is None:
            mean = window_maps.new_zeros(*window_maps.shape[:2], *(side // patch_size for side in size))
            weight_sums = torch.zeros_like(mean[0, 0])
            # All windows have one size, so they have the same weights.
            weights = _tent(window_maps) if tapered else torch.ones_like(window_maps[0, 0])
        top, left = (span.start // patch_size for span in window)
        covered = (..., slice(top, top + grid[0]), slice(left, left + grid[1]))
        weight_sums[covered] += weights
        # A running mean keeps a constant map exactly constant. Min-max would stretch the rounding errors of a sum.
        mean[covered] += (window_maps - mean[covered]) * (weights / weight_sums[covered])
    return mean


def _tent(maps: torch.Tensor) -> torch.Tensor:
    """Returns positive weights `(h, w)` that fall linearly from the middle of maps `(..., h, w)` to their edges."""
    vertical, horizontal = (
        torch.minimum(torch.arange(1, side + 1, device=maps.device), torch.arange(side, 0, -1, device=maps.device))
        for side in maps.shape[-2:]
    )
    return torch.outer(vertical, horizontal).to(maps.dtype)
