"""Helpers for runs of several processes under `accelerate launch`: state, agreement and locks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from .extras import require_extra
from .files import folder_lock


if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

Value = TypeVar("Value")


def partial_state(needed_by: str) -> PartialState:
    """
    Returns the state of this process. The first call also selects its device, so call it before loading a model.
    Raises `ImportError` without Accelerate, which the extra `needed_by` installs.
    """
    with require_extra(needed_by):
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env
    # Without `cpu`, two processes on CPU would not form a group.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu)


def broadcast_from_main(value: Value) -> Value:
    """Returns the value of the first process on all processes. Every process must call this."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


@contextmanager
def shared_folder_lock(folder: Path, state: Accelerator | PartialState) -> Iterator[None]:
    """
    [`iclip_hf.utils.files.folder_lock`] for a run of several processes. The first process locks the folder for all;
    its `OSError` is raised on every process.
    """
    with ExitStack() as claim:
        refusal = None
        if state.is_main_process:
            try:
                claim.enter_context(folder_lock(folder))
            except OSError as error:
                refusal = error
        if refusal := broadcast_from_main(refusal):
            raise refusal
        yield
