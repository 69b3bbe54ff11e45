"""Attention of the last layer, as it is or shared among similar patches. It does not depend on the text."""

from __future__ import annotations

import math

import torch

from ..modeling_iclip import ICLIPImageFeatures, ICLIPTextFeatures
from .explainer import Explainer
from .recording import AttentionRecord


class Attention(Explainer):
    """
    Attention of the class token, or of the pooling head's query, over the patches, averaged over the heads. All texts have the
    same map. For ICLIP, the attention is normalised (Eq. 9).
    """

    sees_text = False

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        image, (layer,) = self.family.trace(pixel_values, weights=True)
        maps = self._attention(image, layer).unflatten(-1, image.grid).unsqueeze(1)
        return maps.expand(-1, texts.text_embeds.shape[-2], -1, -1), image

    def _attention(self, image: ICLIPImageFeatures, layer: AttentionRecord) -> torch.Tensor:
        """Returns the value of each patch, `(B, N)`."""
        if image.attention is not None:
            return image.attention
        return layer.weights[:, :, 0, -math.prod(image.grid) :].float().mean(1)


class AttentionAffinity(Attention):
    """
    The attention of [`Attention`], shared among similar patches, see `config.map_affinity`. This is the part of an ICLIP map that
    does not depend on the text.
    """

    def __init__(self, model, processor):
        super().__init__(model, processor)
        if not hasattr(getattr(model, "config", None), "map_affinity"):
            raise ValueError(
                f"Expected an ICLIP model, whose attention is shared by affinity, got {type(model).__name__}: use attention."
            )

    def _attention(self, image: ICLIPImageFeatures, layer: AttentionRecord) -> torch.Tensor:
        return image.map_attention
