"""The pointing game: whether the highest pixel of a map lies on the object."""

import numpy as np
import torch

from ..metrics import pointing_shares
from .measure import EvaluatedImage, MeansMeasure


class PointingGame(MeansMeasure):
    """
    `pointing_game`, `energy_pointing_game` and `foreground`, the score of a constant map in both, in percent, see
    [`pointing_shares`].
    """

    name = "pointing_game"
    figures = {
        "pointing_game": ("pointing game %", 1),
        "energy_pointing_game": ("energy-based %", 1),
        "foreground": ("a constant map %", 1),
    }
    columns = ("pointing_game", "energy_pointing_game", "foreground")

    def see(self, images: list[EvaluatedImage]) -> list[None]:
        return [None] * len(images)

    def count(self, image: EvaluatedImage, method: str, heatmaps: torch.Tensor) -> tuple[tuple, np.ndarray]:
        shares = [
            pointing_shares(*pair, image.sample.void) for pair in zip(heatmaps, image.masks, image.sample.labels)
        ]
        return image.sample.labels, 100 * np.array(shares)
