"""Image-text similarity maps (ITSM, Eq. 1-5) as pure functions: cosine map, min-max, resize and reversal."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F


def check_map_size(size: Sequence[int]) -> tuple[int, int]:
    """Returns the height and width of a map. Raises `ValueError` unless `size` is two integers of at least 1."""
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise ValueError(f"The size of a map is its height and width in pixels, at least 1, not {size!r:.100}.")
    return height, width


def check_finite(values: torch.Tensor) -> None:
    """Raises `ValueError` if scores or maps of a model hold NaN or infinity. Comparisons would not report them."""
    if not values.isfinite().all():
        raise ValueError("The model gives NaN or infinity: check its weights, or load it in float32.")


def cosines(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """
    Computes the cosines `(B, T)`, float32, of unit vectors of images `(B, P)` and of texts `(T, P)` or `(B, T, P)`.
    """
    # Autocast is disabled: bfloat16 would change scaled cosines, and the loss, by up to 0.5.
    with torch.autocast(image_embeds.device.type, enabled=False):
        image_embeds = image_embeds.float()
        text_embeds = text_embeds.to(image_embeds)
        if text_embeds.ndim == 3:
            return (text_embeds @ image_embeds.unsqueeze(-1)).squeeze(-1)
        return image_embeds @ text_embeds.mT


def cosine_similarity_map(patch_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """
    Returns the cosines `(B, T, h, w)`, float32, of unit vectors of patches `(B, h, w, P)` and of texts `(T, P)` or
    `(B, T, P)` (Eq. 1-3), on the device of the patches.
    """
    # In half precision, as under autocast, several patches would have the same value.
    with torch.autocast(patch_embeds.device.type, enabled=False):
        patches = patch_embeds.flatten(1, 2).mT.float()
        maps = text_embeds.to(patches) @ patches
    return maps.unflatten(-1, patch_embeds.shape[1:3])


def stretch(
    values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Maps `values` linearly so that `low` becomes 0 and `high` becomes 1. Where `low` and `high` are equal, the result
    is `values - low`. Shapes are broadcast. The result is written to `out` if given, which may be `values` itself.
    """
    span = high - low
    # Division instead of multiplication by the reciprocal, so that `high` becomes exactly 1.
    return torch.div(torch.sub(values, low, out=out), span.masked_fill(span == 0, 1.0), out=out)


def min_max_normalize(maps: torch.Tensor) -> torch.Tensor:
    """Stretches each map `(..., H, W)` to [0, 1] (Eq. 4). A constant map becomes zeros."""
    low, high = torch.aminmax(maps.flatten(-2), dim=-1)
    return stretch(maps, low[..., None, None], high[..., None, None])


def resize_maps(maps: torch.Tensor, size: tuple[int, int], out: torch.Tensor | None = None) -> torch.Tensor:
    """
    Resizes maps `(..., h, w)` to an image's size (height, width) in pixels, bicubic with align_corners=False and
    without antialiasing (Eq. 4), float32. The result is written to `out` if given. It equals
    `torch.nn.functional.interpolate` up to rounding. It is computed by one matrix product for each side, which is
    faster if the image is much larger than the grid, such as a photograph and 16x16 patches.
    """
    resized, low = _resize_above_lowest(maps, _resize_weights(maps, size), out)
    return resized.add_(low)


@torch.no_grad()
def resize_and_normalize(maps: torch.Tensor, size: tuple[int, int], reverse: bool = False) -> torch.Tensor:
    """
    Computes M = `min_max_normalize(resize_maps(maps, size))` (Eq. 4), or 1 - M (Eq. 5) with `reverse`, for `(T, h, w)`
    maps. Maps are computed one by one: one map fits the cache of a processor, and no map depends on the other maps, to
    the last bit.
    """
    weights = _resize_weights(maps, size)
    normalized = _empty((len(maps), *size), maps.device)
    resized = torch.empty(size, dtype=torch.float32, device=maps.device)
    for raw_map, target in zip(maps, normalized):
        _resize_above_lowest(raw_map, weights, resized)
        stretch(resized, *torch.aminmax(resized), out=target)
    return 1 - normalized if reverse else normalized  # stretching the negative would round differently


def _resize_weights(maps: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the matrices that resize `(..., h, w)` maps along height and width."""
    return tuple(_bicubic_weights(source, target, maps.device) for source, target in zip(maps.shape[-2:], size))


def _resize_above_lowest(
    maps: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Subtracts the lowest value of each map, then resizes the maps. Returns the resized maps and the lowest values. The
    subtraction keeps a constant map exactly constant: min-max would stretch its rounding errors.
    """
    vertical, horizontal = weights
    maps = maps.float()
    low = maps.amin((-2, -1), keepdim=True)
    with torch.autocast(maps.device.type, enabled=False):  # it would round products to half precision
        return torch.matmul(vertical, (maps - low) @ horizontal.mT, out=out), low


def _empty(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """
    Returns an uninitialised tensor. On a CPU, numpy allocates it in huge pages, because mapping small pages takes
    longer than computing the maps.
    """
    if device.type == "cpu":
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(shape, dtype=torch.float32, device=device)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # the matrix may later be part of a graph
def _bicubic_weights(source: int, target: int, device: torch.device) -> torch.Tensor:
    """Returns the (target, source) matrix of a one-dimensional bicubic resize, from the resized identity."""
    identity = torch.eye(source, dtype=torch.float32, device=device)[None, None]
    return F.interpolate(identity, size=(target, source), mode="bicubic", align_corners=False)[0, 0]
