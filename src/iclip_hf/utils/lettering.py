"""Text drawn with Pillow, in the fonts that matplotlib's figures use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont


# Distance between the base lines of two lines, and of the first from the top, in multiples of the size.
_LINE_HEIGHT, _ASCENT = 1.2, 0.93
# Below it lie Latin letters, which the default font has.
_LATIN_END = 0x250
# Fonts for scripts that the default font lacks; used if installed. The last font, which newer versions of matplotlib include,
# has a box for every character and so avoids a warning for each missing one.
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


def text_mask(text: str, size: float) -> Image.Image:
    """
    Draws text, for `image.paste(color, (x, y), mask)`. Characters that the default font lacks are taken from others.

    Args:
        text (`str`): lines are centred below each other.
        size (`float`): size of the font in pixels.

    Returns:
        `PIL.Image.Image` of mode "L": opacity of the text; a line is 1.2 times `size` high.
    """
    lines = [list(_runs(line, size)) for line in text.split("\n")]
    widths = [sum(font.getlength(run) for run, font in line) for line in lines]
    mask = Image.new("L", (max(1, round(max(widths))), round(_LINE_HEIGHT * size * len(lines))))
    draw = ImageDraw.Draw(mask)
    for number, (line, width) in enumerate(zip(lines, widths)):
        x, y = (mask.width - width) / 2, (_ASCENT + _LINE_HEIGHT * number) * size
        for run, font in line:
            draw.text((x, y), run, fill=255, font=font, anchor="ls")
            x += font.getlength(run)
    return mask


def word_boxes(text: str, size: float) -> Iterator[tuple[str, tuple[float, float, float, float]]]:
    """Yields the words of a text with their boxes (x0, y0, x1, y1) in its `text_mask`, in pixels."""
    lines = text.split("\n")
    widest = max(_width(line, size) for line in lines)
    for number, line in enumerate(lines):
        left, top = (widest - _width(line, size)) / 2, _LINE_HEIGHT * size * number
        for word in re.finditer(r"\S+", line):
            start, end = (left + _width(line[:at], size) for at in word.span())
            yield word[0], (start, top, end, top + _LINE_HEIGHT * size)


def _width(line: str, size: float) -> float:
    return sum(font.getlength(run) for run, font in _runs(line, size))


@cache
def more_scripts() -> list[str]:
    """Returns the installed fonts for scripts that the default font lacks."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return [name for name in _MORE_SCRIPTS if name in installed]


def _runs(line: str, size: float) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    """Yields the parts of a line with their fonts."""
    for path, characters in groupby(line, _font_with):
        yield "".join(characters), _font(path, size)


@cache
def _font_with(character: str) -> str:
    """Returns the file of the first font that has a character; the default font if none has."""
    default = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    if ord(character) < _LATIN_END:
        return default
    return next((path for path, known in _coverage(default) if ord(character) in known), default)


@cache
def _coverage(default: str) -> list[tuple[str, frozenset[int]]]:
    """Returns files of fonts and the characters that each has."""
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    paths = [default, *(str(findfont(FontProperties(family=[name]))) for name in more_scripts())]
    return [(path, frozenset(FT2Font(path).get_charmap())) for path in paths]


@cache
def _font(path: str, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)
