"""
Pooling of tokens into one image vector, by class token, average, max or masked max (Eq. 9, 10), and the selection of
patches for a loss.
"""

import torch
from torch.nn import functional as F

from .similarity import stretch


def normalize_attention(attention: torch.Tensor, norm: str, quantile: float) -> torch.Tensor:
    """
    Scales the class token's attention `(B, N)` to [0, 1] over the patches of each image (Eq. 9), float32. The smallest
    weight becomes 0. With the norm `"minmax"`, the largest weight becomes 1. With `"quantile"`, the weight at
    `quantile`, in (0, 1], and all larger weights become 1. If the weight that would become 1 equals the smallest one,
    the smallest one is subtracted from all weights, so equal weights become 0.
    """
    attention = attention.float()
    low = attention.amin(-1, keepdim=True)
    if norm == "minmax":
        high = attention.amax(-1, keepdim=True)
    else:
        rank = round(quantile * (attention.shape[-1] - 1))
        high = attention.sort(-1).values[:, rank, None]
    return stretch(attention, low, high).clamp(max=1.0)


def average_by_affinity(
    values: torch.Tensor, tokens: torch.Tensor, affinity: float, queries: torch.Tensor
) -> torch.Tensor:
    """
    Averages the values `(B, N, C)` of all N patches, once for each of n patches. The weights are
    softmax(affinity * cosine) over the N patches, where the cosines compare the tokens `queries` `(B, n, D)` of the n
    patches with the `tokens` `(B, N, D)` of all patches. Returns `(B, n, C)`. The weights are not kept in memory.
    """
    keys, queries = F.normalize(tokens.float(), dim=-1), F.normalize(queries.float(), dim=-1)
    # Zeros make all widths equal, as fused attention needs. Other attention would keep the weights in memory.
    width = max(keys.shape[-1], values.shape[-1])
    padded = (F.pad(part, (0, width - part.shape[-1])).unsqueeze(1) for part in (queries, keys, values.float()))
    averaged = F.scaled_dot_product_attention(*padded, scale=float(affinity))
    return averaged[:, 0, :, : values.shape[-1]].to(values.dtype)


def smooth_maximum(values: torch.Tensor, log_weights: torch.Tensor, sharpness: float, dim: int) -> torch.Tensor:
    """
    Returns (1 / b) log sum_i p_i exp(b v_i) along a dimension, with the values v, their weights p, whose sum is 1, and
    the sharpness b. For a small b this is nearly the mean of the values, and for a large b nearly their maximum.
    """
    return (log_weights + sharpness * values).logsumexp(dim) / sharpness


def pool_similarities(
    patch_embeds: torch.Tensor, text_embeds: torch.Tensor, attention: torch.Tensor, sharpness: float
) -> torch.Tensor:
    """
    Computes masked max pooling over similarities instead of channels: the [`smooth_maximum`] of the similarities of
    patches `(B, N, P)` and texts, `(T, P)` or `(B, T, P)`, both unit vectors. The weights of the patches are their
    attention `(B, N)`, at least 0, divided by its sum. If all attention of an image is 0, its patches have equal
    weights. Returns `(B, T)`, float32.

    The trained score is then the peak of the map. Eq. 10 takes the maximum of each channel instead, which is similar
    for all images if a tower was trained with a patch objective.
    """
    attention = attention.float()
    attention = attention.where(attention.sum(-1, keepdim=True) > 0, 1.0)
    weights = attention / attention.sum(-1, keepdim=True)
    with torch.autocast(patch_embeds.device.type, enabled=False):
        similarities = text_embeds.float() @ patch_embeds.mT.float()
    # A patch without attention is left out. The gradient of log 0 would be infinite, and NaN if multiplied by the
    # weight 0 of the patch.
    left_out = weights == 0
    log_weights = weights.masked_fill(left_out, 1.0).log().masked_fill(left_out, -torch.inf)
    return smooth_maximum(similarities, log_weights.unsqueeze(1), sharpness, -1)


# Poolings of an image into one vector: the rows of Table 2, with both normalisations of the attention for masked max.
POOLINGS = ("class_token", "average", "max", "masked_max/minmax", "masked_max/quantile")


def pool(patch_tokens: torch.Tensor, class_token: torch.Tensor, attention: torch.Tensor, mode: str) -> torch.Tensor:
    """
    Pools patch tokens `(B, N, D)`, the class token `(B, D)` and the attention `(B, N)` in [0, 1] into one vector of
    each image, `(B, D)`. The mode `"class_token"` takes the class token. `"average"` and `"max"` take the mean and the
    maximum of each channel over the patches. `"masked_max"` multiplies the patch tokens by their attention before the
    maximum (Eq. 10), so that tokens of the background do not win a channel.
    """
    if mode == "class_token":
        return class_token
    if mode == "average":
        return patch_tokens.mean(1)
    if mode == "max":
        return patch_tokens.amax(1)
    return (patch_tokens * attention.unsqueeze(-1).to(patch_tokens.dtype)).amax(1)


def representative_patches(
    tokens: torch.Tensor, attention: torch.Tensor, grid: tuple[int, int], count: int
) -> torch.Tensor:
    """
    Selects `count` patches that represent an image, from the patch tokens `(B, N, D)`, their attention `(B, N)` in
    [0, 1] and the grid (h, w). The tokens are those of the map branch before the average over similar patches. Returns
    indices `(B, count)`, or all N if there are no more than `count`.

    All but four are salient. The first has the largest attention. Each further one has the largest product of
    attention and square root of the distance, 1 - cosine, to the nearest selected patch. The last four are in the
    middle of the image's quarters, so that large objects and the ground also count by their area.
    """
    num_images, num_patches = tokens.shape[:2]
    if count >= num_patches:
        return torch.arange(num_patches, device=tokens.device).expand(num_images, -1)
    each_image = torch.arange(num_images, device=tokens.device)
    units = F.normalize(tokens.float(), dim=-1)
    priority = attention
    distance = torch.full_like(attention, 2.0)
    salient = []
    for _ in range(count - 4):
        salient.append(priority.argmax(1))
        newest = units[each_image, salient[-1]].unsqueeze(-1)
        distance = torch.minimum(distance, 1 - (units @ newest).squeeze(-1))
        # Adding 0.05 allows patches without attention. By the distance alone, a large object would have fewer patches
        # than its surroundings, because its patches are similar.
        priority = (attention + 0.05) * distance.clamp(min=0).sqrt()
    rows, columns = ((side // 4, side - 1 - side // 4) for side in grid)
    middles = torch.tensor([row * grid[1] + column for row in rows for column in columns], device=tokens.device)
    return torch.cat([torch.stack(salient, 1), middles.expand(num_images, -1)], 1)


EVEN_SIDE = 8  # rows and columns of the patches that `even_patches` selects


def even_patches(grid: tuple[int, int]) -> torch.Tensor:
    """
    Selects 64 patches that cover an image evenly, in 8 rows of 8. Every second row is shifted by half a column.
    Returns their indices in a row-major grid of (height, width) patches. The heights of the patches are
    `even_heights()`.
    """
    height, width = grid
    steps = torch.arange(EVEN_SIDE)
    rows = ((steps + 0.5) * height / EVEN_SIDE).long().unsqueeze(1)
    shift = torch.where(steps % 2 == 0, 0.25, 0.75).unsqueeze(1)
    columns = ((steps + shift) * width / EVEN_SIDE).long()
    return (rows * width + columns).flatten()


def even_heights() -> torch.Tensor:
    """Returns the heights of [`even_patches`], `(64,)`, from 0 at the top of an image to 1 at the bottom."""
    return ((torch.arange(EVEN_SIDE) + 0.5) / EVEN_SIDE).repeat_interleave(EVEN_SIDE)
