"""CLIP Surgery (Li et al. 2023): value-value attention, and maps from which the mean over the texts is subtracted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ..backends.recording import AttentionRecord
from ..model.batches import for_images, join_texts
from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.similarity import cosines
from .replaced_attention import ReplacedAttention


class CLIPSurgery(ReplacedAttention):
    """
    Values attend to values (architecture surgery). The similarities of each text are weighted by the softmax of the
    scores of the texts, and their mean over the texts is subtracted (feature surgery). So a map depends on the other
    texts. If there is a single text, the map of the empty text in the same templates is subtracted. The model computes
    the scores. For ResNets, the authors compute them from the output of the replaced attention pool instead.
    """

    replaces_pool = True

    def __init__(self, model, depth: int = 6):
        super().__init__(model, depth)
        self._empty: dict[tuple[str, ...], ICLIPTextFeatures] = {}  # by the templates

    def mix(self, record: AttentionRecord, features: ICLIPImageFeatures, pixel_values: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(record.value, record.value, record.value)

    @torch.no_grad()
    def forward(
        self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures, templates: Sequence[str]
    ) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        single = texts.text_embeds.shape[1] == 1
        if single:
            texts = join_texts([texts, for_images(self.empty_text(tuple(templates)), len(pixel_values))])
        maps, features = super().forward(pixel_values, texts)
        if single:
            return maps[:, :1] - maps[:, 1:], features
        scores = cosines(features.image_embeds, texts.text_embeds)
        weights = (2 * scores).softmax(1) * scores.shape[1]  # their mean is 1; the factor 2 is the authors'
        maps = maps * weights[..., None, None]
        return maps - maps.mean(1, keepdim=True), features

    def empty_text(self, templates: tuple[str, ...]) -> ICLIPTextFeatures:
        """Encodes the empty text in these templates, `(1, P)`. If a prompt is then empty, it becomes "a photo of"."""
        if templates not in self._empty:
            prompts = [template.replace("{}", "") for template in templates]
            prompts = [prompt if prompt.strip() else "a photo of" for prompt in prompts]
            inputs = self.model.processor(labels=prompts, templates=["{}"])
            inputs["num_templates"] = len(prompts)  # all are prompts of one label
            self._empty[templates] = self.model.get_text_features(**inputs.to(self.model.device))
        return self._empty[templates]
