"""Masks of maps: thresholds, and the presence from which on a text has one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .presence import is_present


def check_thresholds(threshold: float | Sequence[float], count: int) -> torch.Tensor:
    """
    Returns the thresholds of `count` texts, `(count,)` float64. `ValueError` unless one or `count` are given, in
    [0, 1].
    """
    try:
        thresholds = torch.as_tensor(threshold, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # such as None or a string
        thresholds = torch.tensor(torch.nan)
    if thresholds.shape not in ((), (count,)) or not ((thresholds >= 0) & (thresholds <= 1)).all():  # NaN neither
        raise ValueError(
            f"A threshold is a number in [0, 1], or one for each text, of which there are {count}, not "
            f"{threshold!r:.100}."
        )
    return thresholds.expand(count)


def check_threshold(threshold: float) -> float:
    """Returns a threshold. `ValueError` unless it is one number in [0, 1]."""
    if np.ndim(threshold):
        raise ValueError(f"threshold is one number in [0, 1], not {threshold!r:.100}.")
    return check_thresholds(threshold, 1).item()


def masks_of_maps(
    maps: torch.Tensor,
    threshold: float | Sequence[float],
    presences: Sequence[float | None],
    min_presence: float,
) -> torch.Tensor:
    """
    Computes the masks of T texts: the pixels whose map is greater than the threshold of the text, if the text is
    present.

    Args:
        maps (`torch.Tensor` of shape `(T, H, W)`): in [0, 1].
        threshold (`float` in [0, 1], or T of them).
        presences (T `float`, or None for a text without presence), min_presence (`float`): see [`is_present`].

    Returns:
        `torch.Tensor` of shape `(T, H, W)`, boolean.

    Raises:
        `ValueError`: thresholds are outside [0, 1], or their number is not T.
    """
    thresholds = check_thresholds(threshold, len(maps)).float().to(maps.device)
    present = [is_present(presence, min_presence) for presence in presences]
    present = torch.tensor(present, dtype=torch.bool, device=maps.device)
    return (maps > thresholds.view(-1, 1, 1)) & present.view(-1, 1, 1)
