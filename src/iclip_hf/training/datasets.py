"""
Data sets for [`ICLIPTrainer`] beside those of [`~iclip_hf.data.load_pairs`]: cached pairs, streamed ones, other rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import chain, count

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Subset
from tqdm import tqdm

from ..data.columns import PairTexts
from ..data.epochs import Epochs
from ..data.formats.source import PackedRows
from ..data.nouns import ImageNouns
from ..data.pairs import BadPairError, PairDataset
from ..data.streams import PairStream
from ..data.wrappers import leaves, without_subsets
from .collator import PairCollator
from .features import FeatureCache


logger = logging.getLogger(__name__)


class CachedPairs(Epochs, Dataset):
    """
    Pairs with the features of their images, computed unless the cache has them, and what a collator needs of their
    texts. Pairs with a broken image or no caption are left out. `indices` are the indices in `pairs` of the pairs that
    are kept.

    Args:
        pairs: the pairs, which can be inside of torch's `Subset`.
        cache: the features of images and, if the collator has `text_features`, of captions.
        collator: makes the batches.

    Raises:
        `ValueError`: too many pairs are bad.
    """

    def __init__(self, pairs: PairDataset | Subset, cache: FeatureCache, collator: PairCollator):
        self.pairs = pairs = without_subsets(pairs)
        self.seed, self._cache = pairs.seed, cache
        distinct, rows = pairs.distinct()  # a row is an index in `distinct`; `rows` has that of each pair
        record_indices = cache.images(distinct)
        self._texts = PackedRows()  # captions and nouns, of each distinct pair
        for row in tqdm(range(len(distinct)), "Texts", unit="pair", delay=2, leave=False):
            texts = _texts_of(distinct, row) if record_indices[row] >= 0 else PairTexts([])
            if not texts.captions:
                record_indices[row] = -1
            self._texts.append([*collator.read(texts).values()])
        if bad := int((record_indices < 0).sum()):
            logger.warning("%d of %d pairs are left out, as logged here", bad, len(distinct))
        if bad > pairs.max_bad_share * len(distinct):
            raise ValueError(f"max_bad_share: {bad} of {len(distinct)} pairs are bad; fix the data or raise it.")
        self.indices = np.flatnonzero(record_indices[rows] >= 0)  # among all pairs
        self._rows = rows[self.indices]
        self._record_indices = record_indices[self._rows]
        if collator.text_features is not None:
            cache.texts(chain.from_iterable(captions for captions, _ in self._texts))

    def __len__(self) -> int:
        return len(self.indices)

    def captions(self, index: int) -> list[str]:
        return self._texts[self._rows[index]][0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Returns `features`, a record of named arrays, `captions`, `nouns` and `draw` of these pairs."""
        items = []
        for index, features in zip(indices, self._cache.features(self._record_indices[indices])):
            captions, nouns = self._texts[self._rows[index]]
            texts = {"captions": captions, "nouns": nouns and ImageNouns(*nouns)}
            items.append({"features": features, **texts, "draw": (self.seed, self.epoch, int(self.indices[index]))})
        return items

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]


def _texts_of(pairs: PairDataset, row: int) -> PairTexts:
    try:
        return pairs.raw(row).texts
    except BadPairError as error:
        logger.warning("Left out: %s", error)
        return PairTexts([])


# Difference between the numbers of two passes of an epoch. The first pass has the number of the epoch. There are fewer
# epochs than this, so no two epochs have a pass of one number.
_PASSES = 2**32


class StreamedPairs(Epochs, IterableDataset):
    """
    A stream of pairs without end, in epochs of a fixed length. A pass is followed by another one in another order.

    Args:
        stream: this process's part of the pairs.
        num_pairs: number of pairs in an epoch of this process.

    Raises:
        `ValueError`: during iteration, the stream has no pairs.
    """

    def __init__(self, stream: PairStream, num_pairs: int):
        self.stream, self._num_pairs = stream, num_pairs

    def __len__(self) -> int:
        return self._num_pairs

    def __iter__(self) -> Iterator[dict]:
        first = self.epoch
        for number in count():
            pair = None
            for pair in self.stream.one_pass(first + number * _PASSES):
                yield pair
            if pair is None:
                raise ValueError("data: this process's part of the stream has no pairs.")


class NumberedRows(Epochs, Subset):
    """
    All rows of a data set. A row without a `draw` gets one for a [`PairCollator`]: seed, epoch and index of the row.
    """

    def __init__(self, rows: Dataset | Sequence, seed: int):
        super().__init__(rows, range(len(rows)))
        self.seed = seed

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        rows = zip(indices, super().__getitems__(indices))
        return [{"draw": (self.seed, self.epoch, index), **row} for index, row in rows]


def are_pairs(data) -> bool:
    """Whether all items are those of a [`~iclip_hf.data.pairs.PairDataset`], or of [`CachedPairs`]."""
    return all(isinstance(leaf, (PairDataset, CachedPairs)) for leaf in leaves(data))
