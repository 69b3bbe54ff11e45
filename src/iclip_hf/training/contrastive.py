"""
The losses of training over all processes: pure functions of logits, the losses of a branch that call them, and the module that Accelerate
wraps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..model.modeling_iclip import ICLIPBranch, ICLIPModel, attention_weights, contrastive_loss, cosines, normalize
from .features import branch_features, image_features
from .settings import Settings


# ------------------------------------------------------------------------------------------------------- of logits


def sigmoid_loss(
    logits: torch.Tensor, positives: torch.Tensor, negative_weights: torch.Tensor, num_positives: torch.Tensor | float
) -> torch.Tensor:
    """
    Binary cross entropy of each image and text, as in SigLIP, with a weight for each negative.

    Args:
        logits (`torch.Tensor` of shape `(B, T)`): scaled cosines with a bias.
        positives (`torch.Tensor` of shape `(B, T)`): boolean.
        negative_weights (`torch.Tensor` of shape `(B, T)`): weights of the pairs that are not positive; the others have the weight 1.
        num_positives (`torch.Tensor` or `float`): divisor of the sum; with several processes their mean number of positives.

    Returns:
        `torch.Tensor` scalar, float32.
    """
    weights = torch.where(positives, 1.0, negative_weights)
    losses = F.binary_cross_entropy_with_logits(logits.float(), positives.float(), weights, reduction="sum")
    return losses / num_positives


def multi_positive_loss(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """
    Cross entropy of scaled cosines `(B, T)` with any number of positives in a row, `(B, T)` boolean. A positive competes with the
    negatives of its row only. Returns the mean over the positives of a row, then over the rows, float32; a row without positives
    counts 0.
    """
    logits = logits.float()
    negatives = logits.masked_fill(positives, -torch.inf).logsumexp(1)
    rows, columns = positives.nonzero(as_tuple=True)  # positives are few
    own = logits[rows, columns]
    losses = torch.logaddexp(own, negatives[rows]) - own
    return (losses / positives.sum(1)[rows]).sum() / len(logits)


def competition_loss(logits: torch.Tensor, prior: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """
    Loss of texts that compete for the patches of images. Each patch distributes itself over all texts by a softmax. The share of a
    text in an image is the mean of its shares in the patches, and the loss is the negative logarithm of the shares of the texts that
    the image has. So patches behind an object, which belong to some text of the image, cannot stay with the object's.

    Args:
        logits (`torch.Tensor` of shape `(B, N, T)`): scaled cosines of N patches with the texts.
        prior (`torch.Tensor` of shape `(B, N, T)`): weights of the patches in the mean, which add up to 1 over N.
        positives (`torch.Tensor` of shape `(B, T)`): boolean.

    Returns:
        `torch.Tensor` scalar, float32: mean over the positives of an image, then over the images. An image without positives counts 0.
    """
    shares = (prior * logits.float().softmax(-1)).sum(1)
    rows, columns = positives.nonzero(as_tuple=True)
    losses = -shares[rows, columns].clamp(min=torch.finfo(shares.dtype).tiny).log()
    return (losses / positives.sum(1)[rows]).sum() / len(logits)


def noun_prior(attention: torch.Tensor, is_background: torch.Tensor) -> torch.Tensor:
    """
    Returns the prior of the patches for each noun: all patches are equally likely to show an object, and those with the least attention
    show the background.

    Args:
        attention (`torch.Tensor` of shape `(B, N)`): in [0, 1].
        is_background (`torch.Tensor` of shape `(T,)`): boolean.

    Returns:
        `torch.Tensor` of shape `(B, N, T)`, float32, positive, with the sum 1 over N.
    """
    background = (1 - attention.float()) ** 8 + 1e-6
    background = (background / background.sum(1, keepdim=True)).unsqueeze(-1)
    return torch.where(is_background, background, 1 / attention.shape[1])


def direction_loss(weights: torch.Tensor, is_background: torch.Tensor) -> torch.Tensor:
    """
    Squared hinge loss of the attention's weights (T,) of nouns: at least 1 is expected for objects and at most -1 for the background.
    Both kinds count equally.
    """
    errors = (1 - torch.where(is_background, -weights, weights)).relu() ** 2
    return torch.stack([errors[kind].mean() for kind in (is_background, ~is_background) if kind.any()]).mean()


# ------------------------------------------------------------------------------------------------------ of a branch


@dataclass(eq=False, repr=False)
class BranchInputs:
    """What a branch compares: unit vectors of the images and captions of this process, and of the nouns of all."""

    model: ICLIPModel
    branch: ICLIPBranch
    images: torch.Tensor  # (B, P), or of their patches (B, K, P)
    captions: torch.Tensor  # (B, P)
    nouns: torch.Tensor | None  # a prompt of each (V, P)
    attention: torch.Tensor | None = None  # of the patches (B, K)

    def logits(self, texts: torch.Tensor) -> torch.Tensor:
        """Returns the logits (B, T) of this process's images with texts (T, P)."""
        if self.attention is None:
            return self.branch(cosines(self.images, texts))
        return self.branch(self.model.pool_similarities(self.images, texts, self.attention))


class BatchNouns(NamedTuple):
    """The V distinct nouns of the prompts of all processes. A noun of many images counts once."""

    first: torch.Tensor  # the first prompt of each noun among those of all processes (V,)
    own: torch.Tensor  # whether the images of this process show the nouns, boolean (B, V)
    all: torch.Tensor  # the same of all processes
    own_absent: torch.Tensor  # whether the images of this process are known not to show the nouns, boolean (B, V)
    is_background: torch.Tensor  # whether the nouns are of the background, boolean (V,)

    @classmethod
    def gathered(cls, noun_ids: torch.Tensor, noun_labels: torch.Tensor, is_background: torch.Tensor) -> BatchNouns:
        """Gathers the nouns of all processes. Arguments are those of [`PairModel.forward`]."""
        noun_ids, everyone = gather_with_gradient(noun_ids), gather_with_gradient(noun_labels)
        # Sorted by noun; `torch.unique` does not return where each stands first.
        first = torch.from_numpy(np.unique(noun_ids.cpu(), return_index=True)[1]).to(noun_ids.device)
        nouns = noun_ids[first]
        is_background = gather_with_gradient(is_background)[first] > 0
        own = noun_labels[:, nouns]
        return cls(first, own > 0, everyone[:, nouns] > 0, own < 0, is_background)


def caption_loss(inputs: BranchInputs) -> torch.Tensor:
    """
    Returns the contrastive loss of a branch. Each process scores its own images. The logits of a text with all images are gathered,
    because logits are smaller than the embeddings of patches.
    """
    pairs = len(inputs.captions)
    offset = pairs * (distributed.get_rank() if distributed.is_initialized() else 0)
    per_image = inputs.logits(gather_with_gradient(inputs.captions))
    per_text = gather_with_gradient(per_image)[:, offset : offset + pairs].mT
    return contrastive_loss(per_image, per_text, offset)


# The losses of a branch with nouns. Each noun may belong to several images, and an image to several.


def sigmoid_noun_loss(inputs: BranchInputs, nouns: BatchNouns, settings: Settings) -> torch.Tensor:
    """Returns the loss of each noun by itself, in which nouns that an image may show have the weight `unknown_weight`."""
    negative_weights = torch.where(nouns.own_absent, 1.0, settings.unknown_weight)
    num_positives = nouns.all.sum().clamp(min=1) * len(nouns.own) / len(nouns.all)
    return sigmoid_loss(inputs.logits(inputs.nouns), nouns.own, negative_weights, num_positives)


def softmax_noun_loss(inputs: BranchInputs, nouns: BatchNouns, settings: Settings) -> torch.Tensor:
    """Returns the loss of nouns that compete with all nouns that the image is not said to show."""
    return _both_ways(inputs.logits(inputs.nouns), nouns)


def patch_noun_loss(inputs: BranchInputs, nouns: BatchNouns, settings: Settings) -> torch.Tensor:
    """
    Returns the loss of a map that is pooled by similarity. As [`softmax_noun_loss`], but the nouns have their own prior, see
    [`noun_prior`], and compete for the patches with the share `noun_competition`.
    """
    sharpness = inputs.model.config.max_sharpness
    similarities = inputs.images @ inputs.nouns.mT
    prior = noun_prior(inputs.attention, nouns.is_background)
    pooled = (sharpness * similarities + prior.log()).logsumexp(1) / sharpness
    loss = _both_ways(inputs.branch(pooled), nouns)
    if settings.noun_competition:
        competition = competition_loss(2 * sharpness * similarities, prior, nouns.own)
        loss = torch.lerp(loss, competition, settings.noun_competition)
    return loss


def _both_ways(per_image: torch.Tensor, nouns: BatchNouns) -> torch.Tensor:
    per_noun = gather_with_gradient(per_image).mT
    return (multi_positive_loss(per_image, nouns.own) + multi_positive_loss(per_noun, nouns.all.mT)) / 2


# ------------------------------------------------------------------------------------------------- of the whole model


class PairModel(nn.Module):
    """
    Computes the contrastive loss of the pairs of this process against the pairs of all processes. Accelerate wraps this module.

    Memory holds the towers' activations of `chunk_size` pairs only; those of the others are recomputed in the backward pass
    (gradient checkpointing). A large batch costs time but keeps all its negatives. Each process has the same number of pairs.
    The mean of losses and gradients over the processes equals that of one process with all pairs. Chunks and processes change
    no result, except for dropout, which is sampled for each chunk and process.

    Nouns improve a map that is pooled by similarity. With other poolings, the map loses what distinguishes all objects from the
    background.
    """

    def __init__(self, model: ICLIPModel, settings: Settings):
        super().__init__()
        self.model, self.settings, config = model, settings, model.config
        self.noun_losses = {
            "recognition": softmax_noun_loss if config.logit_bias_init_value is None else sigmoid_noun_loss,
            "interpretability": patch_noun_loss if config.max_over == "similarity" else softmax_noun_loss,
        }
        self.train()

    @property
    def branches(self) -> dict[str, ICLIPBranch]:
        """The branches of the model by name, recognition first, the map branch last."""
        named = {"recognition": self.model.recognition, "interpretability": self.model.interpretability}
        return {name: branch for name, branch in named.items() if branch is not None}

    def train(self, mode: bool = True) -> PairModel:
        super().train(mode)
        if self.settings.lock_text:
            self.model.text_model.eval().requires_grad_(False)
        return self

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
        noun_ids: torch.Tensor | None = None,
        is_background: torch.Tensor | None = None,
        place: torch.Tensor | None = None,
        noun_labels: torch.Tensor | None = None,
        **texts: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: images (B, 3, H, W); not needed with `image_features`.
            image_features: precomputed [`~features.image_features`] of the images.
            text_features: precomputed features of the text tower, (M, Dt).
            texts: the tokenizer's tensors (M, L), if there are no `text_features`. The first B texts are the captions, the others
                noun prompts.
            noun_ids, is_background, place, noun_labels: nouns of the prompts, see [`NounPrompts.sample`].

        Returns:
            `dict` with `loss`, the mean of `losses` (branches,) (Eq. 13) and, with `map_attention="signed"`, the loss of the
            attention's direction; without gradient, `losses`, `logit_scales` (branches,) and the unit vectors `image_embeds` and
            `text_embeds` (B, P) of the recognition branch. All are float32.
        """
        if image_features is None:
            image_features = self._in_chunks(self._encode_images, pixel_values)
        if text_features is None:
            text_features = self._in_chunks(partial(self._encode_texts, [*texts]), *texts.values())
        nouns = None if noun_ids is None else BatchNouns.gathered(noun_ids, noun_labels, is_background)
        features = branch_features(image_features, self.model.config)
        branches = {
            name: self._inputs(branch, text_features, nouns, *of_branch)
            for (name, branch), of_branch in zip(self.branches.items(), features)
        }
        # In float16, scaled cosines would be rounded to multiples of 1/16.
        with torch.autocast(text_features.device.type, enabled=False):
            losses = torch.stack([self.branch_loss(name, inputs, nouns) for name, inputs in branches.items()])
            loss = losses.mean()
            if self.model.config.map_attention == "signed":
                loss = loss + self.attention_loss([*branches.values()][-1], nouns)
        return {
            "loss": loss,
            "losses": losses.detach(),
            "logit_scales": torch.cat([branch.logit_scale.exp() for branch in self.branches.values()]).detach(),
            "image_embeds": branches["recognition"].images.detach(),
            "text_embeds": branches["recognition"].captions.detach(),
        }

    def branch_loss(self, name: str, inputs: BranchInputs, nouns: BatchNouns | None) -> torch.Tensor:
        """Returns the loss of a branch: that of its captions and, with the share `noun_weight`, that of its nouns."""
        loss = caption_loss(inputs)
        if nouns is not None and name in self.settings.noun_branches:
            noun_loss = self.noun_losses[name](inputs, nouns, self.settings)
            loss = torch.lerp(loss, noun_loss, self.settings.noun_weight)
        return loss

    def attention_loss(self, inputs: BranchInputs, nouns: BatchNouns | None) -> torch.Tensor:
        """Returns the [`direction_loss`] of the attention, which learns from the nouns of the map branch."""
        direction = self.model.attention_direction.float()
        if nouns is None:
            return 0 * direction.sum()  # DDP waits for its gradient
        weights = attention_weights(direction[None], inputs.nouns.detach(), self.model.config.max_sharpness)[0]
        return direction_loss(weights, nouns.is_background)

    def _inputs(
        self,
        branch: ICLIPBranch,
        text_features: torch.Tensor,
        nouns: BatchNouns | None,
        image_features: torch.Tensor,
        *attention: torch.Tensor,
    ) -> BranchInputs:
        pairs = len(image_features)
        images = normalize(branch.visual_projection(image_features).float())
        texts = normalize(branch.text_projection(text_features).float())
        prompts = None if nouns is None else gather_with_gradient(texts[pairs:])[nouns.first]
        return BranchInputs(self.model, branch, images, texts[:pairs], prompts, *attention)

    def _encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return image_features(self.model, pixel_values, self.settings.map_tokens)

    def _encode_texts(self, names: Sequence[str], *tensors: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(**dict(zip(names, tensors)))[0]

    def _in_chunks(self, encode: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        size = self.settings.chunk_size
        if len(inputs[0]) <= size:
            return encode(*inputs)
        chunks = zip(*(tensor.split(size) for tensor in inputs))
        return torch.cat([checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks])

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        """Keeps the scales just below 100. Above, the clamp in the model has no gradient, so a scale could not decrease again."""
        for branch in self.branches.values():
            branch.logit_scale.clamp_(max=math.log(100) - 1e-6)


# Torch's own, `torch.distributed.nn.functional.all_gather`, is deprecated in favour of a private module.
class _Gather(torch.autograd.Function):
    """Gathers (B, ...) of each process to (processes * B, ...) on all. The gradient of a row is the sum over all processes."""

    @staticmethod
    def forward(ctx, local: torch.Tensor) -> torch.Tensor:
        gathered = local.new_empty(distributed.get_world_size(), *local.shape)
        distributed.all_gather(list(gathered), local.contiguous())
        return gathered.flatten(0, 1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def gather_with_gradient(local: torch.Tensor) -> torch.Tensor:
    """Gathers the rows of all processes in the order of ranks, with gradient. Each process has the same number of rows."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return local
    return _Gather.apply(local)
