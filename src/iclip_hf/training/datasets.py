"""Pairs for [`ICLIPTrainer`] beside those of [`~iclip_hf.data.load_pairs`]: with cached features, and streamed."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from ..data.columns import PairTexts
from ..data.pairs import BadPairError, PairDataset
from ..data.streams import PairStream
from .collator import PairCollator
from .features import FeatureCache


logger = logging.getLogger(__name__)


class CachedPairs(Dataset):
    """
    Pairs with the features of their images, computed unless the cache has them, and what a collator needs of their
    texts. Pairs with a broken image or no caption are left out. `indices` are those of the others among all `pairs`.

    Args:
        pairs: the pairs.
        cache: of the features of images and, if the collator takes its features of texts, also of captions.
        collator: of the batches.

    Raises:
        `ValueError`: too many pairs are bad.
    """

    def __init__(self, pairs: PairDataset, cache: FeatureCache, collator: PairCollator):
        self.pairs, self._cache, self._epoch = pairs, cache, 0
        distinct, rows = pairs.distinct()
        places, digests = cache.images(distinct).tolist(), distinct.image_digests()
        texts = {row: _texts_of(distinct, row) for row, place in enumerate(places) if place >= 0}
        texts = {row: of_row for row, of_row in texts.items() if of_row.captions}
        if bad := len(distinct) - len(texts):
            logger.warning("%d of %d pairs are left out, as logged here", bad, len(distinct))
        if bad > pairs.max_bad_share * len(distinct):
            raise ValueError(f"max_bad_share: {bad} of {len(distinct)} pairs are bad; fix the data or raise it.")
        self.indices = [index for index, row in enumerate(rows.tolist()) if row in texts]  # among all pairs
        of_rows = {
            row: {"place": places[row], "digest": digests[row], **collator.read(of_row)}  # slow: nouns
            for row, of_row in texts.items()
        }
        self._items = [of_rows[rows[index]] for index in self.indices]
        if collator.text_features is not None:
            cache.texts(caption for of_row in texts.values() for caption in of_row.captions)

    def __len__(self) -> int:
        return len(self._items)

    def image_digests(self) -> list[bytes]:
        return [item["digest"] for item in self._items]

    def texts(self) -> list[list[str]]:
        """Returns the captions of each pair."""
        return [item["captions"] for item in self._items]

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __getitems__(self, places: Sequence[int]) -> list[dict]:
        """Returns `features`, a record of named arrays, `captions`, `nouns` and `draw` of these pairs."""
        items = [self._items[place] for place in places]
        features = self._cache.features(np.array([item["place"] for item in items]))
        draws = ((self._epoch, self.indices[place]) for place in places)
        return [{**item, "features": row, "draw": draw} for item, row, draw in zip(items, features, draws)]

    def __getitem__(self, place: int) -> dict:
        return self.__getitems__([place])[0]


def _texts_of(pairs: PairDataset, row: int) -> PairTexts:
    try:
        return pairs.raw(row).texts
    except BadPairError as error:
        logger.warning("Left out: %s", error)
        return PairTexts([])


class StreamedPairs(IterableDataset):
    """
    A stream of pairs without end, in epochs of a fixed length. A pass is followed by another one in another order.

    Args:
        stream: this process's part of the pairs.
        pairs: number of pairs in an epoch of this process.

    Raises:
        `ValueError`: during iteration, the stream has no pairs.
    """

    def __init__(self, stream: PairStream, pairs: int):
        self.stream, self._pairs, self._first = stream, pairs, 0

    def __len__(self) -> int:
        return self._pairs

    def set_epoch(self, epoch: int) -> None:
        """Sets on what the order of the next passes depends."""
        self._first = epoch

    def __iter__(self) -> Iterator[dict]:
        for number in itertools.count():
            self.stream.set_epoch(self._first + number * _PASSES)
            pair = None
            for pair in self.stream:
                yield pair
            if pair is None:
                raise ValueError("data: this process's part of the stream has no pairs.")


_PASSES = 2**32  # more than any number of steps, by which epochs are numbered
