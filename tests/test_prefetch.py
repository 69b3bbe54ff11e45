"""Work ahead: in order, and never further ahead than asked."""

import os
import time

import pytest

from iclip_hf.utils.prefetch import ThreadPool, prefetch_map, spare_processors


def test_results_are_in_order_and_no_more_items_are_drawn_than_allowed():
    drawn = []

    def items():
        for number in range(20):
            drawn.append(number)
            yield number

    with ThreadPool(4) as pool:
        results = prefetch_map(pool, lambda number: number**2, items(), depth=3)
        for taken, result in enumerate(results, start=1):
            assert result == (taken - 1) ** 2
            assert len(drawn) <= taken + 3
    assert taken == 20


def test_an_interrupt_waits_for_what_has_begun_only():
    begun = []

    def work(number: int):
        begun.append(number)
        time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt), ThreadPool(1) as pool:
        next(prefetch_map(pool, work, range(40), 39))
        raise KeyboardInterrupt
    assert len(begun) < 40


@pytest.mark.parametrize(
    ("usable", "processes", "spare"), [(64, 4, 14), (16, 1, 14), (16, "", 14), (2, 1, 1), (4, 8, 1)]
)
def test_processes_of_one_machine_share_its_processors(monkeypatch, usable, processes, spare):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert spare_processors() == spare
