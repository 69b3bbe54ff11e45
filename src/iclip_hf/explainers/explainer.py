"""The interface of every method, and how a method is found by its name."""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.metadata import entry_points

import torch

from ..explanation_core import for_images, raw_maps
from ..modeling_iclip import ICLIPImageFeatures, ICLIPTextFeatures, cosines
from ..models.explainable import recordable
from ..models.loading import load
from . import METHOD_GROUP, METHODS


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


_registered: dict[str, type[Explainer]] = {}


def register_explainer(name: str) -> Callable[[type[Explainer]], type[Explainer]]:
    """
    Class decorator that makes a method known by a name, in this process. A package adds a method to the command line too by an
    entry point of the group `iclip_hf.explainers`, such as `name = "package.module:Class"`.

    Example:

    ```python
    >>> @register_explainer("norm")
    ... class TokenNorm(Explainer):
    ...     def forward(self, pixel_values, texts):
    ...         image, (layer,) = self.model.trace(pixel_values)
    ...         maps = layer.stream[:, -math.prod(image.grid) :].norm(dim=-1).unflatten(1, image.grid)
    ...         return maps[:, None].expand(-1, texts.text_embeds.shape[1], -1, -1), image
    ```
    """

    def register(explainer: type[Explainer]) -> type[Explainer]:
        _registered[name] = explainer
        return explainer

    return register


def explainer_class(method: str) -> type[Explainer]:
    """Returns the class of a method. Raises `ValueError` if it is unknown."""
    if method in _registered:
        return _registered[method]
    if method in METHODS:
        return pkgutil.resolve_name(f"{__package__}.{METHODS[method][1]}")
    added = entry_points(group=METHOD_GROUP)
    if method not in added.names:
        known = sorted({*METHODS, *_registered, *added.names})
        raise ValueError(f"There is no method {method!r}, only {known}.")
    return added[method].load()


def make_explainer(model, method: str = "itsm", **method_options) -> Explainer:
    """
    Prepares a method for a model.

    Args:
        model ([`ExplainableModel`]): or anything that [`load`] takes.
        method (`str`): a name of `METHODS`, or of a registered method, see [`register_explainer`].
        method_options: of the method, see its class.

    Raises:
        `ValueError`: the method is unknown, or the model does not support it.
        `TypeError`: an option is unknown, or the model is of another kind.
    """
    return explainer_class(method)(model, **method_options)


def select_texts(texts: ICLIPTextFeatures, rows: torch.Tensor) -> ICLIPTextFeatures:
    """Selects rows of encoded texts `(T, P)`. Rows of shape `(B, S)` give S texts for each of B images, `(B, S, P)`."""
    return ICLIPTextFeatures(text_embeds=texts.text_embeds[rows], map_text_embeds=texts.map_text_embeds[rows])
