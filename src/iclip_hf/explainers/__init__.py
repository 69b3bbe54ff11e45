"""
Explainers: methods that compute which pixels of an image match a text, for ICLIP and any CLIP-like model.

`explain` and `Localizer` return maps at the size of the images. A method itself computes raw maps of a prepared batch:

```python
>>> explainer = make_explainer(model, processor, method="itsm")
>>> texts = explainer.encode_texts(["dog", "ball"])
>>> maps, scores = explainer.raw_maps(pixel_values, texts)  # (B, T, h, w), (B, T)
```

Some models have no class token, or a score that does not depend on it alone:

- SigLIP and SigLIP2 have a pooling head, whose query is a learned probe. A ResNet ends with attention pooling, whose query is the
  mean of its feature map. `attention`, `bi_modal` and `grad_eclip` use this query instead of the class token. The pooling is the
  last attention layer of the tower.
- `itsm` projects a patch into the space of the texts as this pooling does with all attention on the patch.
- `clip_surgery`, `gem`, `maskclip`, `sclip`, `clearclip`, `naclip`, `proxyclip` and `legrad` use the self-attention of transformer
  blocks. They raise an error for a ResNet, which has none.
- If the score of an ICLIP model pools patch tokens, `bi_modal` and `grad_eclip` sum over all queries of the last layer.
"""

from __future__ import annotations

import inspect

import torch

from ..modeling_iclip import ICLIPTextFeatures
from .attention import Attention, AttentionAffinity
from .bi_modal import BiModal
from .clearclip import ClearCLIP
from .clip_surgery import CLIPSurgery
from .explainer import Explainer, identity
from .gem import GEM
from .grad_cam import GradCAM
from .grad_eclip import GradECLIP
from .itsm import ITSM, ReversedITSM
from .legrad import LeGrad
from .maskclip import MaskCLIP
from .naclip import NACLIP
from .proxyclip import ProxyCLIP
from .random_map import RandomMap
from .sclip import SCLIP
from .words import WORD_METHODS, WordExplainer, WordScore


METHODS: dict[str, type[Explainer]] = {
    "itsm": ITSM,
    "reversed_itsm": ReversedITSM,
    "attention": Attention,
    "attention_affinity": AttentionAffinity,
    "grad_cam": GradCAM,
    "grad_eclip": GradECLIP,
    "legrad": LeGrad,
    "bi_modal": BiModal,
    "clip_surgery": CLIPSurgery,
    "gem": GEM,
    "maskclip": MaskCLIP,
    "sclip": SCLIP,
    "clearclip": ClearCLIP,
    "naclip": NACLIP,
    "proxyclip": ProxyCLIP,
    "random": RandomMap,
}


def make_explainer(model, processor, method: str = "itsm", **method_options) -> Explainer:
    """
    Prepares a method for a model.

    Args:
        model: [`ICLIPModel`], an [`ONNXModel`], transformers' `CLIPModel`, `MetaClip2Model`, `SiglipModel`, `Siglip2Model` or
            `Tipsv2Model`, or a model of open_clip.
        processor: the model's processor; for open_clip its tokenizer.
        method (`str`): a name of `METHODS`.
        method_options: of the method, see its class.

    Raises:
        `ValueError`: the method or an option is unknown, or the model does not support the method.
        `TypeError`: the model is of another kind.
    """
    if method not in METHODS:
        raise ValueError(f"Expected method to be one of {sorted(METHODS)}, got {method!r}: choose one of them.")
    explainer = METHODS[method]
    allowed = list(inspect.signature(explainer).parameters)[2:]
    unknown = sorted(set(method_options) - set(allowed))
    if unknown:
        raise ValueError(
            f"Expected options of method {method!r}, which are {allowed}, got {unknown}: remove the others."
        )
    return explainer(model, processor, **method_options)


def select_texts(texts: ICLIPTextFeatures, rows: torch.Tensor) -> ICLIPTextFeatures:
    """Selects rows of encoded texts `(T, P)`. Rows of shape `(B, S)` give S texts for each of B images, `(B, S, P)`."""
    return ICLIPTextFeatures(text_embeds=texts.text_embeds[rows], map_text_embeds=texts.map_text_embeds[rows])


__all__ = [
    "METHODS",
    "WORD_METHODS",
    "Explainer",
    "WordExplainer",
    "WordScore",
    "identity",
    "make_explainer",
    "select_texts",
]
