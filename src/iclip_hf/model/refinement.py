"""Pixel-adaptive mask refinement (PAMR, Araslanov & Roth 2020): maps that follow the edges of the image."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from .similarity import resize_maps


CELL = 2  # side of a cell of the refined maps, in pixels of the prepared image
DILATIONS = (1, 2, 4)  # in cells
STEPS = 10
SPREAD = 0.3  # differences are divided by this multiple of the local standard deviation; 0.1 in the authors' code


@torch.no_grad()
def refine_maps(raw_maps: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Refines maps `(B, T, h, w)` of any method by the colours of prepared images `(B, 3, H, W)`, without training.
    Returns `(B, T, H // 2, W // 2)`, float32, within the range of the enlarged maps.

    The maps are enlarged to half the image's height and width (bicubic). Then each cell is replaced 10 times by the
    weighted mean of its 24 neighbours in the 3x3 neighbourhoods with the dilations 1, 2 and 4. The weights of the
    neighbours j of cell i are the softmax of -d_ij, where d_ij is the mean of |I_i - I_j| / (0.3 s_i) over the
    channels. I is the image at the size of the maps, and s_i is the standard deviation of the channel over i and its
    neighbours. Cells beyond the edge of the image repeat the nearest cell inside.
    """
    images = F.avg_pool2d(pixel_values.float(), CELL)
    low = raw_maps.float().amin((-2, -1), keepdim=True)
    # Subtracting the minimum keeps a constant map exactly constant.
    maps = resize_maps(raw_maps.float() - low, images.shape[-2:])
    # A CPU refines one image and two of its maps at a time, because their cells fit in its cache.
    at_once = (1, 2) if images.device.type == "cpu" else maps.shape[:2]
    num_images, num_maps = (max(1, number) for number in at_once)
    for image, image_maps in zip(images.split(num_images), maps.split(num_images)):
        weights = neighbour_weights(image, DILATIONS, SPREAD)
        for part in image_maps.split(num_maps, 1):
            part.copy_(propagate(part, weights, DILATIONS))
    return maps.add_(low)


def neighbour_weights(images: torch.Tensor, dilations: Sequence[int], spread: float, centers: int = 1) -> torch.Tensor:
    """
    Computes the weights of the neighbours of each cell of images `(B, C, H, W)`, see [`refine_maps`]. Returns
    `(num_neighbours, B, 1, H, W)`, with 8 neighbours for each dilation. The standard deviation is over the
    neighbours and the cell itself, which counts `centers` times.
    """
    neighbours = list(_neighbours(images, dilations))
    num_cells = len(neighbours) + centers
    mean = (centers * images + sum(neighbours)) / num_cells
    squares = centers * (images - mean).square()
    difference = torch.empty_like(images)  # one for all neighbours, because new memory takes longer than the sums
    for neighbour in neighbours:
        torch.sub(neighbour, mean, out=difference)
        squares.addcmul_(difference, difference)
    # Where all cells have one colour, the deviation is 0. The smallest number then gives them equal weights.
    scale = spread * (squares / (num_cells - 1)).sqrt() + torch.finfo(images.dtype).tiny
    weights = images.new_empty(len(neighbours), len(images), 1, *images.shape[2:])
    for weight, neighbour in zip(weights, neighbours):
        torch.sub(neighbour, images, out=difference).abs_().div_(scale)
        torch.mean(difference, 1, keepdim=True, out=weight)
    # A softmax. The nearest neighbour is at most five deviations away, so not all numbers are 0 after `exp`.
    weights.neg_().exp_()
    return weights.div_(weights.sum(0))


def propagate(maps: torch.Tensor, weights: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    """Replaces each cell of maps `(B, T, H, W)` 10 times by the mean of its neighbours with [`neighbour_weights`]."""
    for _ in range(STEPS):
        refined = torch.zeros_like(maps)
        for weight, neighbour in zip(weights, _neighbours(maps, dilations)):
            refined.addcmul_(weight, neighbour)
        maps = refined
    return maps


def _neighbours(cells: torch.Tensor, dilations: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yields, for each neighbour, its value at every cell of `(B, C, H, W)`, in the same shape."""
    reach = max(dilations)
    height, width = cells.shape[-2:]
    padded = F.pad(cells, (reach,) * 4, mode="replicate")
    for dilation in dilations:
        for dy in (-dilation, 0, dilation):
            for dx in (-dilation, 0, dilation):
                if dy or dx:
                    top, left = reach + dy, reach + dx
                    yield padded[..., top : top + height, left : left + width]
