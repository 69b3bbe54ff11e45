"""The words of a text: how much each adds to the score, and which part of the image it finds, by leaving it out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .prompts import check_text


if TYPE_CHECKING:
    from .explanation import Explanation


# A word with its apostrophes and hyphens, a character of Chinese or Japanese, or punctuation.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+(?:['\u2019-]\w+)*|[^\w\s]+")


def without_each_word(text: str) -> tuple[list[str], list[str]]:
    """Returns the words and punctuation marks of a text, and for each the text without it."""
    matches = [*_WORD.finditer(check_text(text))]
    shorter = [f"{text[: match.start()].rstrip()} {text[match.end() :].lstrip()}".strip() for match in matches]
    return [match.group() for match in matches], shorter


def explain_words(explanation: Explanation, words: Sequence[str]) -> Explanation:
    """
    Converts the explanation of a text and of the text without each word, in this order, to that of the words. The
    score of a word is the score that the text loses without it. Its map is what the raw map of the text loses: for
    maps of cosines, the map of the difference of both texts. Words have no presence.
    """
    scores, raw, unrefined = explanation.scores, explanation.raw_maps, explanation.unrefined_maps
    return replace(
        explanation,
        labels=[*words],
        scores=scores[:1] - scores[1:],
        presence=None,
        raw_maps=raw[:1] - raw[1:],
        unrefined_maps=None if unrefined is None else unrefined[:1] - unrefined[1:],
        all_scores=None,
    )
