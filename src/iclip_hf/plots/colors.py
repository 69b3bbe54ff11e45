"""Colours of maps and of label maps, and their blending with images."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from ..model.images import load_image
from ..utils.tables import known
from . import COLORMAPS


# Default factor of the opacities in `_TABLES`.
OPACITY = 0.85
# For each of `COLORMAPS`: colours at equal distances from 0 to 1, and the opacity at 0 and at 1.
_TABLES = {
    # Low values darken the image, high values cover it brightly. Lightness grows with the value, so the maps can also
    # be read in grey.
    "heat": ("10131a 1a1420 4a1030 a01c2c e5431f ff8a1a ffc93c fff3a0", 0.45, 1.0),
    # Likewise from blue to yellow, which colour-blind readers can tell apart.
    "cividis": ("00102e 00224e 3b496c 707173 a59c74 e1cc55 fee838", 0.5, 1.0),
    # As in the paper's figures, from blue to red, with the same opacity everywhere.
    "jet": ("000080 0000ff 0080ff 00ffff 80ff80 ffff00 ff8000 ff0000 800000", 0.6, 0.6),
}
# Colours of the segments of a label map in a picture. The first seven can be told apart by colour-blind readers (Okabe
# and Ito).
SEGMENTS = (
    *("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7"),
    *("#0072b2", "#8c564b", "#b5e61d", "#7f3fbf", "#9a9a9a", "#17becf"),
)


@cache
def color_table(colormap: str) -> np.ndarray:
    """Returns red, green, blue and opacity of the 256 levels of a map, `(256, 4)` uint8."""
    hex_colors, lowest, highest = _TABLES[known(colormap, _TABLES, "colour map")]
    colors = np.array([list(bytes.fromhex(color)) for color in hex_colors.split()])
    levels = np.linspace(0, 1, 256)
    channels = [np.interp(levels, np.linspace(0, 1, len(colors)), channel) for channel in colors.T]
    opacity = 255 * (lowest + (highest - lowest) * levels)
    return np.stack([*channels, opacity], axis=1).round().astype(np.uint8)


def overlay(image, heatmap: np.ndarray, opacity: float = OPACITY, colormap: str = COLORMAPS[0]) -> Image.Image:
    """
    Blends a map over its image. The image stays visible where the map is low.

    Args:
        image: in any form that [`load_image`] takes, such as a PIL image, or an array `(H, W, 3)` of uint8 or of
            floats in [0, 1].
        heatmap (`np.ndarray` or `torch.Tensor` of shape `(H, W)`): in [0, 1], of the image's size.
        opacity (`float`): factor of the opacities of the colour map, in [0, 1]. It is the opacity where the map is 1,
            except with `"jet"`, which has 0.6 of it everywhere.
        colormap (`str`): one of `COLORMAPS`: `"heat"`, `"cividis"`, which is safe for colour-blind readers, or
            `"jet"`, the colours of the paper.
    """
    if hasattr(heatmap, "detach"):
        heatmap = heatmap.detach().cpu().float().numpy()  # numpy has no bfloat16
    table = color_table(colormap)
    levels = np.minimum(heatmap * np.float32(256), 255).astype(np.intp)
    opacities = (table[:, 3] * opacity).round().astype(np.uint8)[levels]
    return Image.composite(Image.fromarray(table[levels, :3]), load_image(image), Image.fromarray(opacities))


def label_colors(count: int) -> np.ndarray:
    """Returns the colours of class ids 0, 1, ..., `(count, 3)` uint8, as VOC numbers them."""
    ids = np.arange(count)[:, None]
    # The lowest three bits of an id are the highest bits of red, green and blue. The next three bits of the id are
    # their second highest bits, and so on.
    bits = [((ids >> (3 * bit + np.arange(3))) & 1) << (7 - bit) for bit in range(8)]
    return np.sum(bits, axis=0).astype(np.uint8)
