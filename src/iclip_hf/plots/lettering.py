"""
Text drawn with Pillow in DejaVu Sans, from the folder `fonts`. Scripts that it lacks are drawn in installed fonts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


# Distances between base lines, and from the top to the first base line, in multiples of the font size.
_LINE_HEIGHT, _ASCENT = 1.25, 0.97
# Longest text in characters. Longer texts are shortened in the middle: drawing a thousand characters takes seconds.
_LONGEST = 250
# Files of fonts for scripts that DejaVu Sans lacks, on Linux, macOS and Windows.
_MORE_SCRIPTS = (
    *("NotoSansCJK-Regular.ttc", "NotoSansDevanagari-Regular.ttf"),
    *("PingFang.ttc", "Arial Unicode.ttf"),
    *("msyh.ttc", "malgun.ttf", "Nirmala.ttf"),
)
_FONTS = Path(__file__).with_name("fonts")
# A code point that no font has.
_NO_CHARACTER = "\U0010ffff"


def text_mask(text: str, size: float, bold: bool = False) -> Image.Image:
    """Draws text as a mask of mode "L", for `image.paste(color, (x, y), mask)`. `size` is the font size in pixels."""
    lines = text.split("\n")
    widest = max(text_width(line, size, bold) for line in lines)
    mask = Image.new("L", (max(1, round(widest)), round(_LINE_HEIGHT * size * len(lines))))
    draw = ImageDraw.Draw(mask)
    for index, line in enumerate(lines):
        x, y = 0.0, (_ASCENT + _LINE_HEIGHT * index) * size
        for run, font in _runs(line, size, bold):
            draw.text((x, y), run, fill=255, font=font, anchor="ls")
            x += font.getlength(run)
    return mask


def text_width(line: str, size: float, bold: bool = False) -> float:
    """Returns the width of a line in pixels."""
    return sum(font.getlength(run) for run, font in _runs(line, size, bold))


def fitted(text: str, size: float, width: float, max_lines: int, bold: bool = False) -> str:
    """
    Breaks a text into lines of at most `width` pixels. If there are more than `max_lines`, cuts the rest off and ends
    with an ellipsis.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if text_width(longer, size, bold) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for character in word:  # breaks words that are wider than a line, and scripts without spaces
            if text_width(lines[-1] + character, size, bold) > width:
                lines.append("")
            lines[-1] += character
    lines = [line for line in lines if line] or [""]
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and text_width(f"{last}…", size, bold) > width:
            last = last[:-1]
        lines[max_lines - 1 :] = [f"{last}…"]
    return "\n".join(lines)


def _runs(line: str, size: float, bold: bool) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    """Yields the parts of a line that share a font, with the font."""
    for path, characters in groupby(line, lambda character: _font_with(character, bold)):
        yield "".join(characters), _font(path, size)


_font = cache(ImageFont.truetype)


@cache
def _font_with(character: str, bold: bool) -> str:
    """Returns the file of the first font that has a character; the default font if none has."""
    default = str(_FONTS / f"DejaVuSans{'-Bold' if bold else ''}.ttf")
    return next((path for path in (default, *_installed_fonts()) if _has_character(path, character)), default)


@cache
def _installed_fonts() -> list[str]:
    paths = []
    for name in _MORE_SCRIPTS:
        with suppress(OSError):  # Pillow looks for the name in the folders of the system
            paths.append(ImageFont.truetype(name).path)
    return paths


def _has_character(path: str, character: str) -> bool:
    """Returns whether a font has a character. A font draws all characters that it lacks as the same glyph."""
    glyph, placeholder = (_font(path, 32).getmask(text) for text in (character, _NO_CHARACTER))
    return (glyph.size, bytes(glyph)) != (placeholder.size, bytes(placeholder))
