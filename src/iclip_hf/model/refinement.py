"""Pixel-adaptive mask refinement (PAMR, Araslanov & Roth 2020): maps that follow the edges of the image."""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from .similarity import resize_maps


CELL = 2  # pixels of the prepared image along a side of a cell of the refined maps
DILATIONS = (1, 2, 4)  # in cells
STEPS = 10
SPREAD = 0.3  # share of the local standard deviation that a difference is divided by; 0.1 in the authors' code


@torch.no_grad()
def refine_maps(raw_maps: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Refines maps `(B, T, h, w)` of any method by the colours of prepared images `(B, 3, H, W)`, without training.
    Returns `(B, T, H // 2, W // 2)`, float32, within the range of the enlarged maps.

    The maps are enlarged to half the image's height and width (bicubic). Then each cell is replaced 10 times by the
    weighted mean of 24 neighbours: those of its 3x3 neighbourhoods with the dilations 1, 2 and 4. The weights are a
    softmax over the neighbours j of cell i of the mean over the channels of -|I_i - I_j| / (0.3 s_i), where I is the
    image and s_i the standard deviation of the channel over i and its neighbours. Cells beyond the edge of the image
    repeat the nearest cell inside.
    """
    image = F.avg_pool2d(pixel_values.float(), CELL)
    near = list(_neighbours(image))
    mean = (image + sum(near)) / (len(near) + 1)
    variance = sum((cells - mean).square() for cells in (image, *near)) / len(near)
    # The smallest number keeps cells of one colour, whose spread is 0, at equal weights.
    spread = SPREAD * variance.sqrt() + torch.finfo(variance.dtype).tiny
    affinity = torch.stack([-((cells - image).abs() / spread).mean(1) for cells in near])
    weights = affinity.softmax(0)[:, :, None]  # (24, B, 1, H, W)
    # Subtracting the minimum keeps a constant map exactly constant.
    low = raw_maps.float().amin((-2, -1), keepdim=True)
    maps = resize_maps(raw_maps.float() - low, image.shape[-2:])
    for _ in range(STEPS):
        refined = torch.zeros_like(maps)
        for weight, neighbour in zip(weights, _neighbours(maps)):
            refined.addcmul_(weight, neighbour)
        maps = refined
    return maps + low


def _neighbours(cells: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the values of `(B, C, H, W)` cells at each of the 24 neighbours, of the same shape."""
    reach = max(DILATIONS)
    height, width = cells.shape[-2:]
    padded = F.pad(cells, (reach,) * 4, mode="replicate")
    for dilation in DILATIONS:
        for row in (-dilation, 0, dilation):
            for column in (-dilation, 0, dilation):
                if row or column:
                    top, left = reach + row, reach + column
                    yield padded[..., top : top + height, left : left + width]
