"""Threads beside the model: what they prepare is there when it is asked for."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar


Item, Result = TypeVar("Item"), TypeVar("Result")


def prefetch_map(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """`map` over a pool, in order, that draws at most `depth` items ahead of what was taken, so that memory stays flat."""
    pending: deque[Future] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def spare_processors() -> int:
    """How many processors this process may use, those of its machine shared evenly, less two for the model; at least one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun and `accelerate launch`
    return max(1, usable // processes - 2)
