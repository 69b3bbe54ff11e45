"""Text rendered with Pillow, in the fonts that come with matplotlib. matplotlib itself is imported only for scripts other than Latin."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


# Distance between the base lines of two lines, and of the first from the top, in multiples of the size.
_LINE_HEIGHT, _ASCENT = 1.25, 0.97
# The default font has Latin letters, which lie below the first code, and this punctuation.
_LATIN_END, _PUNCTUATION = 0x250, range(0x2010, 0x2027)
# Longer texts are shortened in the middle, in characters, because drawing a thousand takes seconds.
_LONGEST = 250
# Fonts for scripts that the default font lacks; used if installed. The last, of newer versions of matplotlib, has a box for every character.
_MORE_SCRIPTS = (
    "Noto Sans CJK SC, Noto Sans CJK JP, Noto Sans Devanagari, PingFang SC, Hiragino Sans, Microsoft YaHei, Malgun Gothic, "
    "Nirmala UI, Arial Unicode MS, Last Resort High-Efficiency"
).split(", ")


def text_mask(text: str, size: float, bold: bool = False) -> Image.Image:
    """
    Draws text, for `image.paste(color, (x, y), mask)`. Characters that the default font lacks are taken from others.

    Args:
        text (`str`): lines start at the left.
        size (`float`): size of the font in pixels.
        bold (`bool`): whether the letters of the default font are bold.

    Returns:
        `PIL.Image.Image` of mode "L": opacity of the text; a line is 1.25 times `size` high.
    """
    lines = text.split("\n")
    widest = max(text_width(line, size, bold) for line in lines)
    mask = Image.new("L", (max(1, round(widest)), round(_LINE_HEIGHT * size * len(lines))))
    draw = ImageDraw.Draw(mask)
    for number, line in enumerate(lines):
        x, y = 0.0, (_ASCENT + _LINE_HEIGHT * number) * size
        for run, font in _runs(line, size, bold):
            draw.text((x, y), run, fill=255, font=font, anchor="ls")
            x += font.getlength(run)
    return mask


def text_width(line: str, size: float, bold: bool = False) -> float:
    """Returns the width of a line in pixels."""
    return sum(font.getlength(run) for run, font in _runs(line, size, bold))


def fitted(text: str, size: float, width: float, lines: int, bold: bool = False) -> str:
    """Breaks a text into at most `lines` lines that fit a width in pixels. An ellipsis stands for what does not fit."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    rows = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".lstrip()
        if text_width(longer, size, bold) <= width:
            rows[-1] = longer
            continue
        rows.append("")
        for character in word:  # breaks words that are wider than a line, and scripts without spaces
            if text_width(rows[-1] + character, size, bold) > width:
                rows.append("")
            rows[-1] += character
    rows = [row for row in rows if row] or [""]
    if len(rows) > lines:
        last = rows[lines - 1]
        while last and text_width(f"{last}…", size, bold) > width:
            last = last[:-1]
        rows[lines - 1 :] = [f"{last}…"]
    return "\n".join(rows)


def _runs(line: str, size: float, bold: bool) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    """Yields the parts of a line with their fonts."""
    for path, characters in groupby(line, lambda character: _font_with(character, bold)):
        yield "".join(characters), _font(path, size)


_font = cache(ImageFont.truetype)


@cache
def _font_with(character: str, bold: bool) -> str:
    """Returns the file of the first font that has a character; the default font if none has."""
    package = Path(importlib.util.find_spec("matplotlib").origin).parent  # found, not imported
    default = str(package / "mpl-data" / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf")
    if ord(character) < _LATIN_END or ord(character) in _PUNCTUATION:
        return default
    return next((path for path, known in _coverage(default) if ord(character) in known), default)


@cache
def _coverage(default: str) -> list[tuple[str, frozenset[int]]]:
    """Returns files of fonts and the characters that each has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font_names
    from matplotlib.ft2font import FT2Font

    installed = [FontProperties(family=[name]) for name in _MORE_SCRIPTS if name in get_font_names()]
    paths = [default, *(str(findfont(font)) for font in installed)]
    return [(path, frozenset(FT2Font(path).get_charmap())) for path in paths]
