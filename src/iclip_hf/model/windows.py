"""Windows that slide over prepared images."""

import itertools
from collections.abc import Callable

import torch


def windowed_maps(
    raw_maps: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    window: tuple[int, int],
    stride: tuple[int, int],
    patch_size: int,
    tapered: bool = False,
) -> torch.Tensor:
    """
    Computes raw maps from windows that slide over the images. The value of a patch is its mean over the windows that
    contain it. The last window of a row or column ends at the image's edge, and a window is never larger than the
    image.

    Args:
        raw_maps: function from pixel values `(B, 3, H', W')` to raw maps with a value for each patch.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): from the processor.
        window, stride (`tuple[int, int]`): height and width of the windows, and their distance along each side,
            multiples of the patch size in pixels; strides are at most the window.
        patch_size (`int`): side of a patch in pixels.
        tapered (`bool`): whether a window's weight in the mean falls linearly from its middle to its edges, so that
            the maps have no seams where windows end. All have the same weight otherwise.

    Returns:
        `torch.Tensor` of shape `(B, T, H / patch_size, W / patch_size)`, float32.
    """
    mean = None
    edges = [max(side - length, 0) for side, length in zip(pixel_values.shape[2:], window)]
    for top, left in itertools.product(*([*range(0, edge, step), edge] for edge, step in zip(edges, stride))):
        maps = raw_maps(pixel_values[..., top : top + window[0], left : left + window[1]])
        if mean is None:
            mean = maps.new_zeros(*maps.shape[:2], *(side // patch_size for side in pixel_values.shape[2:]))
            weights = torch.zeros_like(mean[0, 0])
            weight = _tent(maps) if tapered else torch.ones_like(maps[0, 0])
        rows = slice(top // patch_size, top // patch_size + maps.shape[2])
        columns = slice(left // patch_size, left // patch_size + maps.shape[3])
        weights[rows, columns] += weight
        # A running mean keeps a constant map exactly constant. Min-max would stretch the rounding errors of a sum.
        mean[..., rows, columns] += (maps - mean[..., rows, columns]) * (weight / weights[rows, columns])
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
    Returns window and stride, as [`windowed_maps`] takes them, of 3x3 windows of half the height and half the width of
    an image `(H, W)` in pixels, in whole patches, each of which shares half with the next.
    """
    patches = [side // patch_size for side in size]
    window = tuple(patch_size * -(-number // 2) for number in patches)
    return window, tuple(patch_size * max(1, -(-number // 4)) for number in patches)
