"""The checkpoints of a training: the last complete one, and errors when one is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


@contextmanager
def checkpoint_errors(checkpoint: str, error_type: type[Exception]) -> Iterator[None]:
    """Explains errors of a type that torch raises if weights or the state of an optimizer have other shapes."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except error_type as error:
        raise ValueError(f"{checkpoint}: this training had other arguments: repeat the same command.") from error


def last_checkpoint(folder: str | Path) -> str | None:
    """
    Returns the last complete checkpoint in a folder; None if there is none. A checkpoint is complete if its state can
    be read, which is written last: a full disk may leave it empty.
    """
    complete = {}
    for file in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"):
        with suppress(ValueError):
            complete[json.loads(file.read_text())["global_step"]] = str(file.parent)
    return complete[max(complete)] if complete else None
