"""CLIP Surgery (Li et al. 2023): value-value attention, and maps without what the texts have in common."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..backends.recording import AttentionRecord
from ..model.engine import join_texts
from ..model.modeling_iclip import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.similarity import cosines
from .replaced_attention import ReplacedAttention


class CLIPSurgery(ReplacedAttention):
    """
    Values attend to values (architecture surgery). The similarities of each text are weighted by how well it matches
    the image, and their mean over the texts is subtracted (feature surgery), so a map depends on the other texts. A
    single text is compared with a prompt without a class.
    """

    def __init__(self, model, depth: int = 6):
        super().__init__(model, depth)
        self.nothing = self.model.encode_texts(["a photo of"], ["{}"])

    def mix(self, layer: AttentionRecord, image: ICLIPImageFeatures, pixel_values: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(layer.value, layer.value, layer.value)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        single = texts.text_embeds.shape[1] == 1
        if single:
            nothing = {name: value.expand_as(texts[name]) for name, value in self.nothing.items()}
            texts = join_texts([texts, ICLIPTextFeatures(**nothing)])
        maps, image = super().forward(pixel_values, texts)
        if single:
            return maps[:, :1] - maps[:, 1:], image
        scores = cosines(image.image_embeds, texts.text_embeds)
        weights = (2 * scores).softmax(1) * scores.shape[1]  # 2 is the authors'; their mean is 1
        maps = maps * weights[..., None, None]
        return maps - maps.mean(1, keepdim=True), image
