"""The words of a text: how much each adds to the score, and which part of the image it finds, by leaving it out."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from .prompts import check_text


if TYPE_CHECKING:
    from .explanation import Explanation


# A word with its apostrophes and hyphens, a character of Chinese or Japanese, or punctuation.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+(?:['\u2019-]\w+)*|[^\w\s]+")


def find_words(text: str) -> list[re.Match]:
    """Returns the words and punctuation marks of a text."""
    return [*_WORD.finditer(check_text(text))]


def without_each_word(text: str) -> list[str]:
    """Returns a text, and for each of its words and punctuation marks the text without it."""
    words = find_words(text)
    return [text, *(f"{text[: word.start()].rstrip()} {text[word.end() :].lstrip()}".strip() for word in words)]


def explain_words(explanation: Explanation) -> Explanation:
    """
    Converts the explanation of the texts of [`without_each_word`] to that of the words. The score of a word is the
    score that the text loses without it. Its map is what the raw map of the text loses: for maps of cosines, the map
    of the difference of both texts. Words have no presence.
    """
    scores, raw, unrefined = explanation.scores, explanation.raw_maps, explanation.unrefined_maps
    return replace(
        explanation,
        labels=[word.group() for word in find_words(explanation.labels[0])],
        scores=scores[:1] - scores[1:],
        presence=None,
        raw_maps=raw[:1] - raw[1:],
        unrefined_maps=None if unrefined is None else unrefined[:1] - unrefined[1:],
        all_scores=None,
        sentence=explanation.labels[0],
    )
