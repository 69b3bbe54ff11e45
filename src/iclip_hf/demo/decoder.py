"""
Decodes a visitor's image in a process of its own, whose memory is limited: a file of kilobytes can hold tags or tiles
that take gigabytes. `python -m iclip_hf.demo.decoder PATH` prints a line with the width and height of the image, then
the image as PPM, with at most `MAX_SENT_SIDE` pixels per side. With exit code 1, it prints an error message.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from PIL import Image

from ..model.images import open_image, to_rgb, upright


MAX_MEMORY = 2**29  # bytes
# Larger images are reduced to this number of pixels, and to this length of a side.
MAX_KEPT_PIXELS, MAX_KEPT_SIDE = 2**24, 2**14
# The preparation for the model takes twenty bytes for each pixel. Models see fewer pixels.
MAX_SENT_SIDE = 2048


def decode(path: str) -> Image.Image:
    """Loads an image as [`load_image`] does, but reduces a large one before it is converted."""
    name = Path(path).name
    image = open_image(path, name)
    scale = min(math.sqrt(MAX_KEPT_PIXELS / (image.width * image.height)), MAX_KEPT_SIDE / max(image.size))
    if scale < 1:
        size = (max(1, int(side * scale)) for side in image.size)
        image = image.resize(tuple(size), Image.Resampling.NEAREST)
    return to_rgb(upright(image), name)


def _limit_memory() -> None:
    """Limits the memory of this process: on Linux all of it, on macOS a part of it, on Windows none."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))


if __name__ == "__main__":
    _limit_memory()
    try:
        image = decode(sys.argv[1])
        sys.stdout.buffer.write(b"%d %d\n" % image.size)
        image.thumbnail((MAX_SENT_SIDE, MAX_SENT_SIDE))
        image.save(sys.stdout.buffer, "PPM")
    except (OSError, ValueError) as error:
        sys.stdout.buffer.write(str(error).encode(errors="replace"))
        sys.exit(1)
