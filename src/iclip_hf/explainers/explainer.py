"""The signature that every method implements, and what an explained image is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..modeling_iclip import ICLIPTextFeatures
from ..models.onnx import ONNXModel
from ..similarity import resize_and_normalize
from ..utils.digests import content_digest, weights_digest
from .adapters import CLIPAdapter, ICLIPAdapter, ModelAdapter, ONNXAdapter, Siglip2Adapter, SiglipAdapter
from .open_clip import OpenCLIPAdapter, OpenCLIPResNetAdapter


# By the model type of a config, or by the image tower's class in open_clip.
_FAMILIES: dict[str, type[ModelAdapter]] = {
    "iclip": ICLIPAdapter,
    "clip": CLIPAdapter,
    "siglip": SiglipAdapter,
    "siglip2": Siglip2Adapter,
    "VisionTransformer": OpenCLIPAdapter,
    "ModifiedResNet": OpenCLIPResNetAdapter,
}


class Explainer(ABC):
    """
    One method on one model: texts are encoded once and go with any number of images.

    The given model is never changed: it works on a private copy that shares the weights. Make it after the model is on its
    device.

    Args:
        model: [`ICLIPModel`], transformers' `CLIPModel`, `SiglipModel` or `Siglip2Model`, an [`ONNXModel`], or a model of
            open_clip (its transformers with a class token and its ResNets).
        processor: the model's processor; for open_clip its tokenizer.

    Attributes:
        processor: `processor(images=images)["pixel_values"]` prepares whole RGB images for this model, `(B, 3, H, W)`.

        more_texts_are_free (`bool`): further texts cost next to nothing, and change no map.

    Raises:
        `TypeError`: for another kind of model. `ValueError`: if this model cannot do the method, with the reason.
    """

    more_texts_are_free = True

    def __init__(self, model, processor):
        self.family = adapt(model, processor)
        self.processor = self.family.processor

    def encode_texts(self, labels: Sequence[str], templates: Sequence[str] | None = None) -> ICLIPTextFeatures:
        """
        Encodes T labels, each put into every template and averaged over them.

        Args:
            labels: class names or phrases.
            templates: prompts with one `{}` each; the processor's if not given. `["{}"]` takes the labels as they are.

        Returns:
            [`ICLIPTextFeatures`] with `text_embeds` and `map_text_embeds` of shape `(T, P)`, unit vectors.
        """
        return self.family.encode_texts(labels, templates)

    @abstractmethod
    def raw_maps(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Explains a batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): prepared by `processor`.
            texts ([`ICLIPTextFeatures`]): of `encode_texts`, shared by all images, or with embeddings of shape `(B, T, P)`.

        Returns:
            `tuple`: raw maps `(B, T, h, w)` and scores `(B, T)`, the cosine of image and text in [-1, 1], both float32.
        """


def adapt(model, processor) -> ModelAdapter:
    """
    A model of any supported kind behind the functions that methods and analyses are written in.

    Raises:
        `TypeError`: for another kind of model.
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
            "Expected an ICLIPModel, CLIPModel, SiglipModel or Siglip2Model, an ONNXModel, or a model of open_clip with a class "
            f"token or a ResNet, got {type(model).__name__}."
        )
    return _FAMILIES[kind](model, processor)


def identity(model) -> dict[str, str]:
    """What results say of the model they come from: its name, a digest of its weights, and the precision it computes in."""
    is_module = isinstance(model, torch.nn.Module)
    dtype = next(model.parameters()).dtype if is_module else model.dtype
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    weights = weights_digest(model) if is_module else content_digest(sorted(model.folder.glob("*.onnx*")))
    return {"model": name, "weights": weights, "dtype": str(dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class Explanation:
    """
    One explained image.

    Attributes:
        labels (`list[str]`): the T texts.
        scores (`torch.Tensor` of shape `(T,)`): cosine of image and text by the recognition branch, in [-1, 1]. Low for an
            absent text, whose map is stretched to [0, 1] like any other.
        raw_maps (`torch.Tensor` of shape `(T, h, w)`): the method's values on the patch grid.
        size (`tuple[int, int]`): height and width of the image in pixels.
    """

    labels: list[str]
    scores: torch.Tensor
    raw_maps: torch.Tensor
    size: tuple[int, int]

    def map(self, index: int) -> torch.Tensor:
        """The map of one text at the image's size: bicubic, then min-max (Eq. 4). `(H, W)` float32 in [0, 1]."""
        if not -len(self.labels) <= index < len(self.labels):
            raise IndexError(f"Expected the index of one of {len(self.labels)} texts, got {index}.")
        return resize_and_normalize(self.raw_maps[index][None], self.size)[0]

    @property
    def maps(self) -> torch.Tensor:
        """All maps, `(T, H, W)`; made anew at each access. With many texts take them one by one from `map`."""
        return resize_and_normalize(self.raw_maps, self.size)
