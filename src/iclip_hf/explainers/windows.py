"""Maps of images that are larger than the model's, from overlapping windows."""

from __future__ import annotations

import itertools

import torch

from ..modeling_iclip import ICLIPTextFeatures
from .explainer import Explainer


def check_window(explainer: Explainer, window: int, stride: int) -> None:
    """Raises `ValueError` unless window and stride, in pixels, are multiples of the patch size, and windows leave no gaps."""
    patch = explainer.model.processor.patch_size
    for name, pixels in (("window", window), ("stride", stride)):
        if pixels < patch or pixels % patch:
            raise ValueError(
                f"Expected {name} in multiples of the patch size, {patch} pixels, got {pixels}: change it."
            )
    if stride > window:
        raise ValueError(f"Expected stride of at most the window's {window} pixels, got {stride}: change it.")


def windowed_maps(
    explainer: Explainer, pixel_values: torch.Tensor, texts: ICLIPTextFeatures, window: int, stride: int
) -> torch.Tensor:
    """
    Computes raw maps from square windows that slide over the images. The value of a patch is its mean over the windows that contain
    it. The last window of a row or column ends at the image's edge, and a window is never larger than the image.

    Args:
        explainer ([`Explainer`]), pixel_values, texts: as for [`Explainer.forward`].
        window, stride (`int`): side of the windows and their distance, in pixels, see `check_window`.

    Returns:
        `torch.Tensor` of shape `(B, T, h, w)`, float32.
    """
    patch, total = explainer.model.processor.patch_size, None
    edges = [max(side - window, 0) for side in pixel_values.shape[2:]]
    for top, left in itertools.product(*([*range(0, edge, stride), edge] for edge in edges)):
        maps, _ = explainer.raw_maps(pixel_values[..., top : top + window, left : left + window], texts)
        if total is None:
            total = maps.new_zeros(*maps.shape[:2], *(side // patch for side in pixel_values.shape[2:]))
            number = torch.zeros_like(total[0, 0])
        rows = slice(top // patch, top // patch + maps.shape[2])
        columns = slice(left // patch, left // patch + maps.shape[3])
        total[..., rows, columns] += maps
        number[rows, columns] += 1
    return total / number
