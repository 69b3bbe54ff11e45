"""Matplotlib figures of maps. Functions return a figure and show nothing."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from functools import cache

import numpy as np
from matplotlib import colormaps, font_manager, rcParams
from matplotlib.figure import Figure
from PIL import Image

from .arrays import to_numpy


# Blue is low and red is high, as in the paper's Fig. 1. "cividis" is safe for colour-blind readers.
COLORMAP = "jet"
# Width of a picture on a sheet, in inches.
CELL = 2.8
# Margin around each picture, in inches.
_GAP = 0.04
# Characters of a title that fit the width of a cell.
_LINE = 25
# Longer titles are shortened in the middle, in characters.
_LONGEST = 250


def cell_sized(image: Image.Image, dpi: int = 120) -> Image.Image:
    """Returns a copy of an image, reduced to at most twice the resolution of a cell at this dpi."""
    image = image.copy()
    image.thumbnail([2 * round(CELL * dpi)] * 2)
    return image


def overlay(image: Image.Image, heatmap: np.ndarray, opacity: float = 0.5, colormap: str = COLORMAP) -> np.ndarray:
    """
    Blends a map over its image.

    Args:
        image (`PIL.Image.Image`): RGB.
        heatmap (`np.ndarray` of shape `(H, W)`): in [0, 1], of the image's size.
        opacity (`float`): of the map, in [0, 1].
        colormap (`str`): name of a matplotlib colormap.

    Returns:
        `np.ndarray` of shape `(H, W, 3)`, RGB in [0, 1], float32.

    Raises:
        `ValueError`: if map and image differ in size, or there is no such colormap.
    """
    heatmap = to_numpy(heatmap)
    if heatmap.shape != (image.height, image.width):
        raise ValueError(
            f"Expected a map of the image's size {(image.height, image.width)} (height, width), got {heatmap.shape}: resize it."
        )
    if colormap not in colormaps:
        raise ValueError(
            f'Expected a colormap of matplotlib, such as "jet" or "cividis", got {colormap!r}: choose one of them.'
        )
    colors = colormaps[colormap](heatmap, bytes=True)[..., :3].astype(np.float32)
    return ((1 - opacity) * np.asarray(image, dtype=np.float32) + opacity * colors) / 255


def explanation_grid(
    image: Image.Image,
    heatmaps: Sequence[np.ndarray],
    titles: Sequence[str],
    *,
    absent: Collection[int] = (),
    opacity: float = 0.5,
    colormap: str = COLORMAP,
    columns: int = 5,
) -> Figure:
    """
    Shows the original image and one overlay for each text; a text that the image does not show is dimmed and called absent,
    because its map is stretched to [0, 1] like all others.

    Args:
        image (`PIL.Image.Image`): RGB.
        heatmaps: T maps of shape `(H, W)` in [0, 1].
        titles: T titles.
        absent: indices of the texts that the image does not show.
        opacity, colormap: see [`overlay`].
        columns (`int`): largest number of pictures in a row.
    """
    pictures, names = [image], ["original"]
    for index, (heatmap, title) in enumerate(zip(heatmaps, titles)):
        shown = index not in absent
        pictures.append(overlay(image, heatmap, opacity if shown else opacity / 4, colormap))
        names.append(title if shown else f"{title}  absent")
    return picture_grid(pictures, names, columns)


def comparison_sheet(
    image: Image.Image,
    heatmaps: Mapping[str, Sequence[np.ndarray | None]],
    row_titles: Sequence[str],
    *,
    colormap: str = COLORMAP,
) -> Figure:
    """
    Compares methods side by side (Fig. 2, 6 and 10). A row shows the original image and the overlays of one text.

    Args:
        image (`PIL.Image.Image`): RGB.
        heatmaps: title of a column to its T maps of shape `(H, W)` in [0, 1]; None leaves a cell empty.
        row_titles: T titles.
        colormap: see [`overlay`].
    """
    pictures = []
    for row in zip(*heatmaps.values()):
        pictures += [image, *(None if one is None else overlay(image, one, colormap=colormap) for one in row)]
    titles = ["original", *heatmaps]
    return picture_grid(pictures, titles + [""] * (len(pictures) - len(titles)), len(titles), row_titles)


def picture_grid(
    pictures: Sequence, titles: Sequence[str], columns: int, row_titles: Sequence[str] = (), caption: str = ""
) -> Figure:
    """
    Arranges pictures in rows, each under its title.

    Args:
        pictures: PIL images or arrays `(H, W, 3)` in [0, 1]; None leaves a cell empty.
        titles: one for each picture; long titles are wrapped.
        columns (`int`): largest number of pictures in a row.
        row_titles: one for each row, written upwards on its left; none by default.
        caption (`str`): a line below all pictures; none by default.
    """
    columns = min(columns, len(pictures))
    shapes = [np.shape(picture)[:2] for picture in pictures if picture is not None]
    # Cells have the mean aspect ratio of the pictures, within a factor of 2 because of panoramas.
    aspect = min(max(float(np.mean([height / width for height, width in shapes])), 0.5), 2.0)
    wrapped = [_wrap(title) for title in titles]
    turned = [_wrap(title, round(_LINE * aspect)) for title in row_titles]
    title_heights = [_inches(wrapped[start : start + columns]) for start in range(0, len(pictures), columns)]
    # All positions are computed in inches. A layout engine would have to draw the figure to find them, which is slow.
    left, bottom = _inches(turned), _inches([caption])
    width = left + CELL * columns
    height = sum(title_heights) + CELL * aspect * len(title_heights) + bottom
    figure = Figure(figsize=(width, height))
    top = height
    for row, title_height in enumerate(title_heights):
        top -= title_height + CELL * aspect
        for column, (picture, title) in enumerate(zip(pictures[row * columns :][:columns], wrapped[row * columns :])):
            corner = ((left + CELL * column + _GAP) / width, (top + _GAP) / height)
            axis = figure.add_axes((*corner, (CELL - 2 * _GAP) / width, (CELL * aspect - 2 * _GAP) / height))
            axis.axis("off")
            if picture is not None:
                axis.imshow(picture)
            axis.set_title(title, fontsize=11, pad=4, **verbatim())
    for axis, title in zip(figure.axes[::columns], turned):
        middle = {"ha": "right", "va": "center", "multialignment": "center", "transform": axis.transAxes}
        axis.text(-0.03, 0.5, title, rotation=90, fontsize=11, **middle, **verbatim())
    figure.text(0.5, bottom / 2 / height, caption, ha="center", va="center", fontsize=9)
    return figure


# Fonts for scripts that matplotlib's default font lacks; used if installed. The last font, which newer versions of matplotlib
# include, has a box for every character and so avoids a warning for each missing one.
_MORE_SCRIPTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans Devanagari",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Nirmala UI",
    "Arial Unicode MS",
    "Last Resort High-Efficiency",
)


@cache
def _more_scripts() -> list[str]:
    installed = set(font_manager.get_font_names())
    return [name for name in _MORE_SCRIPTS if name in installed]


def verbatim() -> dict:
    """Returns the options for text of a user: dollar signs start no formula, and further fonts cover other scripts."""
    return {"parse_math": False, "fontfamily": [*rcParams["font.family"], *_more_scripts()]}


def _wrap(text: str, width: int = _LINE) -> str:
    if len(text) > _LONGEST:  # drawing a thousand characters takes seconds
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    wide = any(unicodedata.east_asian_width(character) in "FW" for character in text)
    return "\n".join(textwrap.fill(line, width // 2 if wide else width) for line in text.splitlines())


def _inches(titles: Sequence[str]) -> float:
    """Returns the height in inches of the highest of these titles."""
    return max((0.1 + 0.19 * (1 + title.count("\n")) for title in titles if title), default=0.05)
