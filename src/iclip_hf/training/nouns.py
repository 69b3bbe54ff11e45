"""Noun prompts: the nouns of an image's captions as additional texts, as in GroupViT."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch


TEMPLATES = (
    "a photo of the {}",
    "a photo of a {}",
    "a picture of a {}",
    "a photo of many {}",
    "a close-up of the {}",
    "a photo of a small {}",
    "a photo of a large {}",
    "there is a {} in the photo",
)
_BACKGROUND = "(background)"


class NounPrompts:
    """
    Samples noun prompts for images. The prompts depend only on (seed, epoch, captions).

    Args:
        nouns: the vocabulary: nouns of one or several words, in the singular. Those of the background, which is behind or below
            objects, are marked: "sky (background)".
        count: number of prompts for each image.
        seed: seed of the prompts.

    Raises:
        `ValueError`: the vocabulary is empty.
    """

    def __init__(self, nouns: Sequence[str], count: int = 3, seed: int = 0):
        lines = [noun.strip().lower() for noun in nouns if noun.strip()]
        marked = {line.removesuffix(_BACKGROUND).rstrip(): line.endswith(_BACKGROUND) for line in lines}
        self.nouns, self.is_background = list(marked), torch.tensor([*marked.values()], dtype=torch.uint8)
        self.count, self.seed = count, seed
        if not self.nouns:
            raise ValueError("Expected at least one noun, got none: add nouns to the vocabulary.")
        # As `find` reads captions: "carpenter's kit" is three words.
        singular = [" ".join(_words(noun)) for noun in self.nouns]
        self._by_form = {noun: number for number, noun in enumerate(singular)}
        for number, noun in enumerate(singular):
            for plural in _plurals(noun):
                self._by_form.setdefault(plural, number)
        self._longest = max(len(noun.split()) for noun in singular)
        self._prompts = frozenset(self.all_prompts())

    @classmethod
    def from_file(cls, path: str | Path, count: int = 3, seed: int = 0) -> NounPrompts:
        """Reads the vocabulary from a text file with one noun in each line."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: expected a UTF-8 text file with a noun in each line, but got: {error}; correct it or name another."
            ) from error
        return cls(lines, count, seed)

    def all_prompts(self) -> list[str]:
        """Returns all possible prompts."""
        return [template.format(noun) for noun in self.nouns for template in TEMPLATES]

    def sentences(self, captions: Sequence[str]) -> Sequence[str]:
        """
        Returns the captions that are no noun prompts, such as "a photo of an oven", whose noun the noun loss has anyway. If there are
        no others, returns all.
        """
        return [caption for caption in captions if caption.replace(" an ", " a ") not in self._prompts] or captions

    def find(self, caption: str) -> set[int]:
        """Returns the indices of the nouns in a caption, including plural forms."""
        words = _words(caption)
        phrases = (
            " ".join(words[start : start + length])
            for length in range(1, self._longest + 1)
            for start in range(len(words) - length + 1)
        )
        return {self._by_form[phrase] for phrase in phrases if phrase in self._by_form}

    def draw(self, captions: Sequence[Sequence[str]], epoch: int) -> tuple[list[str], dict[str, torch.Tensor]]:
        """
        Samples prompts for B images with all their captions.

        Returns:
            `tuple`: B * count prompts, grouped by image, and a `dict` of `noun_ids` (B * count,), the indices of their nouns,
            `is_background` (B * count,), 1 for those of the background, and `has_noun` (B, vocabulary), 1 for the nouns in the
            captions of an image. An image without nouns gets random prompts, which are negatives.
        """
        prompts, drawn = [], []
        has_noun = torch.zeros(len(captions), len(self.nouns), dtype=torch.uint8)
        for several, row in zip(captions, has_noun):
            draws = random.Random(f"{self.seed}/{epoch}/{several}")
            found = sorted({noun for caption in several for noun in self.find(caption)})
            row[found] = 1
            for _ in range(self.count):
                noun = draws.choice(found or range(len(self.nouns)))
                drawn.append(noun)
                prompts.append(draws.choice(TEMPLATES).format(self.nouns[noun]))
        drawn = torch.tensor(drawn)
        return prompts, {"noun_ids": drawn, "is_background": self.is_background[drawn], "has_noun": has_noun}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _plurals(noun: str) -> list[str]:
    """Returns possible plurals of a noun. Forms that are not words do not occur in captions."""
    endings = (("", "s"), ("", "es"), ("y", "ies"), ("man", "men"), ("f", "ves"), ("fe", "ves"))
    return [noun.removesuffix(single) + plural for single, plural in endings if noun.endswith(single)]
