"""Image-text similarity maps (Eq. 1-4) and their reversal (Eq. 5)."""

from __future__ import annotations

import torch

from ..modeling_iclip import ICLIPTextFeatures, cosines
from .explainer import Explainer


class ITSM(Explainer):
    """Cosine of each projected patch token with the text; for ICLIP the model's own map."""

    @torch.no_grad()
    def raw_maps(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.family.encode_image(pixel_values)
        return self.family.similarity_maps(image, texts).float(), cosines(image.image_embeds, texts.text_embeds)


class ReversedITSM(ITSM):
    """The negative of the map: after min-max this is 1 - M, which repairs CLIP's opposite maps without training."""

    def raw_maps(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        maps, scores = super().raw_maps(pixel_values, texts)
        return -maps, scores
