"""What images are asked about, in one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .batches import for_images, select_texts
from .outputs import ICLIPTextFeatures


class Best(NamedTuple):
    """How many texts an image is explained with, see [`Engine.run`]."""

    count: int
    min_presence: float


class Question(NamedTuple):
    """The texts that images are asked about, in one form."""

    labels: list[str]  # T labels: those of all images, or the different ones among the lists of the images
    encoded: ICLIPTextFeatures  # (T, P)
    priors: torch.Tensor | None = None  # of the presence of the labels, (T,); None for 0.5
    label_indices: list[list[int]] | None = None  # for each image the indices of its labels; None for all
    best: Best | None = None  # which labels are explained; None for all

    def select(self, label_indices: Sequence[list[int] | None]) -> tuple[list[list[str]], ICLIPTextFeatures]:
        """Returns the labels of B images, equally many for each, and their features `(B, T, P)`."""
        if label_indices[0] is None:
            return [self.labels] * len(label_indices), for_images(self.encoded, len(label_indices))
        labels = [[self.labels[index] for index in image_indices] for image_indices in label_indices]
        return labels, select_texts(self.encoded, torch.tensor(label_indices))
