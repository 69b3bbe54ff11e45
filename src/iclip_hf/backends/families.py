"""The models of Transformers that explain: ICLIP, also in ONNX, and CLIP, MetaCLIP 2, SigLIP, SigLIP2 and TIPSv2."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel, SiglipImageProcessor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..model.configuration_iclip import patch_side
from ..model.modeling_iclip import ICLIPImageFeatures, ICLIPModel, ICLIPTextFeatures
from ..model.processing_iclip import ICLIPProcessor
from .explainable import ExplainableModel, RecordableModel, block_mlp, text_features, unit
from .onnx import ONNXModel


class TransformersModel(RecordableModel):
    """Base class for models of transformers, whose attention function can be replaced by its name."""

    def _prepare_layers(self) -> None:
        tower = self.network.vision_model
        tower.set_attn_implementation("iclip_recorded")
        for block in tower.modules():
            if isinstance(block, GradientCheckpointingLayer):
                attention = next(child for child in block.children() if hasattr(child, "v_proj"))
                projection = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
                norm = [child for child in block.children() if isinstance(child, nn.LayerNorm)][1]
                scale, mlp_scale = (getattr(block, f"layer_scale{number}", None) for number in (1, 2))
                self._add_layer(block, attention, projection, scale, block_mlp(norm, block.mlp, mlp_scale))

    def _final_norm(self, stream: torch.Tensor) -> torch.Tensor:
        norms = [child for child in self.network.vision_model.children() if isinstance(child, nn.LayerNorm)]
        return norms[-1](stream)


class _ICLIP(ExplainableModel):
    """ICLIP, whose own functions are used where they exist."""

    def __init__(self, model: ICLIPModel | ONNXModel, processor: ICLIPProcessor):
        super().__init__(model, processor)
        config = model.config
        pooling = config.recognition_pooling if config.dual_projection else config.pooling
        self.pools_patches = pooling != "class_token"

    def attention(self, pixel_values: torch.Tensor) -> tuple[ICLIPImageFeatures, torch.Tensor]:
        image = self.get_image_features(pixel_values)
        return image, image.attention

    def weigh_maps(self, maps: torch.Tensor, image: ICLIPImageFeatures, texts: ICLIPTextFeatures) -> torch.Tensor:
        return self.network.weigh_maps(maps, image, texts)

    def logits(self, cosines: torch.Tensor) -> torch.Tensor:
        return self.network.recognition(cosines)

    def presence(self, scores: torch.Tensor) -> torch.Tensor | None:
        return self.network.presence(scores)


class ExplainableICLIP(_ICLIP, TransformersModel):
    """ICLIP in PyTorch."""

    def __init__(self, model: ICLIPModel, processor: ICLIPProcessor):
        super().__init__(model, processor)
        self.network.config.lock_vision = False  # of the copy: gradient methods differentiate through the tower

    def join_features(self, stream: torch.Tensor, image: ICLIPImageFeatures) -> torch.Tensor:
        features = image.patch_tokens[..., stream.shape[-1] :]
        return torch.cat([stream, features if stream.shape[1] > 1 else features.mean(1, keepdim=True)], -1)

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        own = self.network.config.vision_config.hidden_size  # which features of a feature tower may follow
        tokens = torch.cat([self._final_norm(stream[..., :own]), stream[..., own:]], -1)
        return self.network.embed_patches(self.network.centered_tokens(tokens))


class ExplainableONNX(_ICLIP):
    """ICLIP in ONNX Runtime, for methods that do not need the layers of the image tower."""


class ExplainableCLIP(TransformersModel):
    """CLIP. Its patch tokens are projected by the norm and the projection of the class token."""

    text_padding = "longest"
    default_method = "naclip"

    def __init__(self, model: CLIPModel, processor):
        own_processor = ICLIPProcessor(
            self._whole_image_processor(model.config.vision_config, processor.image_processor),
            processor.tokenizer,
            patch_size=patch_side(model.config),
            max_text_length=model.config.text_config.max_position_embeddings,
            text_padding=self.text_padding,
        )
        super().__init__(model, own_processor)

    def _whole_image_processor(self, vision_config, image_processor):
        """Copies an image processor so that it resizes the whole image to the size of the model's training images."""
        side = vision_config.image_size
        options = {"size": {"height": side, "width": side}, "do_center_crop": False}
        return type(image_processor)(**(image_processor.to_dict() | options))

    def get_text_features(self, input_ids: torch.Tensor, num_templates: int = 1, **inputs) -> ICLIPTextFeatures:
        output = self.network.get_text_features(input_ids=input_ids, **inputs)
        return text_features(output.pooler_output, num_templates)

    def _encode_images(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        output = self._vision_output(pixel_values)
        grid = tuple(side // self.processor.patch_size for side in pixel_values.shape[2:])
        patch_tokens = output.last_hidden_state[:, -grid[0] * grid[1] :]
        patch_embeds = unit(self._project_output(patch_tokens)).unflatten(1, grid)
        return ICLIPImageFeatures(image_embeds=unit(output.pooler_output), patch_embeds=patch_embeds)

    def _vision_output(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        return self.network.get_image_features(pixel_values, interpolate_pos_encoding=True)

    def _project_output(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        """Projects patch tokens as the tower returns them. CLIP returns them without the final norm."""
        return self.project(patch_tokens)

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self.network.visual_projection(self._final_norm(stream))


class ExplainableSiglip(ExplainableCLIP):
    """
    SigLIP, which has no class token but a pooling head, whose query is a learned probe. A patch is projected into the
    space of the texts as the head does with all attention on this patch: by value, output projection and MLP.
    """

    text_padding = "max_length"

    def _prepare_layers(self) -> None:
        super()._prepare_layers()
        head = self.network.vision_model.head
        self._add_layer(head, head.attention, head.attention.out_proj)

    def _project_output(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        head = self.network.vision_model.head
        weight, bias = head.attention.in_proj_weight.chunk(3)[2], head.attention.in_proj_bias.chunk(3)[2]
        pooled = head.attention.out_proj(F.linear(patch_tokens, weight, bias))
        return pooled + head.mlp(head.layernorm(pooled))

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self._project_output(self._final_norm(stream))


class ExplainableTipsv2(ExplainableCLIP):
    """TIPSv2. Its towers share one space, so class token and patches are compared with texts without a projection."""

    default_method = "maskclip"  # the value trick of its authors

    def _vision_output(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        return self.network.get_image_features(pixel_values)

    def _project_output(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        return patch_tokens  # after the final norm

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self._final_norm(stream)

    def logits(self, cosines: torch.Tensor) -> torch.Tensor:
        return cosines / self.network.temperature.to(cosines.device)


class ExplainableSiglip2(ExplainableSiglip):
    """SigLIP2 for images of any shape (NaFlex). All patches of an image are passed, so none is padding."""

    def _whole_image_processor(self, vision_config, image_processor):
        side = math.isqrt(vision_config.num_patches) * patch_side(vision_config)
        return square_processor(side, image_processor.image_mean, image_processor.image_std, image_processor.resample)

    def _vision_output(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        patch = self.processor.patch_size
        patches = pixel_values.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, h, w, patch, patch)
        shapes = torch.tensor(patches.shape[2:4], device=patches.device).expand(len(patches), 2)
        patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # (B, h * w, patch * patch * 3)
        mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        return self.network.get_image_features(patches, pixel_attention_mask=mask, spatial_shapes=shapes)


def square_processor(side: int, mean: Sequence[float], std: Sequence[float], resample: int):
    """Creates an image processor that resizes whole images to a square of `side` pixels."""
    return SiglipImageProcessor(
        size={"height": side, "width": side}, image_mean=mean, image_std=std, resample=resample
    )
