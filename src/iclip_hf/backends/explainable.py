"""The interfaces of all loaded models, and of loaded models whose layers can be recorded."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import nn

from ..model.engine import Engine
from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.projections import average_prompts, normalize
from ..model.similarity import cosine_similarity_map, cosines
from .identity import identity
from .recording import AttentionLayer, AttentionRecord, prepare, private_copy, record, unrecorded


class ExplainableModel(ABC):
    """
    A loaded model with its processor, for explanations, evaluations and analyses. [`load`] returns one.

    Attributes:
        network: the model itself; for PyTorch a private copy, which shares the weights of the given model.
        processor ([`ICLIPProcessor`]): prepares `pixel_values` of whole images, without a crop.
        pools_patches (`bool`): whether the score is computed from a vector that is pooled from patch tokens. Otherwise
            it is computed from the output of one query of the last attention layer: the query of the class token or of
            a pooling head.
        reads_features (`bool`): whether the score is computed from the feature tower alone, which only ICLIP models
            have.
        has_attention (`bool`): whether the image tower has attention, in its blocks or in its pooling.
        min_presence (`float`): presence from which a text counts as shown, by default. It is 0 for models other than
            ICLIP: the presence of SigLIP, for example, is at the prior of its training, about one text in 32,767, so
            it hides no mask.
        default_method (`str`): the method for `method=None`. It shows where a text is for this kind of model.
            docs/methods.md has the reasons.
    """

    pools_patches = False
    reads_features = False
    has_attention = True
    min_presence = 0.0
    default_method = "itsm"

    def __init__(self, model, processor):
        self._given = model, processor
        self.network = model
        self.processor = processor

    @cached_property
    def identity(self) -> dict[str, str]:
        """Digests of everything that the numbers of the model depend on, see [`~identity.identity`]."""
        return identity(*self._given)

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        return self.network.device

    def encode_texts(self, labels: Sequence[str], templates: str | Sequence[str] | None = None) -> ICLIPTextFeatures:
        """
        Encodes T labels in each of the templates (the processor's if not given). Returns `text_embeds` and
        `map_text_embeds`, unit vectors of shape `(T, P)`, averaged over the templates. With `["{}"]`, labels are taken
        as they are.
        """
        return Engine(self, self.processor, templates=templates).encode(labels)

    def get_text_features(self, **inputs) -> ICLIPTextFeatures:
        """Encodes prompts from the processor, see [`ICLIPModel.get_text_features`]."""
        return self.network.get_text_features(**inputs)

    def get_image_features(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        """Encodes images `(B, 3, H, W)` as unit vectors of images `(B, P)` and of patches `(B, h, w, P)`."""
        return self.network.get_image_features(pixel_values)

    @abstractmethod
    def attention(self, pixel_values: torch.Tensor) -> tuple[ICLIPImageFeatures, torch.Tensor]:
        """
        Encodes images. Returns their features, and the attention `(B, N)` of the query that pools the patches. If the
        model pools by the mean of the patches, this is the mean attention of all patches.
        """

    def similarity_maps(self, features: ICLIPImageFeatures, texts: ICLIPTextFeatures) -> torch.Tensor:
        """Computes raw maps `(B, T, h, w)`: the cosines of patches and texts (Eq. 1-3), weighed by `weigh_maps`."""
        return self.weigh_maps(cosine_similarity_map(features.map_embeds, texts.map_text_embeds), features, texts)

    def weigh_maps(self, maps: torch.Tensor, features: ICLIPImageFeatures, texts: ICLIPTextFeatures) -> torch.Tensor:
        """Weighs maps of cosines by attention if the model does so, see [`ICLIPModel.weigh_maps`]."""
        return maps

    def scores(self, features: ICLIPImageFeatures, texts: ICLIPTextFeatures) -> torch.Tensor:
        """Computes the scores `(B, T)`, float32: cosines of images and texts, see [`ICLIPModel.scores`]."""
        return cosines(features.image_embeds, texts.text_embeds)

    @abstractmethod
    def logits(self, cosines: torch.Tensor) -> torch.Tensor:
        """Converts cosines of images and texts to the logits that the model was trained with, float32."""

    def presence(self, scores: torch.Tensor) -> torch.Tensor | None:
        """
        Converts scores to the probability that images show texts, float32 in [0, 1]. Returns None for a model that
        was not trained with a sigmoid, see [`ICLIPModel.presence`].
        """
        return None


class RecordableModel(ExplainableModel):
    """
    A model whose attention layers of the image tower can be recorded.

    Attributes:
        layers (list of `AttentionLayer`): attention layers of the image tower in order; a pooling head is the last. In
            a tower without attention, the pooling is the only layer.
    """

    def __init__(self, model: nn.Module, processor):
        super().__init__(model, processor)
        self.network = private_copy(model)
        self.layers: list[AttentionLayer] = []
        self._prepare_layers()

    @abstractmethod
    def _prepare_layers(self) -> None:
        """Adds the attention layers in order."""

    def _add_layer(
        self, block: nn.Module, attention: nn.Module, *parts: nn.Module | None, calls_sdpa: bool = False
    ) -> None:
        """
        Prepares the attention of a block to be recorded, see `prepare`. `parts` are the fields of its `AttentionLayer`
        after `block`.
        """
        prepare(len(self.layers), block, attention, calls_sdpa)
        self.layers.append(AttentionLayer(block, *parts))

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def get_image_features(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        return self._encode_images(pixel_values.to(self.device, next(self.network.parameters()).dtype))

    def _encode_images(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        return self.network.get_image_features(pixel_values)

    def _grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Returns the height and width of the patch grid of prepared images."""
        return tuple(side // self.processor.patch_size for side in pixel_values.shape[2:])

    def attention(self, pixel_values: torch.Tensor) -> tuple[ICLIPImageFeatures, torch.Tensor]:
        features, (last_record,) = self.trace(pixel_values, weights=True)
        num_patches = math.prod(features.grid)
        queries = slice(-num_patches, None) if self.pools_patches else slice(0, 1)
        return features, last_record.weights[:, :, queries, -num_patches:].float().mean((1, 2))

    @abstractmethod
    def project(self, stream: torch.Tensor) -> torch.Tensor:
        """Projects patch tokens `(B, N, D)` that leave the last block into the space of the texts, `(B, N, P)`."""

    def join_features(
        self, stream: torch.Tensor, features: ICLIPImageFeatures, grid: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """
        Appends the features of a feature tower to a stream, for `project`. The stream has the patch tokens `(B, N, D)`
        or one mean token `(B, 1, D)` of each image. If its patches have another `grid` than `features`, the appended
        features are resized. A model without a feature tower returns the stream itself.
        """
        return stream

    def logits(self, cosines: torch.Tensor) -> torch.Tensor:
        logits = cosines * self.network.logit_scale.float().exp().to(cosines.device)
        bias = getattr(self.network, "logit_bias", None)  # SigLIP has one
        return logits if bias is None else logits + bias.float().to(cosines.device)

    def presence(self, scores: torch.Tensor) -> torch.Tensor | None:
        return None if getattr(self.network, "logit_bias", None) is None else self.logits(scores).sigmoid()

    def self_attentions(self, method: str, depth: int) -> list[int]:
        """
        Returns the indices of the last `depth` layers that are self-attentions of transformer blocks. Raises
        `ValueError` if there are none, or `depth` is below 1.
        """
        if depth < 1:
            raise ValueError(f"depth is at least 1, not {depth}.")
        indices = [index for index, layer in enumerate(self.layers) if layer.residual]
        if not indices:
            raise ValueError(
                f"{method} needs an image tower of transformer blocks: use {self.default_method} or grad_cam."
            )
        return indices[-depth:]

    def trace(
        self, pixel_values: torch.Tensor, start: int = -1, grad: bool = False, weights: bool = False
    ) -> tuple[ICLIPImageFeatures, list[AttentionRecord]]:
        """Encodes images and records the attention layers from `start` on, see `record`."""
        first = range(len(self.layers))[start]  # -1 is the last layer
        return record(lambda: self.get_image_features(pixel_values), first, grad, weights)


def recordable(model: ExplainableModel, purpose: str) -> RecordableModel:
    """Returns the model if its layers can be recorded. Raises `ValueError` for an ONNX model."""
    if not isinstance(model, RecordableModel):
        raise ValueError(
            f"{purpose} needs the layers of a PyTorch model: an ONNX model has itsm, competing_itsm, "
            "reversed_itsm, attention, attention_affinity and random."
        )
    return model


def each_alone(head: Callable, tokens: torch.Tensor, length: int = 1) -> torch.Tensor:
    """
    Applies a pooling head to each of the tokens `(B, N, D)` alone, as a sequence of `length` copies. A head that pools
    by attention then gives all attention to this token. Returns `(B, N, P)`.
    """
    with unrecorded():
        pooled = head(tokens.flatten(0, 1).unsqueeze(1).expand(-1, length, -1))
    return pooled.unflatten(0, tokens.shape[:2])


def check_side(pixel_values: torch.Tensor, side: int) -> None:
    """Raises `ValueError` unless images are squares of `side` pixels, the only size that some models take."""
    if pixel_values.shape[2:] != (side, side):
        height, width = pixel_values.shape[2:]
        raise ValueError(
            f"This model takes images of {side}x{side} pixels, not {height}x{width}: leave out the image size."
        )


def unit(features: torch.Tensor) -> torch.Tensor:
    """Normalises features to unit vectors, float32."""
    return normalize(features.float())


def label_features(projected: torch.Tensor, num_templates: int) -> ICLIPTextFeatures:
    """
    Normalises projected prompts `(T * num_templates, P)`, and averages the prompts of each label to a unit vector
    `(T, P)`.
    """
    embeds = average_prompts(unit(projected), num_templates)
    return ICLIPTextFeatures(text_embeds=embeds, map_text_embeds=embeds)


def block_mlp(norm: nn.Module, mlp: nn.Module, scale: nn.Module | None = None) -> nn.Sequential:
    """Creates an `AttentionLayer.mlp`: norm, MLP, and the layer scale if the model has one."""
    return nn.Sequential(norm, mlp, nn.Identity() if scale is None else scale)
