"""Image-text similarity maps (Eq. 1-4) and their reversal (Eq. 5)."""

from __future__ import annotations

import torch

from ..model.explanation_core import SimilarityMap
from ..model.modeling_iclip import ICLIPImageFeatures, ICLIPTextFeatures
from .explainer import Explainer


_NEEDED = ("image_embeds", "patch_embeds", "attention", "map_attention", "attention_direction")


class ITSM(Explainer):
    """Cosine of each projected patch token with the text; for ICLIP the model's own map."""

    needs_layers = False

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        image = self.model.get_image_features(pixel_values)
        # Without the outputs of the tower, which take more memory than the rest.
        return ICLIPImageFeatures(**{name: image[name] for name in _NEEDED if image.get(name) is not None})

    @torch.no_grad()
    def forward(
        self, pixel_values: torch.Tensor | ICLIPImageFeatures, texts: ICLIPTextFeatures
    ) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        return SimilarityMap(self.model).forward(pixel_values, texts)


class ReversedITSM(ITSM):
    """The reversed map 1 - M (Eq. 5), which corrects CLIP's opposite maps without training. Its raw maps are those of [`ITSM`]."""

    reversed = True
