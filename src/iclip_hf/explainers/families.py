"""The kinds of contrastive models that can be explained: the one place that knows their parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import CLIPModel, PreTrainedModel

from ..modeling_iclip import ICLIPImageFeatures, ICLIPModel, ICLIPTextFeatures
from ..processing_iclip import ICLIPProcessor
from ..similarity import cosine_similarity_map


# Prompts encoded at once; 80 classes in 80 templates would take gigabytes together.
_TEXT_BATCH = 256


class Family:
    """
    A model of one family behind the few functions that the methods are written in. This class is ICLIP itself.

    Attributes:
        model: the user's model, which nothing here changes.
        processor (`ICLIPProcessor`): makes `pixel_values` of whole images, without a crop.
    """

    name = "ICLIP"

    def __init__(self, model: PreTrainedModel, processor):
        self.model = model
        self.processor = processor

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode_texts(self, labels: Sequence[str], templates: Sequence[str] | None = None) -> ICLIPTextFeatures:
        """T labels, each put into the templates and averaged over them -> unit vectors `(T, P)`."""
        templates = list(self.processor.templates if templates is None else templates)
        step = max(1, _TEXT_BATCH // len(templates))
        parts = [self._encode_texts(list(labels[i : i + step]), templates) for i in range(0, len(labels), step)]
        return ICLIPTextFeatures(
            text_embeds=torch.cat([part.text_embeds for part in parts]),
            map_text_embeds=torch.cat([part.map_text_embeds for part in parts]),
        )

    def _encode_texts(self, labels: list[str], templates: list[str]) -> ICLIPTextFeatures:
        inputs = self.processor(labels=labels, templates=templates).to(self.device)
        return self.model.get_text_features(**inputs)

    def encode_image(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        """`(B, 3, H, W)` -> unit vectors of images `(B, P)` and patches `(B, N, P)`, and the patch grid."""
        return self.model.get_image_features(pixel_values)

    def similarity_maps(self, image: ICLIPImageFeatures, texts: ICLIPTextFeatures) -> torch.Tensor:
        """Raw maps `(B, T, h, w)`: the cosine of every patch with every text (Eq. 1-3)."""
        return self.model.similarity_maps(image, texts)


class CLIPFamily(Family):
    """transformers' CLIP: the patch tokens go through the class token's norm and projection."""

    name = "CLIP"
    text_options = {}

    def __init__(self, model: PreTrainedModel, processor):
        super().__init__(model, self._whole_image_processor(model, processor))

    def _whole_image_processor(self, model, processor) -> ICLIPProcessor:
        vision = model.config.vision_config
        size = {"height": vision.image_size, "width": vision.image_size}
        options = processor.image_processor.to_dict() | {"size": size, "do_center_crop": False}
        return ICLIPProcessor(
            type(processor.image_processor).from_dict(options),
            processor.tokenizer,
            patch_size=vision.patch_size,
            max_text_length=model.config.text_config.max_position_embeddings,
            **self.text_options,
        )

    def _encode_texts(self, labels: list[str], templates: list[str]) -> ICLIPTextFeatures:
        inputs = self.processor(labels=labels, templates=templates).to(self.device)
        num_templates = inputs.pop("num_templates", 1)
        return _text_features(self.model.get_text_features(**inputs).pooler_output, num_templates)

    def encode_image(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        output = self.model.get_image_features(pixel_values, interpolate_pos_encoding=True)
        return ICLIPImageFeatures(
            image_embeds=_unit(output.pooler_output),
            patch_embeds=_unit(self.project(output.last_hidden_state[:, 1:])),
            grid=self.grid(pixel_values),
        )

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Patch tokens `(B, N, D)` of the last layer -> the image-text space `(B, N, P)`."""
        return self.model.visual_projection(self.model.vision_model.post_layernorm(tokens))

    def grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        patch = self.processor.patch_size
        return pixel_values.shape[2] // patch, pixel_values.shape[3] // patch

    def similarity_maps(self, image: ICLIPImageFeatures, texts: ICLIPTextFeatures) -> torch.Tensor:
        return cosine_similarity_map(image.patch_embeds, texts.map_text_embeds, image.grid)


def _unit(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.float(), dim=-1)


def _text_features(projected: torch.Tensor, num_templates: int) -> ICLIPTextFeatures:
    """(T * num_templates, P) -> (T, P), the mean of each label's unit vectors."""
    embeds = _unit(_unit(projected).unflatten(0, (-1, num_templates)).mean(1))
    return ICLIPTextFeatures(text_embeds=embeds, map_text_embeds=embeds)


_FAMILIES = {ICLIPModel: Family, CLIPModel: CLIPFamily}


def adapt(model, processor) -> Family:
    """The model's family, by its class."""
    for kind, family in _FAMILIES.items():
        if isinstance(model, kind):
            return family(model, processor)
    raise TypeError(
        f"Expected a model of {', '.join(kind.__name__ for kind in _FAMILIES)}, got {type(model).__name__}."
    )
