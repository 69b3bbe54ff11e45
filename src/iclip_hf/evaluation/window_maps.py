"""
Maps of sliding windows, by the steps that papers on training-free open-vocabulary segmentation share, see
[`~protocols.Protocol`]. Resizing is bilinear without antialiasing, and windows are averaged in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..model.refinement import neighbour_weights, propagate
from ..model.windows import mean_of_windows, sliding_windows


# Longest side of a resized image in pixels.
LONGEST_SIDE = 2048
# Share of the local standard deviation by which PAMR divides a difference, as in its authors' code.
PAMR_SPREAD = 0.1
# Number of maps that are enlarged at once.
CHUNK = 8


def resized(image: Image.Image, short_side: int) -> torch.Tensor:
    """
    Resizes an RGB image to a short side in pixels, or a smaller one if the long side would exceed 2048 pixels. Returns
    `(3, H, W)`, uint8. H and W need not be multiples of a patch.

    The numbers are those of OpenCV's bilinear resize of bytes, with which the papers prepare images: weights are
    rounded to 11 bits, and products are cut to integers.
    """
    pixels = np.array(image).astype(np.int32)
    factor = min(short_side / min(pixels.shape[:2]), LONGEST_SIDE / max(pixels.shape[:2]))
    height, width = (int(side * factor + 0.5) for side in pixels.shape[:2])
    (left, right), weights = _fixed_point(pixels.shape[1], width, inside=True)
    rows = (pixels[:, left] * weights[0][:, None] + pixels[:, right] * weights[1][:, None]) >> 4
    (top, bottom), weights = _fixed_point(pixels.shape[0], height, inside=False)
    above, below = ((rows[at] * weight[:, None, None]) >> 16 for at, weight in zip((top, bottom), weights))
    return torch.from_numpy(((above + below + 2) >> 2).astype(np.uint8)).movedim(-1, 0)


def _fixed_point(source: int, target: int, inside: bool) -> tuple[np.ndarray, np.ndarray]:
    """
    Returns the indices of the two pixels that each pixel of a resized side is between, and their weights in units of
    1 / 2048, `(2, target)` each. With `inside`, a pixel beyond the edge has the weight of the edge alone.
    """
    position = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    first = np.floor(position).astype(int)
    share = position - first.astype(np.float32)
    if inside:
        share[(first < 0) | (first >= source - 1)] = 0
    weights = np.rint(np.stack([1 - share, share]) * np.float32(2048)).astype(np.int32)
    return np.stack([first, first + 1]).clip(0, source - 1), weights


class AuthorsPositions(TorchFunctionMode):
    """
    Interpolates position embeddings (bicubic) by the factor (n + 0.1) / sqrt(N) for each side of n patches, where N is
    the number of stored positions. The towers of the papers do so, from the code of DINO. Transformers interpolates to
    n patches.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Maps of texts, which are also resized by this function, are not `(1, D, side, side)`.
        if function is F.interpolate and kwargs.get("mode") == "bicubic" and not kwargs.get("antialias"):
            side, size = args[0].shape[-1], kwargs["size"]
            if args[0].shape[0] == 1 and args[0].shape[1] > 1 and args[0].shape[2] == side:
                kwargs |= {"size": None, "scale_factor": tuple((length + 0.1) / side for length in size)}
        return function(*args, **kwargs)


@dataclass(frozen=True)
class WindowMaps:
    """
    The raw maps of the windows of one image.

    Attributes:
        pixels (`torch.Tensor` of shape `(3, H, W)`): the resized image.
        windows: the rows and columns of pixels of each window. All windows have one size.
        size (`tuple[int, int]`): height and width of the enlarged maps in pixels.
        dilations: distances in pixels of the neighbours of PAMR, which refines the enlarged maps; none without PAMR.
        padding (`int`): windows are padded to multiples of this number of pixels, see [`~protocols.Protocol`].
        maps (`torch.Tensor` of shape `(num_windows, T, h, w)`, *optional*): raw maps of T texts.
    """

    pixels: torch.Tensor
    windows: Sequence[tuple[slice, slice]]
    size: tuple[int, int]
    dilations: Sequence[int] = ()
    padding: int = 0
    maps: torch.Tensor | None = None

    @classmethod
    def cut(cls, pixels: torch.Tensor, window: int | None, stride: int | None, **kwargs) -> WindowMaps:
        """Divides an image into windows at distances of `stride`. Without `window`, the whole image is one window."""
        image_size = tuple(pixels.shape[1:])
        window_size = tuple(min(window or side, side) for side in image_size)
        return cls(pixels, sliding_windows(image_size, window_size, (stride or max(window_size),) * 2), **kwargs)

    def crops(self, patch_size: int) -> list[torch.Tensor]:
        """
        Returns the pixels of each window for a processor, which takes whole patches. Incomplete patches at the right
        and bottom edge are left out, like by a convolution without padding, or completed for `pad`.
        """
        crops = [self.pixels[:, rows, columns] for rows, columns in self.windows]
        rest_height, rest_width = (side % patch_size for side in crops[0].shape[1:])
        if self.padding:
            return [F.pad(crop, (0, -rest_width % patch_size, 0, -rest_height % patch_size)) for crop in crops]
        height, width = crops[0].shape[1] - rest_height, crops[0].shape[2] - rest_width
        return [crop[:, :height, :width] for crop in crops]

    def pad(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pads the prepared windows `(B, 3, H, W)` by zeros, half of them at the left and at the top."""
        rows, columns = self.windows[0]
        inside = pixel_values[..., : rows.stop - rows.start, : columns.stop - columns.start]
        return F.pad(inside, self._margins())

    def _margins(self) -> tuple[int, int, int, int]:
        """Returns the width of the padding at the left, right, top and bottom."""
        rows, columns = self.windows[0]
        missing = [-(span.stop - span.start) % (self.padding or 1) for span in (columns, rows)]
        left, top = (number // 2 for number in missing)
        return left, missing[0] - left, top, missing[1] - top

    def enlarged(self, texts: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        """Yields the map `(height, width)` of each text, or of the texts with these indices."""
        maps = self.maps if texts is None else self.maps[:, list(texts)]
        rows, columns = self.windows[0]
        height, width = rows.stop - rows.start, columns.stop - columns.start
        left, right, top, bottom = self._margins()
        padded = (top + height + bottom, left + width + right)
        weights = None
        if self.dilations:
            image = _bilinear(self.pixels[None].to(maps), self.size)
            # In the authors' code, the neighbourhood of each dilation includes the pixel itself.
            weights = neighbour_weights(image, self.dilations, PAMR_SPREAD, centers=len(self.dilations))
        for chunk in maps.split(CHUNK, 1):
            large_windows = (
                _bilinear(window_maps[None], padded)[..., top : top + height, left : left + width]
                for window_maps in chunk
            )
            joined = mean_of_windows(large_windows, self.windows, self.pixels.shape[1:], patch_size=1)
            enlarged = _bilinear(joined, self.size)
            if weights is not None:
                enlarged = propagate(enlarged, weights, self.dilations)
            yield from enlarged[0]


def _bilinear(values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resizes `(B, C, H, W)`, without antialiasing."""
    return F.interpolate(values, tuple(size), mode="bilinear", align_corners=False)
