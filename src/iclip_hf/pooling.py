"""Pooling of patch tokens into one image vector: class token, average, max, and masked max (Eq. 9, 10)."""

import torch


def normalize_attention(attention: torch.Tensor, norm: str = "minmax", quantile: float = 0.9) -> torch.Tensor:
    """
    Brings the class token's attention to [0, 1] over the patches of each image (Eq. 9).

    Args:
        attention (`torch.Tensor` of shape `(B, N)`): softmax weights of the class token over the N patches.
        norm (`str`): `"minmax"` maps the largest weight to 1; `"quantile"` maps the given quantile to 1 and clips above it.
        quantile (`float` in (0, 1]): used by `"quantile"`.

    Returns:
        `torch.Tensor` of shape `(B, N)`, float32, in [0, 1]; zeros where all weights are equal.
    """
    attention = attention.float()
    low = attention.amin(-1, keepdim=True)
    if norm == "minmax":
        high = attention.amax(-1, keepdim=True)
    else:
        rank = round(quantile * (attention.shape[-1] - 1))
        high = attention.sort(-1).values[:, rank, None]
    span = high - low
    return ((attention - low) / span.masked_fill(span == 0, 1.0)).clamp(max=1.0)


def pool(patch_tokens: torch.Tensor, class_token: torch.Tensor, attention: torch.Tensor, mode: str) -> torch.Tensor:
    """
    Pools the patch tokens of each image into one vector.

    Args:
        patch_tokens (`torch.Tensor` of shape `(B, N, D)`): patch tokens of the image tower.
        class_token (`torch.Tensor` of shape `(B, D)`): its class token.
        attention (`torch.Tensor` of shape `(B, N)`): normalised class-token attention in [0, 1].
        mode (`str`): `"class_token"`, `"average"`, `"max"` (per channel), or `"masked_max"`, the maximum over the tokens
            multiplied by their attention (Eq. 10), which keeps background tokens from winning a channel.

    Returns:
        `torch.Tensor` of shape `(B, D)`.
    """
    if mode == "class_token":
        return class_token
    if mode == "average":
        return patch_tokens.mean(1)
    if mode == "max":
        return patch_tokens.amax(1)
    if mode == "masked_max":
        return (patch_tokens * attention.unsqueeze(-1).to(patch_tokens.dtype)).amax(1)
    raise ValueError(f'Expected pooling to be "masked_max", "max", "average" or "class_token", got {mode!r}.')
