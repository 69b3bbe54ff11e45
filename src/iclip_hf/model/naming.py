"""Which of many texts name what an image shows: one text for one thing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .batches import pad_indices, select_texts
from .outputs import ICLIPTextFeatures
from .presence import SURE_PRESENCE, at_prior, is_present
from .similarity import resize_and_normalize


# Texts whose features have at least this cosine have the same meaning.
SIMILAR_TEXTS = 0.85
SAME_PLACE = 0.6  # texts whose masks have a greater IoU name one thing
MASK_SIDE = 72  # height and width of these masks in pixels
CANDIDATES = 8  # number of texts that are compared for each text that is selected
# People are mentioned first, as in captions, unless something else has a logit of the presence that is higher by this
# number. Chosen on captions of photographs of the training data.
PEOPLE_FIRST = 3.0
PEOPLE = frozenset(
    "adult,baby,ballplayer,baseball player,batter,boy,child,crowd,female,girl,groom,guy,kid,lady,male,man,people,"
    "person,player,rider,scuba diver,skateboarder,skier,snowboarder,surfer,tennis player,toddler,woman".split(",")
)


def best_texts(
    labels: Sequence[Sequence[str]],
    scores: torch.Tensor,
    presence: torch.Tensor | None,
    priors: torch.Tensor | None,
    texts: ICLIPTextFeatures,
    text_indices: Sequence[Sequence[int]],
    map_texts: Callable[[ICLIPTextFeatures], torch.Tensor],
    count: int,
    min_presence: float,
) -> list[list[int]]:
    """
    Selects the best texts for B images among the `text_indices` of each image, at most `count`. All but the best one
    have at least `min_presence`. Of texts that name one thing, one is selected: the most probable one, whose prior
    counts twice, so that "horse" is preferred to "sorrel". If it ends with another sure name of the thing, as "clock
    tower" with "tower", that name is selected. Texts with the highest presence come first. Names of people are
    preferred, see `PEOPLE_FIRST`, and texts of objects, which have a positive weight of the attention.

    Without presence, texts are ranked by their scores, and only texts of the same meaning name one thing.

    Args:
        labels: the texts of each image as strings, B lists of T.
        scores, presence, priors: `(B, T)`, `(B, T)` and `(T,)`.
        texts ([`ICLIPTextFeatures`]): `(B, T, P)`.
        map_texts: function that computes raw maps of the images `(B, S, h, w)` from S of the texts `(B, S, P)`.

    Returns:
        list of B lists of indices, best first.
    """
    probability = ranks = scores
    if presence is not None:
        probability = presence if priors is None else at_prior(presence, priors.to(presence))
        ranks = presence.clamp(1e-6, 1 - 1e-6).logit()
        if texts.attention_weights is not None:
            ranks = ranks + texts.attention_weights
        people = [[PEOPLE_FIRST * (label in PEOPLE) for label in image_labels] for image_labels in labels]
        ranks = ranks + torch.tensor(people).to(ranks)
    candidates = []
    for image, allowed in enumerate(text_indices):
        ordered = sorted(allowed, key=probability[image].tolist().__getitem__, reverse=True)
        if presence is not None and ordered:
            values = presence[image].tolist()
            best = max(ordered, key=values.__getitem__)
            ordered = [text for text in ordered if text == best or is_present(values[text], min_presence)]
        candidates.append(ordered[: CANDIDATES * count])
    maps = None
    if presence is not None and any(candidates):
        maps = map_texts(select_texts(texts, pad_indices(candidates)))
    selected = []
    for image, ordered in enumerate(candidates):
        embeds = texts.text_embeds[image, ordered].float()
        same = embeds @ embeds.mT >= SIMILAR_TEXTS
        if maps is not None:
            same |= _overlap(maps[image, : len(ordered)])
        sure = [False] * len(ordered) if presence is None else (presence[image, ordered] >= SURE_PRESENCE).tolist()
        names = [labels[image][text] for text in ordered]
        chosen = [ordered[position] for position in _first_names(names, same.tolist(), sure)]
        selected.append(sorted(chosen, key=ranks[image].tolist().__getitem__, reverse=True)[:count])
    return selected


def _overlap(maps: torch.Tensor) -> torch.Tensor:
    """Returns whether the masks of maps `(S, h, w)` overlap by more than `SAME_PLACE`, boolean `(S, S)`."""
    masks = (resize_and_normalize(maps, (MASK_SIDE, MASK_SIDE)) > 0.5).flatten(1).float()
    shared, areas = masks @ masks.mT, masks.sum(1)
    return shared > SAME_PLACE * (areas[:, None] + areas - shared)


def _first_names(names: Sequence[str], same: Sequence[Sequence[bool]], sure: Sequence[bool]) -> list[int]:
    """Returns the position of one name for each thing. Names come in the order in which they are preferred."""
    kept = []
    for position, name in enumerate(names):
        if any(same[position][other] for other in kept):
            continue
        shorter = [
            other
            for other, other_name in enumerate(names)
            if same[position][other] and sure[other] and name.endswith(f" {other_name}")
        ]
        kept.append(shorter[0] if shorter else position)
    return kept
