"""The pointing game: whether the highest pixel of a map lies on the object."""

import torch

from ..metrics import pointing_shares
from .measure import EvaluatedImage, MeansMeasure


class PointingGame(MeansMeasure):
    """
    `pointing_game`, `energy_pointing_game` and `foreground`, the score of a constant map in both, in percent, see
    [`pointing_shares`].
    """

    name = "pointing_game"
    scores = {
        "pointing_game": ("pointing game %", 1),
        "energy_pointing_game": ("energy-based %", 1),
        "foreground": ("a constant map %", 1),
    }

    def count(self, image: EvaluatedImage, method: str, heatmaps: torch.Tensor) -> list[tuple]:
        pairs = zip(heatmaps, image.masks, image.sample.labels)
        return [(100 * pointing_shares(*pair, image.sample.void), pair[-1]) for pair in pairs]
