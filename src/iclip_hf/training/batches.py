"""Batches of training and their order, and random numbers that depend only on a key."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..utils.extras import require_extra
from .interrupts import ignore_signals


with require_extra("train"):
    from accelerate import Accelerator
    from accelerate.utils import send_to_device


def seed_everything(*key) -> None:
    """Seeds Python's, numpy's and torch's random numbers, such that they depend only on the key."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def check_batch(rows: int, batch_size: int, world_size: int) -> None:
    """Raises `ValueError` if the processes cannot share a batch, or an epoch of so many pairs has none."""
    if batch_size % world_size:
        raise ValueError(f"batch_size: {batch_size} is no multiple of the {world_size} processes.")
    if rows < batch_size:
        raise ValueError(f"batch_size: an epoch has {rows} pairs, fewer than a batch of {batch_size}; lower it.")


class GlobalBatches(Sampler):
    """
    Yields this process's share of each batch of an epoch. The batches are the same for any number of processes and contain each
    of the `rows` pairs at most once. An incomplete last batch is left out. `batch_size` is that of all processes together, a multiple
    of their number.
    """

    def __init__(self, rows: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1):
        self.rows, self.batch_size, self.seed, self.rank, self.world_size = rows, batch_size, seed, rank, world_size
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.rows // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        share = self.batch_size // self.world_size
        for batch in range(self.first, len(self)):
            start = batch * self.batch_size + self.rank * share
            yield order[start : start + share].tolist()


class BatchLoader:
    """
    Loads the training batches of this process and moves them to its device.

    Args:
        dataset: `TrainingPairs`, `TrainingStream` or `CachedPairs`.
        batch_size: number of pairs in a batch of all processes together, which share it.
        num_workers: number of loading processes for each training process.
        pairs_per_epoch: number of pairs in an epoch of a stream, whose length is unknown.

    Raises:
        `ValueError`: the processes cannot share a batch, or an epoch has none. During iteration, `OSError`: a stream lost its connection.
    """

    def __init__(
        self,
        dataset: Dataset,
        accelerator: Accelerator,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        pairs_per_epoch: int = 0,
    ):
        self.dataset, self.device = dataset, accelerator.device
        self.streamed = isinstance(dataset, IterableDataset)
        rank, world_size = accelerator.process_index, accelerator.num_processes
        rows = pairs_per_epoch if self.streamed else len(dataset)
        self.steps_per_epoch = rows // batch_size
        check_batch(rows, batch_size, world_size)
        self.sampler = GlobalBatches(rows, batch_size, seed, rank, world_size)
        in_order = {"batch_size": batch_size // world_size, "drop_last": True}
        self.loader = DataLoader(
            dataset,
            **(in_order if self.streamed else {"batch_sampler": self.sampler}),
            num_workers=num_workers,
            collate_fn=dataset.collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_signals,
        )

    def steps(self, first: int, end: int) -> Iterator[dict]:
        """Yields the batches of the steps from `first` to before `end`, counted from the beginning of the first epoch."""
        while first < end:
            epoch, skipped = divmod(first, self.steps_per_epoch)
            for batch in itertools.islice(self.epoch(epoch, skipped), end - first):
                first += 1
                yield batch

    def epoch(self, epoch: int, first: int = 0) -> Iterator[dict]:
        """Yields the batches of one epoch, starting with batch `first`. A stream does not skip; it begins another pass."""
        for batch in self._stream(epoch, first) if self.streamed else self._rows(epoch, first):
            yield send_to_device(batch, self.device, non_blocking=True)

    def _rows(self, epoch: int, first: int) -> DataLoader:
        self.dataset.set_epoch(epoch)
        self.sampler.epoch, self.sampler.first = epoch, first
        return self.loader

    def _stream(self, epoch: int, first: int) -> Iterator[dict]:
        """Yields the batches of one epoch, from several passes if the process's part of the stream is short."""
        # The order of a pass depends on its first step: a resumed run would see the beginning of its epoch again, but never the end.
        step = first
        while step < self.steps_per_epoch:
            began = step
            self.dataset.set_epoch(epoch * self.steps_per_epoch + step)
            for batch in itertools.islice(self.loader, self.steps_per_epoch - step):
                yield batch
                step += 1
            if step == began:
                raise ValueError("batch_size: this process's part of the stream has no whole batch; lower batch_size.")
