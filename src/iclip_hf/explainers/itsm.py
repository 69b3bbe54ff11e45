"""Image-text similarity maps (Eq. 1-4) and their reversal (Eq. 5)."""

from __future__ import annotations

import torch

from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from .explainer import Explainer


class ITSM(Explainer):
    """For ICLIP, the model's own map; for other models, the cosine of each projected patch token and the text."""

    needs_layers = False

    @torch.no_grad()
    def forward(
        self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures, features: ICLIPImageFeatures
    ) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        return self.model.similarity_maps(features, texts), features


class ReversedITSM(ITSM):
    """
    The reversed map 1 - M (Eq. 5), which corrects CLIP's opposite maps without training. The raw maps are those of
    [`ITSM`] with the opposite sign.
    """

    def forward(
        self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures, features: ICLIPImageFeatures
    ) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        maps, features = super().forward(pixel_values, texts, features)
        return -maps, features
