"""Checks of the arguments of `ICLIPModel.forward`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:  # as in `losses.py`
    from .configuration_iclip import ICLIPConfig


def check_arguments(
    config: ICLIPConfig,
    images: dict,
    texts: dict,
    nouns: dict,
    return_loss: bool | None,
    output_similarity_maps: bool,
) -> None:
    """Checks arguments of `forward`, by their names. Raises `ValueError` as it says."""
    usable = ("image_inputs", "text_inputs") if return_loss else ("text_features",)
    names = [[name for name, value in of_kind.items() if value is not None] for of_kind in (images, texts)]
    if two := next((of_kind for of_kind in names if len(of_kind) > 1), None):
        raise ValueError(f"{' and '.join(two)} were given: leave out one of them.")
    if any(of_kind == [] or of_kind[0] not in ("pixel_values", "input_ids", *usable) for of_kind in names):
        raise ValueError(
            "The model compares images with texts: give pixel_values and input_ids, or call get_image_features or "
            "get_text_features."
        )
    if (ids := texts["input_ids"]) is not None and ids.is_floating_point():
        raise ValueError(f"input_ids: token ids are integers, not {ids.dtype}.")
    if not return_loss:
        return
    if ids is not None and ids.ndim != 2:  # some towers would flatten them, and take the first B for the captions
        raise ValueError(
            f"input_ids: the loss takes the texts of all images in one list, (M, L), not {tuple(ids.shape)}."
        )
    if output_similarity_maps:
        raise ValueError("The loss reads few patches of an image: ask for maps without return_loss.")
    inputs = images["image_inputs"]
    read = ["pooled" if config.max_over == "channels" else "patches"]
    read += ["even_patches"] * (config.known_competition > 0)
    if inputs and (lacking := next((name for name in read if getattr(inputs, name) is None), None)):
        raise ValueError(f"image_inputs: the loss of this model reads their {lacking}; compute them by this model.")
    count = len(images["pixel_values"] if inputs is None else inputs.recognition)
    num_texts = next(len(value) for value in texts.values() if value is not None)
    absent = [name for name, value in nouns.items() if value is None]
    if num_texts < count or (num_texts > count and len(absent) == len(nouns)):
        raise ValueError(
            f"The contrastive loss needs a caption for each image: {num_texts} texts are not those of {count} "
            f"images; more texts are noun prompts, with {', '.join(nouns)}."
        )
    if 0 < len(absent) < len(nouns):
        raise ValueError(f"{', '.join(nouns)} belong together, and {', '.join(absent)} is missing: give it too.")
    if not absent:
        _check_nouns(**nouns, captions=count, prompts=num_texts - count)


def _check_nouns(
    noun_ids: torch.Tensor,
    noun_labels: torch.Tensor,
    is_background: torch.Tensor,
    place: torch.Tensor,
    captions: int,
    prompts: int,
) -> None:
    """Checks the nouns of so many captions and noun prompts. Raises `ValueError` as `forward` says."""
    given = {"noun_ids": noun_ids, "noun_labels": noun_labels, "is_background": is_background, "place": place}
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name}: expected a tensor, got a {type(value).__name__}.")
    if len(noun_ids) != prompts:
        raise ValueError(
            f"There are {captions + prompts} texts for {captions} images with a caption each and {len(noun_ids)} noun "
            "prompts."
        )
    if not prompts:
        raise ValueError("noun_ids: there are no noun prompts; leave the arguments of nouns out.")
    if not noun_labels.dtype.is_signed:
        raise ValueError(f"noun_labels: {noun_labels.dtype} cannot hold -1, an absent noun; give them as int8.")
    shapes, expected = (
        (noun_labels.shape[:-1], is_background.shape, place.shape),
        ((captions,), (prompts,), (prompts,)),
    )
    if shapes != expected:
        raise ValueError(
            f"noun_labels has a row for each of {captions} images, and is_background and place a value for each of "
            f"{prompts} noun prompts, not the shapes {', '.join(map(str, map(tuple, shapes)))}."
        )
    if noun_ids.min() < 0 or noun_ids.max() >= noun_labels.shape[-1]:
        raise ValueError(f"noun_ids: they are columns of noun_labels, from 0 to {noun_labels.shape[-1] - 1}.")
    for name in ("noun_labels", "place"):
        if (given[name] != given[name].sign()).any():  # NaN neither
            raise ValueError(f"{name}: expected 1, 0 or -1, as `forward` describes, got other numbers.")
