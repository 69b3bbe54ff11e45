"""Attention of the last layer, as it is and spread over like patches: where the model looks, whatever the text."""

from __future__ import annotations

import torch

from ..modeling_iclip import ICLIPImageFeatures, ICLIPTextFeatures, cosines
from ..similarity import spread_maps
from .explainer import Explainer


class Attention(Explainer):
    """
    Class-agnostic attention of the class token, or of the pooling head's query, over the patches: mean of the heads, the
    same map for every text. For ICLIP it is the model's own, normalised (Eq. 9 and 10).
    """

    @torch.no_grad()
    def raw_maps(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        image, (layer,) = self.family.trace(pixel_values, weights=True)
        patches = image.patch_embeds.shape[1]
        attention = layer.weights[:, :, 0, -patches:].float().mean(1) if image.attention is None else image.attention
        scores = cosines(image.image_embeds, texts.text_embeds)
        maps = self._finish(attention.unflatten(-1, image.grid).unsqueeze(1), image)
        return maps.expand(-1, scores.shape[1], -1, -1), scores

    def _finish(self, maps: torch.Tensor, image: ICLIPImageFeatures) -> torch.Tensor:
        """The attention as maps `(B, 1, h, w)` -> what is shown, of the same shape."""
        return maps


class AttentionAffinity(Attention):
    """
    The attention of [`Attention`], shared among like patches as `config.map_affinity` says: what ICLIP's own map owes to
    attention and affinity alone, without any text.
    """

    def __init__(self, model, processor):
        super().__init__(model, processor)
        if not hasattr(getattr(model, "config", None), "map_affinity"):
            raise ValueError(
                f"Expected an ICLIP model, whose maps are spread by affinity, got {type(model).__name__}: use attention."
            )
        self.sharpness = model.config.map_affinity

    def _finish(self, maps: torch.Tensor, image: ICLIPImageFeatures) -> torch.Tensor:
        return spread_maps(maps, image.patch_tokens, self.sharpness)
