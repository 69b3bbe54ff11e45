"""
Explainers: methods that compute which pixels of an image match a text, for ICLIP and any CLIP-like model.

`explain` returns maps at the size of the images. The engine, which it uses, also returns raw maps of a prepared batch:

```python
>>> from iclip_hf import load
>>> from iclip_hf.explainers import make_explainer
>>> from iclip_hf.model.engine import Engine

>>> model = load("embedded")
>>> engine = Engine(model, model.processor, make_explainer(model, method="gem"))
>>> pixel_values = model.processor(images=[image])["pixel_values"]
>>> maps, _ = engine.raw_maps(pixel_values, engine.encode(["dog", "ball"]))  # (B, T, h, w)
```

docs/methods.md lists the methods, and what they do with models that have no class token.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from inspect import signature
from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names
from ..utils.tables import known, unknown


if TYPE_CHECKING:
    from .explainer import Explainer

# Explanation methods by name: label in the demo, and module and class in this package. The classes are not imported,
# because the help of a command lists the names without torch.
METHODS = {
    "itsm": ("Similarity map (ITSM)", "itsm:ITSM"),
    "competing_itsm": ("Similarity map among other nouns", "competing_itsm:CompetingITSM"),
    "reversed_itsm": ("Reversed similarity map", "itsm:ReversedITSM"),
    "attention": ("Attention, the same for every text", "attention:Attention"),
    "attention_affinity": ("Attention spread by affinity, the same for every text", "attention:AttentionAffinity"),
    "grad_cam": ("Grad-CAM", "grad_cam:GradCAM"),
    "grad_eclip": ("Grad-ECLIP", "grad_eclip:GradECLIP"),
    "legrad": ("LeGrad", "legrad:LeGrad"),
    "bi_modal": ("Bi-modal relevance", "bi_modal:BiModal"),
    "clip_surgery": ("CLIP Surgery", "clip_surgery:CLIPSurgery"),
    "gem": ("GEM", "gem:GEM"),
    "maskclip": ("MaskCLIP", "last_block:MaskCLIP"),
    "sclip": ("SCLIP", "last_block:SCLIP"),
    "clearclip": ("ClearCLIP", "last_block:ClearCLIP"),
    "naclip": ("NACLIP", "last_block:NACLIP"),
    "proxyclip": ("ProxyCLIP", "proxyclip:ProxyCLIP"),
    "sc_clip": ("SC-CLIP", "sc_clip:SCCLIP"),
    "resclip": ("ResCLIP", "resclip:ResCLIP"),
    "random": ("Random, independent of image and text", "random_map:RandomMap"),
}
# The group of entry points by which other packages add methods. An entry point names a method, a module and a class.
METHOD_GROUP = "iclip_hf.explainers"

_MODULES = {"Explainer": ".explainer"}
__all__ = ["METHODS", "check_method", "explainer_class", "make_explainer", "register_explainer", *_MODULES]
__getattr__, __dir__ = lazy_names(__name__, _MODULES)

_registered: dict[str, type[Explainer]] = {}


def register_explainer(name: str) -> Callable[[type[Explainer]], type[Explainer]]:
    """
    Class decorator that registers a method by a name, in this process. A package adds a method to the command line by
    an entry point in the group `iclip_hf.explainers`, such as `name = "package.module:Class"`.

    A method has the model as `self.model`, an [`ExplainableModel`], and gets T texts for each of B images.

    Examples:

    A method that compares the patches `(B, h, w, P)` with the texts `(B, T, P)`. Both are unit vectors. `sharpness` is
    an option, as in `explain(model, images, texts, "sharp", sharpness=20)`.

    ```python
    >>> import torch
    >>> from iclip_hf.explainers import Explainer, register_explainer

    >>> @register_explainer("sharp")
    ... class SharpSimilarity(Explainer):
    ...     needs_layers = False  # ONNX models can use it too
    ...
    ...     def __init__(self, model, sharpness: float = 10.0):
    ...         super().__init__(model)
    ...         self.sharpness = sharpness
    ...
    ...     @torch.no_grad()
    ...     def forward(self, pixel_values, texts, features):  # see `Explainer.forward`
    ...         cosines = torch.einsum("bhwp,btp->bthw", features.patch_embeds, texts.map_text_embeds)
    ...         return (self.sharpness * cosines).exp(), features
    ```

    A method that reads the last attention layer. The [`~recording.AttentionRecord`] of a layer has the tokens that
    enter its block, `stream` `(B, L, D)`, and the `query`, `key` and `value` of its heads, `(B, heads, L, D / heads)`.
    The patches are the last h * w tokens. For a ResNet, which has no blocks, `self_attentions` raises an error.

    ```python
    >>> import math

    >>> @register_explainer("norm")
    ... class TokenNorm(Explainer):
    ...     sees_text = False  # all texts have one map
    ...
    ...     def __init__(self, model):
    ...         super().__init__(model)
    ...         (self.last_index,) = self.model.self_attentions("norm", 1)
    ...
    ...     @torch.no_grad()
    ...     def forward(self, pixel_values, texts):
    ...         features, (record, *_) = self.model.trace(pixel_values, self.last_index)
    ...         maps = record.stream[:, -math.prod(features.grid) :].norm(dim=-1).unflatten(1, features.grid)
    ...         return maps[:, None].expand(-1, texts.text_embeds.shape[1], -1, -1), features
    ```
    """

    def register(explainer: type[Explainer]) -> type[Explainer]:
        _registered[name] = explainer
        return explainer

    return register


def check_method(method: str) -> str:
    """Returns the name of a method. Raises `ValueError` if it is unknown."""
    added = {*_registered, *entry_points(group=METHOD_GROUP).names} - {*METHODS}
    return known(method, [*METHODS, *sorted(added)], "method")


def explainer_class(method: str) -> type[Explainer]:
    """Returns the class of a method. Raises `ValueError` if it is unknown."""
    method = check_method(method)
    if method in _registered:
        return _registered[method]
    if method in METHODS:
        return pkgutil.resolve_name(f"{__package__}.{METHODS[method][1]}")
    return entry_points(group=METHOD_GROUP)[method].load()


def make_explainer(model, method: str | None = None, keywords: Iterable[str] = (), **method_options) -> Explainer:
    """
    Prepares a method for a model.

    Args:
        model ([`ExplainableModel`]): or anything that [`load`] takes.
        method (`str`, *optional*): a name in `METHODS`, or of a registered method, see [`register_explainer`]. The
            default is the method that shows where a text is for this model: its own map (`itsm`) for ICLIP and models
            that pool by a mean, `maskclip` for TIPSv2 and ResNets, and `naclip` for others, such as CLIP and SigLIP,
            whose own maps often mark everything but the object.
        keywords: names of the caller's own arguments, so that an error can suggest them.
        method_options: options of the method, see its class.
    """
    if method is None:
        from ..backends.loading import load  # imports torch

        model = load(model)
        method = model.default_method
    method = check_method(method)
    method_class = explainer_class(method)
    parameters = signature(method_class).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not takes_any and (wrong := sorted(method_options.keys() - parameters.keys())):
        options = [*keywords, *(name for name in parameters if name != "model")]
        raise TypeError(unknown(wrong[0], options, "option"))
    explainer = method_class(model, **method_options)
    explainer.name = method
    return explainer
