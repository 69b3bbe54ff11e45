"""
Data sets for [`ICLIPTrainer`] beside those of [`~iclip_hf.data.load_pairs`]: cached pairs, streamed pairs, other rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import chain, count

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Subset
from tqdm import tqdm

from ..data.columns import PairTexts
from ..data.formats.source import PackedRows
from ..data.items import Epochs
from ..data.nouns import ImageNouns
from ..data.pairs import BadPairError, PairDataset
from ..data.streams import PairStream
from ..data.wrappers import leaves, without_subsets
from .collator import PairCollator
from .features import FeatureCache


logger = logging.getLogger(__name__)


class CachedPairs(Epochs, Dataset):
    """
    Pairs with cached features of their images, and with what a collator needs of their texts. Features that the cache
    lacks are computed at the start. Pairs with a broken image or no caption are left out. `indices` are the indices in
    `pairs` of the pairs that are kept.

    Args:
        pairs: the pairs, which can be inside of torch's `Subset`.
        cache: the features of images and, if the collator has `text_features`, of captions.
        collator: the collator that makes batches of the pairs.
    """

    def __init__(self, pairs: PairDataset | Subset, cache: FeatureCache, collator: PairCollator):
        self.pairs = pairs = without_subsets(pairs)
        self.seed, self._cache = pairs.seed, cache
        distinct, distinct_indices = pairs.distinct()
        record_indices = cache.fill_images(distinct)
        self._texts = PackedRows()  # captions and nouns, of each distinct pair
        for index in tqdm(range(len(distinct)), "Texts", unit="pair", delay=2, leave=False):
            texts = PairTexts([])
            if record_indices[index] >= 0:
                try:
                    texts = distinct.raw(index).texts
                except BadPairError as error:
                    logger.warning("Left out: %s", error)
            if not texts.captions:
                record_indices[index] = -1
            self._texts.append([*collator.read(texts).values()])
        if num_bad := int((record_indices < 0).sum()):
            logger.warning("%d of %d pairs are left out, each with a warning", num_bad, len(distinct))
        if num_bad > pairs.max_bad_share * len(distinct):
            raise ValueError(f"max_bad_share: {num_bad} of {len(distinct)} pairs are bad; fix the data or raise it.")
        self.indices = np.flatnonzero(record_indices[distinct_indices] >= 0)  # among all pairs
        self._distinct_indices = distinct_indices[self.indices]
        self._record_indices = record_indices[self._distinct_indices]
        if collator.text_features is not None:
            cache.fill_texts(chain.from_iterable(captions for captions, _ in self._texts))

    def __len__(self) -> int:
        return len(self.indices)

    def captions(self, index: int) -> list[str]:
        """Returns the captions of a kept pair that batches sample from, see [`PairCollator.read`]."""
        return self._texts[self._distinct_indices[index]][0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Returns `features`, a record of named arrays, `captions`, `nouns` and `draw` of these pairs."""
        items = []
        for index, features in zip(indices, self._cache.features(self._record_indices[indices])):
            captions, nouns = self._texts[self._distinct_indices[index]]
            texts = {"captions": captions, "nouns": nouns and ImageNouns(*nouns)}
            items.append({"features": features, **texts, "draw": (self.seed, self.epoch, int(self.indices[index]))})
        return items

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]


# The first pass of an epoch has the number of the epoch. For each further pass, this is added. It is more than the
# number of epochs, so that all passes have different numbers.
_PASS_STRIDE = 2**32


class StreamedPairs(Epochs, IterableDataset):
    """
    An endless stream of pairs, in epochs of a fixed length. After each pass over the pairs, another pass begins, in
    another order.

    Args:
        stream: this process's part of the pairs.
        num_pairs: number of pairs in an epoch of this process.
    """

    def __init__(self, stream: PairStream, num_pairs: int):
        self.stream, self._num_pairs = stream, num_pairs

    def __len__(self) -> int:
        return self._num_pairs

    def __iter__(self) -> Iterator[dict]:
        first = self.epoch
        for number in count():
            pair = None
            for pair in self.stream.one_pass(first + number * _PASS_STRIDE):
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
    """Returns whether all items are from a [`~iclip_hf.data.pairs.PairDataset`] or from [`CachedPairs`]."""
    return all(isinstance(leaf, (PairDataset, CachedPairs)) for leaf in leaves(data))
