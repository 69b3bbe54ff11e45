"""
The one road from a model, images and texts to raw maps, scores and presence.

A model here is an [`ICLIPModel`], or any object with its methods `get_image_features`, `get_text_features`, `similarity_maps` and its
`matches_patches`, such as an [`ExplainableModel`]. A method is any object with `forward(pixel_values, texts)`, such as an [`Explainer`].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image

from .modeling_iclip import ICLIPImageFeatures, ICLIPTextFeatures, cosines
from .presence import presence
from .prompts import check_templates
from .reference_nouns import REFERENCE_NOUNS
from .refinement import refine_maps
from .similarity import check_finite


# Number of prompts in one forward pass. All prompts of 80 classes in 80 templates would take gigabytes.
TEXT_BATCH = 256


class Pixels(NamedTuple):
    """B images of one shape, prepared for a model, see [`prepare`]."""

    pixel_values: torch.Tensor  # (B, 3, H, W), for the maps
    own_size: torch.Tensor | None = None  # (B, 3, H', W'), for scores and presence, if the model's own size is another
    features: ICLIPImageFeatures | None = None  # of `pixel_values`, which are then not encoded again

    @property
    def shape(self) -> tuple:
        """Images of one shape can be joined."""
        return self.pixel_values.shape[1:], None if self.own_size is None else self.own_size.shape[1:]


class Result(NamedTuple):
    """What [`forward`] returns for B images and T texts. Maps, scores and presence are on the CPU."""

    raw_maps: torch.Tensor  # (B, T, h, w), float32
    scores: torch.Tensor  # (B, T), cosines of the recognition branch
    presence: torch.Tensor  # (B, T), see `presence.presence`
    image: ICLIPImageFeatures  # at the model's own size


class SimilarityMap:
    """The model's own map as a method."""

    def __init__(self, model):
        self.model = model

    def forward(
        self, pixel_values: torch.Tensor | ICLIPImageFeatures, texts: ICLIPTextFeatures
    ) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        """Computes raw maps `(B, T, h, w)` and the features of images, which can also be given."""
        is_pixels = isinstance(pixel_values, torch.Tensor)
        image = self.model.get_image_features(pixel_values) if is_pixels else pixel_values
        return self.model.similarity_maps(image, texts), image


def prepare(processor, image: Image.Image, size: int | dict[str, int] | None = None) -> Pixels:
    """
    Prepares an RGB image, with B = 1. `size` is that of the image for the maps, as for [`ICLIPProcessor`]; score and presence always
    come from the processor's own size.
    """
    sizes = [None] if size is None else [size, None]  # None is the processor's
    pixel_values, *own = (processor(images=[image], size=side)["pixel_values"] for side in sizes)
    return Pixels(pixel_values, next((pixels for pixels in own if pixels.shape != pixel_values.shape), None))


def join(parts: Sequence[Pixels]) -> Pixels:
    """Joins images of one shape to a batch. Features are kept only of a single part."""
    if len(parts) == 1:
        return parts[0]
    pixel_values, own_size, _ = zip(*parts)
    return Pixels(torch.cat(pixel_values), None if own_size[0] is None else torch.cat(own_size))


def for_images(texts: ICLIPTextFeatures, images: int) -> ICLIPTextFeatures:
    """Gives T texts `(T, P)` to each of B images, `(B, T, P)`. Texts that have this shape stay as they are."""
    if texts.text_embeds.ndim == 3:
        return texts
    names = ("text_embeds", "map_text_embeds")
    return ICLIPTextFeatures(**{name: texts[name].expand(images, -1, -1) for name in names})


def raw_maps(
    method, pixel_values: torch.Tensor | ICLIPImageFeatures, texts: ICLIPTextFeatures
) -> tuple[torch.Tensor, ICLIPImageFeatures]:
    """
    Computes raw maps `(B, T, h, w)`, float32, of texts `(B, T, P)` by a method, and the features of the images. Raises `ValueError` if
    the method returns another number of maps.
    """
    maps, image = method.forward(pixel_values, texts)
    expected = tuple(texts.text_embeds.shape[:2])
    if maps.ndim != 4 or maps.shape[:2] != expected:
        raise ValueError(
            f"{type(method).__name__} returned maps of shape {tuple(maps.shape)} for {expected[0]} images with {expected[1]} texts "
            f"each, instead of {(*expected, 'h', 'w')}."
        )
    return maps.float(), image


@torch.no_grad()
def forward(
    model, pixels: Pixels, texts: ICLIPTextFeatures, references: ICLIPTextFeatures, method=None, refine: bool = False
) -> Result:
    """
    Explains images of one shape in one forward pass, or in two if they have another size than the model's own.

    Args:
        model: see above.
        pixels ([`Pixels`]): B images.
        texts ([`ICLIPTextFeatures`]): T for all images, `(T, P)`, or for each, `(B, T, P)`.
        references ([`ICLIPTextFeatures`]): the reference nouns in the templates of the texts, `(K, P)`.
        method: computes the maps; the model's own map if not given.
        refine (`bool`): whether to refine the maps by the colours of the images, see [`refine_maps`].

    Raises:
        `ValueError`: the model gives NaN or infinity, or the method another number of maps.
    """
    method = SimilarityMap(model) if method is None else method
    texts = for_images(texts, len(pixels.pixel_values))
    given = pixels.pixel_values if pixels.features is None else pixels.features
    maps, image = raw_maps(method, given, texts)
    if pixels.own_size is not None:
        image = model.get_image_features(pixels.own_size)
    scores, presences = cosines(image.image_embeds, texts.text_embeds), presence(model, image, texts, references)
    check_finite(maps, scores, presences)
    if refine:
        maps = refine_maps(maps, pixels.pixel_values.to(maps.device))
    return Result(maps.cpu(), scores.cpu(), presences.cpu(), image)


def encode_texts(
    model, processor, labels: Sequence[str], templates: str | Sequence[str] | None, device: torch.device | str
) -> ICLIPTextFeatures:
    """
    Encodes T labels, averaged over the templates (the processor's if not given), as unit vectors `text_embeds` and `map_text_embeds`
    of shape `(T, P)`.
    """
    templates = check_templates(processor.templates if templates is None else templates)
    step = max(1, TEXT_BATCH // len(templates))
    with torch.no_grad():
        parts = [
            model.get_text_features(**processor(labels=labels[i : i + step], templates=templates).to(device))
            for i in range(0, len(labels), step)
        ]
    return join_texts(parts)


def join_texts(parts: Sequence[ICLIPTextFeatures]) -> ICLIPTextFeatures:
    """Joins texts that were encoded in parts, `(..., T, P)` each."""
    names = ("text_embeds", "map_text_embeds")
    return ICLIPTextFeatures(**{name: torch.cat([part[name] for part in parts], -2) for name in names})


# Tells whether the features of the reference nouns are those of a model: whatever changes these, such as weights, templates or the
# tokenizer, changes the features of a text of several nouns.
_PROBE = " ".join(REFERENCE_NOUNS[:8])
# Of the models and templates that were asked last: the features of the probe, and those of the reference nouns.
_references: deque[tuple[torch.Tensor, ICLIPTextFeatures]] = deque(maxlen=16)


def reference_features(
    encode: Callable[[Sequence[str]], ICLIPTextFeatures],
    encode_nouns: Callable[[Sequence[str]], ICLIPTextFeatures] | None = None,
) -> ICLIPTextFeatures:
    """
    Returns the features `(K, P)` of [`REFERENCE_NOUNS`], which are encoded again only if the model encodes a probe otherwise than before.

    Args:
        encode: function from labels to their features, by a model and with templates.
        encode_nouns (*optional*): the same for the nouns, such as from a file.
    """
    probe = encode([_PROBE])
    found = torch.cat([probe.text_embeds, probe.map_text_embeds]).float().cpu()
    for known, features in list(_references):  # other threads may add to it
        if known.shape == found.shape and torch.allclose(known, found, rtol=0, atol=1e-5):
            return features
    features = (encode_nouns or encode)(REFERENCE_NOUNS)
    _references.append((found, features))
    return features
