"""The columns of a row: captions of an image, and labels of what it shows."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from numbers import Number
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from .class_names import CLASS_NAMES


# Columns of the image's path and of the captions, in order of preference: the first column with a value is used.
# "captions" is usually a list, all others are text. Members of a shard become the columns "txt" and "json".
IMAGE_COLUMNS = ("image", "file_name", "image_path", "filepath", "path")
CAPTION_COLUMNS = ("captions", "txt", "caption", "text", "title")
# Lists of names and an object of probabilities, see `PairTexts`; `complete` may name a list of `CLASS_NAMES`.
LABEL_COLUMNS = ("labels", "complete", "class_probabilities")
_LIST = re.compile(r"""\s*\[\s*["'].*["']\s*\]\s*""", re.DOTALL)  # a list of texts, written as text


class Columns(NamedTuple):
    """Names of the columns that may hold the image and the captions, in the order of preference."""

    image: tuple[str, ...] = IMAGE_COLUMNS
    caption: tuple[str, ...] = CAPTION_COLUMNS

    @classmethod
    def named(cls, image: str | None = None, caption: str | None = None) -> Columns:
        """Returns the columns with these names, and the usual columns where no name is given."""
        return cls((image,) if image else IMAGE_COLUMNS, (caption,) if caption else CAPTION_COLUMNS)

    def check(self, where: str | os.PathLike, names: Iterable[str]) -> None:
        """Raises `ValueError` if a table has no column for the image or none for the captions."""
        for kind, wanted in zip(("image", "caption"), self):
            if not set(wanted) & set(names):
                raise ValueError(
                    f"{where}: no column for the {kind} ({' or '.join(map(repr, wanted))}) is among "
                    f"{', '.join(map(repr, names))}; add a header line, or name the column by --{kind}_column."
                )

    def texts(self, row: Mapping) -> PairTexts:
        """
        Returns the captions of the first column with text, if there is one, and the labels. Raises `ValueError` for
        labels, `complete` or `class_probabilities` of another form.
        """
        parts = [row]
        if isinstance(row.get("json"), Mapping):  # of a shard
            parts.append(row["json"])

        def first_value(column: str):
            return next((part[column] for part in parts if not _is_empty(part.get(column))), None)

        caption_lists = (_texts(column, part.get(column)) for column in self.caption for part in parts)
        captions = next(filter(None, caption_lists), [])
        labels, complete, probabilities = map(first_value, LABEL_COLUMNS)
        if isinstance(complete, str) and not complete.lstrip().startswith("["):
            if complete.lower() not in CLASS_NAMES:
                raise ValueError(
                    f"complete: {complete!r:.100} is neither a list of names nor one of {', '.join(CLASS_NAMES)}"
                )
            complete = [complete]
        label_names, complete_names = _names("labels", labels), _names("complete", complete)
        if complete_names and label_names is None:  # all names in `complete` would count as absent
            raise ValueError(
                f"labels: {labels!r:.100} is no list of names, which complete needs; an image that shows none of them "
                "has the list []"
            )
        complete_for = chain.from_iterable(CLASS_NAMES.get(name.lower(), (name,)) for name in complete_names or ())
        class_probabilities = _probabilities("class_probabilities", probabilities)
        return PairTexts(captions, label_names or [], [*complete_for], class_probabilities)


USUAL_COLUMNS = Columns()


class PairTexts(NamedTuple):
    """
    Captions and labels of an image.

    Attributes:
        captions: all captions; may be empty.
        labels: names of what the image shows.
        complete: names that the labels are complete for. The image does not show a name of this list that is not among
            the labels.
        class_probabilities: the probability that the image shows a class of a classifier, by the name of the class.
    """

    captions: Sequence[str]
    labels: Sequence[str] = ()
    complete: Sequence[str] = ()
    class_probabilities: Mapping[str, float] = MappingProxyType({})

    @classmethod
    def joined(cls, parts: Iterable[PairTexts]) -> PairTexts:
        """Joins the texts of several rows. A repeated text is kept once."""
        captions, labels, complete, probabilities = zip(*parts)
        distinct = ([*dict.fromkeys(chain(*lists))] for lists in (captions, labels, complete))
        return cls(*distinct, dict(chain.from_iterable(by_name.items() for by_name in probabilities)))


def sample_caption(captions: list[str], seed: int, epoch: int, key: int | str) -> str:
    """Samples one of the captions of an image. The choice depends only on seed, epoch and key."""
    return random.Random(f"{seed}/{epoch}/{key!r}").choice(captions) if len(captions) > 1 else captions[0]


def _texts(column: str, value) -> list[str]:
    """Returns the stripped texts in a value of a caption column; an empty list if there are none."""
    parsed = _parsed(column, value)
    if isinstance(value, str) and isinstance(parsed, Number):
        parsed = value  # a caption such as "1984" or "true"
    items = parsed if isinstance(parsed, list) else [parsed]
    # Captions in JSON can be numbers or booleans. NaN is a missing value.
    items = [json.dumps(text) if isinstance(text, (int, float)) and text == text else text for text in items]
    texts = (_stripped(text) for text in items if isinstance(text, str))
    return [text for text in texts if text]


def _names(column: str, value) -> list[str] | None:
    """
    Returns the names in a value of a label column. An item "dog, cat" is two names. Returns None for an empty value
    and for numbers, such as class ids. Raises `ValueError` for any other value that is not a list of names.
    """
    parsed = _parsed(column, value)
    if _is_empty(parsed) or isinstance(parsed, Number):
        return None
    if isinstance(parsed, list) and all(isinstance(item, str) for item in parsed):
        names = (_stripped(name) for item in parsed for name in item.split(","))
        return [name for name in names if name]
    if isinstance(parsed, list) and all(isinstance(item, Number) for item in parsed):
        return None
    raise ValueError(f'{column}: {value!r:.100} is no list of names, such as ["dog"]')


def _probabilities(column: str, value) -> dict[str, float]:
    """
    Returns the probabilities by name; an empty `dict` for an empty value. Names without a value are left out, because
    Arrow stores every name in every row. Raises `ValueError` if the value is no object of names and probabilities.
    """
    parsed = _parsed(column, value)
    if _is_empty(parsed):
        return {}
    if isinstance(parsed, Mapping):
        numbers = {_stripped(name): number for name, number in parsed.items() if number is not None}
        if all(isinstance(number, Number) for number in numbers.values()):
            # Arrow also has decimals, which numpy cannot add to floats.
            probabilities = {name: float(number) for name, number in numbers.items()}
            if all(0 <= probability <= 1 for probability in probabilities.values()):
                return probabilities
    raise ValueError(f'{column}: {value!r:.100} is no object of names and probabilities, such as {{"dog": 0.9}}')


def _parsed(column: str, value):
    """
    Returns a value with lists for tuples and arrays. JSON that is written as text, as in a .csv, is parsed: lists in
    any column, and any text in "captions" and in the label columns. Other text stays as it is. Raises `ValueError` for
    a list that is not JSON, such as one printed by Python.
    """
    if isinstance(value, np.ndarray):
        return value.tolist()
    if not isinstance(value, str):
        return [*value] if isinstance(value, tuple) else value
    is_list = _LIST.fullmatch(value)
    if not is_list and column not in ("captions", *LABEL_COLUMNS):
        return value
    try:
        return json.loads(value)
    except ValueError:
        if is_list:
            raise ValueError(f'{column}: {value!r:.100} is no list in JSON, such as ["a dog"]') from None
        return value


def _is_empty(value) -> bool:
    return value is None or (isinstance(value, str) and value == "")


def _stripped(text: str) -> str:
    # JSON escapes can contain lone surrogates, which tokenizers refuse. Text files of Windows can begin with a byte
    # order mark.
    return text.encode(errors="ignore").decode("utf-8-sig").strip()
