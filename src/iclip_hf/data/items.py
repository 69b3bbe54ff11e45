"""What data sets of pairs share: the epoch of a pass, and the count of pairs that cannot be used."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class Epochs:
    """
    A data set with an epoch. The epoch lies in shared memory, so that persistent loading processes see each change.
    Set it before each pass, also before the first.
    """

    _epoch: int | torch.Tensor = 0

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which the random choices of the next pass depend."""
        if isinstance(self._epoch, int):
            import torch

            self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._epoch.fill_(epoch)


class BadPairError(ValueError):
    """A pair is unusable: its image is broken or missing, or it has no caption."""


class BadPairTally:
    """
    Counts good and bad pairs that this process reads. Logs bad pairs, and raises `ValueError` if their share is too
    large. A pair of a data set counts once in all epochs. A pair of a stream has no index and counts each time.
    """

    def __init__(self, max_bad_share: float, num_pairs: int | None = None):
        self._max_bad_share = max_bad_share
        # The share of bad pairs among fewer says little.
        self._min_read = 100 if num_pairs is None else min(100, num_pairs)
        self._seen = bytearray(num_pairs or 0)
        self._read = self._bad = 0
        self._last_error: BadPairError | None = None

    def add(self, index: int | None = None, error: BadPairError | None = None) -> None:
        """Counts a pair, with the error of a bad one."""
        if index is not None:
            if self._seen[index]:
                return
            self._seen[index] = True
        self._read += 1
        if error is not None:
            self._bad, self._last_error = self._bad + 1, error
            if self._bad <= 10 or self._bad.bit_count() == 1:  # later only the 16th, 32nd, 64th, ...
                logger.warning("Bad pair, number %d among %d: %s", self._bad, self._read, error)
        if self._read >= self._min_read and self._bad > self._max_bad_share * self._read:
            raise ValueError(
                f"{self._bad} of the {self._read} pairs read so far are bad, more than max_bad_share "
                f"({self._max_bad_share:.2%}): fix the data, or raise max_bad_share. The last bad pair: "
                f"{self._last_error}"
            )
