"""Attention of the last layer, as it is or shared among similar patches. It does not depend on the text."""

from __future__ import annotations

import torch

from ..model.modeling_iclip import ICLIPImageFeatures, ICLIPTextFeatures
from .explainer import Explainer


class Attention(Explainer):
    """
    Attention of the class token, or of the pooling head's query, over the patches, averaged over the heads. All texts have the
    same map. For ICLIP, the attention is normalised (Eq. 9).
    """

    sees_text = False
    needs_layers = False

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        image, attention = self._attention(pixel_values)
        maps = attention.unflatten(-1, image.grid).unsqueeze(1)
        return maps.expand(-1, texts.text_embeds.shape[1], -1, -1), image

    def _attention(self, pixel_values: torch.Tensor) -> tuple[ICLIPImageFeatures, torch.Tensor]:
        """Returns the features of the images, and the value of each patch, `(B, N)`."""
        return self.model.attention(pixel_values)


class AttentionAffinity(Attention):
    """
    The attention of [`Attention`], shared among similar patches, see `config.map_affinity`. This is the part of an ICLIP map that
    does not depend on the text.
    """

    def __init__(self, model):
        super().__init__(model)
        network = self.model.network
        if not hasattr(getattr(network, "config", None), "map_affinity"):
            raise ValueError(f"{type(network).__name__} has no affinity, only ICLIP: use attention.")

    def _attention(self, pixel_values: torch.Tensor) -> tuple[ICLIPImageFeatures, torch.Tensor]:
        image = self.model.get_image_features(pixel_values)
        return image, image.map_attention
