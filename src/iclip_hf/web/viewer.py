"""What the live demo and the exported page share: limits, example photographs, colours, files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..model.presence import MIN_PRESENCE, SURE_PRESENCE
from ..plots import COLORMAPS, example_image
from ..plots.colors import OPACITY, SEGMENTS, color_table


MAX_TEXTS = 12
# Longest text. Models read far fewer characters, and a text of megabytes would fill the memory.
MAX_CHARACTERS = 1000
# Longest side of the maps in pixels: enough for a screen, and some hundred kilobytes for all maps together.
SHOWN_SIDE = 640


class Example(NamedTuple):
    """A photograph to try: file, title, texts (the last one is absent), and origin with licence."""

    file: Path
    title: str
    texts: str
    origin: str


def examples() -> list[Example]:
    """Returns the photographs to try: one of this package and, if scikit-image is installed, two of it."""
    # Photographs and texts that the embedded model is right about.
    found = [Example(Path(example_image()), "Tower", "tower, tree, sky, horse", "Pexels, CC0")]
    if package := importlib.util.find_spec("skimage"):
        folder = Path(package.origin).with_name("data")
        of_package = [
            Example(folder / "coffee.png", "Cup of coffee", "cup of coffee, plate, dog", "Rachel Michetti, CC0"),
            Example(folder / "chelsea.png", "Cat", "cat, bicycle", "Stefan van der Walt, CC0"),
        ]
        found += [example for example in of_package if example.file.is_file()]
    return found


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Returns width and height in pixels of the shown image and maps."""
    scale = min(1.0, SHOWN_SIDE / max(image.size))
    return tuple(max(1, round(side * scale)) for side in image.size)


def introduction(has_presence: bool) -> str:
    """Returns the text above the maps, as HTML. `has_presence` is whether the model computes presence."""
    text = """Bright pixels match most, dark ones least. Each map has its own scale, so a text that is not in the image
is bright somewhere as well. A refined map follows edges that the model may have ignored: the pointer also reads the
unrefined map. Most models know English texts only."""
    if has_presence:
        text += f"""
<b>Presence</b> is the probability that the image shows the text. It assumes that half of the texts are shown. A text
is <i>present</i> from {SURE_PRESENCE:.0%} on, <i>absent</i> below {MIN_PRESENCE:.0%}, and <i>unsure</i> in between.
Texts that resemble what is shown often pass."""
    return text


def viewer_theme() -> dict:
    """
    Returns the settings of `viewer.js`: the colours of the 256 levels of a map, the opacity of maps, the colours of
    segments, and the presences at which a text becomes unsure and present.
    """
    colors = {name: color_table(name).tolist() for name in COLORMAPS}
    return {"colors": colors, "opacity": OPACITY, "segments": SEGMENTS, "limits": [MIN_PRESENCE, SURE_PRESENCE]}


def read_asset(name: str) -> str:
    """Returns the text of a file of the page, in the folder `page`."""
    return Path(__file__).with_name("page").joinpath(name).read_text(encoding="utf-8")
