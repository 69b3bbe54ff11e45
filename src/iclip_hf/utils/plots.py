"""Sheets of pictures and maps, drawn with Pillow, or with matplotlib as vector graphics. Functions show nothing."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps, rcParams
from PIL import Image

from .arrays import to_numpy
from .lettering import more_scripts, text_mask, word_boxes
from .names import COLORMAP


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

# Resolution of a sheet in dots per inch.
DPI = 120
# These are drawn with matplotlib.
VECTOR_FORMATS = ("pdf", "svg")
# Width of a picture on a sheet, in inches.
CELL = 2.8
# Margin around each picture, in inches.
_GAP = 0.04
# Sizes of the letters of titles and captions, in points (1/72 inch).
_TITLE, _CAPTION = 11, 9
# Characters of a title that fit the width of a cell.
_LINE = 25
# Longer titles are shortened in the middle, in characters.
_LONGEST = 250


def cell_sized(image: Image.Image, dpi: int = DPI) -> Image.Image:
    """Returns a copy of an image, reduced to the size of a cell at this resolution."""
    image = image.copy()
    image.thumbnail([round((CELL - 2 * _GAP) * dpi)] * 2)
    return image


def overlay(image: Image.Image, heatmap: np.ndarray, opacity: float = 0.5, colormap: str = COLORMAP) -> Image.Image:
    """
    Blends a map over its image.

    Args:
        image (`PIL.Image.Image`): RGB.
        heatmap (`np.ndarray` of shape `(H, W)`): in [0, 1], of the image's size.
        opacity (`float`): of the map, in [0, 1].
        colormap (`str`): name of a matplotlib colormap.

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
    colors = _colors(colormap)
    levels = np.minimum(heatmap * np.float32(len(colors)), len(colors) - 1).astype(np.intp)
    return Image.blend(image, Image.fromarray(colors[levels]), opacity)


@cache
def _colors(colormap: str) -> np.ndarray:
    """Returns the colors of a colormap, (N, 3) uint8, lowest first."""
    return colormaps[colormap](np.arange(colormaps[colormap].N), bytes=True)[:, :3]


@dataclass(frozen=True)
class Cell:
    """
    A place on a [`Sheet`].

    Attributes:
        box (`tuple[float, float, float, float]`): (x0, y0, x1, y1) in inches, from the upper left corner of the sheet.
        picture (`PIL.Image.Image`, *optional*): RGB; fills the box as far as its proportions allow.
        title (`str`): lines above the box.
        row_title (`str`): lines on its left, written upwards.
        shades (list of `tuple[str, float]`): the first words of the title, and how dark the colour behind each is, in [0, 1].
    """

    box: tuple[float, float, float, float]
    picture: Image.Image | None
    title: str = ""
    row_title: str = ""
    shades: Sequence[tuple[str, float]] = ()

    def shaded(self, size: float) -> Iterator[tuple[tuple[float, float, float, float], tuple[int, ...]]]:
        """Yields the boxes (x0, y0, x1, y1) behind the words of a title with letters of this size, and their colours."""
        shades = iter(self.shades)
        word, shade = next(shades, ("", 0.0))
        for written, box in word_boxes(self.title, size):
            if written == word:  # a long title is shortened
                yield box, tuple(_colors("Oranges")[round(170 * shade)].tolist())
                word, shade = next(shades, ("", 0.0))


@dataclass(frozen=True)
class Sheet:
    """
    Pictures under their titles. A notebook shows it as an image.

    Attributes:
        size (`tuple[float, float]`): width and height in inches.
        cells (`list[Cell]`): row by row.
        caption (`str`): line at the bottom.
    """

    size: tuple[float, float]
    cells: list[Cell]
    caption: str = ""

    def image(self, dpi: int = DPI) -> Image.Image:
        """Draws the sheet as an RGB image of this resolution."""
        canvas = Image.new("RGB", [round(side * dpi) for side in self.size], "white")

        def write(text: str, x: float, y: float, size: float, upwards: bool = False, above: bool = False) -> None:
            """Writes text around a middle in pixels, or above it."""
            mask = text_mask(text, size / 72 * dpi)
            mask = mask.transpose(Image.Transpose.ROTATE_90) if upwards else mask
            canvas.paste("black", (round(x - mask.width / 2), round(y - mask.height / (1 if above else 2))), mask)

        for cell in self.cells:
            left, top, right, bottom = (side * dpi for side in cell.box)
            middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
            if cell.picture is not None:
                shown = _fitted(cell.picture, right - left, bottom - top)
                top = middle_y - shown.height / 2
                canvas.paste(shown, (round(middle_x - shown.width / 2), round(top)))
            if cell.shades:
                mask = text_mask(cell.title, _TITLE / 72 * dpi)
                x, y = round(middle_x - mask.width / 2), round(top - 2 / 72 * dpi - mask.height)
                for (x0, y0, x1, y1), colour in cell.shaded(_TITLE / 72 * dpi):
                    canvas.paste(colour, (round(x + x0), round(y + y0), round(x + x1), round(y + y1)))
            if cell.title:
                write(cell.title, middle_x, top - 2 / 72 * dpi, _TITLE, above=True)
            if cell.row_title:
                width = _inches([cell.row_title]) * dpi
                write(cell.row_title, left - width / 2, middle_y, _TITLE, upwards=True)
        if self.caption:
            middle_x, bottom = self.size[0] / 2, self.size[1] - _inches([self.caption]) / 2
            write(self.caption, middle_x * dpi, bottom * dpi, _CAPTION)
        return canvas

    def figure(self) -> Figure:
        """Draws the sheet with matplotlib, an axis for each cell, for vector graphics and for plots over the pictures."""
        from matplotlib.figure import Figure

        width, height = self.size
        figure = Figure(figsize=self.size)
        for cell in self.cells:
            left, top, right, bottom = cell.box
            place = (left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height)
            axis = figure.add_axes(place)
            axis.axis("off")
            if cell.picture is not None:
                axis.imshow(cell.picture)
            axis.set_title(cell.title, fontsize=_TITLE, pad=4, **verbatim())
            for patch in _shades(cell, axis):
                axis.add_patch(patch)
            options = {"ha": "right", "va": "center", "multialignment": "center", "transform": axis.transAxes}
            axis.text(-0.03, 0.5, cell.row_title, rotation=90, fontsize=_TITLE, **options, **verbatim())
        middle = _inches([self.caption]) / 2 / height
        figure.text(0.5, middle, self.caption, ha="center", va="center", fontsize=_CAPTION)
        return figure

    def savefig(self, path: str | Path, *, format: str | None = None, dpi: int = DPI, **options) -> None:
        """Writes the sheet like `Figure.savefig`: with matplotlib as PDF or SVG, with Pillow as an image."""
        format = format or Path(path).suffix[1:].lower()
        if format in VECTOR_FORMATS:
            self.figure().savefig(path, format=format, dpi=dpi, **options)
        else:
            kind = Image.registered_extensions()[f".{format}"]
            self.image(dpi).save(path, kind, dpi=(dpi, dpi), **options.get("pil_kwargs", {}))

    def _repr_png_(self) -> bytes:
        return self.image()._repr_png_()


def _shades(cell: Cell, axis: Axes) -> Iterator[Rectangle]:
    """Yields the rectangles behind the words of an axis' title."""
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import Affine2D, ScaledTranslation

    mask = text_mask(cell.title, _TITLE)
    middle = ScaledTranslation(0.5, 1, axis.transAxes)
    points = Affine2D().scale(1 / 72) + axis.figure.dpi_scale_trans + middle
    for (x0, y0, x1, y1), colour in cell.shaded(_TITLE):
        corner = (x0 - mask.width / 2, 2 + mask.height - y1)
        style = {"facecolor": [value / 255 for value in colour], "transform": points, "clip_on": False, "zorder": -1}
        yield Rectangle(corner, x1 - x0, y1 - y0, **style)


def explanation_grid(
    image: Image.Image,
    heatmaps: Sequence[np.ndarray],
    titles: Sequence[str],
    *,
    absent: Collection[int] = (),
    words: Sequence[Sequence[tuple[str, float]]] | None = None,
    opacity: float = 0.5,
    colormap: str = COLORMAP,
    columns: int = 5,
) -> Sheet:
    """
    Shows the original image and one overlay for each text; a text that the image does not show is dimmed and called absent,
    because its map is stretched to [0, 1] like all others.

    Args:
        image (`PIL.Image.Image`): RGB.
        heatmaps: T maps of shape `(H, W)` in [0, 1].
        titles: T titles.
        absent: indices of the texts that the image does not show.
        words: for each text the first words of its title, with scores of at least 0; the darker a word, the higher its score.
        opacity, colormap: see [`overlay`].
        columns (`int`): largest number of pictures in a row.
    """
    pictures, names = [image], ["original"]
    for index, (heatmap, title) in enumerate(zip(heatmaps, titles)):
        shown = index not in absent
        pictures.append(overlay(image, heatmap, opacity if shown else opacity / 4, colormap))
        names.append(title if shown else f"{title}  absent")
    sheet = picture_grid(pictures, names, columns)
    if words is None:
        return sheet
    highest = [max((score for _, score in scored), default=0) or 1 for scored in words]
    shades = [[(word, score / top) for word, score in scored] for scored, top in zip(words, highest)]
    cells = [replace(cell, shades=one) for cell, one in zip(sheet.cells, [[], *shades])]
    return replace(sheet, cells=cells)


def label_colors(number: int) -> np.ndarray:
    """
    Returns the colours of class ids 0, 1, ..., as VOC numbers them: the bits of an id, in turn, are the highest bits of red, green and
    blue. The background (0) is black.

    Returns:
        `np.ndarray` of shape `(number, 3)`, uint8, RGB.
    """
    ids = np.arange(number)[:, None]
    bits = [((ids >> (3 * place + np.arange(3))) & 1) << (7 - place) for place in range(8)]
    return np.sum(bits, axis=0).astype(np.uint8)


def label_sheet(image: Image.Image, labels: np.ndarray, texts: Sequence[str], *, opacity: float = 0.6) -> Sheet:
    """
    Shows an image and its label map over it, with a legend of the texts that have pixels, the largest first.

    Args:
        image (`PIL.Image.Image`): RGB.
        labels (`np.ndarray` of shape `(H, W)`): index of a text for each pixel, -1 for the background, which is dimmed.
        texts: T texts.
        opacity (`float`): of the colours, in [0, 1].
    """
    colors = label_colors(len(texts) + 1)
    areas = np.bincount(labels.ravel() + 1, minlength=len(texts) + 1)[1:] / labels.size
    shown = [index for index in np.argsort(-areas, kind="stable") if areas[index]]
    entries = [
        (tuple(colors[index + 1].tolist()), f"{_shortened(texts[index])}  {100 * areas[index]:.1f} %")
        for index in shown
    ]
    blended = Image.blend(image, Image.fromarray(colors[labels + 1]), opacity)
    aspect = min(max(image.height / image.width, 0.5), 2.0)
    legend = _legend(entries or [("white", "none of the texts")], aspect)
    return picture_grid([image, blended, legend], ["original", "", ""], 3)


def _legend(entries: Sequence[tuple[str | tuple[int, int, int], str]], aspect: float, dpi: int = DPI) -> Image.Image:
    """Draws colours with their names as a picture of the size of a cell. Those that do not fit are counted in the last line."""
    width, line = round((CELL - 2 * _GAP) * dpi), round(0.19 * dpi)
    legend = Image.new("RGB", (width, round(width * aspect)), "white")
    fitting = legend.height // line
    if len(entries) > fitting:
        entries = [*entries[: fitting - 1], ("white", f"and {len(entries) - fitting + 1} more")]
    top = (legend.height - line * len(entries)) // 2
    for number, (color, name) in enumerate(entries):
        y, mask = top + line * number, text_mask(name, _CAPTION / 72 * dpi)
        legend.paste(color, (line // 2, y + line // 6, 2 * line, y + line * 5 // 6))
        legend.paste("black", (2 * line + line // 3, y + (line - mask.height) // 2), mask)
    return legend


def _shortened(text: str) -> str:
    """Returns the beginning of a text, on one line that fits a cell."""
    text = " ".join(text.split())
    wide = any(unicodedata.east_asian_width(character) in "FW" for character in text)
    longest = _LINE // 2 if wide else _LINE
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def comparison_sheet(
    image: Image.Image,
    heatmaps: Mapping[str, Sequence[np.ndarray | None]],
    row_titles: Sequence[str],
    *,
    colormap: str = COLORMAP,
) -> Sheet:
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
    pictures: Sequence[Image.Image | None],
    titles: Sequence[str],
    columns: int,
    row_titles: Sequence[str] = (),
    caption: str = "",
) -> Sheet:
    """
    Arranges pictures in rows, each under its title.

    Args:
        pictures: RGB images; None leaves a cell empty.
        titles: one for each picture; long titles are wrapped.
        columns (`int`): largest number of pictures in a row.
        row_titles: one for each row, written upwards on its left; none by default.
        caption (`str`): a line below all pictures; none by default.
    """
    columns = min(columns, len(pictures))
    # Cells have the mean aspect ratio of the pictures, within a factor of 2 because of panoramas.
    aspects = [picture.height / picture.width for picture in pictures if picture is not None]
    aspect = min(max(float(np.mean(aspects)), 0.5), 2.0)
    wrapped = [_wrap(title) for title in titles]
    turned = [_wrap(title, round(_LINE * aspect)) for title in row_titles]
    left, side = _inches(turned), CELL - 2 * _GAP
    cells, top = [], 0.0
    for start in range(0, len(pictures), columns):
        row = range(start, min(start + columns, len(pictures)))
        top += _inches([wrapped[index] for index in row])
        for column, index in enumerate(row):
            corner = left + CELL * column + _GAP
            box = (corner, top + _GAP, corner + side, top + _GAP + side * aspect)
            row_title = turned[start // columns] if turned and column == 0 else ""
            cells.append(Cell(box, pictures[index], wrapped[index], row_title))
        top += side * aspect + 2 * _GAP
    return Sheet((left + CELL * columns, top + _inches([caption])), cells, caption)


def verbatim() -> dict:
    """Returns matplotlib's options for text of a user: dollar signs start no formula, and further fonts cover other scripts."""
    return {"parse_math": False, "fontfamily": [*rcParams["font.family"], *more_scripts()]}


def _fitted(picture: Image.Image, width: float, height: float) -> Image.Image:
    """Resizes a picture to fit a box, unless it fits within a pixel already."""
    scale = min(width / picture.width, height / picture.height)
    if abs(scale - 1) * max(picture.size) <= 1:
        return picture
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)


def _wrap(text: str, width: int = _LINE) -> str:
    if len(text) > _LONGEST:  # drawing a thousand characters takes seconds
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    wide = any(unicodedata.east_asian_width(character) in "FW" for character in text)
    return "\n".join(textwrap.fill(line, width // 2 if wide else width) for line in text.splitlines())


def _inches(titles: Sequence[str]) -> float:
    """Returns the height in inches of the highest of these titles."""
    return max((0.1 + 0.19 * (1 + title.count("\n")) for title in titles if title), default=0.05)
