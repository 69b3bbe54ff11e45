"""Threads that load and prepare data while the model runs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar


Item, Result = TypeVar("Item"), TypeVar("Result")


class ThreadPool(ThreadPoolExecutor):
    """A thread pool that cancels waiting calls when its context ends, such as by Ctrl-C."""

    def __exit__(self, *error) -> None:
        self.shutdown(cancel_futures=True)


def prefetch_map(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """Maps a function over items in a thread pool, in order. At most `depth` results wait, to limit the memory."""
    pending: deque[Future] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def spare_processors() -> int:
    """Returns the number of processors for each process of this machine, minus two for the model, at least one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # set by torchrun and `accelerate launch`
    return max(1, usable // processes - 2)
