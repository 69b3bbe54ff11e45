"""Handling of Ctrl-C and SIGTERM: a run completes its step and saves a checkpoint before it stops."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


def ignore_signals(worker: int) -> None:
    """
    Ignores signals to every process of a terminal or job, in a worker of a `DataLoader`, which the training process
    ends.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Interrupts:
    """
    Context manager in which SIGINT and SIGTERM raise `KeyboardInterrupt`. If `deferred` is set, they only set
    `requested`. Another Ctrl-C, more than one second after the first signal, always raises. Within this second,
    launchers repeat a signal that a process already got from the terminal.
    """

    def __init__(self):
        self.deferred = self.requested = False
        self._since = None  # time of the first signal

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error: BaseException | None, frames) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # The traceback of an error keeps workers. As they ignore signals, the program would wait for them forever.
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Context in which a signal raises at once, also one that came before."""
        self.deferred = False
        if self.requested:
            raise KeyboardInterrupt
        yield
        self.deferred = True

    def _handle(self, number: int, frame) -> None:
        now, first = time.monotonic(), self._since is None
        self._since = now if first else self._since
        self.requested = True
        if not self.deferred or (number == signal.SIGINT and now - self._since > 1):
            raise KeyboardInterrupt
        if first and os.environ.get("RANK", "0") == "0":
            print("iclip train: stopping after this step, with a checkpoint; Ctrl-C again stops at once", flush=True)
