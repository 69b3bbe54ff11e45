"""The loss of a batch of images with their captions and nouns, and what it reads of the images."""

from collections.abc import Callable
from itertools import repeat
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .losses import BatchNouns, BranchBatch, branch_loss, direction_loss
from .outputs import ICLIPOutput
from .similarity import cosines


class ImageInputs(NamedTuple):
    """What the loss reads of B images. With a locked tower it can be computed once and kept."""

    # (B, D), or (B, (1 + L) D) with `recognition_pooling="class_and_average"` and L `average_layers`: averages of the
    # layers before the last, class token, average of the last. With a feature tower, (..., K) more: its averages.
    recognition: torch.Tensor
    pooled: torch.Tensor | None  # of the map branch, (B, D); None with `max_over="similarity"`
    # Tokens (B, K, D) and attention in [0, 1] (B, K), float32, of the `representative_patches`. Both are averaged over
    # similar patches, and the tokens are centered before. None with `max_over="channels"`.
    patches: torch.Tensor | None = None
    map_attention: torch.Tensor | None = None
    even_patches: torch.Tensor | None = None  # as `patches`, (B, 64, D); None without `known_competition`


def pair_loss(
    model: nn.Module, image: ImageInputs, text_inputs: torch.Tensor, nouns: BatchNouns | None
) -> ICLIPOutput:
    """Returns the losses of images with their captions, the first of the texts, and with nouns (Eq. 13)."""
    if nouns is None and len(text_inputs) != len(image.recognition):  # more texts would be left out in silence
        raise ValueError(
            f"The loss needs a caption for each of {len(image.recognition)} images, not {len(text_inputs)}."
        )
    count = len(image.recognition)
    images, texts = model.recognition.embed_image(image.recognition), model.recognition.embed_text(text_inputs)
    map_texts, even_patches = texts, None
    if branch := model.interpretability:
        map_images = branch.embed_image(image.patches if image.pooled is None else image.pooled)
        map_texts = branch.embed_text(text_inputs)
        if nouns is not None and image.even_patches is not None:
            even_patches = branch.embed_image(image.even_patches[nouns.spread_evenly])
    # In half precision, scaled cosines would be rounded to multiples of 1/16.
    with torch.autocast(images.device.type, enabled=False):
        prompts = None if nouns is None else nouns.prompts(texts[count:])
        batch = BranchBatch(model.recognition, model.config, images, texts[:count], None, nouns, prompts)
        losses, attention_loss = [branch_loss("recognition", batch)], 0
        if branch:  # which can be on another device
            prompts = None if nouns is None else nouns.prompts(map_texts[count:])
            batch = BranchBatch(branch, model.config, map_images, map_texts[:count], image.map_attention)
            if model.config.max_over == "similarity":  # no other map learns from nouns
                batch.nouns, batch.prompts, batch.even_patches = nouns, prompts, even_patches
            losses.append(branch_loss("map", batch).to(images.device))
        if model.config.map_attention == "signed":
            attention_loss = _attention_loss(model, prompts, nouns).to(images.device)
        losses = torch.stack(losses)
        # No loss reads the product with all prompts.
        logits_per_image = None if model.training else model.recognition(cosines(images, texts))
    return ICLIPOutput(
        loss=losses.mean() + attention_loss,
        branch_losses=losses.detach().unbind(),
        logits_per_image=logits_per_image,
        logits_per_text=None if model.training else logits_per_image.mT,
        image_embeds=images,
        text_embeds=texts,
    )


def _attention_loss(model: nn.Module, prompts: torch.Tensor | None, nouns: BatchNouns | None) -> torch.Tensor:
    """
    Returns the loss of the weights of the attention, for unit vectors of a prompt of each noun, from which they
    learn.
    """
    if nouns is None:
        return 0 * model.attention_direction.sum()  # DDP waits for its gradient
    return direction_loss(model.attention_weights(prompts.detach()), nouns.is_background)


def in_chunks(encode: Callable[..., tuple], size: int | None, *inputs: torch.Tensor | None) -> tuple:
    """
    Encodes a batch in chunks of a size, whose activations are computed again in the backward pass, and joins the parts
    of each result. Inputs and results can be None.
    """
    if size is None or len(inputs[0]) <= size:
        return encode(*inputs)
    chunks = zip(*(repeat(None) if tensor is None else tensor.split(size) for tensor in inputs))
    parts = zip(*(checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks))
    return tuple(None if part[0] is None else torch.cat(part) for part in parts)
