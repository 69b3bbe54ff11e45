"""The losses of a branch over all processes, and the terms whose sum is the loss of a branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import distributed, nn
from torch.nn import functional as F

from .losses import (
    BatchNouns,
    attention_prior,
    competition_loss,
    contrastive_loss,
    count_per_process,
    distillation_loss,
    gather_with_gradient,
    is_distributed,
    multi_positive_loss,
    place_prior,
    shares_of_texts,
)
from .pooling import even_heights, pool_similarities, smooth_maximum
from .similarity import cosines


if TYPE_CHECKING:  # the configuration imports transformers, which imports the model, which imports this module
    from .configuration_iclip import ICLIPConfig


# Weight of the sigmoid loss of classes relative to their distillation. A larger weight lowers the presence of classes
# that only look like what an image shows, but also of some classes that it shows.
CLASS_PRESENCE = 0.1
# A noun with higher odds in a batch is common: the loss adjusts its logits.
COMMON_ODDS = 1 / 4
SHARE_EXPONENT = 4.0  # the share of a known noun is the power mean over patches with this exponent


def caption_loss(
    logits: Callable[[torch.Tensor], torch.Tensor], captions: torch.Tensor, caption_ids: torch.Tensor
) -> torch.Tensor:
    """
    Returns the contrastive loss of a branch for this process's captions (B, P). `logits` computes the logits (B, T) of
    this process's images from unit vectors of texts (T, P). The logits of a caption with the images of other processes
    are gathered instead of the vectors of their patches, which are larger.

    Captions with the same id `(B,)` are equal, so they and their images are no negatives of each other. As equal
    captions have equal logits, this is the mean over all positives of a row.
    """
    num_pairs = len(captions)
    offset = num_pairs * (distributed.get_rank() if is_distributed() else 0)
    per_image = logits(gather_with_gradient(captions))
    per_text = gather_with_gradient(per_image)[:, offset : offset + num_pairs].mT
    is_equal = caption_ids.unsqueeze(1) == gather_with_gradient(caption_ids)
    is_equal[:, offset : offset + num_pairs].fill_diagonal_(False)  # the pair itself
    return contrastive_loss(
        per_image.masked_fill(is_equal, -torch.inf), per_text.masked_fill(is_equal, -torch.inf), offset
    )


def sigmoid_loss(logits: torch.Tensor, positives: torch.Tensor, negative_weights: torch.Tensor) -> torch.Tensor:
    """
    Returns the sigmoid loss of SigLIP for this process's images and texts, from logits, boolean positives and weights
    of the negatives, each `(B, T)`. It is the sum of the binary cross entropies, divided by the [`count_per_process`]
    of the positives.
    """
    weights = torch.where(positives, 1.0, negative_weights)
    losses = F.binary_cross_entropy_with_logits(logits.float(), positives.float(), weights, reduction="sum")
    return losses / count_per_process(positives)


def sigmoid_noun_loss(per_image: torch.Tensor, nouns: BatchNouns, unknown_weight: float) -> torch.Tensor:
    """
    Returns the [`sigmoid_loss`] of nouns, each by itself, from the logits of this process's images `(B, V)`. A noun
    that is known neither to be shown nor to be absent has the weight `unknown_weight`.

    The logits of common nouns are adjusted (https://huggingface.co/papers/2007.07314). If the odds of a noun in the
    batch exceed `COMMON_ODDS`, log(odds / `COMMON_ODDS`) is added to its logits. Then the model does not learn that
    "person" is likely in any image, and one `presence_bias` fits common and rare nouns.
    """
    negative_weights = torch.where(nouns.absent, 1.0, unknown_weight)
    negatives = gather_with_gradient((negative_weights * ~nouns.shown).sum(0, keepdim=True)).sum(0)
    odds = (nouns.all_shown.sum(0) + 0.5) / (negatives + 0.5)
    adjustments = (odds / COMMON_ODDS).log().clamp(min=0)
    return sigmoid_loss(per_image + adjustments, nouns.shown, negative_weights)


def class_presence_loss(logits: torch.Tensor, probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Returns the sigmoid loss of the classes of a classifier, from their logits, probabilities and labels (1 for shown,
    -1 for absent, 0 for unknown), each `(B, K)`. An unknown class counts as shown if its probability p is above 0.5.
    Otherwise it counts as absent, with the weight (1 - p) q^2, where q is the highest probability of the image: a
    classifier that is sure of one class also excludes the classes that look like it.
    """
    positives = torch.where(labels == 0, probabilities > 0.5, labels > 0)
    unknown_weights = (1 - probabilities) * probabilities.amax(1, keepdim=True) ** 2
    negative_weights = torch.where(labels < 0, 1.0, unknown_weights)
    return sigmoid_loss(logits, positives, negative_weights)


def softmax_noun_loss(per_image: torch.Tensor, nouns: BatchNouns) -> torch.Tensor:
    """
    Returns the symmetric [`multi_positive_loss`] of images and nouns, from the logits of this process's images
    `(B, V)`. It is the mean of two losses: of each image over the nouns, and of each noun over the images. The
    positives are the nouns that an image is known to show.
    """
    per_noun = gather_with_gradient(per_image).mT
    return (multi_positive_loss(per_image, nouns.shown) + multi_positive_loss(per_noun, nouns.all_shown.mT)) / 2


def shares_by_place(
    shares: torch.Tensor, patch_embeds: torch.Tensor, prompts: torch.Tensor, scale: float, nouns: BatchNouns
) -> torch.Tensor:
    """
    Replaces the shares `(B, V)` of the nouns with a place in the b images that show such a noun. The new shares are
    computed from evenly spread patches `(b, 64, P)` ([`~pooling.even_patches`]), weighted by [`place_prior`].
    `prompts` are unit vectors `(V, P)`, and `scale` multiplies the cosines in the softmax.
    """
    spatial_prior = place_prior(even_heights().to(patch_embeds.device), nouns.place)
    by_place = shares_of_texts(scale * (patch_embeds.float() @ prompts.float().mT), spatial_prior)
    rows, columns = nouns.shows_place.nonzero(), nouns.place.nonzero().squeeze(1)
    return shares.index_put((rows, columns), by_place[:, columns])


def known_competition_loss(
    patch_embeds: torch.Tensor, prompts: torch.Tensor, scale: float, nouns: BatchNouns
) -> torch.Tensor:
    """
    Returns the loss of nouns that compete for the evenly spread patches `(b, 64, P)` of the b images with
    `nouns.knows_background`, as the mean over these images of all processes. Only the known nouns of an image compete:
    nouns that are known to be shown or absent. `prompts` are unit vectors `(V, P)`.

    The share of a noun in a patch is the softmax of `scale` times the cosines over the known nouns of the image. The
    loss is the sum of two losses:

    - Each noun shown has patches. The share of a noun in the image is the power mean of its shares in the patches,
    weighted by [`place_prior`]. The loss is the negative logarithm of this share, as the mean over the nouns shown.
    With the exponent `SHARE_EXPONENT`, a few patches suffice: a mean would give all nouns shown equal areas. The
    spatial prior separates nouns that are always shown together, such as wall and floor. A loss of whole images cannot
    do so.
    - Each patch shows one of the nouns shown. The loss is the negative logarithm of the sum of their shares in the
    patch, as the mean over the patches. This loss does not decide which of the nouns a patch shows: the model learns
    it from images with other nouns.
    """
    counted = nouns.knows_background
    shown, known = nouns.shown[counted], (nouns.shown | nouns.absent)[counted]
    columns = known.any(0).nonzero().squeeze(1)  # known nouns are few, and all nouns shown are known
    shown, known, place = shown[:, columns], known[:, columns], nouns.place[columns]
    logits = scale * (patch_embeds.float() @ prompts[columns].float().mT)
    # -1e4 instead of -inf, because the gradient of -inf would be NaN for the nouns that an image does not know.
    log_softmax = logits.masked_fill(~known.unsqueeze(1), -1e4).log_softmax(-1)
    log_prior = place_prior(even_heights().to(place.device), place).log()
    log_shares = smooth_maximum(log_softmax, log_prior, SHARE_EXPONENT, dim=1)
    noun_losses = -(log_shares * shown).sum(1) / shown.sum(1)
    patch_losses = -log_softmax.masked_fill(~shown.unsqueeze(1), -1e4).logsumexp(-1).mean(1)
    return (noun_losses + patch_losses).sum() / count_per_process(counted)


# ----------------------------------------------------------------------------------------------------------- terms


@dataclass
class BranchBatch:
    """
    Inputs of the loss of a branch: the B image-text pairs of this process, and the V nouns of all processes.

    Attributes:
        branch ([`ICLIPBranch`]): the branch, which maps cosines to logits.
        config ([`ICLIPConfig`]): configuration of the model.
        images (`torch.Tensor` of shape `(B, P)`, or `(B, n, P)` in the map branch with `max_over="similarity"`): unit
            vectors of images, or of n patches of each image.
        captions (`torch.Tensor` of shape `(B, P)`): unit vectors of the captions.
        caption_ids (`torch.Tensor` of shape `(B,)`): [`row_ids`] of the captions.
        map_attention (`torch.Tensor` of shape `(B, n)`, *optional*): attention of the patches, in [0, 1].
        nouns ([`BatchNouns`], *optional*): the nouns; None if the branch has no loss of nouns.
        prompts (`torch.Tensor` of shape `(V, P)`, *optional*): unit vectors of one prompt of each noun.
        even_embeds (`torch.Tensor` of shape `(b, 64, P)`, *optional*): unit vectors of the evenly spread patches of
            the b images that `nouns.needs_even_patches` marks; None in the recognition branch, and without
            `known_competition`.
        class_prompts (`torch.Tensor` of shape `(K, P)`, *optional*): unit vectors of one prompt of each class; None in
            the map branch, and if `nouns` has no classes.
    """

    branch: nn.Module
    config: ICLIPConfig
    images: torch.Tensor
    captions: torch.Tensor
    caption_ids: torch.Tensor
    map_attention: torch.Tensor | None = None
    nouns: BatchNouns | None = None
    prompts: torch.Tensor | None = None
    even_embeds: torch.Tensor | None = None
    class_prompts: torch.Tensor | None = None

    @property
    def noun_weight(self) -> float:
        """The weight of the nouns in the loss; 0 without nouns."""
        return 0.0 if self.nouns is None else self.config.noun_weight

    def logits(self, texts: torch.Tensor) -> torch.Tensor:
        """Returns the logits (B, T) of this process's images and of texts, unit vectors (T, P)."""
        if self.images.ndim == 2:
            return self.branch(cosines(self.images, texts))
        attention = torch.ones_like(self.map_attention) if self.config.pooling == "max" else self.map_attention
        return self.branch(pool_similarities(self.images, texts, attention, self.config.max_sharpness))

    @cached_property
    def similarities(self) -> torch.Tensor:
        """The cosines of patches and nouns (B, n, V)."""
        return self.images @ self.prompts.mT

    @cached_property
    def spatial_prior(self) -> torch.Tensor:
        """The [`attention_prior`] of the nouns (B, n, V)."""
        return attention_prior(self.map_attention, self.nouns.is_background)

    def select_even_embeds(self, selected: torch.Tensor) -> torch.Tensor:
        """
        Returns the `even_embeds` of the selected images, boolean (B,). `nouns.needs_even_patches` marks all of them.
        """
        return self.even_embeds[selected[self.nouns.needs_even_patches]]


class LossTerm(NamedTuple):
    """
    A term of the loss of a branch.

    Attributes:
        loss: function of a [`BranchBatch`] that returns a scalar, by one rule: **the scalar is a mean over the rows of
            this process**, images or texts. Then the mean over all processes is the loss of the whole batch. A sum is
            divided by B, or by a [`count_per_process`]. Rows of other processes are gathered with their gradient
            ([`gather_with_gradient`]). The logarithm of a mean, for example, breaks the rule, unless the rows of all
            processes are gathered first.
        weight: function of a [`BranchBatch`] that returns the factor of the term, which is equal on all processes. A
            term with the weight 0 is not computed.

    `tests/test_losses.py` compares two processes with one for every term of [`LOSS_TERMS`].

    Example of a term that pushes the vectors of captions apart:

    ```python
    >>> def uniformity(batch: BranchBatch) -> torch.Tensor:
    ...     return (batch.captions @ gather_with_gradient(batch.captions).mT).square().mean()


    >>> LOSS_TERMS["recognition"]["uniformity"] = LossTerm(uniformity, weight=lambda batch: 0.1)
    ```
    """

    loss: Callable[[BranchBatch], torch.Tensor]
    weight: Callable[[BranchBatch], float]


def _captions(batch: BranchBatch) -> torch.Tensor:
    return caption_loss(batch.logits, batch.captions, batch.caption_ids)


def _class_presence(batch: BranchBatch) -> torch.Tensor:
    nouns = batch.nouns
    return class_presence_loss(batch.logits(batch.class_prompts), nouns.class_probabilities, nouns.class_labels)


def _distillation_weight(batch: BranchBatch) -> float:
    return 0.0 if batch.class_prompts is None else batch.config.distillation_weight


def _nouns_of_patches(batch: BranchBatch) -> torch.Tensor:
    pooled = smooth_maximum(batch.similarities, batch.spatial_prior.log(), batch.config.max_sharpness, dim=1)
    return softmax_noun_loss(batch.branch(pooled), batch.nouns)


def _noun_competition(batch: BranchBatch) -> torch.Tensor:
    scale = batch.config.map_scale
    shares = shares_of_texts(scale * batch.similarities, batch.spatial_prior)
    if batch.even_embeds is not None:
        patch_embeds = batch.select_even_embeds(batch.nouns.shows_place)
        shares = shares_by_place(shares, patch_embeds, batch.prompts, scale, batch.nouns)
    return competition_loss(shares, batch.nouns.shown)


def _known_competition(batch: BranchBatch) -> torch.Tensor:
    patch_embeds = batch.select_even_embeds(batch.nouns.knows_background)
    return known_competition_loss(patch_embeds, batch.prompts, batch.config.map_scale, batch.nouns)


LOSS_TERMS = {
    "recognition": {
        "captions": LossTerm(_captions, lambda batch: 1 - batch.noun_weight),
        # Without a bias, nouns compete; with one, each noun has a loss by itself.
        "nouns_by_softmax": LossTerm(
            lambda batch: softmax_noun_loss(batch.logits(batch.prompts), batch.nouns),
            lambda batch: batch.noun_weight if batch.branch.logit_bias is None else 0.0,
        ),
        "nouns_by_sigmoid": LossTerm(
            lambda batch: sigmoid_noun_loss(batch.logits(batch.prompts), batch.nouns, batch.config.unknown_weight),
            lambda batch: 0.0 if batch.branch.logit_bias is None else batch.noun_weight,
        ),
        "distillation": LossTerm(
            lambda batch: distillation_loss(batch.logits(batch.class_prompts), batch.nouns.class_probabilities),
            _distillation_weight,
        ),
        "class_presence": LossTerm(
            _class_presence,
            lambda batch: 0.0 if batch.branch.logit_bias is None else CLASS_PRESENCE * _distillation_weight(batch),
        ),
    },
    "map": {
        "captions": LossTerm(_captions, lambda batch: 1 - batch.noun_weight),
        "nouns": LossTerm(_nouns_of_patches, lambda batch: batch.noun_weight * (1 - batch.config.noun_competition)),
        "noun_competition": LossTerm(
            _noun_competition, lambda batch: batch.noun_weight * batch.config.noun_competition
        ),
        "known_competition": LossTerm(
            _known_competition, lambda batch: 0.0 if batch.nouns is None else batch.config.known_competition
        ),
    },
}


def branch_loss(name: str, batch: BranchBatch) -> torch.Tensor:
    """Returns the weighted sum of the [`LOSS_TERMS`] of the branch with this name."""
    total = 0.0
    for term in LOSS_TERMS[name].values():
        if weight := term.weight(batch):
            total = total + weight * term.loss(batch)
    return total
