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

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names
from .methods import METHODS


if TYPE_CHECKING:
    from .explainer import Explainer, explainer_class, make_explainer, register_explainer, select_texts
    from .words import WORD_METHODS, WordExplainer, WordScore

_MODULES = {
    "Explainer": ".explainer",
    "WORD_METHODS": ".words",
    "WordExplainer": ".words",
    "WordScore": ".words",
    "explainer_class": ".explainer",
    "make_explainer": ".explainer",
    "register_explainer": ".explainer",
    "select_texts": ".explainer",
}
__all__ = ["METHODS", *_MODULES]
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
