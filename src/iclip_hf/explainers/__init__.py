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


if TYPE_CHECKING:
    from .explainer import Explainer, explainer_class, make_explainer, register_explainer, select_texts
    from .words import WORD_METHODS, WordExplainer, WordScore

# Explanation methods: for each its label in the demo, and the module and class here. No torch, because the help of a command lists them.
METHODS = {
    "itsm": ("Similarity map (ITSM)", "itsm:ITSM"),
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
    "random": ("Random, independent of image and text", "random_map:RandomMap"),
}
# The group of entry points by which other packages add methods: a name, and module and class.
METHOD_GROUP = "iclip_hf.explainers"

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
