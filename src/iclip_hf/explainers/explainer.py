"""The interface of every method, and the adapter of each kind of model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from ..modeling_iclip import ICLIPImageFeatures, ICLIPTextFeatures, cosines
from ..models.onnx import ONNXModel
from ..utils.digests import content_digest, weights_digest
from .adapters import (
    CLIPAdapter,
    ICLIPAdapter,
    ModelAdapter,
    ONNXAdapter,
    Siglip2Adapter,
    SiglipAdapter,
    Tipsv2Adapter,
)
from .open_clip import OpenCLIPAdapter, OpenCLIPResNetAdapter


# By the model type of a config, or by the image tower's class in open_clip.
_FAMILIES: dict[str, type[ModelAdapter]] = {
    "iclip": ICLIPAdapter,
    "clip": CLIPAdapter,
    "metaclip_2": CLIPAdapter,
    "siglip": SiglipAdapter,
    "siglip2": Siglip2Adapter,
    "tipsv2": Tipsv2Adapter,
    "VisionTransformer": OpenCLIPAdapter,
    "ModifiedResNet": OpenCLIPResNetAdapter,
}


class Explainer(ABC):
    """
    A method for one model. Texts are encoded once and can be used with any number of images.

    The explainer works on a private copy that shares the model's weights, so the given model is not changed. Create it after the
    model is on its device.

    Args:
        model: [`ICLIPModel`], an [`ONNXModel`], transformers' `CLIPModel`, `MetaClip2Model`, `SiglipModel`, `Siglip2Model` or
            `Tipsv2Model`, or a model of open_clip (its transformers with a class token and its ResNets).
        processor: the model's processor; for open_clip its tokenizer.

    Attributes:
        processor: `processor(images=images)["pixel_values"]` prepares whole RGB images for this model, `(B, 3, H, W)`.
        reversed (`bool`): whether the method's maps are 1 - M (Eq. 5), where M is computed from the raw maps.
        sees_text (`bool`): whether maps depend on the text. If `False`, all texts of an image have the same map.
        backward_per_text (`bool`): whether each text needs a backward pass. If `False`, further texts cost little.

    Raises:
        `TypeError`: the model is of another kind. `ValueError`: the model does not support the method.
    """

    reversed = False
    sees_text = True
    backward_per_text = False

    def __init__(self, model, processor):
        self.family = adapt(model, processor)
        self.processor = self.family.processor

    def encode_texts(self, labels: Sequence[str], templates: Sequence[str] | None = None) -> ICLIPTextFeatures:
        """
        Encodes T labels, averaged over the templates.

        Args:
            labels: class names or phrases.
            templates: prompts with one `{}` each; the processor's if not given. `["{}"]` takes the labels as they are.

        Returns:
            [`ICLIPTextFeatures`] with `text_embeds` and `map_text_embeds` of shape `(T, P)`, unit vectors.
        """
        return self.family.encode_texts(labels, templates)

    def encode_image(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures | None:
        """
        Encodes prepared images `(B, 3, H, W)` for any number of calls of `forward`. Returns None if the method runs the image tower
        in each call.
        """
        return None

    @abstractmethod
    def forward(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        """
        Computes the raw maps of a batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): prepared by `processor`.
            texts ([`ICLIPTextFeatures`]): of `encode_texts`, shared by all images, or with embeddings of shape `(B, T, P)`.

        Returns:
            `tuple`: raw maps `(B, T, h, w)`, float32, and the features of the images, without a graph.
        """

    def raw_maps(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Computes raw maps and scores of a batch, see `forward`.

        Returns:
            `tuple`: raw maps `(B, T, h, w)` and scores `(B, T)`, the cosine of image and text in [-1, 1], both float32.
        """
        maps, image = self.forward(pixel_values, texts)
        return maps, cosines(image.image_embeds, texts.text_embeds)


def adapt(model, processor) -> ModelAdapter:
    """
    Creates the adapter of a model, which methods and analyses use.

    Raises:
        `TypeError`: the model is of another kind.
    """
    if isinstance(model, ONNXModel):
        return ONNXAdapter(model, processor)
    if hasattr(model, "visual"):
        kind = type(model.visual).__name__
        fits = getattr(model.visual, "attn_pool", None) is None  # CoCa pools by queries of its own
    else:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        fits = hasattr(model, "get_text_features")  # CLIP's image classifier has CLIP's config
    if kind not in _FAMILIES or not fits:
        raise TypeError(
            "Expected an ICLIPModel, an ONNXModel, a CLIPModel, MetaClip2Model, SiglipModel, Siglip2Model or Tipsv2Model of "
            f"transformers, or a model of open_clip with a class token or a ResNet, got {type(model).__name__}: load one of them."
        )
    return _FAMILIES[kind](model, processor)


def identity(model) -> dict[str, str]:
    """Returns the description of a model in results: its name, a digest of its weights, and its dtype."""
    is_module = isinstance(model, torch.nn.Module)
    dtype = next(model.parameters()).dtype if is_module else model.dtype
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    weights = weights_digest(model) if is_module else content_digest(sorted(model.folder.glob("*.onnx*")))
    return {"model": name, "weights": weights, "dtype": str(dtype).removeprefix("torch.")}
