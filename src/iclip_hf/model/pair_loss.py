"""The loss of a batch of images with their captions and nouns."""

from collections.abc import Callable
from itertools import repeat
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .loss_terms import BranchBatch, branch_loss
from .losses import BatchNouns, direction_loss
from .outputs import ICLIPOutput
from .similarity import cosines


class ImageInputs(NamedTuple):
    """Inputs of the loss from B images. With a locked tower they can be computed once and kept."""

    # Pooled tokens of the recognition branch, (B, D). With `recognition_pooling="class_and_average"`, (B, 2 D): class
    # token and average. With a feature tower, the average has Df (`feature_dim`) more numbers. (B, Df) with
    # "feature_average".
    pooled: torch.Tensor
    map_pooled: torch.Tensor | None  # pooled tokens of the map branch, (B, D); None with `max_over="similarity"`
    # Tokens (B, n, D) and attention in [0, 1] (B, n), float32, of the n `representative_patches`. The tokens are
    # centered, then both are averaged over similar patches. None with `max_over="channels"`.
    representative_tokens: torch.Tensor | None = None
    map_attention: torch.Tensor | None = None
    # Tokens (B, 64, D) of the `even_patches`, centered and averaged in the same way. None without `known_competition`.
    even_tokens: torch.Tensor | None = None


def pair_loss(
    model: nn.Module,
    image_inputs: ImageInputs,
    text_inputs: torch.Tensor,
    text_ids: torch.Tensor,
    nouns: BatchNouns | None,
) -> ICLIPOutput:
    """
    Returns the output of [`ICLIPModel.forward`] with the losses of B images, their captions and their nouns (Eq. 13).
    `model` is an [`ICLIPModel`]. The first B texts of `text_inputs` `(M, Dt)` are the captions, the last K are the
    prompts of the classes, and the others are noun prompts. `text_ids` `(M,)` are their [`row_ids`].
    """
    num_images = len(image_inputs.pooled)
    if nouns is None and len(text_inputs) != num_images:  # further texts would be ignored
        raise ValueError(f"The loss of {num_images} images needs one caption for each, not {len(text_inputs)} texts.")
    image_embeds = model.recognition.embed_image(image_inputs.pooled)
    text_embeds, class_prompts = model.recognition.embed_text(text_inputs), None
    if nouns is not None and nouns.num_classes:
        text_embeds, class_prompts = text_embeds[: -nouns.num_classes], text_embeds[-nouns.num_classes :]
    if map_branch := model.interpretability:
        pooled, tokens = image_inputs.map_pooled, image_inputs.representative_tokens
        map_image_embeds = map_branch.embed_image(tokens if pooled is None else pooled)
        map_text_embeds, even_embeds = map_branch.embed_text(text_inputs[: len(text_embeds)]), None
        if nouns is not None and image_inputs.even_tokens is not None:
            even_embeds = map_branch.embed_image(image_inputs.even_tokens[nouns.needs_even_patches])
    # In half precision, scaled cosines would be rounded to multiples of 1/16.
    with torch.autocast(image_embeds.device.type, enabled=False):
        prompts = None if nouns is None else nouns.prompts(text_embeds[num_images:])
        captions = text_embeds[:num_images], text_ids[:num_images]
        batch = BranchBatch(model.recognition, model.config, image_embeds, *captions, nouns=nouns)
        batch.prompts, batch.class_prompts = prompts, class_prompts
        losses, map_prompts = [branch_loss("recognition", batch)], prompts
        if map_branch:
            map_prompts = None if nouns is None else nouns.prompts(map_text_embeds[num_images:])
            captions = map_text_embeds[:num_images], text_ids[:num_images]
            batch = BranchBatch(map_branch, model.config, map_image_embeds, *captions)
            batch.map_attention = image_inputs.map_attention
            if model.config.max_over == "similarity":  # other maps do not learn from nouns
                batch.nouns, batch.prompts, batch.even_embeds = nouns, map_prompts, even_embeds
            losses.append(branch_loss("map", batch).to(image_embeds.device))  # branches can be on different devices
        attention_loss = 0
        if model.config.map_attention == "signed":
            if nouns is None:
                attention_loss = 0 * model.attention_direction.sum()  # DDP waits for the gradient of each parameter
            else:
                attention_loss = direction_loss(model.attention_weights(map_prompts.detach()), nouns.is_background)
            attention_loss = attention_loss.to(image_embeds.device)
        losses = torch.stack(losses)
        # Training does not read the logits of all prompts.
        logits_per_image = None if model.training else model.recognition(cosines(image_embeds, text_embeds))
    return ICLIPOutput(
        loss=losses.mean() + attention_loss,
        branch_losses=losses.detach().unbind(),
        logits_per_image=logits_per_image,
        logits_per_text=None if model.training else logits_per_image.mT,
        image_embeds=image_embeds,
        text_embeds=text_embeds,
    )


def in_chunks(encode: Callable[..., tuple], size: int | None, *inputs: torch.Tensor | None) -> tuple:
    """
    Encodes a batch in chunks of `size` rows, and joins the chunks of each result. The activations of a chunk are
    computed again in the backward pass. Inputs and results can be None.
    """
    if size is None or len(inputs[0]) <= size:
        return encode(*inputs)
    chunks = zip(*(repeat(None) if tensor is None else tensor.split(size) for tensor in inputs))
    encoded = [checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*encoded))
