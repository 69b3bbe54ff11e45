"""The interface of explanation methods."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ..backends.explainable import recordable
from ..backends.loading import load
from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures


class Explainer(ABC):
    """
    Base class of explanation methods. An explainer is a method for one model.

    Args:
        model ([`ExplainableModel`]): or anything that [`load`] takes.

    Attributes:
        name (`str`): name of the method that [`make_explainer`] was given; otherwise the name of the class.
        model ([`ExplainableModel`]): encodes texts and prepares images.
        sees_text (`bool`): whether maps depend on the text. If `False`, all texts of an image have the same map.
        needs_layers (`bool`): whether the method records the layers of the image tower. `model` is then a
            [`RecordableModel`].
        has_holes (`bool`): whether maps may be NaN where the method has no value.
        needs_attention (`bool`): whether the method reads the last attention layer, which a convolutional tower lacks.
    """

    sees_text = True
    needs_layers = True
    has_holes = False
    needs_attention = False

    def __init__(self, model):
        self.name, self.model = type(self).__name__, load(model)
        if self.needs_layers:
            recordable(self.model, self.name)
        if self.needs_attention and not self.model.has_attention:
            raise ValueError(f"{self.name} needs a tower with attention: use itsm, reversed_itsm or grad_cam.")

    @abstractmethod
    def forward(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        """
        Computes the raw maps of a batch. A method may take further arguments by these names:

        - `features` ([`ICLIPImageFeatures`]): features of the images from `model.get_image_features`, which are also
          used for the scores and by other methods.
        - `text_indices` (`torch.Tensor` of shape `(B, S)`): indices of the texts to map, for methods whose cost grows
          with the number of texts, such as methods with a backward pass for each text. Such a method returns only the
          maps of these texts, `(B, S, h, w)`. Other methods map all texts, and the engine selects the maps.
        - `templates` (`list[str]`): templates of the prompts, for methods that encode further texts.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): prepared by `processor`.
            texts ([`ICLIPTextFeatures`]): T texts for each image, with embeddings of shape `(B, T, P)`.

        Returns:
            `tuple`: raw maps `(B, T, h, w)`, and the features of the images.
        """
