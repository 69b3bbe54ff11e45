"""
Contrastive losses over all processes: pure functions of logits, what is known of the nouns of a batch, the losses of a
branch, and their sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F

from .pooling import even_heights, pool_similarities, smooth_maximum
from .similarity import cosines


if TYPE_CHECKING:  # it imports transformers, with which the model is imported, which needs this module
    from .configuration_iclip import ICLIPConfig


# Sharpness of the prior of place: a noun below prefers the lowest patches to the highest by exp(3).
PLACE_SHARPNESS = 3.0
SHARE_EXPONENT = 4.0  # of the power mean over patches that is the share of a known noun in an image


# ------------------------------------------------------------------------------------------------------- of logits


def contrastive_loss(logits_per_image: torch.Tensor, logits_per_text: torch.Tensor, offset: int) -> torch.Tensor:
    """
    Returns the symmetric cross entropy of image-text pairs (Eq. 13, one branch), from logits `(B, T)` of this
    process's images with all texts and of its texts with all images. Pair i is positive at column `i + offset`: rank
    times B where columns come from several processes.
    """
    labels = torch.arange(len(logits_per_image), device=logits_per_image.device) + offset
    return (F.cross_entropy(logits_per_image.float(), labels) + F.cross_entropy(logits_per_text.float(), labels)) / 2


def sigmoid_loss(
    logits: torch.Tensor, positives: torch.Tensor, negative_weights: torch.Tensor, num_positives: torch.Tensor | float
) -> torch.Tensor:
    """
    Returns the binary cross entropy of images and texts, as in SigLIP, from logits, boolean positives and weights of
    the negatives, each `(B, T)`: the sum divided by `num_positives`, of several processes their mean number.
    """
    weights = torch.where(positives, 1.0, negative_weights)
    losses = F.binary_cross_entropy_with_logits(logits.float(), positives.float(), weights, reduction="sum")
    return losses / num_positives


def multi_positive_loss(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """
    Cross entropy of scaled cosines `(B, T)` with any number of positives in a row, `(B, T)` boolean. A positive
    competes with the negatives of its row only. Returns the mean over the positives of a row, then over the rows,
    float32; a row without positives counts 0.
    """
    logits = logits.float()
    negatives = logits.masked_fill(positives, -torch.inf).logsumexp(1)
    rows, columns = positives.nonzero(as_tuple=True)  # positives are few
    own = logits[rows, columns]
    losses = torch.logaddexp(own, negatives[rows]) - own
    return (losses / positives.sum(1)[rows]).sum() / len(logits)


def competition_loss(shares: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """
    Returns the loss of texts that compete for the patches of images: the negative logarithm of the shares `(B, T)`
    ([`shares_of_texts`]) of the texts that an image has, `(B, T)` boolean; the mean over these, then over the images.
    So patches behind an object, which belong to some text of the image, cannot stay with the object's.
    """
    rows, columns = positives.nonzero(as_tuple=True)
    losses = -shares[rows, columns].clamp(min=torch.finfo(shares.dtype).tiny).log()
    return (losses / positives.sum(1)[rows]).sum() / len(shares)


def shares_of_texts(logits: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """
    Returns the share of each text in images `(B, T)`, float32, in [0, 1]. Each patch distributes itself over all texts
    by a softmax of the logits `(B, N, T)`, and the share of a text is the mean over the N patches, with the weights
    `prior`, `(B, N, T)` or `(N, T)`, which add up to 1 over N.
    """
    return (prior * logits.float().softmax(-1)).sum(1)


def attention_prior(attention: torch.Tensor, is_background: torch.Tensor) -> torch.Tensor:
    """
    Returns the prior `(B, N, T)` of the patches for each noun by the class token's attention `(B, N)` in [0, 1]: all
    patches are equally likely to show an object, and those with the least attention show the background
    (`is_background`, `(T,)` boolean). Its sum over N is 1.
    """
    background = (1 - attention.float()) ** 8 + 1e-6
    background = (background / background.sum(1, keepdim=True)).unsqueeze(-1)
    return torch.where(is_background, background, 1 / attention.shape[1])


def place_prior(heights: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """
    Returns the prior `(N, T)` of patches at the heights y `(N,)`, from 0 at the top to 1, for each noun by its place
    `(T,)`: exp(3 y) for nouns that are below (1), such as a floor, exp(-3 y) for those above (-1), such as the sky,
    and equal for others (0). Its sum over N is 1.
    """
    return (PLACE_SHARPNESS * heights.float().unsqueeze(1) * place.float()).softmax(0)


def direction_loss(weights: torch.Tensor, is_background: torch.Tensor) -> torch.Tensor:
    """
    Squared hinge loss of the attention's weights (T,) of nouns: at least 1 is expected for objects and at most -1 for
    the background. Both kinds count equally.
    """
    errors = (1 - torch.where(is_background, -weights, weights)).relu() ** 2
    return torch.stack([errors[kind].mean() for kind in (is_background, ~is_background) if kind.any()]).mean()


# ------------------------------------------------------------------------------------------------ over all processes


# Torch's own, `torch.distributed.nn.functional.all_gather`, is deprecated in favour of a private module.
class _Gather(torch.autograd.Function):
    """
    Gathers (B, ...) of each process to (processes * B, ...) on all. The gradient of a row is the sum over all
    processes.
    """

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
    """
    Gathers the rows of all processes in the order of ranks, with gradient. Each process has the same number of rows.
    """
    return _Gather.apply(local) if _is_distributed() else local


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class BatchNouns(NamedTuple):
    """
    The V distinct nouns of the prompts of all processes. A noun of many images counts once. The last fields are the
    marks of nouns that a batch has of each noun prompt, by these names.
    """

    first: torch.Tensor  # the first prompt of each noun among those of all processes (V,)
    shown: torch.Tensor  # whether the images of this process show the nouns, boolean (B, V)
    all_shown: torch.Tensor  # the same of all processes
    absent: torch.Tensor  # whether the images of this process are known not to show the nouns, boolean (B, V)
    is_background: torch.Tensor  # whether the nouns are of the background, boolean (V,)
    place: torch.Tensor  # 1 for nouns that are below, -1 for those above, else 0 (V,)

    @classmethod
    def gathered(cls, noun_ids: torch.Tensor, noun_labels: torch.Tensor, **marks: torch.Tensor) -> BatchNouns:
        """Gathers the nouns of all processes. Arguments are the `nouns` of [`ICLIPModel.forward`]."""
        noun_ids, everyone = gather_with_gradient(noun_ids), gather_with_gradient(noun_labels)
        # Sorted by noun; `torch.unique` does not return where each stands first.
        first = torch.from_numpy(np.unique(noun_ids.cpu(), return_index=True)[1]).to(noun_ids.device)
        nouns = noun_ids[first]
        marks = {name: gather_with_gradient(mark)[first] for name, mark in marks.items()}
        own = noun_labels[:, nouns]
        return cls(first, own > 0, everyone[:, nouns] > 0, own < 0, **marks)

    @property
    def shows_place(self) -> torch.Tensor:
        """Whether the images of this process show a noun that is above or below others, boolean (B,)."""
        return (self.shown & (self.place != 0)).any(1)

    @property
    def complete(self) -> torch.Tensor:
        """
        Whether the labels of the images of this process are complete for the background, because an absent noun of the
        background is known, and something is shown, boolean (B,).
        """
        return (self.absent & self.is_background).any(1) & self.shown.any(1)

    @property
    def spread_evenly(self) -> torch.Tensor:
        """Whether losses read the evenly spread patches of the images of this process, boolean (B,)."""
        return self.complete | self.shows_place

    def prompts(self, embeds: torch.Tensor) -> torch.Tensor:
        """Returns the vector of a prompt of each noun (V, P), from those of this process's prompts (M - B, P)."""
        return gather_with_gradient(embeds)[self.first]


# ------------------------------------------------------------------------------------------------------ of a branch


def caption_loss(logits: Callable[[torch.Tensor], torch.Tensor], captions: torch.Tensor) -> torch.Tensor:
    """
    Returns the contrastive loss of a branch for this process's captions (B, P). Each process scores its own images:
    `logits` maps unit vectors of texts (T, P) to the logits (B, T). The logits of a text with all images are gathered,
    because logits are smaller than the embeddings of patches.
    """
    pairs = len(captions)
    offset = pairs * (distributed.get_rank() if _is_distributed() else 0)
    per_image = logits(gather_with_gradient(captions))
    per_text = gather_with_gradient(per_image)[:, offset : offset + pairs].mT
    return contrastive_loss(per_image, per_text, offset)


def sigmoid_noun_loss(per_image: torch.Tensor, nouns: BatchNouns, unknown_weight: float) -> torch.Tensor:
    """
    Returns the loss of each noun by itself, in which nouns that an image may show have the weight `unknown_weight`.
    """
    negative_weights = torch.where(nouns.absent, 1.0, unknown_weight)
    num_positives = nouns.all_shown.sum().clamp(min=1) * len(nouns.shown) / len(nouns.all_shown)
    return sigmoid_loss(per_image, nouns.shown, negative_weights, num_positives)


def softmax_noun_loss(per_image: torch.Tensor, nouns: BatchNouns) -> torch.Tensor:
    """Returns the loss of nouns that compete with all nouns that the image is not said to show."""
    per_noun = gather_with_gradient(per_image).mT
    return (multi_positive_loss(per_image, nouns.shown) + multi_positive_loss(per_noun, nouns.all_shown.mT)) / 2


def shares_by_place(
    shares: torch.Tensor, patches: torch.Tensor, prompts: torch.Tensor, scale: float, nouns: BatchNouns
) -> torch.Tensor:
    """
    Replaces the shares `(B, V)` of the nouns that are above or below others, in the b images that show one, by their
    shares in evenly spread patches `(b, 64, P)` ([`~pooling.even_patches`]), weighted by their [`place_prior`].
    `prompts` are unit vectors `(V, P)`, and `scale` is that of the cosines in the softmax.
    """
    prior = place_prior(even_heights().to(patches.device), nouns.place)
    by_place = shares_of_texts(scale * (patches.float() @ prompts.float().mT), prior)
    rows, columns = nouns.shows_place.nonzero(), nouns.place.nonzero().squeeze(1)
    return shares.index_put((rows, columns), by_place[:, columns])


def known_competition_loss(
    patches: torch.Tensor, prompts: torch.Tensor, scale: float, nouns: BatchNouns
) -> torch.Tensor:
    """
    Returns the loss of the nouns that are known to be shown or absent and compete for the evenly spread patches `(b,
    64, P)` of the b images that are `nouns.complete`, the mean over these images of all processes. `prompts` are unit
    vectors `(V, P)`.

    Each patch distributes itself over the known nouns of its image by a softmax of `scale` times cosines. The loss is
    the sum of two:

    - A noun that is shown has patches. Its share in the image is the power mean of its shares in the patches, weighted
    by its [`place_prior`], and the loss is the negative logarithm of the shares of the nouns shown. Two nouns that are
    always shown together, such as wall and floor, are the same to a loss of whole images, and their places tell them
    apart. The exponent `SHARE_EXPONENT` makes a few patches suffice: a mean would give all nouns shown equal areas.
    - A patch shows a noun that is shown. The loss is the negative logarithm of the sum of its shares in these nouns,
    the mean over the patches. It gives no noun an area, so the nouns of other images decide what a patch shows.
    """
    complete = nouns.complete
    shown, known = nouns.shown[complete], (nouns.shown | nouns.absent)[complete]
    columns = known.any(0).nonzero().squeeze(1)  # few of the nouns, all shown ones among them
    shown, known, place = shown[:, columns], known[:, columns], nouns.place[columns]
    logits = scale * (patches.float() @ prompts[columns].float().mT)
    # A large number instead of infinity, whose gradient would be NaN in a noun without known patches.
    shares = logits.masked_fill(~known.unsqueeze(1), -1e4).log_softmax(-1)
    prior = place_prior(even_heights().to(place.device), place).log()
    log_shares = smooth_maximum(shares, prior, SHARE_EXPONENT, 1)
    of_nouns = -(log_shares * shown).sum(1) / shown.sum(1)
    of_patches = -shares.masked_fill(~shown.unsqueeze(1), -1e4).logsumexp(-1).mean(1)
    of_all = gather_with_gradient(complete)
    return (of_nouns + of_patches).sum() * len(of_all) / len(complete) / of_all.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------ sums of a branch


def recognition_loss(
    branch: nn.Module, images: torch.Tensor, texts: torch.Tensor, nouns: BatchNouns | None, config: ICLIPConfig
) -> torch.Tensor:
    """
    Returns the loss of the recognition branch for unit vectors of B images (B, P), and of their captions and noun
    prompts (M, P). With a bias, each noun has a loss by itself, otherwise nouns compete.
    """

    def logits(of: torch.Tensor) -> torch.Tensor:
        return branch(cosines(images, of))

    loss = caption_loss(logits, texts[: len(images)])
    if nouns is None:
        return loss
    per_image = logits(nouns.prompts(texts[len(images) :]))
    if branch.logit_bias is None:
        noun_loss = softmax_noun_loss(per_image, nouns)
    else:
        noun_loss = sigmoid_noun_loss(per_image, nouns, config.unknown_weight)
    return torch.lerp(loss, noun_loss, float(config.noun_weight))


def map_loss(
    branch: nn.Module,
    images: torch.Tensor,
    attention: torch.Tensor | None,
    even_patches: torch.Tensor | None,
    texts: torch.Tensor,
    nouns: BatchNouns | None,
    config: ICLIPConfig,
) -> torch.Tensor:
    """
    Returns the loss of the interpretability branch for unit vectors of B images (B, P), or of their patches (B, K, P)
    with their attention (B, K), of the evenly spread patches of the images that are `nouns.spread_evenly` (b, 64, P),
    and of the captions and noun prompts (M, P). Nouns improve a map that is pooled by similarity only.
    """
    count, sharpness = len(images), config.max_sharpness
    if config.max_over == "channels":
        return caption_loss(lambda of: branch(cosines(images, of)), texts[:count])
    weights = torch.ones_like(attention) if config.pooling == "max" else attention
    loss = caption_loss(lambda of: branch(pool_similarities(images, of, weights, sharpness)), texts[:count])
    if nouns is None:
        return loss
    prompts = nouns.prompts(texts[count:])
    similarities, prior = images @ prompts.mT, attention_prior(attention, nouns.is_background)
    noun_loss = softmax_noun_loss(branch(smooth_maximum(similarities, prior.log(), sharpness, 1)), nouns)
    if config.noun_competition:
        shares = shares_of_texts(2 * sharpness * similarities, prior)
        if even_patches is not None:
            placed = even_patches[nouns.shows_place[nouns.spread_evenly]]
            shares = shares_by_place(shares, placed, prompts, 2 * sharpness, nouns)
        noun_loss = torch.lerp(noun_loss, competition_loss(shares, nouns.shown), float(config.noun_competition))
    loss = torch.lerp(loss, noun_loss, float(config.noun_weight))
    if even_patches is not None:
        complete = even_patches[nouns.complete[nouns.spread_evenly]]
        known = known_competition_loss(complete, prompts, 2 * sharpness, nouns)
        loss = loss + config.known_competition * known
    return loss
