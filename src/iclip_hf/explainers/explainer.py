"""The signature that every method implements, and what an explained image is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..modeling_iclip import ICLIPTextFeatures
from ..similarity import min_max_normalize, resize_maps
from .families import adapt


class Explainer(ABC):
    """
    One method on one model: texts are encoded once and go with any number of images.

    The given model is never changed.

    Attributes:
        processor (`ICLIPProcessor`): `processor(images=images)["pixel_values"]` prepares whole images for this model.
    """

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
        return min_max_normalize(resize_maps(self.raw_maps[index], self.size))

    @property
    def maps(self) -> torch.Tensor:
        """All maps, `(T, H, W)`; made anew at each access. With many texts take them one by one from `map`."""
        return torch.stack([self.map(index) for index in range(len(self.labels))])
