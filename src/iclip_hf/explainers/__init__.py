"""
Explainers: the methods that tell which pixels of an image match a text, for ICLIP and any CLIP-like model.

`explain` is the short form. Who explains many images with the same texts keeps an explainer and the encoded texts:

```python
>>> explainer = make_explainer(model, processor, method="itsm")
>>> texts = explainer.encode_texts(["dog", "ball"])
>>> maps, scores = explainer.raw_maps(pixel_values, texts)  # (B, T, h, w), (B, T)
```

What the methods do where there is no class token to start from:

- SigLIP and SigLIP2 pool by a head whose probe attends over the patches, and a ResNet by the mean of its feature map. This
  query takes the class token's place in `attention` and `bi_modal`; the head is the tower's last attention layer.
- `itsm` needs patches in the space of the texts: each is what the head gives with all attention on it.
- `clip_surgery` and `gem` change the self-attention of a transformer's blocks: a ResNet has none and is refused.
- `bi_modal` is refused for an ICLIP of one branch that pools its patch tokens.
"""

from __future__ import annotations

import inspect
import os
from collections import defaultdict
from collections.abc import Sequence

import torch
from PIL import Image

from ..images import load_image
from ..modeling_iclip import ICLIPTextFeatures
from .adapters import join_texts
from .attention import Attention
from .bi_modal import BiModal
from .clip_surgery import CLIPSurgery
from .explainer import Explainer, Explanation, identity
from .gem import GEM
from .grad_cam import GradCAM
from .itsm import ITSM, ReversedITSM


METHODS: dict[str, type[Explainer]] = {
    "itsm": ITSM,
    "reversed_itsm": ReversedITSM,
    "attention": Attention,
    "grad_cam": GradCAM,
    "bi_modal": BiModal,
    "clip_surgery": CLIPSurgery,
    "gem": GEM,
}


def make_explainer(model, processor, method: str = "itsm", **method_options) -> Explainer:
    """
    Prepares a method for a model.

    Args:
        model: [`ICLIPModel`], or transformers' `CLIPModel`, `SiglipModel` or `Siglip2Model`, an [`ONNXModel`], or a model of open_clip.
        processor: the model's processor; for open_clip its tokenizer.
        method (`str`): a name of `METHODS`.
        method_options: of the method, see its class.

    Raises:
        `ValueError`: for an unknown method or option, or a method that this model cannot do, with the reason.
        `TypeError`: for another kind of model.
    """
    if method not in METHODS:
        raise ValueError(f"Expected method to be one of {sorted(METHODS)}, got {method!r}.")
    explainer = METHODS[method]
    allowed = list(inspect.signature(explainer).parameters)[2:]
    unknown = sorted(set(method_options) - set(allowed))
    if unknown:
        raise ValueError(f"Method {method!r} has the options {allowed}, got {unknown}.")
    return explainer(model, processor, **method_options)


def explain(
    model,
    processor,
    images: Sequence[Image.Image | str | os.PathLike],
    texts: Sequence[str] | Sequence[Sequence[str]],
    method: str = "itsm",
    *,
    templates: Sequence[str] | None = None,
    target_sizes: Sequence[tuple[int, int]] | None = None,
    size: dict[str, int] | None = None,
    batch_size: int = 8,
    **method_options,
) -> list[Explanation]:
    """
    Explains which pixels of each image match which text.

    Args:
        model, processor, method, method_options: as for [`make_explainer`].
        images: B images of any shapes: PIL images, or paths of image files.
        texts: labels shared by all images, or a list of labels for each, of any lengths.
        templates: prompts with one `{}` each that the labels are put into; the processor's if not given. `["{}"]` takes
            the texts as they are.
        target_sizes: `(height, width)` in pixels of each image's maps; the image's own if not given.
        size: the resolution that the model sees, as [`ICLIPProcessor`] takes it; the processor's if not given.
        batch_size (`int`): images that go through the model at once, where they are of one shape there and have equally
            many texts.

    Returns:
        list of B [`Explanation`].

    Raises:
        `ValueError`, `TypeError`: as [`make_explainer`] and [`ICLIPProcessor`]; for lists of different lengths.
    """
    images = [load_image(image) for image in images]
    if not images or isinstance(texts, str) or not len(texts):
        raise ValueError(
            f"Expected at least one image and a list of texts, got {len(images)} images and {texts!r:.100}."
        )
    per_image = all(isinstance(one, (list, tuple)) for one in texts)
    labels = [list(one) for one in texts] if per_image else [list(texts)] * len(images)
    if not all(labels):
        raise ValueError(f"Expected at least one text for each image, got {texts!r:.100}.")
    if not all(isinstance(label, str) for one in labels for label in one):
        raise TypeError(f"Expected texts to be strings, got {texts!r:.100}.")
    sizes = [(image.height, image.width) for image in images] if target_sizes is None else list(target_sizes)
    if len(labels) != len(images) or len(sizes) != len(images):
        raise ValueError(
            f"Expected texts and target sizes for {len(images)} images, got {len(labels)} lists of texts and "
            f"{len(sizes)} sizes."
        )
    explainer = make_explainer(model, processor, method, **method_options)
    unique = list(dict.fromkeys(label for one in labels for label in one))
    encoded = explainer.encode_texts(unique, templates)
    rows = {label: row for row, label in enumerate(unique)}

    options = {} if size is None else {"size": size}
    pixels = [explainer.processor(images=[image], **options)["pixel_values"][0] for image in images]
    groups = defaultdict(list)
    for index, one in enumerate(pixels):
        groups[one.shape, len(labels[index])].append(index)

    explanations: list[Explanation | None] = [None] * len(images)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            own = select_texts(encoded, torch.tensor([[rows[label] for label in labels[index]] for index in batch]))
            maps, scores = explainer.raw_maps(torch.stack([pixels[index] for index in batch]), own)
            for index, raw, score in zip(batch, maps, scores):
                explanations[index] = Explanation(labels[index], score, raw, sizes[index])
    return explanations


def select_texts(texts: ICLIPTextFeatures, rows: torch.Tensor) -> ICLIPTextFeatures:
    """Of encoded texts `(T, P)` those of the given rows, in any shape: `(B, S)` gives S texts for each of B images."""
    return ICLIPTextFeatures(text_embeds=texts.text_embeds[rows], map_text_embeds=texts.map_text_embeds[rows])


__all__ = [
    "METHODS",
    "Explainer",
    "Explanation",
    "explain",
    "identity",
    "join_texts",
    "make_explainer",
    "select_texts",
]
