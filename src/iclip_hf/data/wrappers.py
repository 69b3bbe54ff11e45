"""Access to the data sets that torch's wrappers contain: `Subset`, as of `random_split`, and `ConcatDataset`."""

from __future__ import annotations

from bisect import bisect_right
from copy import copy
from itertools import chain

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset

from .epochs import Epochs


def leaves(data) -> list:
    """Returns the data sets that wrappers contain, or the data set itself if it is no wrapper."""
    if isinstance(data, Subset):
        return leaves(data.dataset)
    return [*chain.from_iterable(map(leaves, data.datasets))] if isinstance(data, ConcatDataset) else [data]


def leaf_of(data, index: int) -> tuple[Dataset, int]:
    """Returns the one of the [`leaves`] that holds an item, and the index of the item in it."""
    if isinstance(data, Subset):
        return leaf_of(data.dataset, int(data.indices[index]))
    if isinstance(data, ConcatDataset):
        position = bisect_right(data.cumulative_sizes, index)
        part = data.datasets[position]
        return leaf_of(part, index - data.cumulative_sizes[position] + len(part))
    return data, index


def without_subsets(data):
    """Converts a `Subset` of pairs to a [`~pairs.PairDataset`]. Other data are returned unchanged."""
    return without_subsets(data.dataset)._select(np.array(data.indices)) if isinstance(data, Subset) else data


def at_first_epoch(data):
    """Returns a copy in epoch 0, whose epoch can be set alone. Data sets without an epoch are returned unchanged."""
    if isinstance(data, Subset):
        data = copy(data)
        data.dataset = at_first_epoch(data.dataset)
    elif isinstance(data, ConcatDataset):
        data = copy(data)
        data.datasets = [*map(at_first_epoch, data.datasets)]
    elif isinstance(data, Epochs):
        data = copy(data)
        data._epoch = 0
    return data
