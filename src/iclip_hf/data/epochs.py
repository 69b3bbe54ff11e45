"""The epoch of a data set, shared with its loading processes."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


class Epochs:
    """
    A data set with an epoch. The epoch lies in shared memory, so that persistent loading processes see each change.
    Set it before each pass, also before the first.
    """

    _epoch: int | torch.Tensor = 0

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which the random choices of the next pass depend."""
        if isinstance(self._epoch, int):
            import torch

            self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._epoch.fill_(epoch)
