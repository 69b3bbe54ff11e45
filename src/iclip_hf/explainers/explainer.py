"""The interface of every method."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ..backends.explainable import recordable
from ..backends.loading import load
from ..model.modeling_iclip import ICLIPImageFeatures, ICLIPTextFeatures


class Explainer(ABC):
    """
    A method for one model.

    Args:
        model ([`ExplainableModel`]): or anything that [`load`] takes.

    Attributes:
        model ([`ExplainableModel`]): encodes texts and prepares images.
        reversed (`bool`): whether the method's maps are 1 - M (Eq. 5), where M is computed from the raw maps.
        is_own_map (`bool`): whether the maps are those of `model.similarity_maps`, which encoded images are enough for.
        sees_text (`bool`): whether maps depend on the text. If `False`, all texts of an image have the same map.
        backward_per_text (`bool`): whether each text needs a backward pass. If `False`, further texts cost little.
        needs_layers (`bool`): whether the method records the layers of the image tower. `model` is then a [`RecordableModel`].

    Raises:
        `TypeError`: the model is of another kind. `ValueError`: the model does not support the method.
    """

    reversed = False
    is_own_map = False
    sees_text = True
    backward_per_text = False
    needs_layers = True

    def __init__(self, model):
        self.model = load(model)
        if self.needs_layers:
            recordable(self.model, "this method")

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
