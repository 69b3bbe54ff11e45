"""Batches of prepared images, and functions that join, repeat and select images and encoded texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from .outputs import ICLIPImageFeatures, ICLIPTextFeatures


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageBatch:
    """
    B prepared images of one shape, and their features if they are encoded.

    Attributes:
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): input for the maps.
        score_pixel_values (`torch.Tensor` of shape `(B, 3, H', W')`, *optional*): input for the scores, if the model's
            own image size differs from the size for the maps.
        score_features (`list[ICLIPImageFeatures]`, *optional*): features of each view of the images, for the scores.
            The views are the whole images at the model's own size and, at two scales, windows.
        features (`list[ICLIPImageFeatures]`, *optional*): features of each view of `pixel_values`, for the maps.
            [`Engine`] sets them.
    """

    pixel_values: torch.Tensor
    score_pixel_values: torch.Tensor | None = None
    score_features: list[ICLIPImageFeatures] | None = None
    features: list[ICLIPImageFeatures] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedImage(ImageBatch):
    """
    An image for [`Engine.run`], from [`Engine.prepare`]: a batch of one.

    Attributes:
        size (`tuple[int, int]`): height and width of the maps in pixels.
        text_indices (`Sequence[int]`, *optional*): indices of the texts to map; all if not given.
        image (`PIL.Image.Image`, *optional*): the image that the explanation keeps.
    """

    size: tuple[int, int]
    text_indices: Sequence[int] | None = None
    image: Image.Image | None = None

    @property
    def batch_key(self) -> tuple:
        """A key that is equal for images that can share a forward pass."""
        pixels = (self.pixel_values, self.score_pixel_values)
        shapes = [None if values is None else values.shape for values in pixels]
        return *shapes, self.text_indices is None, self.score_features is None, self.features is None


def for_images(texts: ICLIPTextFeatures, num_images: int) -> ICLIPTextFeatures:
    """Repeats encoded texts `(T, P)` for B images. Texts of each image, `(B, T, P)`, are returned unchanged."""
    if texts.text_embeds.ndim == 3:
        return texts
    return map_tensors(lambda values: values.expand(num_images, *values.shape), texts)


def join_texts(parts: Sequence[ICLIPTextFeatures]) -> ICLIPTextFeatures:
    """Joins texts that were encoded in parts, `(..., T, P)` each."""
    dim = parts[0].text_embeds.ndim - 2
    return map_tensors(lambda *values: torch.cat(values, dim), *parts)


def select_texts(texts: ICLIPTextFeatures, indices: torch.Tensor) -> ICLIPTextFeatures:
    """
    Selects S texts for each of B images, `(B, S, P)`, by their indices `(B, S)` among T encoded texts `(T, P)`, or
    among the T texts of each image `(B, T, P)`.
    """
    index = indices if texts.text_embeds.ndim == 2 else (torch.arange(len(indices))[:, None], indices)
    return map_tensors(lambda values: values[index], texts)


def join_images(images: Sequence[PreparedImage]) -> ImageBatch:
    """Joins images with equal `batch_key`."""
    if len(images) == 1:
        return images[0]
    joined = {}
    for field in fields(ImageBatch):
        parts = [getattr(image, field.name) for image in images]
        joined[field.name] = map_tensors(lambda *values: torch.cat(values), *parts)
    return ImageBatch(**joined)


def map_tensors(function: Callable[..., torch.Tensor], *parts):
    """
    Applies a function to tensors, or to the tensors inside lists and features, item by item. Features keep only the
    tensors that scores and maps are computed from. None stays None.
    """
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return function(*parts)
    if isinstance(first, list):
        return [map_tensors(function, *items) for items in zip(*parts)]
    # The class of `first` can be another one, from the code of a model folder.
    features_class = ICLIPImageFeatures if "image_embeds" in first else ICLIPTextFeatures
    names = [name for name in features_class.compared_fields if name in first]
    return features_class(**{name: function(*(part[name] for part in parts)) for name in names})


def pad_indices(text_indices: Sequence[Sequence[int]]) -> torch.Tensor:
    """
    Returns the indices of the texts of each image as a tensor `(B, S)`. If an image has fewer than S texts, its
    indices are padded with 0.
    """
    return pad_sequence([torch.tensor(list(indices) or [0]) for indices in text_indices], batch_first=True)


def map_groups(
    function: Callable[[list[Any]], Iterable[Any]], items: Sequence[Any], keys: Iterable[Hashable]
) -> list[Any]:
    """
    Groups items by their keys, such as images by their shapes, and calls `function` with each group. The function
    returns a result for each item. Returns the results in the order of the items.
    """
    indices_by_key = defaultdict(list)
    for index, key in enumerate(keys):
        indices_by_key[key].append(index)
    results = {}
    for indices in indices_by_key.values():
        group = [items[index] for index in indices]
        results.update(zip(indices, function(group), strict=True))
    return [results[index] for index in range(len(items))]
