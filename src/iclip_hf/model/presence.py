"""
Presence: the probability that an image shows a text ([`ICLIPModel.presence`]). A map does not show this, because
it is stretched to [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real


# Prior of the presence of a model: half of the texts are assumed to be shown.
EVEN_PRIOR = 0.5
# From this presence on, a text counts as shown; below, its mask is empty.
MIN_PRESENCE = 0.5
# From this presence on, the word for a text is "present"; between `MIN_PRESENCE` and this one, it is "unsure".
SURE_PRESENCE = 0.8
ABSENT = "absent"  # the word below `MIN_PRESENCE`


def at_prior(presence, prior: float):
    """
    Converts presence, an array or tensor in [0, 1], from a prior of 0.5 to the prior `prior` (Bayes' rule). The prior
    is the probability that a text is shown, before the image is seen.
    """
    return presence * prior / (presence * prior + (1 - presence) * (1 - prior))


def check_priors(priors: Mapping[str, float]) -> None:
    """Raises `ValueError` unless the prior of each text is a number between 0 and 1."""
    for text, prior in priors.items():
        if not (isinstance(prior, Real) and 0 < prior < 1):
            raise ValueError(f"The prior of {text!r:.100} is a number between 0 and 1, not {prior!r:.100}.")


def is_present(presence: float | None, min_presence: float = MIN_PRESENCE) -> bool:
    """
    Returns whether a text counts as shown: its presence is at least `min_presence`, or None because the model has no
    presence. Its [`presence_word`] is then "present" or "unsure". NaN counts as absent. The numbers are compared in
    double precision, so a presence of 0.7 in float32 is less than a `min_presence` of 0.7.
    """
    return presence is None or presence >= min_presence


def check_min_presence(min_presence: float) -> None:
    """Raises `ValueError` unless `min_presence` is in [0, 1]."""
    if not 0 <= min_presence <= 1:
        raise ValueError(f"min_presence is a number in [0, 1], not {min_presence!r:.100}.")


def presence_word(value: float | None, min_presence: float = MIN_PRESENCE) -> str | None:
    """
    Returns `"absent"` for a presence below `min_presence`, otherwise `"present"` from 0.8 on and `"unsure"` below.
    Returns None for None, which stands for a model without presence.
    """
    if value is None:
        return None
    if not is_present(value, min_presence):
        return ABSENT
    return "present" if value >= SURE_PRESENCE else "unsure"


def presence_text(value: float | None, min_presence: float = MIN_PRESENCE) -> str:
    """
    Returns the word and the number of a presence, such as "present 0.93", or an empty string for None. The number is
    rounded down if the rounded number would have another word: 0.499 becomes "absent 0.49".
    """
    if value is None:
        return ""
    word = presence_word(value, min_presence)
    if presence_word(round(value, 2), min_presence) != word:
        value -= 0.005
    return f"{word} {value:.2f}"
