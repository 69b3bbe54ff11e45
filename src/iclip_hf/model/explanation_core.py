"""
The one road from a model, images and texts to raw maps, scores and presence.

A model here is an [`ICLIPModel`], or any object with its methods `get_image_features`, `get_text_features`, `similarity_maps` and its
`matches_patches`, such as an [`ExplainableModel`]. A method is any object with `forward(pixel_values, texts)`, such as an [`Explainer`].
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from PIL import Image

from .modeling_iclip import ICLIPImageFeatures, ICLIPTextFeatures, cosines
from .presence import presence
from .prompts import check_templates
from .reference_nouns import REFERENCE_NOUNS
from .refinement import refine_maps
from .similarity import check_finite


logger = logging.getLogger(__name__)

# Number of prompts in one forward pass. All prompts of 80 classes in 80 templates would take gigabytes.
TEXT_BATCH = 256
# Numbers of each weight tensor that tell whether it was changed without its version, as by `weight.data`.
_SAMPLES = 256


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
    step, parts = max(1, TEXT_BATCH // len(templates)), []
    for start in range(0, len(labels), step):
        prompts = processor(labels=labels[start : start + step], templates=templates)
        mask = prompts.get("attention_mask")
        if mask is not None and mask.shape[1] == processor.max_text_length and mask[:, -1].any():
            logger.warning("A text has %d tokens or more; the others are cut off.", processor.max_text_length)
        with torch.no_grad():
            parts.append(model.get_text_features(**prompts.to(device)))
    return join_texts(parts)


def join_texts(parts: Sequence[ICLIPTextFeatures]) -> ICLIPTextFeatures:
    """Joins texts that were encoded in parts, `(..., T, P)` each."""
    names = ("text_embeds", "map_text_embeds")
    return ICLIPTextFeatures(**{name: torch.cat([part[name] for part in parts], -2) for name in names})


# For each model, by templates and tokenizer: what the features were computed from, and the features.
_references: WeakKeyDictionary = WeakKeyDictionary()


def reference_features(
    model, tokenizer, templates: Sequence[str], encode: Callable[[Sequence[str]], ICLIPTextFeatures], owner=None
) -> ICLIPTextFeatures:
    """
    Returns the features `(K, P)` of [`REFERENCE_NOUNS`] by `encode`, which is called again only when weights, tokenizer or templates are
    others than before.

    Args:
        model: encodes the texts.
        tokenizer, templates: of the texts.
        encode: function from labels to their features by this model, with these templates.
        owner (*optional*): the model that the features live as long as, if `model` is a copy that shares its weights.
    """
    known = _references.setdefault(model if owner is None else owner, {})
    asked, state = (*templates, tokenizer), _state(model)
    if asked not in known or known[asked][0] != state:
        known[asked] = state, encode(REFERENCE_NOUNS)
    return known[asked][1]


@torch.no_grad()
def _state(model) -> tuple:
    """
    Returns what changes with the weights that texts are encoded by: where they lie, how often they were changed, and a sum over a
    sample of each, because changes through `weight.data` are not counted. A digest of all weights takes 50 times as long.
    """
    if not isinstance(model, torch.nn.Module):
        return ()  # ONNX, whose weights do not change
    weights = list(model.parameters(recurse=False))
    for name, part in model.named_children():
        if not name.startswith("vis"):  # the image tower
            weights += [*part.parameters(), *part.buffers()]
    plain = [weight for weight in weights if type(weight) in (torch.Tensor, torch.nn.Parameter) and not weight.is_meta]
    places = [weight.data_ptr() for weight in plain] + [id(weight) for weight in weights if weight.is_meta]
    versions = [None if weight.is_inference() else weight._version for weight in weights]
    samples = [weight.reshape(-1)[:: weight.numel() // _SAMPLES + 1].float().cpu() for weight in plain]
    total = torch.cat(samples).double().sum().item() if samples else 0.0
    return places, versions, total, getattr(getattr(model, "config", None), "text_pooling", None)
