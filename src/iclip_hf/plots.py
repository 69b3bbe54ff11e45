"""Arrays to matplotlib figures; a figure is returned, nothing is shown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image


# Blue is background, red the target, as in the paper's Fig. 1; "cividis" is safe for colour-blind readers.
COLORMAP = "jet"


def overlay(image: Image.Image, heatmap: np.ndarray, opacity: float = 0.5, colormap: str = COLORMAP) -> np.ndarray:
    """
    Blends a map over its image.

    Args:
        image (`PIL.Image.Image`): RGB.
        heatmap (`np.ndarray` of shape `(H, W)`): in [0, 1], of the image's size.
        opacity (`float`): of the map, in [0, 1].
        colormap (`str`): a name of matplotlib's.

    Returns:
        `np.ndarray` of shape `(H, W, 3)`, RGB in [0, 1].

    Raises:
        `ValueError`: if map and image differ in size, or there is no such colormap.
    """
    heatmap = np.asarray(heatmap)
    if heatmap.shape != (image.height, image.width):
        raise ValueError(
            f"Expected a map of the image's size {(image.height, image.width)} (height, width), got {heatmap.shape}."
        )
    if colormap not in colormaps:
        raise ValueError(f'Expected a colormap of matplotlib, such as "jet" or "cividis", got {colormap!r}.')
    colors = colormaps[colormap](heatmap)[..., :3]
    return (1 - opacity) * np.asarray(image, dtype=np.float32) / 255 + opacity * colors


def explanation_grid(
    image: Image.Image,
    heatmaps: Sequence[np.ndarray],
    titles: Sequence[str],
    *,
    opacity: float = 0.5,
    colormap: str = COLORMAP,
    columns: int = 5,
) -> Figure:
    """
    The original beside one overlay a text.

    Args:
        image (`PIL.Image.Image`): RGB.
        heatmaps: T maps of shape `(H, W)` in [0, 1].
        titles: T titles.
        opacity, colormap: see [`overlay`].
        columns (`int`): pictures in a row, at most.
    """
    pictures = [(image, "original"), *((overlay(image, m, opacity, colormap), t) for m, t in zip(heatmaps, titles))]
    return picture_grid([picture for picture, _ in pictures], [title for _, title in pictures], columns)


def picture_grid(pictures: Sequence, titles: Sequence[str], columns: int) -> Figure:
    """
    Pictures in reading order, each under its title.

    Args:
        pictures: PIL images or arrays `(H, W, 3)` in [0, 1]; None leaves a place empty.
        titles: one a picture; long ones are wrapped.
        columns (`int`): pictures in a row, at most.
    """
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    shapes = [np.shape(picture)[:2] for picture in pictures if picture is not None]
    # A cell as the average picture needs it, within a factor of 2 so that a panorama does not make a poster.
    aspect = min(max(float(np.mean([height / width for height, width in shapes])), 0.5), 2.0)
    wrapped = [textwrap.fill(title, 26) for title in titles]
    title_height = 0.24 * max(title.count("\n") + 1 for title in wrapped) + 0.1
    figure = Figure(figsize=(2.8 * columns, (2.8 * aspect + title_height) * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, picture, title in zip(axes, pictures, wrapped):
        if picture is not None:
            axis.imshow(picture)
        # parse_math: a text with two dollar signs is no formula
        axis.set_title(title, fontsize=10, parse_math=False)
    return figure
