"""This process among those of `accelerate launch`: its place, what all agree on, and the death of another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed

from .extras import require_extra
from .files import folder_lock


if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

Value = TypeVar("Value")

# What gloo, NCCL and the store through which processes meet say of one that is gone or silent.
_PARTNER_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|socket closed|likely closed|waiting \d+ms for (send|recv)"
    r"|collective operation timeout|ncclRemoteError|remote process exit",
    re.IGNORECASE,
)


def this_process(needed_by: str) -> PartialState:
    """
    Where this process stands; after the first call its device is the current one, so call it before a model is loaded.

    Args:
        needed_by: the extra that brings Accelerate.

    Raises:
        `ImportError`: Accelerate is missing.
    """
    with require_extra(needed_by):
        from accelerate import PartialState
    # Without `cpu`, two processes on CPU would not find each other.
    return PartialState(cpu=not torch.cuda.is_available())


def agreed(value: Value) -> Value:
    """The first process's value, on all processes; each must call this."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


@contextmanager
def shared_folder_lock(folder: Path, state: Accelerator | PartialState) -> Iterator[None]:
    """
    [`iclip_hf.utils.files.folder_lock`] for a run of several processes: the first one claims the folder, and all wait for it.

    Raises:
        `OSError`: on every process, what `folder_lock` raises on the first.
    """
    with ExitStack() as claim:
        refusal = None
        if state.is_main_process:
            try:
                claim.enter_context(folder_lock(folder))
            except OSError as error:
                refusal = error
        if refusal := agreed(refusal):
            raise refusal
        yield


@contextmanager
def partner_errors(advice: str) -> Iterator[None]:
    """
    Around what several processes do together: the death of another one, of which each backend says something else in a
    `RuntimeError`, becomes one clear `OSError`. All other errors stay as they are.

    Args:
        advice: what to do then.
    """
    try:
        yield
    except RuntimeError as error:
        if not (distributed.is_available() and distributed.is_initialized() and _PARTNER_LOST.search(str(error))):
            raise
        problem = (
            re.sub(r"^\[\S+\] ", "", str(error).strip()).splitlines()[0].partition(". ")[0]
        )  # without a place in C++
        raise OSError(
            f"A partner process of this run died or no longer answers ({problem}); see what it said, then {advice}."
        ) from error
