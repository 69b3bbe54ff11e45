"""The towers of the model. The image tower also returns the attention of its class token."""

from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_iclip import ICLIPConfig, patch_side
from .tower_loading import check_text_tower, load_tower


class VisionTowerType(NamedTuple):
    """Properties of a type of image tower that the model needs to know."""

    # Class of its attention layers. The last layer computes the class token's attention.
    attention_class: str
    # Name of its final norm, and whether the tower applies this norm to the patch tokens that it returns.
    final_norm: str = "layernorm"
    normed: bool = True
    # Whether other image sizes need `interpolate_pos_encoding`.
    interpolates: bool = False


# Supported image towers by model type. Their first token is the class token, and the patches are their last tokens.
VISION_TOWERS = {
    "vit": VisionTowerType("ViTAttention", interpolates=True),
    "dinov2": VisionTowerType("Dinov2Attention"),
    "dinov2_with_registers": VisionTowerType("Dinov2WithRegistersAttention"),
    "dinov3_vit": VisionTowerType("DINOv3ViTAttention", "norm"),
    "clip_vision_model": VisionTowerType("CLIPAttention", "post_layernorm", normed=False, interpolates=True),
}
# Text towers whose pooled output is the end-of-sequence token.
EOS_TEXT_TOWERS = ("clip_text_model", "siglip_text_model")


class LayerExchange:
    """
    Data of one forward pass that the model exchanges with the last layers of the image tower. The last attention reads
    `value_share`, and writes the class token's attention over all L tokens to `class_row` (B, heads, 1, L).

    This class is neither a list nor a dictionary, because hooks of device maps, offloading and FSDP copy lists and
    dictionaries.
    """

    def __init__(self, value_share: float):
        self.value_share = value_share
        self.class_row: torch.Tensor | None = None


def _sdpa_class_row(module, query, key, value, attention_mask, scaling=None, layer_exchange=None, **kwargs):
    """
    Computes fused attention, which returns no weights. The last layer also sets `layer_exchange.class_row`, and mixes
    its output with the values.
    """
    attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if layer_exchange is not None and getattr(module, "is_last_attention", False):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        # The product is in float32, also under autocast: logits can overflow float16, and bfloat16 rounds them.
        with torch.autocast(query.device.type, enabled=False):
            layer_exchange.class_row = ((query[:, :, :1].float() @ key.float().mT) * scale).softmax(-1)
        if layer_exchange.value_share:
            # (B, L, heads, D / heads) and (B, heads, L, D / heads); the class token is not changed
            mixed = torch.lerp(attended[:, 1:], value.transpose(1, 2)[:, 1:], layer_exchange.value_share)
            attended = torch.cat([attended[:, :1], mixed], 1)
    return attended, None


AttentionInterface.register("sdpa_class_row", _sdpa_class_row)
AttentionMaskInterface.register("sdpa_class_row", sdpa_mask)


class ImageTokens(NamedTuple):
    """Output of the image towers for B images of N = h * w patches. Tokens have passed the tower's final norm."""

    class_token: torch.Tensor  # (B, D)
    patch_tokens: torch.Tensor  # (B, N, D), or (B, N, D + Df) with Df features of a feature tower, row-major
    raw_attention: torch.Tensor  # (B, N), of the class token in the last layer, mean over the heads, float32
    grid: tuple[int, int]  # height and width in patches
    tower_output: BaseModelOutputWithPooling
    feature_average: torch.Tensor | None = None  # (B, Df), with `recognition_pooling="feature_average"`
    feature_map: torch.Tensor | None = None  # (B, C, rows, columns) of a feature tower, before the reduction


def resize_grid(values: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Resizes values of patches `(B, N, C)` of a grid (height, width) bilinearly to another grid."""
    resized = F.interpolate(values.mT.unflatten(-1, grid), new_grid, mode="bilinear", align_corners=False)
    return resized.flatten(2).mT


class ICLIPTowers(PreTrainedModel):
    """
    Base class of [`ICLIPModel`]: builds, locks and runs the towers. The image and the text tower are used through
    their public outputs.

    Args:
        config ([`ICLIPConfig`]): configuration of the model.
        vision_model, text_model, feature_model (`PreTrainedModel`, *optional*): loaded towers; initialised from their
            configurations if not given.
    """

    config: ICLIPConfig
    config_class = ICLIPConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: ICLIPConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
        feature_model: PreTrainedModel | None = None,
    ):
        config.validate_architecture()  # `from_pretrained` sets options after the configuration was checked
        self._check_tower_types(config)
        super().__init__(config)
        self.vision_model = vision_model or load_tower(config.vision_config)
        self.text_model = text_model or load_tower(config.text_config)
        # A tower may copy its configuration. The model refers to this copy, so that later changes reach the layers.
        config.vision_config, config.text_config = self.vision_model.config, self.text_model.config
        self.feature_model = self.feature_reduction = None
        if config.feature_config is not None:
            self.feature_model = feature_model or load_tower(config.feature_config)
            config.feature_config = self.feature_model.config
            channels = self.feature_model.timm_model.num_features
            if config.feature_dim > channels:
                raise ValueError(f"feature_dim is at most {channels}, the number of the feature tower's channels.")
            self.feature_reduction = nn.Linear(channels, config.feature_dim)

        self._prepare_last_attention()

    @staticmethod
    def _check_tower_types(config: ICLIPConfig) -> None:
        """Raises `ValueError` for towers of other types. A tower is built after this check: timm can read pickles."""
        vision_type, text_type = config.vision_config.model_type, config.text_config.model_type
        if vision_type not in VISION_TOWERS:
            raise ValueError(
                f"An image tower needs a class token: one of {sorted(VISION_TOWERS)}, not {vision_type!r}."
            )
        check_text_tower(config.text_config)
        if config.text_pooling == "eos" and text_type not in EOS_TEXT_TOWERS:
            raise ValueError(f'text_pooling="eos" needs one of {sorted(EOS_TEXT_TOWERS)}, not {text_type!r}.')
        if config.feature_config is not None and config.feature_config.model_type != "timm_wrapper":
            raise ValueError(f"A feature tower is a backbone of timm, not {config.feature_config.model_type!r}.")

    def _prepare_last_attention(self):
        """
        Makes the last attention layer of the image tower compute the class token's attention besides the fused one.
        """
        name = VISION_TOWERS[self.config.vision_config.model_type].attention_class
        *_, last = (module for module in self.vision_model.modules() if type(module).__name__ == name)
        last.is_last_attention = True
        if self.vision_model.config._attn_implementation != "eager":
            self.vision_model.set_attn_implementation("sdpa_class_row")

    def set_attn_implementation(self, *args, **kwargs):
        """
        Like the base class. The image tower stays on SDPA or eager attention, which return the class token's
        attention.
        """
        super().set_attn_implementation(*args, **kwargs)
        self._prepare_last_attention()

    def train(self, mode: bool = True):
        """
        Sets the training mode. A locked image tower and the feature tower stay in eval mode and without gradients. A
        text tower stays in eval mode, without dropout, if none of its parameters has a gradient.
        """
        super().train(mode)
        if hasattr(self, "text_model") and not any(weight.requires_grad for weight in self.text_model.parameters()):
            self.text_model.eval()
        # `from_pretrained` replaces the parameters and then calls `eval()`, so the parameters are locked here.
        if hasattr(self, "vision_model"):
            if self.config.lock_vision:
                self.vision_model.eval()
                self.vision_model.requires_grad_(False)
            for name, parameter in self.vision_model.named_parameters():
                # DINO's mask token is not used, and DDP would wait for its gradient.
                if name.endswith("mask_token"):
                    parameter.requires_grad_(False)
        if getattr(self, "feature_model", None) is not None:
            self.feature_model.eval()
            self.feature_model.requires_grad_(False)
            self.feature_reduction.requires_grad_(False)
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Returns the input embeddings of the text tower, which `resize_token_embeddings` needs."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs):
        # Reentrant checkpoints drop the gradients of tensors that are not outputs of a layer, such as the attention of
        # the class token.
        function = kwargs.get("gradient_checkpointing_func")
        if getattr(function, "keywords", {}).get("use_reentrant"):
            kwargs["gradient_checkpointing_func"] = partial(function, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, **kwargs)

    def encode_image(self, pixel_values: torch.FloatTensor, **kwargs) -> ImageTokens:
        """Runs the image towers on `(B, 3, H, W)`. H and W are multiples of the patch size."""
        tower_type, patch_size = VISION_TOWERS[self.config.vision_config.model_type], patch_side(self.config)
        height, width = pixel_values.shape[-2:]
        if height % patch_size or width % patch_size:  # towers would leave out the rest
            raise ValueError(
                f"Images have {height}x{width} pixels: height and width must be multiples of the patch size "
                f"{patch_size}."
            )
        if tower_type.interpolates:
            kwargs["interpolate_pos_encoding"] = True
        grid = height // patch_size, width // patch_size
        patch_slice = slice(-grid[0] * grid[1], None)  # after the class token and, in some towers, registers
        exchange = LayerExchange(self.config.value_share)
        if self.vision_model.config._attn_implementation == "eager":
            if self.config.value_share:
                raise ValueError(f"value_share={self.config.value_share} needs SDPA attention, not eager.")
            kwargs["output_attentions"] = True
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.lock_vision):
            factor = self.config.vision_downsampling
            downsampled = pixel_values if factor == 1 else F.avg_pool2d(pixel_values, factor)
            outputs = self.vision_model(downsampled, layer_exchange=exchange, **kwargs)
            tokens = outputs.last_hidden_state
            if not tower_type.normed:
                tokens = getattr(self.vision_model, tower_type.final_norm)(tokens)
            # Layers may be on several devices.
            attention = outputs.attentions[-1] if exchange.class_row is None else exchange.class_row
            raw_attention = attention[:, :, 0, patch_slice].float().mean(1).to(tokens.device)
            patch_tokens = tokens[:, patch_slice]
            feature_map = feature_average = None
            if self.feature_model is not None:
                feature_map, feature_average = self._encode_features(pixel_values, downsampled, like=patch_tokens)
                patch_tokens = torch.cat([patch_tokens, self._features_on(grid, feature_map).to(patch_tokens)], -1)
        return ImageTokens(
            class_token=tokens[:, 0],
            patch_tokens=patch_tokens,
            raw_attention=raw_attention,
            grid=grid,
            tower_output=outputs,
            feature_average=feature_average,
            feature_map=feature_map,
        )

    def resize_tokens(self, image: ImageTokens, grid: tuple[int, int]) -> torch.FloatTensor:
        """Returns patch tokens as of another grid, `(B, N, D)`: those of the image tower are resized."""
        width = self.config.vision_config.hidden_size
        tokens = resize_grid(image.patch_tokens[..., :width], image.grid, grid)
        if image.feature_map is None:
            return tokens
        return torch.cat([tokens, self._features_on(grid, image.feature_map).to(tokens)], -1)

    def _encode_features(
        self,
        pixel_values: torch.FloatTensor,
        downsampled: torch.FloatTensor,
        like: torch.FloatTensor,
    ) -> tuple[torch.FloatTensor, torch.FloatTensor | None]:
        """
        Runs the feature tower. Returns its feature map, see `feature_map`, and, for
        `recognition_pooling="feature_average"`, the mean of the reduced map `(B, Df)`, with the type and on the device
        of `like`.
        """
        feature_map, feature_average = self.feature_map(pixel_values), None
        if self.config.recognition_pooling == "feature_average":
            average = feature_map.mean((2, 3))
            if self.config.vision_downsampling > 1:
                # The backbone may have learned from smaller images, where objects are smaller.
                average = (average + self.feature_map(downsampled).mean((2, 3))) / 2
            feature_average = self.feature_reduction(average).to(like)
        return feature_map, feature_average

    def _features_on(self, grid: tuple[int, int], feature_map: torch.FloatTensor) -> torch.FloatTensor:
        """Returns the reduced features of the patches of a grid `(B, N, Df)`."""
        on_grid = F.interpolate(feature_map, grid, mode="bilinear", align_corners=False).flatten(2).mT
        return self.feature_reduction(on_grid)

    def feature_map(self, pixel_values: torch.FloatTensor) -> torch.FloatTensor:
        """
        Returns the last feature map of the feature tower, `(B, C, rows, columns)` before the reduction, for pixel
        values `(B, 3, H, W)`. The tower has a grid of its own.
        """
        if self.config.feature_image_mean is not None:
            statistics = (self.config.feature_image_mean, self.config.feature_image_std)
            mean, std = (pixel_values.new_tensor(channels).view(-1, 1, 1) for channels in statistics)
            pixel_values = (pixel_values - mean) / std
        # With channels last, convolutions are a sixth faster on CPUs.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        # A CPU encodes one image at a time, because clearing new memory for the maps of several takes as long as
        # computing them. A graph does not split the images, because it takes any number of them.
        one_by_one = pixel_values.device.type == "cpu" and not torch.compiler.is_compiling()
        parts = pixel_values.split(1) if one_by_one else [pixel_values]
        return torch.cat([self.feature_model(part, do_pooling=False).last_hidden_state for part in parts])

    def encode_text(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ):
        """
        Runs the text tower on token ids `(M, L)`. Returns the pooled texts `(M, Dt)`, see `config.text_pooling`, and
        the output of the tower.
        """
        config = self.config.text_config
        if is_siglip := config.model_type == "siglip_text_model":
            # SigLIP reads the last position, which was padding during its training. Some callers pad fewer positions.
            padding = (0, max(0, config.max_position_embeddings - input_ids.shape[-1]))
            input_ids = F.pad(input_ids, padding, value=config.pad_token_id)
            attention_mask = None if attention_mask is None else F.pad(attention_mask, padding)
        if token_type_ids is not None:  # CLIP's tower does not take them
            kwargs["token_type_ids"] = token_type_ids
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if self.config.text_pooling == "eos":
            return outputs.pooler_output, outputs
        tokens, weights = outputs.last_hidden_state, attention_mask
        if weights is None:
            # SigLIP's processors pad all texts, and return no mask.
            weights = input_ids != config.pad_token_id if is_siglip else torch.ones_like(input_ids)
        weights = weights.unsqueeze(-1).float()
        mean = (tokens.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
        return mean.to(tokens.dtype), outputs
