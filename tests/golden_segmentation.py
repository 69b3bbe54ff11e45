"""A photograph and texts, generated from seeds whose stream numpy has frozen."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F


# Class of each text, -1 for the background: synonyms, and a text of the background that is a class, too.
CLASSES = (-1, -1, -1, 0, 0, 1, 2, 3, 4, 5)


def photograph() -> Image.Image:
    """120 x 170 pixels (height x width): smooth colours, an edge, and noise."""
    y, x = np.mgrid[0:120, 0:170] / 100
    smooth = np.stack([np.sin(7 * x + 3 * y), np.cos(9 * y - 2 * x), np.sin(5 * x * y + 1)], -1)
    smooth[(x - 0.9) ** 2 + (y - 0.6) ** 2 < 0.12] *= -1
    noise = np.random.RandomState(1).standard_normal((120, 170, 3))
    return Image.fromarray((128 + 70 * smooth + 15 * noise).clip(0, 255).astype(np.uint8))


def text_features(seed: int) -> torch.Tensor:
    """Unit vectors `(T, 32)`; that of the third text of the background is also that of the second class."""
    features = torch.tensor(np.random.RandomState(seed).standard_normal((len(CLASSES), 32)), dtype=torch.float32)
    features = F.normalize(features, dim=-1)
    features[5] = features[2]
    return features
