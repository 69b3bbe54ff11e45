"""Helpers for runs of several processes under `accelerate launch`: state, agreement, locks, and errors of lost processes."""

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

# Error messages of gloo, NCCL and the rendezvous store about a process that died or does not answer.
_PARTNER_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|socket closed|likely closed|waiting \d+ms for (send|recv)"
    r"|collective operation timeout|ncclRemoteError|remote process exit",
    re.IGNORECASE,
)


def this_process(needed_by: str) -> PartialState:
    """
    Returns the state of this process. The first call also selects its device, so call it before loading a model. Raises `ImportError`
    without Accelerate, which the extra `needed_by` installs.
    """
    with require_extra(needed_by):
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env
    # Without `cpu`, two processes on CPU would not form a group.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def agreed(value: Value) -> Value:
    """Returns the value of the first process on all processes. Every process must call this."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


@contextmanager
def shared_folder_lock(folder: Path, state: Accelerator | PartialState) -> Iterator[None]:
    """
    [`iclip_hf.utils.files.folder_lock`] for a run of several processes. The first process locks the folder for all; its `OSError` is
    raised on every process.
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
    """Converts the `RuntimeError` that a backend raises when another process died into an `OSError` that ends with `advice`."""
    try:
        yield
    except RuntimeError as error:
        if not (distributed.is_available() and distributed.is_initialized() and _PARTNER_LOST.search(str(error))):
            raise
        # Without the location in C++ code.
        problem = re.sub(r"^\[\S+\] ", "", str(error).strip()).splitlines()[0].partition(". ")[0]
        raise OSError(
            f"Another process of this run ended or no longer answers ({problem}); see its output, then {advice}."
        ) from error
