"""ICLIP: a locked image tower, masked max pooling and dual projections for recognition and interpretability."""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    MODEL_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperModel,
)
from transformers import initialization as init
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple, is_timm_available, logging

from .configuration_iclip import ICLIPConfig, patch_side
from .losses import BatchNouns, BranchBatch, branch_loss, direction_loss
from .pooling import (
    even_patches,
    normalize_attention,
    pool,
    representative_patches,
    share_among_like,
)
from .similarity import cosine_similarity_map, cosines, min_max_normalize


class VisionTower(NamedTuple):
    """What the model needs to know of a kind of image tower."""

    # Class of its attention layers, the last of which computes the class token's attention.
    attention: str
    # Its final norm, and whether the patch tokens that it returns have passed it.
    final_norm: str = "layernorm"
    normed: bool = True
    # Whether its position embeddings follow the size of images only with `interpolate_pos_encoding`.
    interpolates: bool = False


# Supported image towers by model type. Their first token is the class token, and the patches are their last tokens.
VISION_TOWERS = {
    "vit": VisionTower("ViTAttention", interpolates=True),
    "dinov2": VisionTower("Dinov2Attention"),
    "dinov2_with_registers": VisionTower("Dinov2WithRegistersAttention"),
    "dinov3_vit": VisionTower("DINOv3ViTAttention", "norm"),
    "clip_vision_model": VisionTower("CLIPAttention", "post_layernorm", normed=False, interpolates=True),
}
# Factor of what is below the mean of a map with additive or signed attention: it stays low, and in its order.
BELOW_MEAN = 0.1
# Text towers whose pooled output is the end-of-sequence token.
_EOS_TEXT_TOWERS = ("clip_text_model", "siglip_text_model")


class LastLayers:
    """
    Carries `value_share` into the tower's last attention, and out of the tower the class token's attention there,
    `class_row` of shape (B, heads, 1, N), and the outputs (B, N, D) of the `earlier` layers that `average_layers`
    reads. It is neither a list nor a dictionary, because the hooks of device maps, offloading and FSDP copy those.
    """

    def __init__(self, value_share: float):
        self.value_share = value_share
        self.class_row: torch.Tensor | None = None
        self.earlier: dict[nn.Module, torch.Tensor] = {}

    def mix(self, attended: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """
        Mixes the output of the attention, (B, N, heads, D / heads), with the values (B, heads, N, D / heads), but for
        the class token.
        """
        if self.value_share == 0:
            return attended
        own = value.transpose(1, 2)
        return torch.cat([attended[:, :1], torch.lerp(attended[:, 1:], own[:, 1:], self.value_share)], 1)


def _sdpa_class_row(module, query, key, value, attention_mask, scaling=None, last_layers=None, **kwargs):
    """Fused attention, which returns no weights. In the tower's last layer, it fills and applies `last_layers`."""
    attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if last_layers is not None and getattr(module, "is_last_attention", False):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        # float32 in the product, also under autocast: its logits can overflow float16, and bfloat16 rounds them
        with torch.autocast(query.device.type, enabled=False):
            last_layers.class_row = ((query[:, :, :1].float() @ key.float().mT) * scale).softmax(-1)
        attended = last_layers.mix(attended, value)
    return attended, None


def _keep_output(layer: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
    if last_layers := kwargs.get("last_layers"):
        last_layers.earlier[layer] = output


AttentionInterface.register("sdpa_class_row", _sdpa_class_row)
AttentionMaskInterface.register("sdpa_class_row", sdpa_mask)


class ImageTokens(NamedTuple):
    """Output of the image tower for B images of N = h * w patches. Tokens are those after the tower's final norm."""

    class_token: torch.Tensor  # (B, D)
    patch_tokens: torch.Tensor  # (B, N, D), or (B, N, D + K) with those of a feature tower, row-major
    attention: torch.Tensor  # (B, N), class token's in the last layer, mean over the heads, not normalised, float32
    grid: tuple[int, int]  # height and width in patches
    tower_output: BaseModelOutputWithPooling
    # (B, L - 1, D), mean patch tokens of the layers before the last, with L `average_layers`; None with L = 1
    earlier_averages: torch.Tensor | None = None
    feature_average: torch.Tensor | None = None  # (B, K), mean of the reduced feature map; None without feature tower


class ImageInputs(NamedTuple):
    """What the loss reads of B images. With a locked tower it can be computed once and kept."""

    # (B, D), or (B, (1 + L) D) with `recognition_pooling="class_and_average"` and L `average_layers`: averages of the
    # layers before the last, class token, average of the last. With a feature tower, (..., K) more: its averages.
    recognition: torch.Tensor
    pooled: torch.Tensor | None  # of the map branch, (B, D); None with `max_over="similarity"`
    # Tokens of the map branch, centred and shared among similar patches, of `representative_patches`, (B, K, D), and
    # their attention in [0, 1], (B, K), float32. None with `max_over="channels"`.
    patches: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    even_patches: torch.Tensor | None = None  # as `patches`, (B, 64, D); None without `known_competition`


@dataclass
class ICLIPTextFeatures(BaseModelOutputWithPooling):
    """
    Features of texts. They can be computed once and reused for any number of images.

    Attributes:
        pooler_output (`torch.Tensor` of shape `(..., T, P)`): projected feature of the recognition branch, not
            normalised; if a label has several prompts, `text_embeds`.
        text_embeds (`torch.Tensor` of shape `(..., T, P)`): unit vectors of the recognition branch.
        map_text_embeds (`torch.Tensor` of shape `(..., T, P)`, or `(..., T, 2 P)` with a `recognition_share`): unit
            vectors that patches are compared with, equal to `text_embeds` in a model with one branch.
        attention_weights (`torch.Tensor` of shape `(..., T)`): weight in [-1, 1] of the attention in the map of each
            text, float32: positive for objects, negative for the background; None unless `config.map_attention` is
            `"signed"`. For features of other things than texts, None counts as 1.
    """

    text_embeds: torch.FloatTensor | None = None
    map_text_embeds: torch.FloatTensor | None = None
    attention_weights: torch.FloatTensor | None = None

    compared = ("text_embeds", "map_text_embeds", "attention_weights")  # what scores and maps are computed from


@dataclass
class ICLIPImageFeatures(BaseModelOutputWithPooling):
    """
    Features of images.

    Attributes:
        pooler_output (`torch.Tensor` of shape `(B, P)`): projected feature of the recognition branch, not normalised.
        image_embeds (`torch.Tensor` of shape `(B, P)`): unit vectors of the recognition branch.
        map_image_embeds (`torch.Tensor` of shape `(B, P)`): unit vectors of the map branch; None with
            `max_over="similarity"`, where this branch has no image vector.
        patch_embeds (`torch.Tensor` of shape `(B, h, w, P)`, or `(B, h, w, 2 P)` with a `recognition_share`): unit
            vectors of the patches, to compare with `map_text_embeds`.
        patch_tokens (`torch.Tensor` of shape `(B, N, D)`, or `(B, N, D + K)` with a feature tower): the tower's patch
            tokens after its final norm, followed by the K reduced features of the feature tower, row-major, N = h * w.
        attention (`torch.Tensor` of shape `(B, N)`): class-token attention over the patches, normalised to [0, 1]
            (Eq. 9).
        map_attention (`torch.Tensor` of shape `(B, N)`): `attention` after sharing among similar patches, see
            `config.map_affinity`.
        feature_average (`torch.Tensor` of shape `(B, K)`): mean of the reduced feature map; None without a feature
            tower.
    """

    image_embeds: torch.FloatTensor | None = None
    map_image_embeds: torch.FloatTensor | None = None
    patch_embeds: torch.FloatTensor | None = None
    patch_tokens: torch.FloatTensor | None = None
    attention: torch.FloatTensor | None = None
    map_attention: torch.FloatTensor | None = None
    feature_average: torch.FloatTensor | None = None

    compared = ("image_embeds", "patch_embeds", "attention", "map_attention")  # what scores and maps are computed from

    @property
    def grid(self) -> tuple[int, int]:
        """
        Height and width of the patch grid. It is not a field, because fields are gathered over processes as tensors.
        """
        return tuple(self.patch_embeds.shape[1:3])


@dataclass
class ICLIPOutput(ModelOutput):
    """
    Output of [`ICLIPModel`] for B images and T texts. With `input_ids` of three dimensions, each image has T texts of
    its own.

    Attributes:
        loss (`torch.Tensor` scalar, with `return_loss=True`): contrastive loss, averaged over the branches (Eq. 13),
            plus that of the weights of the attention with `map_attention="signed"`.
        branch_losses (`tuple[torch.Tensor]`, with `return_loss=True`): the loss of each branch, a scalar, recognition
            first, without gradient.
        logits_per_image (`torch.Tensor` of shape `(B, T)`): scaled cosines of the recognition branch, with its bias,
            float32; None of a model in training mode with `return_loss=True`.
        logits_per_text (`torch.Tensor` of shape `(T, B)`): their transpose.
        image_embeds, text_embeds (`torch.Tensor` of shape `(B, P)`, `(T, P)`): unit vectors of the recognition branch.
        map_image_embeds (`torch.Tensor` of shape `(B, P)`): unit vectors of the map branch.
        map_text_embeds, patch_embeds: unit vectors that maps are computed from, see [`ICLIPTextFeatures`] and
            [`ICLIPImageFeatures`].
        attention (`torch.Tensor` of shape `(B, N)`): normalised class-token attention, in [0, 1], row-major,
            N = h * w.
        similarity_maps (`torch.Tensor` of shape `(B, T, h, w)`, with `output_similarity_maps=True`): raw maps, see
            [`ICLIPModel.similarity_maps`].
        vision_model_output ([`ICLIPImageFeatures`]), text_model_output ([`ICLIPTextFeatures`]): all features of the
            images and of the texts.
    """

    loss: torch.FloatTensor | None = None
    branch_losses: tuple[torch.FloatTensor, ...] | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    map_image_embeds: torch.FloatTensor | None = None
    map_text_embeds: torch.FloatTensor | None = None
    patch_embeds: torch.FloatTensor | None = None
    attention: torch.FloatTensor | None = None
    similarity_maps: torch.FloatTensor | None = None
    vision_model_output: ICLIPImageFeatures | None = None
    text_model_output: ICLIPTextFeatures | None = None

    def to_tuple(self):
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


# How the names of the weights begin that are the model's own, and of no tower.
OWN_WEIGHTS = ("recognition.", "interpretability.", "feature_reduction.", "token_mean", "attention_direction")


class Projection(nn.Module):
    """
    Linear projection of features `(..., in_features)`, plus an MLP with one hidden layer if `hidden_size` is not 0:
    W x + W2 GELU(W1 x + b1). W2 starts at zero, so that training starts from the linear projection.

    It is no `nn.Linear`, because libraries that replace these, to quantize them or for adapters, would lose the MLP.
    """

    def __init__(self, in_features: int, out_features: int, hidden_size: int = 0):
        super().__init__()
        self.weight = nn.Linear(in_features, out_features, bias=False).weight
        self.hidden = None
        if hidden_size:
            layers = nn.Linear(in_features, hidden_size), nn.GELU(), nn.Linear(hidden_size, out_features, bias=False)
            self.hidden = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor, linear: bool = False) -> torch.Tensor:
        """
        Projects features. With `linear`, the hidden layer is left out, and features may be the last of `in_features`:
        the others are zero.
        """
        if linear:
            return F.linear(features, self.weight[:, -features.shape[-1] :])
        projected = F.linear(features, self.weight)
        return projected if self.hidden is None else projected + self.hidden(features)


class ICLIPBranch(nn.Module):
    """
    One pair of projections into a shared image-text space (Eq. 12), with its temperature and, if its logits are
    trained by a sigmoid, its bias.

    `logit_scale` is the logarithm of the scale. Both have the shape (1,), because FSDP cannot shard scalars.
    """

    def __init__(self, config: ICLIPConfig, image_dim: int, text_dim: int, recognises: bool = False):
        super().__init__()
        self.visual_projection = Projection(
            image_dim, config.projection_dim, config.image_hidden_size if recognises else 0
        )
        self.text_projection = Projection(text_dim, config.projection_dim, config.text_hidden_size)
        self.logit_scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init_value)))
        self.logit_bias = None
        if recognises and config.logit_bias_init_value is not None:
            self.logit_bias = nn.Parameter(torch.full((1,), float(config.logit_bias_init_value)))

    def embed_image(self, features: torch.Tensor) -> torch.Tensor:
        """Projects features of images or patches `(..., D)` to unit vectors `(..., P)`, float32 (Eq. 12)."""
        return normalize(self.visual_projection(features).float())

    def embed_text(self, features: torch.Tensor) -> torch.Tensor:
        """Projects features of texts `(..., Dt)` to unit vectors `(..., P)`, float32 (Eq. 12)."""
        return normalize(self.text_projection(features).float())

    def forward(self, cosines: torch.Tensor) -> torch.Tensor:
        """Returns the logits of cosines: times the scale, of at most 100 as in CLIP, plus the bias if there is one."""
        logits = cosines * self.logit_scale.exp().clamp(max=100).squeeze().to(cosines.device)
        return logits if self.logit_bias is None else logits + self.logit_bias.squeeze().to(cosines.device)


class FeatureTower(TimmWrapperModel):
    """A convolutional backbone of timm."""

    _no_split_modules = ["FeatureTower"]

    def __init__(self, config: PreTrainedConfig):
        if not is_timm_available():
            raise ImportError(
                "A feature tower needs the package timm: install it with `pip install timm`.", name="timm"
            )
        super().__init__(config)

    @property
    def device(self) -> torch.device:
        """The device that `forward` moves its input to; the CPU if the weights are offloaded, where hooks move it."""
        device = super().device
        return torch.device("cpu") if device.type == "meta" else device


def tower_config(checkpoint: str, side: str) -> PreTrainedConfig:
    """
    Returns the configuration of a tower checkpoint, or of one side of a two-tower checkpoint. Raises `ValueError` for
    an ICLIP model, whose weights have other names than a tower's.
    """
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    if config.model_type == ICLIPConfig.model_type:
        raise ValueError(
            f"{checkpoint}: this is an ICLIP model, not a tower; train it further by `iclip train --model`."
        )
    config._attn_implementation = None  # of the file, which could name code of the Hub
    return getattr(config, side, config)


def load_tower(config: PreTrainedConfig, checkpoint: str | None = None) -> PreTrainedModel:
    """Loads a tower from a checkpoint, or initialises it, without a pooler, which would not be trained."""
    if config.model_type == "siglip_text_model":  # not in the Auto classes, and slow to import
        from transformers import SiglipTextModel as tower_class
    elif config.model_type == "timm_wrapper":
        tower_class = FeatureTower
    else:
        tower_class = MODEL_MAPPING[type(config)]
    takes_pooler = "add_pooling_layer" in inspect.signature(tower_class.__init__).parameters
    options = {"add_pooling_layer": False} if takes_pooler else {}
    if checkpoint is None:
        return tower_class._from_config(config, **options)
    # Without Transformers' report on weights that the tower does not have, such as a pooler's. Missing weights are
    # checked below.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tower, loading = tower_class.from_pretrained(
            checkpoint, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
    except ImportError:  # of a package that is missing
        raise
    except Exception as error:  # which may not say of which tower it is
        raise OSError(f"{checkpoint}: the tower cannot be loaded: {error}; download it again.") from error
    finally:
        logging.set_verbosity(verbosity)
    check_weights(checkpoint, tower, loading["missing_keys"])
    if os.path.isdir(checkpoint):  # elsewhere a relative path would look like a Hub id
        tower.config._name_or_path = os.path.abspath(checkpoint)
    return tower


def check_weights(checkpoint, model: PreTrainedModel, missing: Iterable[str]) -> None:
    """
    Raises `ValueError` if weights of a loaded model are missing, which `from_pretrained` fills with random numbers, or
    contain NaN or infinity.
    """
    if missing := sorted(missing):
        raise ValueError(
            f"{checkpoint}: {len(missing)} weights of {type(model).__name__} are missing, such as {missing[0]}; "
            "download it again."
        )
    if name := non_finite_weight(model):
        raise ValueError(f"{checkpoint}: {name} holds NaN or infinity; download it again.")


def non_finite_weight(model: nn.Module) -> str | None:
    """Returns the name of a parameter or buffer with NaN or infinity, if there is one. Offloaded ones are not read."""
    for name, weight in chain(model.named_parameters(), model.named_buffers()):  # a sum reads each weight once
        known = weight.is_floating_point() and not weight.is_meta
        if known and not weight.detach().sum(dtype=torch.float32).isfinite():
            return name
    return None


class ICLIPModel(PreTrainedModel):
    """
    Contrastive image-text model that explains itself. One forward pass computes image and text embeddings and, for
    each text, a map of the patches that match it.

    Any image tower with a class token (ViT/DINO, DINOv2 with or without registers, DINOv3, CLIP) can be combined with
    any text tower (CLIP, SigLIP, BERT-like), and with a convolutional backbone of timm as a second image tower
    (`config.feature_config`). The towers are used through their public outputs.

    Example:

    ```python
    >>> from PIL import Image
    >>> from iclip_hf import ICLIPModel, ICLIPProcessor

    >>> model = ICLIPModel.from_pretrained("org/iclip-vit-b16")
    >>> processor = ICLIPProcessor.from_pretrained("org/iclip-vit-b16")
    >>> image = Image.open("dog.jpg")
    >>> inputs = processor(images=image, labels=["dog", "red ball"], return_tensors="pt")
    >>> outputs = model(**inputs, output_similarity_maps=True)
    >>> outputs.logits_per_image.shape
    torch.Size([1, 2])
    >>> maps = processor.post_process_similarity_maps(outputs.similarity_maps, [(image.height, image.width)])
    ```
    """

    config: ICLIPConfig
    config_class = ICLIPConfig
    base_model_prefix = "iclip"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Projection"]  # which adds what its two parts compute; the towers name their own
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
        vision_type, text_type = config.vision_config.model_type, config.text_config.model_type
        if vision_type not in VISION_TOWERS:
            raise ValueError(
                f"An image tower needs a class token: one of {sorted(VISION_TOWERS)}, not {vision_type!r}."
            )
        if config.text_pooling == "eos" and text_type not in _EOS_TEXT_TOWERS:
            raise ValueError(f'text_pooling="eos" needs one of {sorted(_EOS_TEXT_TOWERS)}, not {text_type!r}.')
        if config.feature_config is not None and config.feature_config.model_type != "timm_wrapper":
            raise ValueError(f"A feature tower is a backbone of timm, not {config.feature_config.model_type!r}.")
        super().__init__(config)
        self.vision_model = vision_model if vision_model is not None else load_tower(config.vision_config)
        self.text_model = text_model if text_model is not None else load_tower(config.text_config)
        # A tower may copy its configuration. The model refers to this copy, so that later changes reach the layers.
        config.vision_config, config.text_config = self.vision_model.config, self.text_model.config
        self.feature_model = self.feature_reduction = None
        if config.feature_config is not None:
            self.feature_model = feature_model if feature_model is not None else load_tower(config.feature_config)
            config.feature_config = self.feature_model.config
            channels = self.feature_model.timm_model.num_features
            if config.feature_dim > channels:
                raise ValueError(f"feature_dim is at most {channels}, the number of the feature tower's channels.")
            self.feature_reduction = nn.Linear(channels, config.feature_dim)

        image_dim, text_dim = config.vision_config.hidden_size, config.text_config.hidden_size
        if config.text_pooling == "eos":
            text_dim = getattr(config.text_config, "projection_size", text_dim)  # SigLIP's head
        recognised, _ = config.poolings
        widths = {"class_token": image_dim, "earlier_averages": (config.average_layers - 1) * image_dim}
        widths["feature_average"] = config.feature_dim
        width = sum(widths.get(pooling, config.patch_dim) for pooling in recognised)
        self.recognition = ICLIPBranch(config, width, text_dim, recognises=True)
        self.interpretability = None
        if config.dual_projection:
            self.interpretability = ICLIPBranch(config, config.patch_dim, text_dim)
        if config.center_tokens:
            self.token_mean = nn.Buffer(torch.zeros(config.patch_dim))
        if config.map_attention == "signed":
            self.attention_direction = nn.Parameter(torch.zeros(config.projection_dim))

        self._find_last_attention()
        if (layers := config.average_layers) > 1:
            depth = config.vision_config.num_hidden_layers
            stack = next(m for m in self.vision_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
            for layer in stack[-layers:-1]:
                layer.register_forward_hook(_keep_output, with_kwargs=True)
        self.post_init()
        self.train(self.training)

    def _find_last_attention(self):
        """
        Makes the last attention layer of the image tower compute the class token's row besides the fused attention.
        """
        name = VISION_TOWERS[self.config.vision_config.model_type].attention
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
        self._find_last_attention()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Projection):
            init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            if module.hidden is not None:
                init.normal_(module.hidden[0].weight, std=module.weight.shape[1] ** -0.5)
                init.zeros_(module.hidden[-1].weight)
        elif isinstance(module, ICLIPBranch):
            init.constant_(module.logit_scale, float(self.config.logit_scale_init_value))
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, float(self.config.logit_bias_init_value))
        elif module is self.feature_reduction:  # until a training sets it
            init.zeros_(module.weight)
        elif isinstance(module, ICLIPModel):
            for name in ("token_mean", "attention_direction"):
                if hasattr(module, name):
                    init.zeros_(getattr(module, name))

    def train(self, mode: bool = True):
        """
        Sets the training mode. A locked image tower and the feature tower stay in eval mode and without gradients, and
        a text tower of which no parameter has a gradient in eval mode, without dropout.
        """
        super().train(mode)
        if hasattr(self, "text_model") and not any(weight.requires_grad for weight in self.text_model.parameters()):
            self.text_model.eval()
        # `from_pretrained` replaces the parameters and then calls `eval()`, so they are locked here.
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        Like the base class. Raises `ValueError` if weights are missing, contain NaN or infinity, or are of a part that
        the configuration does not have, such as the bias of a model with presence.
        """
        model, loading = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if pretrained_model_name_or_path is not None:  # otherwise the caller passed a `state_dict` and checks it
            check_weights(pretrained_model_name_or_path, model, loading["missing_keys"])
            # Towers may have parts that are not used, such as a pooler, and models that hold this one heads.
            names = (name.removeprefix(f"{cls.base_model_prefix}.") for name in loading["unexpected_keys"])
            unused = sorted(name for name in names if name.startswith(OWN_WEIGHTS))
            if unused:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: its config.json describes a model without {', '.join(unused)}, "
                    "which is among the weights; use the config.json that was saved with them."
                )
        return (model, loading) if output_loading_info else model

    def load_state_dict(self, state_dict, *args, **kwargs):
        """
        Like the base class. It also takes the names that files have, because Trainer loads its checkpoints with it.
        """
        if state_dict.keys() - self.state_dict().keys():
            loaded, loading = type(self).from_pretrained(
                None, config=self.config, state_dict=dict(state_dict), dtype=self.dtype, output_loading_info=True
            )
            renamed = {
                name: value for name, value in loaded.state_dict().items() if name not in loading["missing_keys"]
            }
            state_dict = renamed | {name: state_dict[name] for name in loading["unexpected_keys"]}
        return super().load_state_dict(state_dict, *args, **kwargs)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str, text: str, features: str | None = None, image_processor=None, **config_options
    ) -> "ICLIPModel":
        """
        Joins pretrained towers with newly initialised projections, in float32.

        Args:
            vision (`str`): folder or Hub id of the image tower, or of a two-tower model such as CLIP, whose image
                tower is used.
            text (`str`): folder or Hub id of the text tower, or of a two-tower model, whose text tower is used.
            features (`str`, *optional*): folder or Hub id of a feature tower, a convolutional backbone of timm, see
                `feature_config` of [`ICLIPConfig`].
            image_processor (*optional*): instead of that of the image tower, for a model with a feature tower, whose
                `feature_image_mean` and `feature_image_std` default to what turns the pixel values of this processor
                into those of the feature tower's training.
            config_options: options of [`ICLIPConfig`]. The configurations of the towers default to those of the
                checkpoints, and `text_pooling` to `"eos"` for CLIP and SigLIP towers and to `"mean"` for others.

        Returns:
            [`ICLIPModel`] in eval mode.

        Raises:
            `OSError`, `ValueError`: a folder or id has no model, an option is unknown, or a tower is not supported.
        """
        towers = {"vision_config": vision, "text_config": text} | ({"feature_config": features} if features else {})
        found = {name: tower_config(tower, name) for name, tower in towers.items()}
        pooling = "eos" if found["text_config"].model_type in _EOS_TEXT_TOWERS else "mean"
        given = {name: of for name, of in config_options.items() if of is not None or name not in found}
        config = cls.config_class(**{**found, "text_pooling": pooling, **given})
        if config.feature_config is not None and not features:
            raise ValueError("The configuration has a feature tower: name one (features, --feature_tower).")
        model = cls(config, *(load_tower(getattr(config, name), tower) for name, tower in towers.items())).eval()
        if features and config.feature_image_mean is None:
            image_processor = image_processor or AutoImageProcessor.from_pretrained(vision, trust_remote_code=False)
            wanted = {
                **model.feature_model.timm_model.pretrained_cfg,
                **getattr(config.feature_config, "pretrained_cfg", {}),  # of the checkpoint
            }
            channels = [*zip(image_processor.image_mean, image_processor.image_std, wanted["mean"], wanted["std"])]
            config.feature_image_mean = [(to - mean) / std for mean, std, to, _ in channels]
            config.feature_image_std = [to / std for _, std, _, to in channels]
        return model

    @property
    def map_branch(self) -> ICLIPBranch:
        """The map branch: the interpretability branch, or the only branch."""
        return self.recognition if self.interpretability is None else self.interpretability

    def presence(self, scores: torch.Tensor) -> torch.Tensor | None:
        """
        Computes the probability that images show texts, at a prior of 0.5: the sigmoid of scale * cosine + logit bias
        + `config.presence_bias`. `scores` are cosines of the recognition branch. Returns a tensor of their shape,
        float32, in [0, 1]; None if the model has no logit bias, because it was trained with a softmax.
        """
        if self.config.logit_bias_init_value is None:
            return None
        return (self.recognition(scores.float()) + self.config.presence_bias).sigmoid()

    def _set_gradient_checkpointing(self, enable: bool = True, **options):
        # Reentrant checkpoints drop gradients of tensors that are not outputs of a layer, such as the class token's
        # attention.
        function = options.get("gradient_checkpointing_func")
        if getattr(function, "keywords", {}).get("use_reentrant"):
            options["gradient_checkpointing_func"] = partial(function, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, **options)

    def encode_image(self, pixel_values: torch.FloatTensor, **kwargs) -> ImageTokens:
        """
        Runs the image towers on `(B, 3, H, W)`. Raises `ValueError` unless H and W are multiples of the patch size.
        """
        kind, patch_size = VISION_TOWERS[self.config.vision_config.model_type], patch_side(self.config)
        height, width = pixel_values.shape[-2:]
        if height % patch_size or width % patch_size:  # towers would leave out the rest
            raise ValueError(f"Images of {height}x{width} pixels are not in multiples of the patch size {patch_size}.")
        if kind.interpolates:
            kwargs["interpolate_pos_encoding"] = True
        grid = height // patch_size, width // patch_size
        patches = slice(-grid[0] * grid[1], None)  # after the class token and, of some towers, registers
        last_layers, averages = LastLayers(self.config.value_share), None
        if self.vision_model.config._attn_implementation == "eager":
            if self.config.value_share:
                raise ValueError(f"value_share={self.config.value_share} needs SDPA attention, not eager.")
            kwargs["output_attentions"] = True
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.lock_vision):
            factor = self.config.vision_downsampling
            seen = pixel_values if factor == 1 else F.avg_pool2d(pixel_values, factor)
            outputs = self.vision_model(seen, last_layers=last_layers, **kwargs)
            tokens, norm = outputs.last_hidden_state, getattr(self.vision_model, kind.final_norm)
            if not kind.normed:
                tokens = norm(tokens)
            if (layers := self.config.average_layers) > 1:
                earlier = list(last_layers.earlier.values())[1 - layers :]
                averages = torch.stack([norm(output.to(tokens.device))[:, patches].mean(1) for output in earlier], 1)
            row = outputs.attentions[-1] if last_layers.class_row is None else last_layers.class_row
            # Layers may be on several devices.
            attention = row[:, :, 0, patches].float().mean(1).to(tokens.device)
        patch_tokens, feature_average = tokens[:, patches], None
        if self.feature_model is not None:
            with torch.no_grad():
                features = self.feature_map(pixel_values)
                feature_average = self.feature_reduction(features.mean((2, 3))).to(patch_tokens)
                on_grid = F.interpolate(features, grid, mode="bilinear", align_corners=False).flatten(2).mT
                on_grid = self.feature_reduction(on_grid).to(patch_tokens)
            patch_tokens = torch.cat([patch_tokens, on_grid], -1)
        return ImageTokens(
            class_token=tokens[:, 0],
            patch_tokens=patch_tokens,
            attention=attention,
            grid=grid,
            tower_output=outputs,
            earlier_averages=averages,
            feature_average=feature_average,
        )

    def feature_map(self, pixel_values: torch.FloatTensor) -> torch.FloatTensor:
        """
        Returns the last feature map of the feature tower for `(B, 3, H, W)`, before the reduction, `(B, C, h, w)` of C
        channels. Raises `ValueError` for a tower without a map.
        """
        if self.config.feature_image_mean is not None:
            of_channels = (self.config.feature_image_mean, self.config.feature_image_std)
            mean, std = (pixel_values.new_tensor(of).view(-1, 1, 1) for of in of_channels)
            pixel_values = (pixel_values - mean) / std
        # Channels last, in which convolutions are a sixth faster on CPUs.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        features = self.feature_model(pixel_values, do_pooling=False).last_hidden_state
        channels = self.feature_reduction.in_features
        if features.ndim != 4 or features.shape[1] != channels:
            raise ValueError(
                f"{self.config.feature_config.architecture} returns no feature map of {channels} channels: use a "
                "convolutional backbone of timm."
            )
        return features

    def encode_text(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ):
        """
        Runs the text tower on token ids `(M, L)`. Returns text features `(M, Dt)`, see `config.text_pooling`, and the
        output of the tower.
        """
        config = self.config.text_config
        if padded := config.model_type == "siglip_text_model":
            # SigLIP reads the last position, which was padding in its training. Some callers pad less.
            padding = (0, max(0, config.max_position_embeddings - input_ids.shape[-1]))
            input_ids = F.pad(input_ids, padding, value=config.pad_token_id)
            attention_mask = None if attention_mask is None else F.pad(attention_mask, padding)
        if token_type_ids is not None:  # which CLIP's tower does not take
            kwargs["token_type_ids"] = token_type_ids
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if self.config.text_pooling == "eos":
            return outputs.pooler_output, outputs
        tokens, weights = outputs.last_hidden_state, attention_mask
        if weights is None:
            # SigLIP's processors return no mask, and pad all texts.
            weights = input_ids != config.pad_token_id if padded else torch.ones_like(input_ids)
        weights = weights.unsqueeze(-1).float()
        mean = (tokens.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
        return mean.to(tokens.dtype), outputs

    def normalized_attention(self, image: ImageTokens) -> torch.Tensor:
        """
        Returns the class token's attention over the patches, `(B, N)` in [0, 1] (Eq. 9), see `config.attention_norm`.
        """
        return normalize_attention(image.attention, self.config.attention_norm, self.config.attention_quantile)

    def _pooled(self, image: ImageTokens, poolings: Iterable[str | None]) -> dict[str, torch.Tensor]:
        """
        Returns the vectors of images by their `poolings`, in one of [`~pooling.POOLINGS`] `(B, D)`, or `(B, D + K)` of
        patches with a feature tower, in `"earlier_averages"` `(B, (L - 1) D)`. None has no vector.
        """

        def pooled(name: str) -> torch.Tensor:
            if name == "earlier_averages":
                return image.earlier_averages.flatten(1)
            if name == "feature_average":
                return image.feature_average
            mode, _, norm = name.partition("/")
            attention = normalize_attention(image.attention, norm or "minmax", self.config.attention_quantile)
            return pool(image.patch_tokens, image.class_token, attention, mode)

        return {name: pooled(name) for name in poolings if name}

    def loss_features(self, image: ImageTokens, poolings: Iterable[str | None]) -> dict[str, torch.Tensor]:
        """
        Returns by name what a loss can read of images: their vectors by the `poolings`, see `config.poolings`; with
        `max_over="similarity"` also `patches`, `attention` and, with `known_competition`, `even_patches` of
        [`ImageInputs`], centred and shared. With a locked tower they can be computed once and kept.
        """
        config, features = self.config, self._pooled(image, poolings)
        if config.max_over == "channels":
            return features
        tokens, attention = self.centered_tokens(image.patch_tokens), self.normalized_attention(image)
        own = tokens[..., : config.vision_config.hidden_size]  # without those of a feature tower
        chosen = representative_patches(own, attention, image.grid, config.map_tokens)
        features["patches"], features["attention"] = self._shared(tokens, attention, chosen)
        if config.known_competition:
            evenly = even_patches(image.grid).to(tokens.device).expand(len(tokens), -1)
            features["even_patches"], _ = self._shared(tokens, attention, evenly)
        return features

    def loss_inputs(self, features: Mapping[str, torch.Tensor]) -> ImageInputs:
        """Returns what this model's loss reads of images, from their `loss_features`."""
        recognised, of_map = self.config.poolings
        recognition = torch.cat([features[name] for name in recognised], -1)
        return ImageInputs(recognition, *map(features.get, (of_map, "patches", "attention", "even_patches")))

    def image_inputs(self, image: ImageTokens) -> ImageInputs:
        """Returns what the loss reads of images: pooled tokens, and few tokens of the map branch."""
        recognised, of_map = self.config.poolings
        return self.loss_inputs(self.loss_features(image, [*recognised, of_map]))

    def _shared(
        self, tokens: torch.Tensor, attention: torch.Tensor, chosen: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns tokens `(B, K, D)` and attention `(B, K)` of the chosen patches `(B, K)`, or of all, after sharing
        among similar patches (`config.map_affinity`).
        """
        queries = tokens if chosen is None else tokens.take_along_dim(chosen.unsqueeze(-1), 1)
        if self.config.map_affinity == 0:
            return queries, attention if chosen is None else attention.take_along_dim(chosen, 1)
        values = torch.cat([tokens, attention.unsqueeze(-1).to(tokens.dtype)], -1)
        # The image tower alone says which patches are alike.
        keys, queries = (of[..., : self.config.vision_config.hidden_size] for of in (tokens, queries))
        shared = share_among_like(values, keys, self.config.map_affinity, queries)
        return shared[..., :-1], shared[..., -1].float()

    def _own_tensor(self, name: str) -> torch.Tensor:
        """
        Returns `token_mean` or `attention_direction`, also if Accelerate offloads it, whose hook loads it for
        `forward` alone.
        """
        tensor, hook = getattr(self, name), getattr(self, "_hf_hook", None)
        if tensor.is_meta and hook is not None:
            hook.pre_forward(self)
            tensor = getattr(self, name)
            hook.post_forward(self, None)
        return tensor

    def centered_tokens(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        """Returns patch tokens `(..., D)` as the map branch uses them, before sharing among similar patches."""
        if not self.config.center_tokens:
            return patch_tokens
        return patch_tokens - self._own_tensor("token_mean").to(patch_tokens)

    def embed_patches(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        """
        Projects centered patch tokens `(..., D)` to the unit vectors that texts are compared with in a map,
        `(..., P)`, or `(..., 2 P)` with a `recognition_share`.
        """
        patch_embeds = self.map_branch.embed_image(patch_tokens)
        if share := self.config.recognition_share:
            # The recognition branch learned with tokens that are not centered. They follow the class token, which is
            # zero here.
            patches = patch_tokens
            if self.config.center_tokens:
                patches = patches + self._own_tensor("token_mean").to(patches)
            projection = self.recognition.visual_projection
            if self.config.recognition_pooling == "feature_average":
                patches = patches[..., -self.config.feature_dim :]
            recognised = normalize(projection(patches, linear=True).float())
            patch_embeds = join_branches(patch_embeds, recognised, share)
        return patch_embeds.to(patch_tokens.dtype)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> ICLIPImageFeatures:
        """
        Encodes images.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): from [`ICLIPProcessor`]. H and W are multiples of
            the patch size.

        Returns:
            [`ICLIPImageFeatures`].

        Raises:
            `ValueError`: H or W is not a multiple of the patch size.
        """
        image = self.encode_image(pixel_values, **kwargs)
        attention = self.normalized_attention(image)
        recognised, of_map = self.config.poolings
        recognition, map_pooled, *_ = self.loss_inputs(self._pooled(image, [*recognised, of_map]))
        patches, map_attention = self._shared(self.centered_tokens(image.patch_tokens), attention)
        projected, map_image_embeds = self.recognition.visual_projection(recognition), None
        if map_pooled is not None:
            map_image_embeds = self.map_branch.embed_image(map_pooled).to(projected.dtype)
        return ICLIPImageFeatures(
            last_hidden_state=image.tower_output.last_hidden_state,
            hidden_states=image.tower_output.hidden_states,
            attentions=image.tower_output.attentions,
            pooler_output=projected,
            image_embeds=normalize(projected),
            map_image_embeds=map_image_embeds,
            patch_embeds=self.embed_patches(patches).unflatten(1, image.grid),
            patch_tokens=image.patch_tokens,
            attention=attention,
            map_attention=map_attention,
            feature_average=image.feature_average,
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        num_templates: int = 1,
        **kwargs,
    ) -> ICLIPTextFeatures:
        """
        Encodes texts. The result can be used with any number of images.

        Args:
            input_ids (`torch.Tensor` of shape `(M, L)`, or `(B, M, L)` with a list of texts for each image): token
                ids.
            attention_mask, token_type_ids (`torch.Tensor` of the same shape, *optional*): of the tokens.
            num_templates (`int`, defaults to 1): number of consecutive texts that are prompts of one label. Their unit
                vectors are averaged, so there are T = M / num_templates labels.

        Returns:
            [`ICLIPTextFeatures`].
        """
        texts = input_ids.shape[:-1]
        tokens = [None if of is None else of.flatten(0, -2) for of in (input_ids, attention_mask, token_type_ids)]
        features, outputs = self.encode_text(*tokens, **kwargs)
        projected = self.recognition.text_projection(features).unflatten(0, texts)
        text_embeds = average_prompts(normalize(projected), num_templates)
        map_text_embeds = average_prompts(self.map_branch.embed_text(features).unflatten(0, texts), num_templates)
        weights = None
        if self.config.map_attention == "signed":
            weights = self.attention_weights(map_text_embeds).clamp(-1, 1)
        if share := self.config.recognition_share:
            map_text_embeds = join_branches(map_text_embeds, text_embeds.float(), share)
        return ICLIPTextFeatures(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            pooler_output=projected if num_templates == 1 else text_embeds,
            text_embeds=text_embeds,
            map_text_embeds=map_text_embeds.to(projected.dtype),
            attention_weights=weights,
        )

    def attention_weights(self, map_text_embeds: torch.Tensor) -> torch.Tensor:
        """
        Returns the weights of the attention in the maps of texts, `(..., T)` float32, before they are limited to [-1,
        1], from unit vectors of the map branch `(..., T, P)`.
        """
        direction = self._own_tensor("attention_direction").to(map_text_embeds.device, torch.float32)
        with torch.autocast(direction.device.type, enabled=False):
            return 2 * self.config.max_sharpness * (map_text_embeds.float() @ direction)

    def similarity_maps(
        self, image: torch.FloatTensor | ICLIPImageFeatures, text: ICLIPTextFeatures
    ) -> torch.FloatTensor:
        """
        Computes raw image-text similarity maps: the cosines of patches and texts (Eq. 1-3), weighted by the class
        token's attention. See `config.map_attention` for the weighting, and `config.map_affinity` for sharing among
        similar patches.

        Args:
            image (`torch.Tensor` of shape `(B, 3, H, W)` or [`ICLIPImageFeatures`]): pixel values, or the features of
                images.
            text ([`ICLIPTextFeatures`]): from `get_text_features`.

        Returns:
            `torch.Tensor` of shape `(B, T, h, w)`, in [-1, 1], additive and signed ones up to
            1 / (2 `config.max_sharpness`) more. [`ICLIPProcessor.post_process_similarity_maps`] enlarges and stretches
            them.
        """
        if isinstance(image, torch.Tensor):
            image = self.get_image_features(image)
        return self.weigh_maps(cosine_similarity_map(image.patch_embeds, text.map_text_embeds), image, text)

    def weigh_maps(
        self, maps: torch.FloatTensor, image: ICLIPImageFeatures, text: ICLIPTextFeatures
    ) -> torch.FloatTensor:
        """Weighs maps of cosines `(B, T, h, w)` by the class token's attention, as `config.map_attention` says."""
        attention = image.map_attention.unflatten(-1, image.grid).unsqueeze(1).to(maps)
        if self.config.map_attention == "similarity":
            maps = maps * attention
        elif self.config.map_attention in ("additive", "signed"):
            attention = min_max_normalize(attention)
            if self.config.map_attention == "signed" and text.attention_weights is not None:
                attention = attention * text.attention_weights[..., None, None].to(attention)
            low = maps.amin((-2, -1), keepdim=True)  # its rounded mean could differ from the values of a constant map
            mean = low + (maps - low).mean((-2, -1), keepdim=True)
            above, below = (maps - mean).clamp(min=0), (maps - mean).clamp(max=0)
            most = 1 / (2 * self.config.max_sharpness)
            maps = mean + above + attention * above.clamp(max=most) + BELOW_MEAN * below
        return maps

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        text_features: ICLIPTextFeatures | None = None,
        num_templates: int = 1,
        image_inputs: ImageInputs | None = None,
        text_inputs: torch.Tensor | None = None,
        nouns: dict[str, torch.Tensor] | None = None,
        return_loss: bool | None = None,
        chunk_size: int | None = None,
        output_similarity_maps: bool = False,
        **kwargs,
    ) -> ICLIPOutput:
        """
        Compares images with texts.

        Args:
            input_ids (`torch.Tensor` of shape `(M, L)`, or `(B, M, L)` with a list of texts for each image): token
                ids. With `return_loss`, `(M, L)`: the first B texts are the captions of the images, and the others
                noun prompts.
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): from [`ICLIPProcessor`].
            attention_mask, token_type_ids (`torch.Tensor` of the shape of `input_ids`, *optional*): of the tokens.
            text_features ([`ICLIPTextFeatures`], *optional*): encoded texts, instead of `input_ids`.
            num_templates (`int`, defaults to 1): number of consecutive texts that are prompts of one label, see
                `get_text_features`.
            image_inputs, text_inputs ([`ImageInputs`] and `torch.Tensor` of shape `(M, Dt)`, *optional*): precomputed
                by `image_inputs` and `encode_text`, instead of `pixel_values` and `input_ids`, with `return_loss`.
            nouns (`dict` of `torch.Tensor`, *optional*): of the noun prompts, as [`PairCollator`] makes them:
                - **noun_ids** `(M - B,)` -- the noun of each, as an index of the vocabulary.
                - **noun_labels** `(B, vocabulary)` -- 1 for the nouns that an image shows, -1 for those that it is
                  known not to show, else 0; of a signed type.
                - **is_background** `(M - B,)` -- whether the noun of each is of the background, boolean.
                - **place** `(M - B,)` -- 1 if it is below, such as a floor, -1 if it is above, such as the sky, else
                  0.
            return_loss (`bool`, *optional*): whether to return the loss of B images with their captions and nouns,
                over all processes.
            chunk_size (`int`, *optional*): number of images and of texts that a tower encodes at once for the loss.
                Activations of one chunk are in memory; those of the others are computed again in the backward pass.
            output_similarity_maps (`bool`, defaults to `False`): whether to return raw maps.

        Returns:
            [`ICLIPOutput`].

        Raises:
            `ValueError`: images or texts are missing, or H or W is not a multiple of the patch size; with
                `return_loss` and without nouns, there is not one text for each image.
        """
        tokens, texts = (input_ids, attention_mask, token_type_ids), text_inputs if return_loss else text_features
        if (pixel_values is None and image_inputs is None) or (input_ids is None and texts is None):
            raise ValueError(
                "The model compares images with texts: give pixel_values and input_ids, or call get_image_features or "
                "get_text_features."
            )
        if return_loss:
            if image_inputs is None:

                def encode_images(images: torch.Tensor) -> ImageInputs:
                    return self.image_inputs(self.encode_image(images, **kwargs))

                image_inputs = ImageInputs(*in_chunks(encode_images, chunk_size, pixel_values))
            if text_inputs is None:

                def encode_texts(*tokens: torch.Tensor | None) -> tuple[torch.Tensor]:
                    return self.encode_text(*tokens, **kwargs)[:1]

                (text_inputs,) = in_chunks(encode_texts, chunk_size, *tokens)
            return self._losses(image_inputs, text_inputs, BatchNouns.gathered(**nouns) if nouns else None)
        kwargs["return_dict"] = True
        image = self.get_image_features(pixel_values, **kwargs)
        if text_features is None:
            text_features = self.get_text_features(*tokens, num_templates, **kwargs)
        return self._compare(image, text_features, output_similarity_maps)

    def _compare(self, image: ICLIPImageFeatures, text: ICLIPTextFeatures, output_maps: bool) -> ICLIPOutput:
        """Returns the output for encoded images and texts."""
        logits_per_image = self.recognition(cosines(image.image_embeds, text.text_embeds))
        return ICLIPOutput(
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.mT,
            image_embeds=image.image_embeds,
            text_embeds=text.text_embeds,
            map_image_embeds=image.map_image_embeds,
            map_text_embeds=text.map_text_embeds,
            patch_embeds=image.patch_embeds,
            attention=image.attention,
            similarity_maps=self.similarity_maps(image, text) if output_maps else None,
            vision_model_output=image,
            text_model_output=text,
        )

    def _losses(self, image: ImageInputs, text_inputs: torch.Tensor, nouns: BatchNouns | None) -> ICLIPOutput:
        """Returns the losses of images with their captions, the first of the texts, and with nouns (Eq. 13)."""
        if nouns is None and len(text_inputs) != len(image.recognition):  # more texts would be left out in silence
            raise ValueError(
                f"The loss needs a caption for each of {len(image.recognition)} images, not {len(text_inputs)}."
            )
        count = len(image.recognition)
        images, texts = self.recognition.embed_image(image.recognition), self.recognition.embed_text(text_inputs)
        map_texts, even_patches = texts, None
        if branch := self.interpretability:
            map_images = branch.embed_image(image.patches if image.pooled is None else image.pooled)
            map_texts = branch.embed_text(text_inputs)
            if nouns is not None and image.even_patches is not None:
                even_patches = branch.embed_image(image.even_patches[nouns.spread_evenly])
        # In half precision, scaled cosines would be rounded to multiples of 1/16.
        with torch.autocast(images.device.type, enabled=False):
            prompts = None if nouns is None else nouns.prompts(texts[count:])
            batch = BranchBatch(self.recognition, self.config, images, texts[:count], None, nouns, prompts)
            losses, attention_loss = [branch_loss("recognition", batch)], 0
            if branch:  # which can be on another device
                prompts = None if nouns is None else nouns.prompts(map_texts[count:])
                batch = BranchBatch(branch, self.config, map_images, map_texts[:count], image.attention)
                if self.config.max_over == "similarity":  # no other map learns from nouns
                    batch.nouns, batch.prompts, batch.even_patches = nouns, prompts, even_patches
                losses.append(branch_loss("map", batch).to(images.device))
            if self.config.map_attention == "signed":
                attention_loss = self._attention_loss(prompts, nouns).to(images.device)
            losses = torch.stack(losses)
            # No loss reads the product with all prompts.
            logits_per_image = None if self.training else self.recognition(cosines(images, texts))
        return ICLIPOutput(
            loss=losses.mean() + attention_loss,
            branch_losses=losses.detach().unbind(),
            logits_per_image=logits_per_image,
            logits_per_text=None if self.training else logits_per_image.mT,
            image_embeds=images,
            text_embeds=texts,
        )

    def _attention_loss(self, prompts: torch.Tensor | None, nouns: BatchNouns | None) -> torch.Tensor:
        """
        Returns the loss of the weights of the attention, for unit vectors of a prompt of each noun, from which they
        learn.
        """
        if nouns is None:
            return 0 * self.attention_direction.sum()  # DDP waits for its gradient
        return direction_loss(self.attention_weights(prompts.detach()), nouns.is_background)


def in_chunks(encode: Callable[..., tuple], size: int | None, *inputs: torch.Tensor | None) -> tuple:
    """
    Encodes a batch in chunks of a size, whose activations are computed again in the backward pass, and joins the parts
    of each result. Inputs and results can be None.
    """
    if size is None or len(inputs[0]) <= size:
        return encode(*inputs)
    chunks = zip(*(repeat(None) if tensor is None else tensor.split(size) for tensor in inputs))
    parts = zip(*(checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks))
    return tuple(None if part[0] is None else torch.cat(part) for part in parts)


def normalize(features: torch.Tensor) -> torch.Tensor:
    """Scales vectors `(..., D)` to unit length, in float32. A zero vector stays zero. Keeps the dtype."""
    return F.normalize(features.float(), dim=-1).to(features.dtype)


def join_branches(map_embeds: torch.Tensor, embeds: torch.Tensor, share: float) -> torch.Tensor:
    """
    Joins unit vectors `(..., P)` of both branches to unit vectors `(..., 2 P)`, whose product is (1 - share) times
    that of the map branch plus `share` times that of the recognition branch.
    """
    return torch.cat([(1 - share) ** 0.5 * map_embeds, share**0.5 * embeds], -1)


def average_prompts(embeds: torch.Tensor, num_templates: int) -> torch.Tensor:
    """
    Averages the unit vectors of each label's prompts, `(..., T * num_templates, P)`, to unit vectors `(..., T, P)`.
    """
    return embeds if num_templates == 1 else normalize(embeds.unflatten(-2, (-1, num_templates)).mean(-2))


__all__ = ["ICLIPModel", "ICLIPOutput", "ICLIPImageFeatures", "ICLIPTextFeatures"]

AutoModel.register(ICLIPConfig, ICLIPModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(ICLIPConfig, ICLIPModel, exist_ok=True)
