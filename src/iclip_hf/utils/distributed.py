"""Helpers for runs of several processes under `accelerate launch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from .errors import require_extra


if TYPE_CHECKING:
    from accelerate import PartialState

Value = TypeVar("Value")


def partial_state(needed_by: str) -> PartialState:
    """Returns the state of this process. The first call selects its device, so call this before a model is loaded."""
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
