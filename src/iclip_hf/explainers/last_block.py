"""Methods that replace the self-attention of the last block: MaskCLIP, SCLIP, ClearCLIP and NACLIP."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..backends.recording import AttentionRecord, split_heads
from ..model.outputs import ICLIPImageFeatures
from .replaced_attention import ReplacedAttention


class LastBlock(ReplacedAttention):
    """
    Base class of methods that replace the attention of the last block only.

    Args:
        residual (`bool`): whether to keep the block's residual connection and MLP.
    """

    def __init__(self, model, residual: bool = False):
        super().__init__(model, depth=1, residual=residual, mlp=residual)


class MaskCLIP(LastBlock):
    """
    MaskCLIP (Zhou et al. 2022): each token keeps its own value, without attention. This is also the value trick of
    TIPSv2. With `residual=False`, it is the variant that ClearCLIP's authors compare with. For a ResNet, the attention
    pool computes the values, without its position embeddings.
    """

    replaces_pool = True

    def __init__(self, model, residual: bool = True):
        super().__init__(model, residual)

    def mix(self, record: AttentionRecord, features: ICLIPImageFeatures, pixel_values: torch.Tensor) -> torch.Tensor:
        if not self.is_pool:
            return record.value
        pool = self.model.layers[0].block
        return split_heads(pool.v_proj(record.stream), pool.num_heads)


class SCLIP(LastBlock):
    """
    SCLIP (Wang et al. 2024): queries attend to queries and keys to keys; the sum of both attentions mixes the values.
    """

    def __init__(self, model, residual: bool = True):
        super().__init__(model, residual)

    def mix(self, record: AttentionRecord, features: ICLIPImageFeatures, pixel_values: torch.Tensor) -> torch.Tensor:
        return sum(F.scaled_dot_product_attention(heads, heads, record.value) for heads in (record.query, record.key))


class ClearCLIP(LastBlock):
    """
    ClearCLIP (Lan et al. 2024): queries attend to queries, without residual connection and MLP.

    Args:
        tokens (`str`): what attends to itself, `"query"`, `"key"` or `"value"`.
    """

    def __init__(self, model, tokens: str = "query", residual: bool = False):
        if tokens not in ("query", "key", "value"):
            raise ValueError(f"tokens is 'query', 'key' or 'value', not {tokens!r}.")
        super().__init__(model, residual)
        self.tokens = tokens

    def mix(self, record: AttentionRecord, features: ICLIPImageFeatures, pixel_values: torch.Tensor) -> torch.Tensor:
        heads = getattr(record, self.tokens)
        return F.scaled_dot_product_attention(heads, heads, record.value)


class NACLIP(LastBlock):
    """
    NACLIP (Hajimiri et al. 2025): keys attend to keys, and exp(-d^2 / (2 sigma^2)) is added to the logit of two
    patches, where d is their distance on the grid. Logits of the class token and of registers are not changed.

    Args:
        sigma (`float` or None): width of the window in patches, greater than 0; None for no window.
    """

    def __init__(self, model, sigma: float | None = 5.0, residual: bool = False):
        super().__init__(model, residual)
        self.sigma = sigma

    def mix(self, record: AttentionRecord, features: ICLIPImageFeatures, pixel_values: torch.Tensor) -> torch.Tensor:
        key = record.key
        window = None
        if self.sigma is not None:
            window = gaussian_window(features.grid, self.sigma, key.shape[2]).to(key)
        return F.scaled_dot_product_attention(key, key, record.value, attn_mask=window)


def gaussian_window(grid: tuple[int, int], sigma: float, length: int) -> torch.Tensor:
    """Computes exp(-d^2 / (2 sigma^2)) for the patches, which are the last of `length` tokens, and 0 for others."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    coordinates = torch.stack([rows.flatten(), columns.flatten()], 1).float()
    num_others = length - len(coordinates)
    distances = torch.cdist(coordinates, coordinates)
    return F.pad((-distances.square() / (2 * sigma**2)).exp(), (num_others, 0, num_others, 0))
