"""Sheets of pictures under their titles. Each function returns one RGB image."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageColor, ImageOps

from ..model.images import load_image
from ..model.presence import ABSENT, presence_text
from ..model.words import find_words
from . import COLORMAPS
from .colors import OPACITY, SEGMENTS, overlay
from .lettering import fitted, text_mask, text_width


if TYPE_CHECKING:
    from ..model.explanation import Explanation

# Resolution of a sheet in dots per inch. All lengths are in pixels at this resolution.
DPI = 120
# Width of each picture.
_PICTURE = 336
_MARGIN, _GAP = 18, 14
# Font sizes of titles, and of the notes below them.
_TITLE, _NOTE = 15, 12.5
# Distance between a title and its picture.
_SPACE = 7
_INK, _PALE = "#1c2430", "#5b6472"
# Grey of the texts of the background in a label map, and behind the bar of a colour map.
_GREY = "#c9cdd4"
# Opacity of the black over the pixels of a label map that have no text.
_DIMMED = 0.4
# Colour of these pixels in the legend.
_DARK = "#4d4d4d"
# Largest number of maps in a picture.
MAX_MAPS = 24
# Opacity on white of the picture of an absent text.
_FADED = 0.35


def draw(
    explanation: Explanation,
    image=None,
    *,
    colormap: str = COLORMAPS[0],
    opacity: float = OPACITY,
    columns: int = 5,
    dpi: int = DPI,
) -> Image.Image:
    """
    Draws an image, and its maps over it: at most 24, in the order of the texts, with absent texts last. Each title has
    the score and, if the model has presence, the presence as a word and a number. The picture of an absent text is
    faded, because its map is stretched to [0, 1] like all others. Above the maps of words stands their sentence, whose
    words are orange, or blue if their score is negative, as strongly as it is high. Notebooks show an explanation by
    this picture.

    Example:

    ```python
    >>> from iclip_hf import draw, explain

    >>> explanation = explain("embedded", ["dog.jpg"], ["dog", "red ball"])[0]
    >>> draw(explanation).save("explanation.png")
    ```

    Args:
        explanation ([`Explanation`]): the explanation of an image.
        image (*optional*): the image, in any form that [`explain`] takes; the explanation's own image if not given.
        colormap (`str`): `"heat"`, `"cividis"`, which is safe for colour-blind readers, or `"jet"`, the colours of the
            paper.
        opacity (`float`): opacity where a map is 1, in [0, 1]; `"jet"` has 0.6 of it everywhere.
        columns (`int`): largest number of pictures in a row.
        dpi (`int`): resolution; at 120, each map is 336 pixels wide.

    Returns:
        `PIL.Image.Image` of mode "RGB".
    """
    image = load_image(explanation.image if image is None else image)
    present = explanation.present
    drawn = sorted(range(len(present)), key=lambda index: not present[index])[:MAX_MAPS]
    left_out = f" · {len(drawn)} of {len(explanation)} texts" if len(drawn) < len(explanation) else ""
    titles = [f"image\n{image.width} x {image.height} pixels · {explanation.made_by}{left_out}"]
    image = at_picture_size(image, dpi)
    pictures = [image]
    explanation = replace(explanation, size=(image.height, image.width))  # maps of this size
    presences, presence_words = explanation.presences, explanation.presence_words
    for index in drawn:
        pictures.append(_map_picture(image, explanation.map(index), presence_words[index], colormap, opacity))
        presence = presence_text(presences[index], explanation.min_presence)
        notes = " · ".join(filter(None, [presence, f"score {explanation.scores[index]:.2f}"]))
        titles.append(f"{' '.join(explanation.labels[index].split())}\n{notes}")
    sheet = picture_grid(pictures, titles, columns, color_bar=colormap, dpi=dpi)
    return sheet if explanation.sentence is None else _under_sentence(sheet, explanation, dpi / DPI)


def png(explanation: Explanation) -> bytes | None:
    """Returns the picture of [`draw`] as a PNG file, for notebooks; None if the explanation has no image."""
    if explanation.image is None:
        return None
    file = io.BytesIO()
    draw(explanation).save(file, "PNG")
    return file.getvalue()


def label_sheet(
    image: Image.Image,
    label_map: np.ndarray,
    texts: Sequence[str],
    presence_words: Sequence[str | None],
    background: Sequence[str] = (),
    made_by: str = "",
    *,
    opacity: float = 0.6,
    dpi: int = DPI,
) -> Image.Image:
    """
    Draws an RGB image, its label map over it, and a legend. `label_map` has the index of a text for each pixel, `(H,
    W)`; pixels without a text have -1 and are dimmed. Indices count first `texts`, then the texts of the `background`,
    which are grey. `presence_words` are the [`Explanation.presence_words`] of all these texts. The legend lists the
    texts that have pixels, then the pixels without a text, with their shares of the image, then the other texts.
    """
    names = [*texts, *(f"{text} (background)" for text in background)]
    colors = [SEGMENTS[index % len(SEGMENTS)] for index in range(len(texts))] + [_GREY] * len(background)
    # Shares of the whole label map, as in the table of `iclip segment`.
    without_text, *areas = np.bincount(label_map.ravel() + 1, minlength=len(names) + 1) / label_map.size
    image = at_picture_size(image, dpi)
    with_pixels, others = [], []
    for color, name, word, area in zip(colors, names, presence_words, areas):
        if area:
            note = " · ".join(filter(None, [word, f"{100 * area:.1f} %"]))
            with_pixels.append((color, name, note))
        else:
            others.append(("white", name, word or ""))
    if without_text:
        with_pixels.append((_DARK, "no text", f"{100 * without_text:.1f} %"))
    legend = _legend(with_pixels + others, _aspect([image]), dpi)
    legend_title = "presence and share of the image" if any(presence_words) else "share of the image"
    titles = ["image", f"at most one text for each pixel\n{made_by}", legend_title]
    return picture_grid([image, _label_picture(image, label_map, colors, opacity), legend], titles, 3, dpi=dpi)


def comparison_sheet(
    image: Image.Image,
    heatmaps: Mapping[str, Sequence[np.ndarray | None]],
    row_titles: Sequence[str],
    presence_words: Mapping[str, Sequence[str | None]] | None = None,
    *,
    colormap: str = COLORMAPS[0],
    dpi: int = DPI,
) -> Image.Image:
    """
    Compares methods side by side (Fig. 2, 6 and 10). A row shows the RGB image and the maps of one text over it, in a
    column for each method. With a single text, a row has at most five pictures. `heatmaps` has for the title
    of each column the maps of all texts, `(H, W)` in [0, 1]; None leaves a gap. `presence_words` has for the same
    titles the presence of all texts as words. Pictures of absent texts are faded.
    """
    presence_words = presence_words or {}
    pictures = []
    for index in range(len(row_titles)):
        pictures.append(image)
        for title, maps in heatmaps.items():
            word = presence_words[title][index] if title in presence_words else None
            pictures.append(None if maps[index] is None else _map_picture(image, maps[index], word, colormap))
    if len(row_titles) == 1:
        return picture_grid(pictures, [*row_titles, *heatmaps], 5, color_bar=colormap, dpi=dpi)
    titles = ["", *heatmaps]  # above the first row: no title of the image, then those of the methods
    titles += [""] * (len(pictures) - len(titles))
    return picture_grid(pictures, titles, len(heatmaps) + 1, row_titles, color_bar=colormap, dpi=dpi)


def picture_grid(
    pictures: Sequence[Image.Image | None],
    titles: Sequence[str],
    columns: int,
    row_titles: Sequence[str] = (),
    *,
    color_bar: str | None = None,
    dpi: int = DPI,
) -> Image.Image:
    """
    Arranges pictures in rows of equal length, each under its title. The first line of a title is bold, the others are
    notes. None leaves a gap. `color_bar` is the colour map whose bar is drawn below the pictures.
    """
    scale = dpi / DPI
    margin, gap, side = (round(length * scale) for length in (_MARGIN, _GAP, _PICTURE))
    num_rows = math.ceil(len(pictures) / columns)
    columns = math.ceil(len(pictures) / num_rows)
    width = columns * (side + gap) - gap
    height = round(side * _aspect(pictures))
    placed = []  # pictures and titles, each with the coordinates of its upper left corner
    top = margin

    def place_titles(texts: Sequence[str], title_width: int) -> None:
        """Places titles side by side with their lower edges aligned."""
        nonlocal top
        blocks = [_title_block(text, title_width, scale) for text in texts]
        tallest = max((block.height for block in blocks), default=0)
        for column, block in enumerate(blocks):
            placed.append((block, margin + column * (side + gap), top + tallest - block.height))
        if tallest:
            top += tallest + round(_SPACE * scale)

    for row, start in enumerate(range(0, len(pictures), columns)):
        in_row = slice(start, start + columns)
        top += 2 * gap if row else 0
        place_titles(titles[in_row], side)
        place_titles(row_titles[row : row + 1], width)
        for column, picture in enumerate(pictures[in_row]):
            if picture is not None:
                padded = ImageOps.pad(picture, (side, height), Image.Resampling.LANCZOS, color="white")
                placed.append((padded, margin + column * (side + gap), top))
        top += height
    if color_bar is not None:
        placed.append((_color_bar(color_bar, scale), margin, top + gap))
        top += gap + round(_NOTE * scale)
    canvas = Image.new("RGB", (width + 2 * margin, top + margin), "white")
    for picture, x, y in placed:
        canvas.paste(picture, (x, y))
    return canvas


def _map_picture(
    image: Image.Image, heatmap: np.ndarray, word: str | None, colormap: str, opacity: float = OPACITY
) -> Image.Image:
    """Draws the map of a text over an image. The picture of an absent text is faded."""
    picture = overlay(image, heatmap, opacity, colormap)
    return Image.blend(Image.new("RGB", picture.size, "white"), picture, _FADED) if word == ABSENT else picture


def _label_picture(image: Image.Image, label_map: np.ndarray, colors: Sequence[str], opacity: float) -> Image.Image:
    """Draws a label map over an image in the colours of its texts. Pixels without a text, -1, are dimmed."""
    label_map = np.asarray(Image.fromarray(label_map.astype(np.int32)).resize(image.size, Image.Resampling.NEAREST))
    palette = np.array([ImageColor.getrgb(color) for color in ("black", *colors)], np.uint8)
    opacities = Image.fromarray(np.where(label_map < 0, 255 * _DIMMED, 255 * opacity).astype(np.uint8))
    return Image.composite(Image.fromarray(palette[label_map + 1]), image, opacities)


def at_picture_size(image: Image.Image, dpi: int = DPI) -> Image.Image:
    """Returns a copy of an image, reduced to the size that it has on a sheet of this resolution."""
    image = image.copy()
    side = round(_PICTURE * dpi / DPI)
    image.thumbnail((side, round(side * _aspect([image]))))
    return image


def _aspect(pictures: Sequence[Image.Image | None]) -> float:
    """Returns the mean of height divided by width, limited to [1/2, 4/3] so that sheets fit on a page."""
    ratios = [picture.height / picture.width for picture in pictures if picture is not None]
    return min(max(float(np.mean(ratios)), 0.5), 4 / 3)


def _under_sentence(sheet: Image.Image, explanation: Explanation, scale: float) -> Image.Image:
    """Draws the sentence above the sheet of its words. Words that the explanation does not have are not coloured."""
    margin, size = round(_MARGIN * scale), 1.4 * _TITLE * scale
    scores = explanation.scores.tolist()
    highest = max(map(abs, scores)) or 1.0
    scored = [*zip(explanation.labels, scores)]
    placed, x, y, end = [], margin, margin, 0
    for word in find_words(explanation.sentence):
        score = scored.pop(0)[1] if scored and scored[0][0] == word.group() else 0.0
        mask = text_mask(word.group(), size)
        x += round(text_width(" ", size)) if word.start() > end else 0
        if x + mask.width > sheet.width - margin:
            x, y = margin, y + round(1.2 * mask.height)
        color = Image.new("RGB", mask.size, SEGMENTS[0 if score > 0 else 1])
        color = Image.blend(Image.new("RGB", mask.size, "white"), color, abs(score) / highest)
        color.paste(_INK, (0, 0), mask)
        placed.append((color, x, y))
        x, end = x + mask.width, word.end()
    top = y + mask.height
    canvas = Image.new("RGB", (sheet.width, top + sheet.height), "white")
    canvas.paste(sheet, (0, top))
    for word, x, y in placed:
        canvas.paste(word, (x, y))
    return canvas


def _title_block(text: str, width: int, scale: float) -> Image.Image:
    title, _, notes = text.partition("\n")
    title = fitted(title, _TITLE * scale, width, 3, bold=True)
    notes = fitted(notes, _NOTE * scale, width, 2)
    masks = [(text_mask(title, _TITLE * scale, bold=True), _INK)] if title else []
    masks += [(text_mask(notes, _NOTE * scale), _PALE)] if notes else []
    block = Image.new("RGB", (width, sum(mask.height for mask, _ in masks)), "white")
    top = 0
    for mask, ink in masks:
        block.paste(ink, (0, top), mask)
        top += mask.height
    return block


def _color_bar(colormap: str, scale: float) -> Image.Image:
    """Draws the bar of a colour map between the words for its ends."""
    size, gap = _NOTE * scale, round(8 * scale)
    levels = np.linspace(0, 1, round(140 * scale))[None].repeat(round(10 * scale), 0)
    bar = overlay(Image.new("RGB", levels.shape[::-1], _GREY), levels, colormap=colormap)
    low, high = text_mask("low", size), text_mask("high, each map on its own scale", size)
    line = Image.new("RGB", (low.width + bar.width + high.width + 2 * gap, low.height), "white")
    line.paste(_PALE, (0, 0), low)
    line.paste(bar, (low.width + gap, (low.height - bar.height) // 2))
    line.paste(_PALE, (low.width + bar.width + 2 * gap, 0), high)
    return line


def _legend(entries: Sequence[tuple[str, str, str]], aspect: float, dpi: int) -> Image.Image:
    """Draws entries (colour, name, note), as large as a picture. The last line counts those that do not fit."""
    scale = dpi / DPI
    size, line = _NOTE * scale, round(24 * scale)
    width = round(_PICTURE * scale)
    legend = Image.new("RGB", (width, round(width * aspect)), "white")
    fitting = legend.height // line
    if len(entries) > fitting:
        entries = [*entries[: fitting - 1], ("white", f"and {len(entries) - fitting + 1} more", "")]
    for index, (color, name, note) in enumerate(entries):
        y = line * index
        note_mask = text_mask(note, size)
        room = width - 2 * line - note_mask.width
        name_mask = text_mask(fitted(name, size, room, 1), size)
        middle = y + (line - name_mask.height) // 2
        legend.paste(color, (0, y + line // 6, line, y + line * 5 // 6))
        legend.paste(_PALE if note == ABSENT else _INK, (line + line // 3, middle), name_mask)
        legend.paste(_PALE, (width - note_mask.width, middle), note_mask)
    return legend
