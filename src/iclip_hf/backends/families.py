"""
The models of Transformers that explain: ICLIP, also in ONNX; CLIP and models that are built like it; SigLIP, SigLIP2,
AIMv2, TIPSv2 and VisionTextDualEncoder.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from tokenizers import Regex, normalizers
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel, GradientCheckpointingLayer, SiglipImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..model.configuration_iclip import patch_side
from ..model.modeling_iclip import ICLIPModel
from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.presence import MIN_PRESENCE
from ..model.processing_iclip import ICLIPProcessor
from ..model.tower_loading import check_text_tower
from .explainable import (
    ExplainableModel,
    RecordableModel,
    block_mlp,
    check_side,
    each_alone,
    label_features,
    unit,
)
from .onnx import ONNXModel


class TransformersModel(RecordableModel):
    """Base class for models of transformers, which take their attention function by a name."""

    def _prepare_layers(self) -> None:
        tower = self.network.vision_model
        tower.set_attn_implementation("iclip_recorded")
        for block in tower.modules():
            if isinstance(block, GradientCheckpointingLayer):
                attention = next(child for child in block.children() if hasattr(child, "v_proj"))
                projection = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
                norms = [child for child in block.children() if isinstance(child, nn.LayerNorm)]
                scale, mlp_scale = (getattr(block, f"layer_scale{number}", None) for number in (1, 2))
                mlp = block_mlp(norms[1], block.mlp, mlp_scale)
                self._add_layer(block, attention, projection, scale, mlp)

    def _final_norm(self, stream: torch.Tensor) -> torch.Tensor:
        norms = [child for child in self.network.vision_model.children() if isinstance(child, nn.LayerNorm)]
        return norms[-1](stream)


class _ICLIP(ExplainableModel):
    """ICLIP, in PyTorch or ONNX: attention, maps, logits and presence are the model's own."""

    min_presence = MIN_PRESENCE

    def __init__(self, model: ICLIPModel | ONNXModel, processor: ICLIPProcessor):
        super().__init__(model, processor)
        config = model.config
        pooling = config.recognition_pooling if config.dual_projection else config.pooling
        self.pools_patches = pooling != "class_token"

    def attention(self, pixel_values: torch.Tensor) -> tuple[ICLIPImageFeatures, torch.Tensor]:
        features = self.get_image_features(pixel_values)
        return features, features.attention

    def weigh_maps(self, maps: torch.Tensor, features: ICLIPImageFeatures, texts: ICLIPTextFeatures) -> torch.Tensor:
        return self.network.weigh_maps(maps, features, texts)

    def scores(self, features: ICLIPImageFeatures, texts: ICLIPTextFeatures) -> torch.Tensor:
        return self.network.scores(features, texts)

    def logits(self, cosines: torch.Tensor) -> torch.Tensor:
        return self.network.recognition(cosines)

    def presence(self, scores: torch.Tensor) -> torch.Tensor | None:
        return self.network.presence(scores)


class ExplainableICLIP(_ICLIP, TransformersModel):
    """ICLIP in PyTorch."""

    def __init__(self, model: ICLIPModel, processor: ICLIPProcessor):
        super().__init__(model, processor)
        self.network.config.lock_vision = False  # in the copy, because gradient methods differentiate the tower
        self.reads_features = model.config.recognition_pooling == "feature_average"

    def join_features(
        self, stream: torch.Tensor, features: ICLIPImageFeatures, grid: tuple[int, int] | None = None
    ) -> torch.Tensor:
        appended = features.patch_tokens[..., stream.shape[-1] :]
        if appended.shape[-1] == 0:  # no feature tower
            return stream
        if grid not in (None, features.grid):
            feature_map = appended.mT.unflatten(-1, features.grid)
            appended = F.interpolate(feature_map, grid, mode="bilinear").flatten(2).mT
        if stream.shape[1] == 1:  # a mean token
            appended = appended.mean(1, keepdim=True)
        return torch.cat([stream, appended], -1)

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        width = self.network.config.vision_config.hidden_size  # features of a feature tower may follow
        tokens = torch.cat([self._final_norm(stream[..., :width]), stream[..., width:]], -1)
        return self.network.embed_patches(self.network.centered_tokens(tokens))


class ExplainableONNX(_ICLIP):
    """ICLIP in ONNX Runtime, for methods that do not need the layers of the image tower."""


class ExplainableCLIP(TransformersModel):
    """
    CLIP, MetaCLIP 2, AltCLIP and Chinese-CLIP. Patch tokens are projected by the norm and the projection of the class
    token.
    """

    text_padding = "longest"
    default_method = "naclip"

    def __init__(self, model: CLIPModel, processor):
        is_chinese = model.config.model_type == "chinese_clip"  # the default template is English
        iclip_processor = ICLIPProcessor(
            self._whole_image_processor(model.config.vision_config, processor.image_processor),
            self._prepared_tokenizer(processor.tokenizer),
            patch_size=patch_side(model.config),
            max_text_length=_text_length(model),
            text_padding=self.text_padding,
            **({"templates": ["{}"]} if is_chinese else {}),
        )
        super().__init__(model, iclip_processor)

    def _whole_image_processor(self, vision_config, image_processor):
        """Returns a copy of an image processor that resizes the whole image to the size of the training images."""
        patch = patch_side(vision_config)
        # Rounded down to whole patches: to 378 for SigLIP So400m, which has images of 384 and patches of 14 pixels.
        side = vision_config.image_size // patch * patch
        changes = {"size": {"height": side, "width": side}, "do_center_crop": False}
        return type(image_processor)(**(image_processor.to_dict() | changes))

    def _prepared_tokenizer(self, tokenizer):
        return tokenizer

    def get_text_features(self, input_ids: torch.Tensor, num_templates: int = 1, **inputs) -> ICLIPTextFeatures:
        output = self.network.get_text_features(input_ids=input_ids, **inputs)
        return label_features(output.pooler_output, num_templates)

    def _encode_images(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        output = self._vision_output(pixel_values)
        grid = self._grid(pixel_values)
        patch_tokens = output.last_hidden_state[:, -math.prod(grid) :]
        patch_embeds = unit(self._project_output(patch_tokens)).unflatten(1, grid)
        return ICLIPImageFeatures(image_embeds=unit(output.pooler_output), patch_embeds=patch_embeds)

    def _vision_output(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        return self.network.get_image_features(pixel_values, interpolate_pos_encoding=True)

    def _project_output(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        """Projects the patch tokens that the tower returns. CLIP's tower returns them before the final norm."""
        return self.project(patch_tokens)

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self.network.visual_projection(self._final_norm(stream))


class ExplainableSiglip(ExplainableCLIP):
    """
    SigLIP. It has no class token but a pooling head, whose query is a learned probe. The projection of a patch is the
    output of the head with all attention on this patch: value, output projection and MLP.
    """

    text_padding = "max_length"

    def _prepared_tokenizer(self, tokenizer):
        """
        Returns a copy of a tokenizer that makes texts lower case, removes punctuation, pads on the right and returns
        no mask, as in the authors' evaluation and in open_clip. The tokenizers in folders of SigLIP2 do not do this.
        """
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side, tokenizer.model_input_names = "right", ["input_ids"]
        if backend := getattr(tokenizer, "backend_tokenizer", None):  # SiglipTokenizer has none, and does the same
            spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
            punctuation = normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")
            saved = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), punctuation, *spaces, *saved])
        return tokenizer

    def _prepare_layers(self) -> None:
        super()._prepare_layers()
        head = self.network.vision_model.head
        self._add_layer(head, head.attention, head.attention.out_proj)

    def _project_output(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        return each_alone(self.network.vision_model.head, patch_tokens)

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self._project_output(self._final_norm(stream))


class ExplainableAimv2(ExplainableCLIP):
    """AIMv2. It has no class token but a pooling head, whose query is learned."""

    def _prepare_layers(self) -> None:
        tower = self.network.vision_model
        tower.set_attn_implementation("iclip_recorded")
        for block in tower.encoder.layers:
            mlp = block_mlp(block.rms_norm2, block.ffn)
            self._add_layer(block, block.attention, block.attention.out_proj, None, mlp)
        self._add_layer(tower.head, tower.head, tower.head.output_proj, calls_sdpa=True)

    def _vision_output(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        if not self.network.config.vision_config.is_native:  # its position embeddings have one size
            check_side(pixel_values, self.processor.image_processor.size["height"])
        return self.network.get_image_features(pixel_values)

    def _project_output(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        return self.network.visual_projection(each_alone(self.network.vision_model.head, patch_tokens))

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self._project_output(self.network.vision_model.rms_norm(stream))

    def logits(self, cosines: torch.Tensor) -> torch.Tensor:
        scale = self.network.logit_scale.float().clamp(0, self.network.max_log_logit_scale).exp()
        return cosines * scale.to(cosines.device)


class ExplainableDualEncoder(ExplainableCLIP):
    """VisionTextDualEncoder with an image tower of CLIP, or with a ViT, which has a pooler for the class token."""

    def __init__(self, model, processor):
        tower = model.config.vision_config.model_type
        if tower not in ("clip_vision_model", "vit"):
            raise ValueError(f"The image tower of a vision-text-dual-encoder is CLIP's or a ViT, not {tower}.")
        check_text_tower(model.config.text_config)
        self._is_vit = tower == "vit"
        super().__init__(model, processor)

    def _project_output(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        if not self._is_vit:
            return super()._project_output(patch_tokens)
        return self.network.visual_projection(each_alone(self.network.vision_model.pooler, patch_tokens))

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        if not self._is_vit:
            return super().project(stream)
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
    """SigLIP2 for images of any shape (NaFlex). An image has all its patches and no padding."""

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


def _text_length(model) -> int:
    """Returns the highest number of tokens of a text. RoBERTa and its kin count positions from the padding index."""
    modules = model.text_model.named_modules()
    embeddings = (module for name, module in modules if name.endswith("position_embeddings"))
    unused = next((module.padding_idx + 1 for module in embeddings if module.padding_idx is not None), 0)
    return model.config.text_config.max_position_embeddings - unused


def square_processor(side: int, mean: Sequence[float], std: Sequence[float], resample: int):
    """Creates an image processor that resizes whole images to a square of `side` pixels."""
    return SiglipImageProcessor(
        size={"height": side, "width": side}, image_mean=mean, image_std=std, resample=resample
    )
