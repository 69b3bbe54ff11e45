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
    """
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)
    height, width = pixels.shape[1:]
    factor = min(short_side / min(height, width), LONGEST_SIDE / max(height, width))
    return _bilinear(pixels[None].float(), [int(side * factor + 0.5) for side in (height, width)])[0].round().byte()


@dataclass(frozen=True)
class WindowMaps:
    """
    The raw maps of the windows of one image.

    Attributes:
        pixels (`torch.Tensor` of shape `(3, H, W)`): the resized image.
        windows: the rows and columns of pixels of each window. All windows have one size.
        size (`tuple[int, int]`): height and width of the enlarged maps in pixels.
        dilations: distances in pixels of the neighbours of PAMR, which refines the enlarged maps; none without PAMR.
        maps (`torch.Tensor` of shape `(num_windows, T, h, w)`, *optional*): raw maps of T texts.
    """

    pixels: torch.Tensor
    windows: Sequence[tuple[slice, slice]]
    size: tuple[int, int]
    dilations: Sequence[int] = ()
    maps: torch.Tensor | None = None

    @classmethod
    def cut(cls, pixels: torch.Tensor, window: int | None, stride: int | None, **kwargs) -> WindowMaps:
        """Divides an image into windows at distances of `stride`. Without `window`, the whole image is one window."""
        image_size = tuple(pixels.shape[1:])
        window_size = tuple(min(window or side, side) for side in image_size)
        return cls(pixels, sliding_windows(image_size, window_size, (stride or max(window_size),) * 2), **kwargs)

    def crops(self, patch_size: int) -> list[torch.Tensor]:
        """
        Returns the pixels of each window, without incomplete patches at the right and bottom edge, like a convolution
        without padding.
        """
        crops = [self.pixels[:, rows, columns] for rows, columns in self.windows]
        height, width = (side - side % patch_size for side in crops[0].shape[1:])
        return [crop[:, :height, :width] for crop in crops]

    def enlarged(self, texts: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        """Yields the map `(height, width)` of each text, or of the texts with these indices."""
        maps = self.maps if texts is None else self.maps[:, list(texts)]
        rows, columns = self.windows[0]
        window_size = (rows.stop - rows.start, columns.stop - columns.start)
        weights = None
        if self.dilations:
            image = _bilinear(self.pixels[None].to(maps), self.size)
            # In the authors' code, the neighbourhood of each dilation includes the pixel itself.
            weights = neighbour_weights(image, self.dilations, PAMR_SPREAD, centers=len(self.dilations))
        for chunk in maps.split(CHUNK, 1):
            large_windows = (_bilinear(window_maps[None], window_size) for window_maps in chunk)
            joined = mean_of_windows(large_windows, self.windows, self.pixels.shape[1:], patch_size=1)
            enlarged = _bilinear(joined, self.size)
            if weights is not None:
                enlarged = propagate(enlarged, weights, self.dilations)
            yield from enlarged[0]


def _bilinear(values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resizes `(B, C, H, W)`, without antialiasing."""
    return F.interpolate(values, tuple(size), mode="bilinear", align_corners=False)
