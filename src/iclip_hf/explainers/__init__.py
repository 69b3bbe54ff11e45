"""
Explainers: methods that compute which pixels of an image match a text, for ICLIP and any CLIP-like model.

`explain` and `Localizer` return maps at the size of the images. A method itself computes raw maps of a prepared batch:

```python
>>> model = load("embedded")
>>> texts = model.encode_texts(["dog", "ball"])
>>> pixel_values = model.processor(images=[image])["pixel_values"]
>>> explainer = make_explainer(model, method="itsm")
>>> maps, scores = explainer.raw_maps(pixel_values, texts)  # (B, T, h, w), (B, T)
```

docs/methods.md lists the methods, and what they do with models that have no class token.
"""

from __future__ import annotations

import inspect

import torch

from ..modeling_iclip import ICLIPTextFeatures
from ..utils.names import METHODS
from .explainer import Explainer, explainer_class, register_explainer
from .words import WORD_METHODS, WordExplainer, WordScore


def make_explainer(model, method: str = "itsm", **method_options) -> Explainer:
    """
    Prepares a method for a model.

    Args:
        model ([`ExplainableModel`]): or anything that [`load`] takes.
        method (`str`): a name of `METHODS`, or of a registered method, see [`register_explainer`].
        method_options: of the method, see its class.

    Raises:
        `ValueError`: the method or an option is unknown, or the model does not support the method.
        `TypeError`: the model is of another kind.
    """
    explainer = explainer_class(method)
    allowed = list(inspect.signature(explainer).parameters)[1:]
    unknown = sorted(set(method_options) - set(allowed))
    if unknown:
        raise ValueError(f"{method} has the options {allowed}, not {unknown}.")
    return explainer(model, **method_options)


def select_texts(texts: ICLIPTextFeatures, rows: torch.Tensor) -> ICLIPTextFeatures:
    """Selects rows of encoded texts `(T, P)`. Rows of shape `(B, S)` give S texts for each of B images, `(B, S, P)`."""
    return ICLIPTextFeatures(text_embeds=texts.text_embeds[rows], map_text_embeds=texts.map_text_embeds[rows])


__all__ = [
    "METHODS",
    "WORD_METHODS",
    "Explainer",
    "WordExplainer",
    "WordScore",
    "explainer_class",
    "make_explainer",
    "register_explainer",
    "select_texts",
]
