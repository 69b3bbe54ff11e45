"""SCLIP (Wang et al. 2024): correlative self-attention in the last block."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..modeling_iclip import ICLIPImageFeatures
from ..models.recording import AttentionRecord
from .replaced_attention import LastBlock


class SCLIP(LastBlock):
    """
    Queries attend to queries and keys to keys; the sum of both attentions mixes the values.

    Args:
        model, residual: see [`LastBlock`].
    """

    def __init__(self, model, residual: bool = True):
        super().__init__(model, residual)

    def mix(self, layer: AttentionRecord, image: ICLIPImageFeatures, pixel_values: torch.Tensor) -> torch.Tensor:
        return sum(F.scaled_dot_product_attention(tokens, tokens, layer.value) for tokens in (layer.query, layer.key))
