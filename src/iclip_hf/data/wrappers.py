"""Access to the data sets that torch's wrappers contain: `Subset`, as of `random_split`, and `ConcatDataset`."""

from __future__ import annotations

from bisect import bisect_right
from copy import copy
from itertools import chain

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset

from .items import Epochs


def leaves(data) -> list:
    """Returns the data sets in a wrapper, at any depth; the data set itself if it is no wrapper."""
    if isinstance(data, Subset):
        return leaves(data.dataset)
    if isinstance(data, ConcatDataset):
        return [*chain.from_iterable(map(leaves, data.datasets))]
    return [data]


def leaf_of(data, index: int) -> tuple[Dataset, int]:
    """Returns the data set of [`leaves`] that holds an item, and the index of the item there."""
    if isinstance(data, Subset):
        return leaf_of(data.dataset, int(data.indices[index]))
    if isinstance(data, ConcatDataset):
        position = bisect_right(data.cumulative_sizes, index)
        part = data.datasets[position]
        return leaf_of(part, index - data.cumulative_sizes[position] + len(part))
    return data, index


def without_subsets(data):
    """Converts a `Subset` of pairs to a [`~pairs.PairDataset`]. Other data are returned unchanged."""
    if isinstance(data, Subset):
        return without_subsets(data.dataset)._select(np.array(data.indices))
    return data


def at_first_epoch(data):
    """
    Returns a copy in epoch 0. Setting the epoch of the copy does not change the original. Data sets without an epoch
    are returned unchanged.
    """
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
