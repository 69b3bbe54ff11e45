"""Noun prompts: the nouns of an image's captions as additional texts, as in GroupViT."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence, Set
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .class_names import SAME_CLASS
from .files import read_text


if TYPE_CHECKING:
    from .columns import PairTexts


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
PROMPTS_PER_IMAGE = 3  # as in GroupViT
# In captions, this word is more often the colour than the fruit, except as the last word: "a photo of an orange".
_COLOUR = "orange"
# A noun and its marks: "sky (background) (above)", "yurt (3)" of a noun that three training photographs show.
_LINE = re.compile(r"([^()#,;\x00-\x1f]+?)\s*((?:\((?:background|above|below|class|\d+)\)\s*)*)")

# For each name of a class, all names of the class.
_SAME_CLASS = {name: frozenset(names) for names in SAME_CLASS for name in names}


def marked_nouns(lines: Sequence[str]) -> dict[str, str]:
    """
    Returns the nouns of a vocabulary in lower case, each with its marks. Blank lines are skipped. Raises `ValueError`
    for a line that is not a noun with its marks, for a noun that is both above and below, and for a repeated noun.
    """
    marks_by_noun = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line.strip().lower())
        noun, marks = found.groups() if found else ("", "")
        if not _name(noun) or ("above" in marks and "below" in marks):
            raise ValueError(
                f'line {number}: {line!r:.100} is not a noun with its marks, such as "sky (background) (above)"; '
                "correct or remove it."
            )
        if noun in marks_by_noun:
            raise ValueError(f"line {number}: {noun!r} is in an earlier line too; remove one of these lines.")
        marks_by_noun[noun] = marks
    return marks_by_noun


class ImageNouns(NamedTuple):
    """
    The nouns that an image is known to show or not to show, as sorted indices in the vocabulary. Other nouns are
    unknown. Complete labels deny a noun that `complete` names and `labels` do not.

    Attributes:
        shown: nouns that labels name, and nouns that captions name and complete labels do not deny.
        absent: nouns that complete labels deny and no caption names.
        captions: captions of the image, which the sampled prompts depend on.
        class_probabilities: positions in `NounPrompts.class_nouns`, each with the probability of the class.
    """

    shown: list[int]
    absent: list[int]
    captions: Sequence[str]
    class_probabilities: Sequence[tuple[int, float]] = ()


class NounPrompts:
    """
    Samples noun prompts for images. The prompts depend only on (seed, epoch, captions, nouns shown).

    Args:
        nouns: the vocabulary: nouns of one or several words, in the singular, each with its marks. "(background)"
            marks what is behind or below objects; "(above)" and "(below)" mark what images show above or below most
            other nouns: "sky (background) (above)", "floor (background) (below)". "(class)" marks a class of the
            classifier that gave the `class_probabilities` of images. A number, "(3)", counts the training photographs
            that show the noun. It has no effect on prompts.
        seed: seed of the prompts.
    """

    def __init__(self, nouns: Sequence[str], seed: int = 0):
        marks_by_noun = marked_nouns(nouns)
        self.nouns, marks_of_nouns = list(marks_by_noun), list(marks_by_noun.values())
        places = [("below" in marks) - ("above" in marks) for marks in marks_of_nouns]
        # Arrays over the vocabulary. A batch has the values of the nouns of its prompts, see `BatchNouns`.
        self.marks = {
            "is_background": np.array(["background" in marks for marks in marks_of_nouns]),
            "place": np.array(places, np.int8),
        }
        self.class_nouns = [index for index, marks in enumerate(marks_of_nouns) if "class" in marks]
        self._class_positions = {index: position for position, index in enumerate(self.class_nouns)}
        self.seed = seed
        if not self.nouns:
            raise ValueError("Expected at least one noun, got none: add nouns to the vocabulary.")
        # Split into words as captions are: "carpenter's kit" has three.
        singular = [*map(_name, self.nouns)]
        self._by_form = {noun: index for index, noun in enumerate(singular)}
        for index, noun in enumerate(singular):
            for plural in _plurals(noun):
                self._by_form.setdefault(plural, index)
        self._max_words = max(len(noun.split()) for noun in singular)
        self._prompts = frozenset(self.all_prompts())

    @classmethod
    def from_file(cls, path: str | Path, seed: int = 0) -> NounPrompts:
        """Reads the vocabulary from a text file with one noun in each line. Errors name the file."""
        lines = read_text(Path(path)).splitlines()
        try:
            return cls(lines, seed)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def all_prompts(self) -> list[str]:
        """Returns all possible prompts."""
        return [template.format(noun) for noun in self.nouns for template in TEMPLATES]

    def sentences(self, captions: Sequence[str]) -> Sequence[str]:
        """
        Leaves out captions that are noun prompts, such as "a photo of an oven", because the noun loss has their nouns
        anyway. Returns all captions if all are noun prompts.
        """
        return [caption for caption in captions if caption.replace(" an ", " a ") not in self._prompts] or captions

    def nouns_in(self, caption: str, phrases: Collection[str] = ()) -> set[int]:
        """
        Returns the indices of the nouns that a caption names, in the singular or plural. A word belongs to the longest
        noun that contains it: a hot dog is no dog, and "laptop computer" is no laptop. If two nouns of the same length
        overlap, the right one counts: a "city bus stop" is a bus stop.

        Args:
            caption: the text.
            phrases: other names of several words, in lower case. A noun within such a name does not count.
        """
        words = _words(caption)
        free_positions, nouns = set(range(len(words))), set()
        max_words = max([self._max_words, *(len(phrase.split()) for phrase in phrases)])
        for length in range(max_words, 0, -1):
            for start in range(len(words) - length, -1, -1):
                end = start + length
                name = " ".join(words[start:end])
                is_noun = name in self._by_form and (name != _COLOUR or end == len(words))
                if (is_noun or name in phrases) and free_positions.issuperset(range(start, end)):
                    free_positions.difference_update(range(start, end))
                    if is_noun:
                        nouns.add(self._by_form[name])
        return nouns

    def known_nouns(
        self,
        captions: Sequence[str],
        labels: Sequence[str] = (),
        complete: Sequence[str] = (),
        class_probabilities: Mapping[str, float] = MappingProxyType({}),
    ) -> ImageNouns:
        """
        Returns what the texts of an image say about its nouns, see [`~iclip_hf.data.columns.PairTexts`]. A noun that
        a caption names and complete labels deny is unknown. In captions, the words of a label, or of a name in
        `complete`, name no other noun, even if the vocabulary lacks the name. A label stands for all names of its
        class: VOC's "tvmonitor" is the "tv" of COCO's names in `complete`. Probabilities of names that are not
        among the `class_nouns` are ignored.
        """
        listed = {*map(_name, complete)}
        labelled = {name for label in labels for name in _names_of(label, listed)}
        other_names = (name for name in labelled | listed if " " in name and name not in self._by_form)
        phrases = {form for name in other_names for form in (name, *_plurals(name))}
        captioned = {noun for caption in captions for noun in self.nouns_in(caption, phrases)}
        shown, denied = self._indices(labelled), self._indices(listed) - self._indices(labelled)
        known_classes = []
        for name, probability in class_probabilities.items():
            noun = self._by_form.get(_name(name))
            if noun in self._class_positions:
                known_classes.append((self._class_positions[noun], probability))
        return ImageNouns(sorted(shown | (captioned - denied)), sorted(denied - captioned), captions, known_classes)

    def _indices(self, names: Set[str]) -> set[int]:
        return {self._by_form[name] for name in names & self._by_form.keys()}

    def unknown_labels(self, texts: PairTexts) -> set[str]:
        """
        Returns the labels of an image that are neither in its `complete` nor in the vocabulary. They teach nothing.
        """
        listed = {*map(_name, texts.complete)}
        return {
            label
            for label in texts.labels
            if not any(name in listed or name in self._by_form for name in _names_of(label, listed))
        }

    def sample(self, images: Sequence[ImageNouns], epoch: int) -> tuple[list[str], dict[str, np.ndarray]]:
        """
        Samples prompts for B images. An image without nouns gets prompts of random nouns.

        Returns:
            `tuple`: a list of prompts, 3 B grouped by image, then one for each of the K `class_nouns`; and a `dict` of
            arrays: `noun_ids` (3 B,), the index of the noun of each prompt of an image; `noun_labels` (B, vocabulary),
            1 for a noun that an image shows, -1 for a noun that it is known not to show, else 0; `is_background`
            (3 B,), boolean; `place` (3 B,), -1 for a noun above others, 1 for a noun below, else 0. In a vocabulary
            with classes, also `class_ids` (K,), the indices of their nouns, and `class_probabilities` (B, K), float32.
        """
        prompts, sampled = [], []
        noun_labels = np.zeros((len(images), len(self.nouns)), np.int8)
        for image, image_labels in zip(images, noun_labels):
            rng = random.Random(f"{self.seed}/{epoch}/{image.captions}")
            image_labels[image.shown], image_labels[image.absent] = 1, -1
            for _ in range(PROMPTS_PER_IMAGE):
                noun = rng.choice(image.shown or range(len(self.nouns)))
                sampled.append(noun)
                prompts.append(rng.choice(TEMPLATES).format(self.nouns[noun]))
        sampled = np.array(sampled)
        prompt_marks = {name: values[sampled] for name, values in self.marks.items()}
        arrays = {"noun_ids": sampled, "noun_labels": noun_labels, **prompt_marks}
        if self.class_nouns:
            rng = random.Random(f"{self.seed}/{epoch}/{images[0].captions}")
            prompts += [rng.choice(TEMPLATES).format(self.nouns[noun]) for noun in self.class_nouns]
            arrays["class_ids"] = np.array(self.class_nouns)
            arrays["class_probabilities"] = np.zeros((len(images), len(self.class_nouns)), np.float32)
            for image, image_probabilities in zip(images, arrays["class_probabilities"]):
                for position, probability in image.class_probabilities:
                    # A name and its plural are one noun, and may be sure both.
                    image_probabilities[position] = min(image_probabilities[position] + probability, 1)
        return prompts, arrays


def _name(text: str) -> str:
    """Returns a name as the vocabulary holds it for searches: words in lower case."""
    return " ".join(_words(text))


def _names_of(label: str, listed: Set[str]) -> set[str]:
    """Returns the name of a label, and the `listed` names of its class in other data sets."""
    name = _name(label)
    return {name, *(_SAME_CLASS.get(name, frozenset()) & listed)}


@lru_cache(2**12)  # many images have the same names
def _words(text: str) -> tuple[str, ...]:
    # Composed, because file names of macOS have decomposed letters.
    composed = unicodedata.normalize("NFC", text.lower())
    without_signs = "".join(character if _is_in_word(character) else " " for character in composed)
    return tuple(without_signs.split())


def _is_in_word(character: str) -> bool:
    """Returns whether a character is a letter, a digit or a mark of a letter, such as a vowel of Thai."""
    category, is_of_emoji = unicodedata.category(character), "\ufe00" <= character <= "\ufe0f"
    return category[0] in "LN" or (category in ("Mn", "Mc") and not is_of_emoji)


def _plurals(noun: str) -> list[str]:
    """Returns possible plurals of a noun. Forms that are not words do not occur in captions."""
    endings = (("", "s"), ("", "es"), ("y", "ies"), ("man", "men"), ("f", "ves"), ("fe", "ves"), ("child", "children"))
    endings += (("person", "people"), ("foot", "feet"), ("tooth", "teeth"), ("goose", "geese"), ("mouse", "mice"))
    return [noun.removesuffix(singular) + plural for singular, plural in endings if noun.endswith(singular)]
