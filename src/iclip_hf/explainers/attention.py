"""Attention of the last layer: where the model looks, whatever the text."""

from __future__ import annotations

import math

import torch

from ..modeling_iclip import ICLIPTextFeatures, cosines
from .explainer import Explainer


class Attention(Explainer):
    """
    Class-agnostic attention of the class token, or of the pooling head's query, over the patches: mean of the heads, the
    same map for every text. For ICLIP it is the model's own, normalised (Eq. 9 and 10).
    """

    @torch.no_grad()
    def raw_maps(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        image, (layer,) = self.family.trace(pixel_values, weights=True)
        patches = math.prod(image.grid)
        attention = layer.weights[:, :, 0, -patches:].float().mean(1) if image.attention is None else image.attention
        scores = cosines(image.image_embeds, texts.text_embeds)
        return attention.unflatten(-1, image.grid).unsqueeze(1).expand(-1, scores.shape[1], -1, -1), scores
