"""The figures of a run's log that are about its speed."""

from __future__ import annotations

import time


class Meter:
    """
    Measures steps between two logs. What happens between `pause` and the next step, such as an evaluation, does not count.

    Args:
        batch_size: pairs in a step.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self._reset()
        self.pause()

    def pause(self) -> None:
        """Time goes on from here."""
        self._since = time.perf_counter()

    def loaded(self) -> None:
        """The batch of a step has come."""
        self._loading += time.perf_counter() - self._since

    def stepped(self) -> None:
        """The step is done."""
        now = time.perf_counter()
        self._seconds += now - self._since
        self._steps += 1
        self._since = now

    def read(self) -> dict[str, float]:
        """Pairs a second and the share of time spent waiting for data since the last call."""
        figures = {
            "pairs_per_second": self._steps * self.batch_size / self._seconds,
            "share_of_time_loading": self._loading / self._seconds,
        }
        self._reset()
        return figures

    def _reset(self) -> None:
        self._steps, self._seconds, self._loading = 0, 0.0, 0.0
