"""Attention of the last layer, unchanged or averaged over similar patches. It does not depend on the text."""

from __future__ import annotations

import torch

from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from .explainer import Explainer


class Attention(Explainer):
    """
    Attention of the class token, or of the pooling head's query, over the patches, averaged over the heads. For ICLIP,
    the attention is normalised (Eq. 9). For a model that pools by the mean of the patches, the map is the mean
    attention of all patches.
    """

    sees_text = False
    needs_attention = True
    needs_layers = False

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        features, attention = self.model.attention(pixel_values)
        return _repeat_for_texts(attention, features.grid, texts), features


class AttentionAffinity(Explainer):
    """
    The attention of [`Attention`], averaged over similar patches, see `config.map_affinity`. This is the part of an
    ICLIP map that does not depend on the text.
    """

    sees_text = False
    needs_layers = False

    def __init__(self, model):
        super().__init__(model)
        network = self.model.network
        if not hasattr(getattr(network, "config", None), "map_affinity"):
            raise ValueError(f"{type(network).__name__} has no affinity, which only ICLIP has: use attention.")

    @torch.no_grad()
    def forward(
        self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures, features: ICLIPImageFeatures
    ) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        return _repeat_for_texts(features.map_attention, features.map_embeds.shape[1:3], texts), features


def _repeat_for_texts(attention: torch.Tensor, grid: tuple[int, int], texts: ICLIPTextFeatures) -> torch.Tensor:
    """Repeats attention `(B, N)` over a grid as the map of each of T texts, `(B, T, h, w)`."""
    maps = attention.unflatten(-1, grid).unsqueeze(1)
    return maps.expand(-1, texts.text_embeds.shape[1], -1, -1)
