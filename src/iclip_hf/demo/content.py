"""What the live demo and the page in the browser have in common: limits, example photographs, colours, files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from PIL import Image

from ..utils.names import COLORMAP


MAX_TEXTS = 12
# Longest side of the maps in pixels: enough for a screen, and some hundred kilobytes for all maps together.
VIEW_SIDE = 640


class Example(NamedTuple):
    """A photograph to try: its `title`, `texts` of which the last is absent, and its `origin` with the licence."""

    title: str
    texts: str
    origin: str


# Photographs of scikit-image.
EXAMPLES = {
    "coffee.png": Example("Cup of coffee", "cup of coffee, spoon, dog", "Rachel Michetti, CC0"),
    "chelsea.png": Example("Cat", "cat, eyes, bicycle", "Stefan van der Walt, CC0"),
    "rocket.jpg": Example("Rocket at night", "rocket, night sky, dog", "SpaceX, public domain"),
    "astronaut.png": Example("Astronaut", "woman, orange jacket, tree", "NASA, public domain"),
}


def example_files() -> list[Path]:
    """Returns the paths of the `EXAMPLES`; none where scikit-image is not installed."""
    package = importlib.util.find_spec("skimage")
    folder = Path(package.origin).with_name("data") if package else Path()
    return [folder / name for name in EXAMPLES if (folder / name).is_file()]


def view_size(image: Image.Image) -> tuple[int, int]:
    """Returns width and height in pixels of the shown image and maps."""
    scale = min(1.0, VIEW_SIDE / max(image.size))
    return tuple(max(1, round(side * scale)) for side in image.size)


def colors() -> list[list[int]]:
    """Returns the red, green and blue, 0..255, of the 256 levels of a map."""
    return colormaps[COLORMAP](np.arange(256), bytes=True)[:, :3].tolist()


def beside(name: str) -> str:
    """Returns the text of a file in this folder."""
    return Path(__file__).parent.joinpath(name).read_text(encoding="utf-8")
