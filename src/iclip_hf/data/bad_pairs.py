"""Counting of pairs that cannot be used."""

from __future__ import annotations

import logging


logger = logging.getLogger(__name__)


class BadPairError(ValueError):
    """A pair is unusable: its image is broken or missing, or it has no caption."""


class BadPairTally:
    """
    Counts good and bad pairs. Logs bad pairs, and raises `ValueError` if their share is too large. A pair of a data
    set counts once, in whatever number of epochs it is read; those of a stream have no index and count each time.
    """

    def __init__(self, max_bad_share: float, pairs: int | None = None):
        self._max_bad_share = max_bad_share
        self._counts_from = 100 if pairs is None else min(100, pairs)  # from so many on, the share is meaningful
        self._seen = bytearray(pairs or 0)
        self._read = self._bad = 0
        self._last_error: BadPairError | str = "see the log"

    def add(self, index: int | None = None, error: BadPairError | None = None) -> None:
        """Counts a pair that this process read."""
        if error is not None and not (index is not None and self._seen[index]):
            self._last_error, bad = error, self._bad + 1
            if bad <= 10 or bad.bit_count() == 1:  # later only the 16th, 32nd, 64th, ...
                logger.warning("Bad pair, number %d among %d: %s", bad, self._read + 1, error)
        self.count(index, 1, int(error is not None))

    def count(self, index: int | None, read: int, bad: int) -> None:
        """Counts pairs that were read, also by a loading process, which logs the bad ones."""
        if index is not None:
            if self._seen[index]:
                return
            self._seen[index] = True
        self._read += read
        self._bad += bad
        if self._read >= self._counts_from and self._bad > self._max_bad_share * self._read:
            raise ValueError(
                f"{self._bad} of the {self._read} pairs read so far are bad, more than max_bad_share "
                f"({self._max_bad_share:.2%}): fix the data, or raise it. The last one: {self._last_error}"
            )
