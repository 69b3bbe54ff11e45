"""Adapters of the supported contrastive models, which hide how the models differ."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel, SiglipImageProcessor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..configuration_iclip import patch_side
from ..modeling_iclip import (
    ICLIPImageFeatures,
    ICLIPModel,
    ICLIPTextFeatures,
    average_templates,
    cosines,
    normalize,
)
from ..models.onnx import ONNXModel
from ..processing_iclip import ICLIPProcessor
from ..prompts import check_templates
from ..similarity import cosine_similarity_map
from .recording import AttentionLayer, AttentionRecord, merge_heads, prepare, private_copy, record


# Number of prompts in one forward pass. All prompts of 80 classes in 80 templates would take gigabytes.
TEXT_BATCH = 256


def join_texts(parts: Sequence[ICLIPTextFeatures]) -> ICLIPTextFeatures:
    """Joins texts that were encoded in parts, `(..., T, P)` each."""
    names = ("text_embeds", "map_text_embeds")
    return ICLIPTextFeatures(**{name: torch.cat([part[name] for part in parts], -2) for name in names})


class ModelAdapter(ABC):
    """
    Common interface of the supported models, which the methods use. An adapter works on a private copy that shares the model's
    weights, so it is created after the model is on its device.

    Attributes:
        model: the private copy.
        processor: prepares `pixel_values` of whole images, without a crop; an [`ICLIPProcessor`], except for open_clip.
        templates (`list[str]`): default prompts for labels.
        layers (list of `AttentionLayer`): attention layers of the image tower in order; a pooling head is the last.
        blocks (list of `nn.Module`): the modules that these layers belong to.
        reads_one_query (`bool`): whether the score depends on the last attention layer through its first query only, which is
            that of the class token or of a pooling head.
    """

    reads_one_query = True

    @property
    def pools_one_vector(self) -> bool:
        """Whether the branch that computes the maps also has a pooled vector of each image."""
        return True

    @property
    def draws_by_class_token(self) -> bool:
        """Whether the branch that computes the maps pools by the class token, or by the query of a pooling head."""
        return self.reads_one_query

    def __init__(self, model: nn.Module, processor):
        self.model = private_copy(model)
        self.processor = processor
        self.templates = getattr(processor, "templates", ["a photo of the {}"])
        self.layers: list[AttentionLayer] = []
        self.blocks: list[nn.Module] = []
        self._prepare_layers()

    @abstractmethod
    def _prepare_layers(self) -> None:
        """Prepares the attention layers for recording and lists them in `layers`."""

    def _add_layer(
        self, block: nn.Module, attention: nn.Module, output: Callable, mlp: Callable | None = None
    ) -> None:
        prepare(len(self.layers), block, attention)
        self.blocks.append(block)
        self.layers.append(AttentionLayer(output, mlp))

    def encode_texts(self, labels: Sequence[str], templates: Sequence[str] | None = None) -> ICLIPTextFeatures:
        """Encodes T labels, averaged over the templates, as unit vectors `(T, P)`."""
        if isinstance(labels, str) or len(labels) == 0:
            raise ValueError(f"Expected a list of at least one label, got {labels!r}: pass such a list.")
        templates = check_templates(self.templates if templates is None else templates)
        step = max(1, TEXT_BATCH // len(templates))
        with torch.no_grad():
            parts = [self._encode_texts(list(labels[i : i + step]), templates) for i in range(0, len(labels), step)]
        return join_texts(parts)

    @abstractmethod
    def _encode_texts(self, labels: list[str], templates: list[str]) -> ICLIPTextFeatures: ...

    def trace_texts(self, labels: list[str], templates: list[str]) -> tuple[ICLIPTextFeatures, AttentionRecord]:
        """
        Encodes labels with a graph from the last attention layer of the text tower on, and records this layer with its weights,
        see `record`.

        Raises:
            `ValueError`: the model is not of transformers, so the layers of its text tower cannot be recorded.
        """
        raise ValueError(
            "Expected a model of transformers for word scores, which need the layers of its text tower, got "
            f"{type(self.model).__name__}: leave words out."
        )

    def encode_image(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        """Encodes `(B, 3, H, W)` as unit vectors of images `(B, P)` and of patches `(B, h, w, P)`."""
        weight = next(self.model.parameters())
        return self._encode_image(pixel_values.to(weight.device, weight.dtype))

    @abstractmethod
    def _encode_image(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures: ...

    @abstractmethod
    def project(self, stream: torch.Tensor) -> torch.Tensor:
        """Projects patches of the stream that leaves the last block, `(B, N, D)`, into the space of the texts, `(B, N, P)`."""

    def self_attentions(self, method: str) -> list[int]:
        """
        Returns the indices of the layers that are self-attentions of transformer blocks.

        Raises:
            `ValueError`: there are none.
        """
        blocks = [index for index, layer in enumerate(self.layers) if layer.residual]
        if not blocks:
            raise ValueError(
                f"Expected an image tower of transformer blocks for {method}, got one without self-attention: use itsm, "
                "grad_cam, grad_eclip, bi_modal or attention."
            )
        return blocks

    def rgb(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Undoes the normalisation of the processor. Returns `(B, 3, H, W)` in [0, 1]."""
        processor = self.processor
        image_processor = processor.func if isinstance(processor, partial) else processor.image_processor
        if not image_processor.do_normalize:
            return pixel_values
        statistics = (image_processor.image_mean, image_processor.image_std)
        mean, std = (torch.tensor(values).to(pixel_values).view(3, 1, 1) for values in statistics)
        return pixel_values * std + mean

    def similarity_maps(self, image: ICLIPImageFeatures, texts: ICLIPTextFeatures) -> torch.Tensor:
        """Computes raw maps `(B, T, h, w)`: the cosine of every patch with every text (Eq. 1-3)."""
        return cosine_similarity_map(image.patch_embeds, texts.map_text_embeds)

    def match(self, image: ICLIPImageFeatures, texts: ICLIPTextFeatures) -> torch.Tensor:
        """Scores how well images match texts, `(B, T)`, float32: their cosines, or [`ICLIPModel.match`] for ICLIP."""
        return cosines(image.image_embeds, texts.text_embeds)

    def logit_scale(self) -> torch.Tensor:
        """Returns the factor by which the model multiplies the cosines of images and texts."""
        return self.model.logit_scale.exp()

    def trace(
        self, pixel_values: torch.Tensor, start: int = -1, grad: bool = False, weights: bool = False
    ) -> tuple[ICLIPImageFeatures, list[AttentionRecord]]:
        """Encodes images and records the attention layers from `start` on, see `record`."""
        return record(lambda: self.encode_image(pixel_values), range(len(self.layers))[start], grad, weights)


class _TransformersAdapter(ModelAdapter):
    """Base class for models of transformers, whose attention function can be replaced by its name."""

    _text_layer: nn.Module | None = None

    def _prepare_layers(self) -> None:
        tower = self.model.vision_model
        tower.set_attn_implementation("iclip_recorded")
        for block in tower.modules():
            if isinstance(block, GradientCheckpointingLayer):
                attention = next(child for child in block.children() if hasattr(child, "v_proj"))
                projection = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
                norm = [child for child in block.children() if isinstance(child, nn.LayerNorm)][1]
                self._add_layer(
                    block,
                    attention,
                    head_output(projection, getattr(block, "layer_scale1", None)),
                    block_mlp(norm, block.mlp, getattr(block, "layer_scale2", None)),
                )

    def trace_texts(self, labels: list[str], templates: list[str]) -> tuple[ICLIPTextFeatures, AttentionRecord]:
        tower = self.model.text_model
        if self._text_layer is None:
            tower.set_attn_implementation("iclip_recorded")
            self._text_layer = [one for one in tower.modules() if isinstance(one, GradientCheckpointingLayer)][-1]
            prepare(0, self._text_layer)
        features, layers = record(lambda: self._encode_texts(labels, templates), 0, grad=True, weights=True)
        return features, layers[-1]

    def _final_norm(self, stream: torch.Tensor) -> torch.Tensor:
        norms = [child for child in self.model.vision_model.children() if isinstance(child, nn.LayerNorm)]
        return norms[-1](stream)


class ICLIPAdapter(_TransformersAdapter):
    """ICLIP, whose own functions are used where they exist."""

    def __init__(self, model: ICLIPModel, processor: ICLIPProcessor):
        super().__init__(model, processor)
        self.model.config.lock_vision = False  # of the copy: gradient methods differentiate through the tower

    @property
    def reads_one_query(self) -> bool:
        config = self.model.config
        return config.recognition_pooling == "class_token" if config.dual_projection else self.draws_by_class_token

    @property
    def pools_one_vector(self) -> bool:
        return self.model.config.max_over == "channels"

    @property
    def draws_by_class_token(self) -> bool:
        return self.model.config.pooling == "class_token"

    def _encode_texts(self, labels: list[str], templates: list[str]) -> ICLIPTextFeatures:
        return self.model.get_text_features(**self.processor(labels=labels, templates=templates).to(self.model.device))

    def _encode_image(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        return self.model.get_image_features(pixel_values)

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self.model.map_branch.visual_projection(self.model.centered_tokens(self._final_norm(stream)))

    def similarity_maps(self, image: ICLIPImageFeatures, texts: ICLIPTextFeatures) -> torch.Tensor:
        return self.model.similarity_maps(image, texts)

    def match(self, image: ICLIPImageFeatures, texts: ICLIPTextFeatures) -> torch.Tensor:
        return self.model.match(image, texts)

    def logit_scale(self) -> torch.Tensor:
        return self.model.logit_scales()[0]


class ONNXAdapter(ICLIPAdapter):
    """ICLIP in ONNX Runtime, for methods that do not need the layers of the image tower."""

    def __init__(self, model: ONNXModel, processor: ICLIPProcessor):
        self.model = model  # no copy, because it cannot be changed
        self.processor = processor
        self.templates = processor.templates

    @property
    def layers(self):
        raise ValueError(
            "Expected a PyTorch model for this method, which needs the layers of the image tower, got an ONNX model: use itsm, "
            "reversed_itsm or attention, or the model that was exported."
        )

    def encode_image(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        return self.model.get_image_features(pixel_values)

    def trace(self, pixel_values: torch.Tensor, **options) -> tuple[ICLIPImageFeatures, list[None]]:
        """Returns the features, which contain the last layer's normalised attention, and no records of layers."""
        return self.encode_image(pixel_values), [None]

    trace_texts = ModelAdapter.trace_texts


class CLIPAdapter(_TransformersAdapter):
    """CLIP. Its patch tokens are projected by the norm and the projection of the class token."""

    text_padding = "longest"

    def __init__(self, model: CLIPModel, processor):
        own_processor = ICLIPProcessor(
            self._whole_image_processor(model.config.vision_config, processor.image_processor),
            processor.tokenizer,
            patch_size=patch_side(model.config.vision_config),
            max_text_length=model.config.text_config.max_position_embeddings,
            text_padding=self.text_padding,
        )
        super().__init__(model, own_processor)

    def _whole_image_processor(self, vision_config, image_processor):
        """Copies an image processor so that it resizes the whole image to the size of the model's training images."""
        side = vision_config.image_size
        options = {"size": {"height": side, "width": side}, "do_center_crop": False, "do_convert_rgb": True}
        return type(image_processor)(**(image_processor.to_dict() | options))

    def _encode_texts(self, labels: list[str], templates: list[str]) -> ICLIPTextFeatures:
        inputs = self.processor(labels=labels, templates=templates).to(self.model.device)
        num_templates = inputs.pop("num_templates", 1)
        return text_features(self.model.get_text_features(**inputs).pooler_output, num_templates)

    def _encode_image(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        output = self._vision_output(pixel_values)
        grid = tuple(side // self.processor.patch_size for side in pixel_values.shape[2:])
        patch_tokens = output.last_hidden_state[:, -grid[0] * grid[1] :]
        patch_embeds = unit(self._project_output(patch_tokens)).unflatten(1, grid)
        return ICLIPImageFeatures(image_embeds=unit(output.pooler_output), patch_embeds=patch_embeds)

    def _vision_output(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, interpolate_pos_encoding=True)

    def _project_output(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        """Projects patch tokens as the tower returns them. CLIP returns them without the final norm."""
        return self.project(patch_tokens)

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self.model.visual_projection(self._final_norm(stream))


class SiglipAdapter(CLIPAdapter):
    """
    SigLIP, which has no class token but a pooling head, whose query is a learned probe. A patch is projected into the space of the
    texts as the head does with all attention on this patch: by value, output projection and MLP.
    """

    text_padding = "max_length"

    def _prepare_layers(self) -> None:
        super()._prepare_layers()
        head = self.model.vision_model.head
        self._add_layer(head, head.attention, head_output(head.attention.out_proj))

    def _project_output(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        head = self.model.vision_model.head
        weight, bias = head.attention.in_proj_weight.chunk(3)[2], head.attention.in_proj_bias.chunk(3)[2]
        pooled = head.attention.out_proj(F.linear(patch_tokens, weight, bias))
        return pooled + head.mlp(head.layernorm(pooled))

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self._project_output(self._final_norm(stream))


class Tipsv2Adapter(CLIPAdapter):
    """TIPSv2. Its towers share one space, so class token and patches are compared with texts without a projection."""

    def _vision_output(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values)

    def _project_output(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        return patch_tokens  # after the final norm

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self._final_norm(stream)

    def logit_scale(self) -> torch.Tensor:
        return 1 / self.model.temperature


class Siglip2Adapter(SiglipAdapter):
    """SigLIP2 for images of any shape (NaFlex). All patches of an image are passed, so none is padding."""

    def _whole_image_processor(self, vision_config, image_processor):
        side = math.isqrt(vision_config.num_patches) * patch_side(vision_config)
        return whole_image_processor(
            side, image_processor.image_mean, image_processor.image_std, image_processor.resample
        )

    def _vision_output(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        patch = self.processor.patch_size
        patches = pixel_values.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, h, w, patch, patch)
        shapes = torch.tensor(patches.shape[2:4], device=patches.device).expand(len(patches), 2)
        patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # (B, h * w, patch * patch * 3)
        mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        return self.model.get_image_features(patches, pixel_attention_mask=mask, spatial_shapes=shapes)


def whole_image_processor(side: int, mean: Sequence[float], std: Sequence[float], resample: int):
    """Creates an image processor that resizes whole images to a square of `side` pixels."""
    return SiglipImageProcessor(
        size={"height": side, "width": side}, image_mean=mean, image_std=std, resample=resample, do_convert_rgb=True
    )


def unit(features: torch.Tensor) -> torch.Tensor:
    """Normalizes features to unit vectors, float32."""
    return normalize(features.float())


def text_features(projected: torch.Tensor, num_templates: int) -> ICLIPTextFeatures:
    """Averages the unit vectors of each label's prompts, `(T * num_templates, P)`, to unit vectors `(T, P)`."""
    embeds = unit(average_templates(projected.float(), num_templates))
    return ICLIPTextFeatures(text_embeds=embeds, map_text_embeds=embeds)


def head_output(projection: nn.Module, scale: nn.Module | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Creates an `AttentionLayer.output`: merged heads, output projection, and the layer scale if the model has one."""
    scale = nn.Identity() if scale is None else scale
    return lambda heads: scale(projection(merge_heads(heads)))


def block_mlp(norm: nn.Module, mlp: nn.Module, scale: nn.Module | None = None) -> nn.Sequential:
    """Creates an `AttentionLayer.mlp`: norm, MLP, and the layer scale if the model has one."""
    return nn.Sequential(norm, mlp, nn.Identity() if scale is None else scale)
