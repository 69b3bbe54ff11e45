"""The contrastive loss over all processes, as a module that Accelerate wraps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..model.modeling_iclip import (
    ICLIPBranch,
    ICLIPModel,
    ImageTokens,
    attention_weights,
    contrastive_loss,
    cosines,
    normalize,
)
from ..model.pooling import share_among_like


def representative_tokens(
    tokens: torch.Tensor, attention: torch.Tensor, grid: tuple[int, int], count: int, affinity: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Selects few patches that represent an image. All but four are salient: the first has the largest attention, and each further one the
    largest product of attention and square root of the distance to the selected patches. The last four are in the middle of the image's
    quarters, so that an object or a ground counts by its area as well. The result for a patch is the mean over the patches with similar
    tokens.

    Args:
        tokens (`torch.Tensor` of shape `(B, N, D)`): tokens of the map branch, before sharing among similar patches, row-major.
        attention (`torch.Tensor` of shape `(B, N)`): in [0, 1].
        grid (`tuple[int, int]`): height and width in patches, N = h * w.
        count (`int`): number of patches to select, at least 5.
        affinity (`float`): see [`~pooling.share_among_like`]; 0 leaves tokens unchanged.

    Returns:
        `tuple`: tokens `(B, K, D)` and attention `(B, K)`, K = min(count, N).
    """
    batch = torch.arange(len(tokens), device=tokens.device)
    if count < tokens.shape[1]:
        units = normalize(tokens.float())
        wanted, distance = attention, torch.full_like(attention, 2.0)
        salient = []
        for _ in range(count - 4):
            salient.append(wanted.argmax(1))
            distance = torch.minimum(distance, 1 - (units @ units[batch, salient[-1]].unsqueeze(-1)).squeeze(-1))
            # Patches without attention can be selected too. The distance alone would leave a large object, whose patches are alike,
            # with fewer patches than what is around it.
            wanted = (attention + 0.05) * distance.clamp(min=0).sqrt()
        rows, columns = ((side // 4, side - 1 - side // 4) for side in grid)
        middles = torch.tensor([row * grid[1] + column for row in rows for column in columns], device=tokens.device)
        taken = torch.cat([torch.stack(salient, 1), middles.expand(len(tokens), -1)], 1)
    else:
        taken = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    queries = tokens[batch[:, None], taken]
    if affinity == 0:
        return queries, attention[batch[:, None], taken]
    values = torch.cat([tokens, attention.unsqueeze(-1).to(tokens.dtype)], -1)
    shared = share_among_like(values, tokens, affinity, queries)
    return shared[..., :-1], shared[..., -1].float()


def image_features(model: ICLIPModel, pixel_values: torch.Tensor, map_tokens: int) -> tuple[torch.Tensor, ...]:
    """
    Computes the inputs of the projections for images (B, 3, H, W): the pooled vector of each branch, see
    [`ICLIPModel.pool_image`], or with `max_over="similarity"` the vector of the recognition branch, [`representative_tokens`] (B, K, D)
    and their attention (B, K).
    """
    image = model.encode_image(pixel_values)
    recognised, map_pooled = model.pool_image(image, model.normalized_attention(image))
    if model.config.max_over == "similarity":
        return recognised, *map_features(model, image, map_tokens)
    return (recognised, map_pooled) if model.config.dual_projection else (map_pooled,)


def map_features(model: ICLIPModel, image: ImageTokens, map_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the [`representative_tokens`] of images for the map branch: tokens (B, K, D) and their attention (B, K)."""
    tokens, attention = model.centered_tokens(image.patch_tokens), model.normalized_attention(image)
    return representative_tokens(tokens, attention, image.grid, map_tokens, model.config.map_affinity)


@torch.no_grad()
def set_token_mean(model: ICLIPModel, images: Iterable[torch.Tensor]) -> None:
    """
    Sets `token_mean` of a model with `center_tokens`. Keeps the mean of an earlier training, which its branches learned with.

    Args:
        model: model on its device.
        images (iterable of `torch.Tensor` of shape `(3, H, W)`): a few hundred images.
    """
    if model.config.center_tokens and not model.token_mean.any():
        images, means = iter(images), []
        while batch := list(itertools.islice(images, 32)):
            means.append(model.encode_image(torch.stack(batch).to(model.device)).patch_tokens.float().mean(1))
        model.token_mean.copy_(torch.cat(means).mean(0))


class BranchInputs(NamedTuple):
    """What a branch compares: unit vectors of the pairs of this process."""

    images: torch.Tensor  # (B, P), or of their patches (B, K, P)
    captions: torch.Tensor  # (B, P)
    prompts: torch.Tensor  # of nouns (M - B, P)
    branch: ICLIPBranch
    attention: torch.Tensor | None = None  # of the patches (B, K)


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


class PairModel(nn.Module):
    """
    Computes the contrastive loss of the pairs of this process against the pairs of all processes. Accelerate wraps this module.

    Memory holds the towers' activations of `chunk_size` pairs only; those of the others are recomputed in the backward pass
    (gradient checkpointing). A large batch costs time but keeps all its negatives. Each process has the same number of pairs.
    The mean of losses and gradients over the processes equals that of one process with all pairs. Chunks and processes change
    no result, except for dropout, which is sampled for each chunk and process.

    The options are the settings of these names, see [`~settings.Settings`]; `map_tokens` is at least 5, see [`representative_tokens`].
    Nouns improve a map that is pooled by similarity. With other poolings, the map loses what distinguishes all objects from the
    background.
    """

    def __init__(
        self,
        model: ICLIPModel,
        chunk_size: int = 256,
        lock_text: bool = False,
        map_tokens: int = 20,
        noun_weight: float = 0.5,
        unknown_weight: float = 0.1,
        noun_branches: Sequence[str] = ("recognition",),
        noun_competition: float = 0.0,
    ):
        super().__init__()
        self.model, self.chunk_size, self.lock_text, self.map_tokens = model, chunk_size, lock_text, map_tokens
        self.noun_weight, self.noun_branches, self.noun_competition = noun_weight, noun_branches, noun_competition
        self.unknown_weight = unknown_weight
        self.train()

    @property
    def branches(self) -> dict[str, nn.Module]:
        """The branches of the model by name, recognition first."""
        named = {"recognition": self.model.recognition, "interpretability": self.model.interpretability}
        return {name: branch for name, branch in named.items() if branch is not None}

    def train(self, mode: bool = True) -> PairModel:
        super().train(mode)
        if self.lock_text:
            self.model.text_model.eval().requires_grad_(False)
        return self

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_features: Sequence[torch.Tensor] | None = None,
        text_features: torch.Tensor | None = None,
        noun_ids: torch.Tensor | None = None,
        is_background: torch.Tensor | None = None,
        noun_labels: torch.Tensor | None = None,
        **texts: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: images (B, 3, H, W); not needed with `image_features`.
            image_features: precomputed [`image_features`] of the images.
            text_features: precomputed features of the text tower, (M, Dt).
            texts: the tokenizer's tensors (M, L), if there are no `text_features`. The first B texts are the captions, the others
                noun prompts.
            noun_ids, is_background, noun_labels: nouns of the prompts, see [`NounPrompts.sample`].

        Returns:
            `dict` with `loss`, the mean of `losses` (branches,) (Eq. 13) and, with `map_attention="signed"`, the loss of the
            attention's direction; without gradient, `losses`, `logit_scales` (branches,) and the unit vectors `image_embeds` and
            `text_embeds` (B, P) of the recognition branch. All are float32.
        """
        if image_features is None:
            image_features = self._in_chunks(self._encode_images, pixel_values)
        if text_features is None:
            text_features = self._in_chunks(
                lambda *chunk: self.model.encode_text(**dict(zip(texts, chunk)))[0], *texts.values()
            )
        nouns = None if noun_ids is None else BatchNouns.gathered(noun_ids, noun_labels, is_background)
        branches = {name: self._branch_inputs(name, image_features, text_features) for name in self.branches}
        losses, recognised = [], branches["recognition"]
        # In float16, scaled cosines would be rounded to multiples of 1/16.
        with torch.autocast(text_features.device.type, enabled=False):
            for name, inputs in branches.items():
                loss = self.caption_loss(inputs)
                prompts = None if nouns is None else gather_with_gradient(inputs.prompts)[nouns.first]
                if nouns is not None and name in self.noun_branches:
                    loss = torch.lerp(loss, self.noun_loss(inputs, prompts, nouns), self.noun_weight)
                losses.append(loss)
        losses = torch.stack(losses)
        loss = losses.mean()
        if self.model.config.map_attention == "signed":
            direction = self.model.attention_direction.float()
            if nouns is None:
                loss = loss + 0 * direction.sum()  # DDP waits for its gradient
            else:  # `prompts` are those of the map branch, the last
                weights = attention_weights(direction[None], prompts.detach(), self.model.config.max_sharpness)[0]
                loss = loss + direction_loss(weights, nouns.is_background)
        return {
            "loss": loss,
            "losses": losses.detach(),
            "logit_scales": torch.cat([branch.logit_scale.exp() for branch in self.branches.values()]).detach(),
            "image_embeds": recognised.images.detach(),
            "text_embeds": recognised.captions.detach(),
        }

    def caption_loss(self, inputs: BranchInputs) -> torch.Tensor:
        """
        Returns the contrastive loss of a branch. Each process scores its own images. The logits of a text with all images are
        gathered, because logits are smaller than the embeddings of patches.
        """
        pairs, offset = len(inputs.captions), _rank() * len(inputs.captions)
        per_image = self._logits(inputs, gather_with_gradient(inputs.captions))
        per_text = gather_with_gradient(per_image)[:, offset : offset + pairs].mT
        return contrastive_loss(per_image, per_text, offset)

    def noun_loss(self, inputs: BranchInputs, prompts: torch.Tensor, nouns: BatchNouns) -> torch.Tensor:
        """
        Returns the loss of a branch with the noun prompts (V, P), each of which may belong to several images, and an image to several.
        With a logit bias, it is a sigmoid loss, in which nouns that an image may show have the weight `unknown_weight`. Without one, it is
        a softmax over all nouns that the image is not said to show. In a map that is pooled by similarity, the nouns have their own prior,
        see [`noun_prior`], and compete for the patches.
        """
        if inputs.branch.logit_bias is not None:
            negative_weights = torch.where(nouns.own_absent, 1.0, self.unknown_weight)
            num_positives = nouns.all.sum().clamp(min=1) * len(nouns.own) / len(nouns.all)
            return sigmoid_loss(self._logits(inputs, prompts), nouns.own, negative_weights, num_positives)
        if inputs.attention is None:
            per_image = self._logits(inputs, prompts)
        else:
            sharpness = self.model.config.max_sharpness
            similarities = inputs.images @ prompts.mT
            prior = noun_prior(inputs.attention, nouns.is_background)
            per_image = inputs.branch((sharpness * similarities + prior.log()).logsumexp(1) / sharpness)
        per_prompt = gather_with_gradient(per_image).mT
        loss = (multi_positive_loss(per_image, nouns.own) + multi_positive_loss(per_prompt, nouns.all.mT)) / 2
        if inputs.attention is None or not self.noun_competition:
            return loss
        competition = competition_loss(2 * sharpness * similarities, prior, nouns.own)
        return torch.lerp(loss, competition, self.noun_competition)

    def _branch_inputs(
        self, name: str, image_features: Sequence[torch.Tensor], text_features: torch.Tensor
    ) -> BranchInputs:
        features, *attention = image_features[:1] if name == "recognition" else image_features[1:]
        branch, pairs = self.branches[name], len(features)
        images = normalize(branch.visual_projection(features).float())
        texts = normalize(branch.text_projection(text_features).float())
        return BranchInputs(images, texts[:pairs], texts[pairs:], branch, *attention)

    def _logits(self, inputs: BranchInputs, texts: torch.Tensor) -> torch.Tensor:
        """Returns the logits (B, T) of this process's images with texts (T, P)."""
        if inputs.attention is None:
            return inputs.branch(cosines(inputs.images, texts))
        return inputs.branch(self.model.pool_similarities(inputs.images, texts, inputs.attention))

    def _encode_images(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return image_features(self.model, pixel_values, self.map_tokens)

    def _in_chunks(self, encode: Callable, *inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs[0]) <= self.chunk_size:
            return encode(*inputs)
        chunks = zip(*(tensor.split(self.chunk_size) for tensor in inputs))
        encoded = [checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(encoded) if isinstance(encoded[0], torch.Tensor) else tuple(map(torch.cat, zip(*encoded)))

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        """Keeps the scales just below 100. Above, the clamp in the model has no gradient, so a scale could not decrease again."""
        for branch in self.branches.values():
            branch.logit_scale.clamp_(max=math.log(100) - 1e-6)


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


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


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
