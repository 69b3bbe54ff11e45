"""This process among those of `accelerate launch`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .extras import extra


if TYPE_CHECKING:
    from accelerate import PartialState


def this_process(needed_by: str) -> PartialState:
    """
    Where this process stands; after the first call its device is the current one, so call it before a model is loaded.

    Args:
        needed_by: the extra that brings Accelerate.

    Raises:
        `ImportError`: Accelerate is missing.
    """
    with extra(needed_by):
        from accelerate import PartialState
    # Without `cpu`, two processes on CPU would not find each other.
    return PartialState(cpu=not torch.cuda.is_available())
