"""MaskCLIP (Zhou et al. 2022): the values of the last block, without attention."""

from __future__ import annotations

import torch

from ..modeling_iclip import ICLIPImageFeatures
from ..models.recording import AttentionRecord
from .replaced_attention import LastBlock


class MaskCLIP(LastBlock):
    """
    Each token keeps its own value. With `residual=True`, this is the value trick of TIPSv2.

    Args:
        model, residual: see [`LastBlock`].
    """

    def mix(self, layer: AttentionRecord, image: ICLIPImageFeatures, pixel_values: torch.Tensor) -> torch.Tensor:
        return layer.value
