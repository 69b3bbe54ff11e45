"""Attention of the last layer: where the model looks, whatever the text."""

from __future__ import annotations

import math

import torch

from ..modeling_iclip import ICLIPTextFeatures
from .explainer import Explainer


class Attention(Explainer):
    """
    Class-agnostic attention of the class token, or of the pooling head's query, over the patches: mean of the heads, the
    same map for every text. For ICLIP it is the model's own, normalised (Eq. 9).
    """

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        image, (layer,) = self.family.trace(pixel_values, weights=True)
        patches = math.prod(image.grid)
        attention = layer.weights[:, :, 0, -patches:].float().mean(1) if image.attention is None else image.attention
        maps = attention.unflatten(-1, image.grid).unsqueeze(1)
        return maps.expand(-1, texts.text_embeds.shape[-2], -1, -1), image.image_embeds
