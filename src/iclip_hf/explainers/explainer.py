"""The interface of every method."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ..backends.explainable import recordable
from ..backends.loading import load
from ..model.explanation_core import for_images, raw_maps
from ..model.modeling_iclip import ICLIPImageFeatures, ICLIPTextFeatures, cosines


class Explainer(ABC):
    """
    A method for one model.

    Args:
        model ([`ExplainableModel`]): or anything that [`load`] takes.

    Attributes:
        model ([`ExplainableModel`]): encodes texts and prepares images.
        reversed (`bool`): whether the method's maps are 1 - M (Eq. 5), where M is computed from the raw maps.
        sees_text (`bool`): whether maps depend on the text. If `False`, all texts of an image have the same map.
        backward_per_text (`bool`): whether each text needs a backward pass. If `False`, further texts cost little.
        needs_layers (`bool`): whether the method records the layers of the image tower. `model` is then a [`RecordableModel`].

    Raises:
        `TypeError`: the model is of another kind. `ValueError`: the model does not support the method.
    """

    reversed = False
    sees_text = True
    backward_per_text = False
    needs_layers = True

    def __init__(self, model):
        self.model = load(model)
        if self.needs_layers:
            recordable(self.model, "this method")

    @property
    def content(self) -> dict[str, str]:
        """Digests of what options name, such as the folder of another model, by option. Results are known by them, not by the names."""
        return {}

    def encode_images(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures | None:
        """Encodes `(B, 3, H, W)` for any number of calls of `forward`. Returns None if the method runs the image tower in each call."""
        return None

    @abstractmethod
    def forward(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        """
        Computes the raw maps of a batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): prepared by `processor`.
            texts ([`ICLIPTextFeatures`]): T texts for each image, with embeddings of shape `(B, T, P)`.

        Returns:
            `tuple`: raw maps `(B, T, h, w)`, and the features of the images, without a graph.
        """

    def raw_maps(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Computes raw maps `(B, T, h, w)` and scores `(B, T)`, the cosines of images and texts, both float32, for texts of `encode_texts`,
        `(T, P)`, or other texts for each image, `(B, T, P)`. Raises `ValueError` if `forward` returns another number of maps.
        """
        texts = for_images(texts, len(pixel_values))
        maps, image = raw_maps(self, pixel_values, texts)
        return maps, cosines(image.image_embeds, texts.text_embeds)


def select_texts(texts: ICLIPTextFeatures, rows: torch.Tensor) -> ICLIPTextFeatures:
    """Selects rows of encoded texts `(T, P)`. Rows of shape `(B, S)` give S texts for each of B images, `(B, S, P)`."""
    return ICLIPTextFeatures(text_embeds=texts.text_embeds[rows], map_text_embeds=texts.map_text_embeds[rows])
