"""Noun prompts: the nouns of an image's captions as further texts of it, as in GroupViT."""

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


class NounPrompts:
    """
    Draws prompts for images; what it draws depends on (seed, epoch, captions) alone.

    Args:
        nouns: the vocabulary, in the singular, of one or several words each.
        count: prompts an image.
        seed: of the draws.

    Raises:
        `ValueError`: there is no noun.
    """

    def __init__(self, nouns: Sequence[str], count: int = 3, seed: int = 0):
        self.nouns = list(dict.fromkeys(noun.strip().lower() for noun in nouns if noun.strip()))
        self.count, self.seed = count, seed
        if not self.nouns:
            raise ValueError("Expected at least one noun, got none.")
        self._by_form = {noun: number for number, noun in enumerate(self.nouns)}
        for number, noun in enumerate(self.nouns):
            for plural in _plurals(noun):
                self._by_form.setdefault(plural, number)
        self._longest = max(len(noun.split()) for noun in self.nouns)

    @classmethod
    def from_file(cls, path: str | Path, count: int = 3, seed: int = 0) -> NounPrompts:
        """The vocabulary of a text file, one noun a line."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: expected a UTF-8 text file with a noun a line, but got: {error}; correct it or name another."
            ) from error
        return cls(lines, count, seed)

    def all_prompts(self) -> list[str]:
        """Every prompt that may be drawn."""
        return [template.format(noun) for noun in self.nouns for template in TEMPLATES]

    def find(self, caption: str) -> set[int]:
        """The nouns in a caption by number, plural forms included."""
        words = re.findall(r"\w+", caption.lower())
        phrases = (
            " ".join(words[start : start + length])
            for length in range(1, self._longest + 1)
            for start in range(len(words) - length + 1)
        )
        return {self._by_form[phrase] for phrase in phrases if phrase in self._by_form}

    def draw(self, captions: Sequence[Sequence[str]], epoch: int) -> tuple[list[str], dict[str, torch.Tensor]]:
        """
        Args:
            captions: all captions of each of B images.
            epoch: other epochs draw other prompts.

        Returns:
            `tuple`: B * count prompts, those of an image together, and `noun_ids` (B * count,), their nouns by number, with
            `has_noun` (B, vocabulary), which nouns an image's captions have. An image without nouns brings others, as
            negatives.
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
        return prompts, {"noun_ids": torch.tensor(drawn), "has_noun": has_noun}


def _plurals(noun: str) -> list[str]:
    """What may be the plural of a noun; a form that is no word is in no caption."""
    endings = (("", "s"), ("", "es"), ("y", "ies"), ("man", "men"), ("f", "ves"), ("fe", "ves"))
    return [noun.removesuffix(single) + plural for single, plural in endings if noun.endswith(single)]
