"""Speed of a run, for its log."""

from __future__ import annotations

import time


class Meter:
    """
    Measures the speed of steps between two logs. Time between a step and the next `pause`, such as an evaluation, does not count.

    Args:
        batch_size: number of pairs in a step.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self._reset()
        self.pause()

    def pause(self) -> None:
        """Restarts the clock, so that the time since the last step does not count."""
        self._since = time.perf_counter()

    def loaded(self) -> None:
        """Marks that the batch of a step has been loaded."""
        self._loading += time.perf_counter() - self._since

    def stepped(self) -> None:
        """Marks the end of a step."""
        now = time.perf_counter()
        self._seconds += now - self._since
        self._steps += 1
        self._since = now

    def read(self) -> dict[str, float]:
        """Returns pairs per second and the share of time spent waiting for data, since the last call."""
        figures = {
            "pairs_per_second": self._steps * self.batch_size / self._seconds,
            "share_of_time_loading": self._loading / self._seconds,
        }
        self._reset()
        return figures

    def _reset(self) -> None:
        self._steps, self._seconds, self._loading = 0, 0.0, 0.0
