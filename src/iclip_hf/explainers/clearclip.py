"""ClearCLIP (Lan et al. 2024): self-self attention in the last block, without residual connection and MLP."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..modeling_iclip import ICLIPImageFeatures
from ..models.recording import AttentionRecord
from .replaced_attention import LastBlock


class ClearCLIP(LastBlock):
    """
    Queries attend to queries.

    Args:
        model, residual: see [`LastBlock`].
        tokens (`str`): which tokens attend to themselves, `"query"`, `"key"` or `"value"`.
    """

    def __init__(self, model, tokens: str = "query", residual: bool = False):
        super().__init__(model, residual)
        if tokens not in ("query", "key", "value"):
            raise ValueError(f'Expected tokens to be "query", "key" or "value", got {tokens!r}: choose one of them.')
        self.tokens = tokens

    def mix(self, layer: AttentionRecord, image: ICLIPImageFeatures, pixel_values: torch.Tensor) -> torch.Tensor:
        tokens = getattr(layer, self.tokens)
        return F.scaled_dot_product_attention(tokens, tokens, layer.value)
