"""The checkpoints of a training: the last complete one, and errors of loading one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


@contextmanager
def checkpoint_errors(checkpoint: str, kind: type[Exception]) -> Iterator[None]:
    """Explains an error of this type, which torch raises for weights or the state of an optimizer of other shapes."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except kind as error:
        raise ValueError(f"{checkpoint}: this training had other options: repeat the same command.") from error


def last_checkpoint(folder: str | Path) -> str | None:
    """
    Returns the last checkpoint in a folder whose state, which is written last, is whole; None without one. A full disk
    may leave an empty state.
    """
    complete = {}
    for file in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"):
        with suppress(ValueError):
            complete[json.loads(file.read_text())["global_step"]] = str(file.parent)
    return complete[max(complete)] if complete else None
