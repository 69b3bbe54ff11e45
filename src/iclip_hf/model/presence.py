"""Presence: the probability that an image shows a text. A map, which is stretched to [0, 1], does not tell this."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


# From this presence on, a text counts as shown; below, its mask is empty.
MIN_PRESENCE = 0.5
# From here on, a text is called present; between the two it is unsure.
PRESENT = 0.8
# Presence as words, see `presence_word`.
ABSENT, UNSURE, SURE = "absent", "unsure", "present"

# Factors of the rank and of the patches' evidence, and an offset: the logit of the presence at even odds. A logistic regression of
# the embedded model on the 80 classes of 261 photographs that it was not trained on: `benchmarks/presence.py`.
RANK_AND_PATCHES = (1.004, 5.082, -0.145)
# The same from the rank alone, for models whose patches were not trained to match texts.
RANK_ALONE = (1.363, -1.652)
# The patches' evidence: a sharpness of the maximum over nouns, the cosine from which a noun is like the text and does not compete
# with it, and the number of patches that count.
SHARPNESS, LIKE, BEST = 20.0, 0.6, 8
# All of them, by the names that the page in the browser takes from its settings.
CONSTANTS = {
    "rank_and_patches": RANK_AND_PATCHES,
    "rank_alone": RANK_ALONE,
    "sharpness": SHARPNESS,
    "like": LIKE,
    "best": BEST,
}


def presence(model, image, texts, references, prior: float = 0.5) -> torch.Tensor:
    """
    Estimates the probability that images show texts, from two numbers: the rank of the text's cosine among those of the reference
    nouns, in standard deviations, and, if the model was trained to match patches with texts, how far the text beats these nouns at its
    best patches ([`patch_evidence`]). A logistic regression turns them into a probability. It was fitted to the embedded model; for
    another model `iclip evaluate` shows how well the probabilities are calibrated. The page in the browser computes the same in
    `numerics.js`.

    Args:
        model ([`ICLIPModel`] or [`ExplainableModel`]): its `matches_patches` tells whether its patches were trained to match texts.
        image ([`ICLIPImageFeatures`]), texts ([`ICLIPTextFeatures`]): of B images, and of T texts `(T, P)` or `(B, T, P)`.
        references ([`ICLIPTextFeatures`]): of [`REFERENCE_NOUNS`] in the templates of the texts, `(K, P)`.
        prior (`float` in (0, 1)): share of the texts that are expected to be shown. By default, a text is as likely shown as not.

    Returns:
        `torch.Tensor` of shape `(B, T)`, float32, in [0, 1].
    """
    import torch  # not above, because commands take `MIN_PRESENCE` before they load it

    from .modeling_iclip import cosines

    std, mean = torch.std_mean(cosines(image.image_embeds, references.text_embeds), dim=-1, keepdim=True)
    rank = (cosines(image.image_embeds, texts.text_embeds) - mean) / std
    if getattr(getattr(model, "network", model), "interpretability", None) is not None:
        of_rank, of_patches, offset = RANK_AND_PATCHES
        evidence = patch_evidence(image.patch_embeds, texts.map_text_embeds, references.map_text_embeds)
        logit = of_rank * rank + of_patches * evidence.to(rank.device) + offset
    else:
        of_rank, offset = RANK_ALONE
        logit = of_rank * rank + offset
    return at_prior(logit.sigmoid(), prior)


def patch_evidence(
    patch_embeds: torch.Tensor, text_embeds: torch.Tensor, reference_embeds: torch.Tensor
) -> torch.Tensor:
    """
    Computes how far texts beat the reference nouns at the patches that match them best: the cosine of patch and text minus the smooth
    maximum, log-sum-exp(20 c) / 20, of the patch's cosines c with the nouns, without those whose own text is like the text (cosine
    above 0.6); the mean over the 8 best patches.

    Args:
        patch_embeds (`torch.Tensor` of shape `(B, h, w, P)`): unit vectors of the patches.
        text_embeds (`torch.Tensor` of shape `(T, P)` or `(B, T, P)`): unit vectors of texts, map branch.
        reference_embeds (`torch.Tensor` of shape `(K, P)`): unit vectors of the reference nouns, map branch.

    Returns:
        `torch.Tensor` of shape `(B, T)`, float32.
    """
    import torch

    patches = patch_embeds.float().flatten(1, 2)
    texts, nouns = (embeds.to(patches) for embeds in (text_embeds, reference_embeds))
    with torch.autocast(patches.device.type, enabled=False):  # the differences are small
        competes = (texts @ nouns.mT <= LIKE).float()
        competition = (SHARPNESS * (patches @ nouns.mT)).exp() @ competes.mT
        beaten = patches @ texts.mT - competition.clamp(min=torch.finfo(torch.float32).tiny).log() / SHARPNESS
    return beaten.topk(min(BEST, beaten.shape[1]), dim=1).values.mean(1)


def at_prior(presence, prior: float):
    """
    Converts presence, an array or tensor in [0, 1] at even odds, to the presence when the share `prior` of the texts is expected to be
    shown (Bayes' rule).
    """
    return presence * prior / (presence * prior + (1 - presence) * (1 - prior))


def presence_word(value: float, min_presence: float = MIN_PRESENCE) -> str:
    """Returns `"absent"` for a presence below `min_presence`, `"present"` from 0.8 on, and otherwise `"unsure"`."""
    if not value >= min_presence:  # also NaN
        return ABSENT
    return SURE if value >= PRESENT else UNSURE
