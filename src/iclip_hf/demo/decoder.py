"""
Decodes a visitor's image in a process of its own, whose memory and time are limited: a file of kilobytes can hold tags
or tiles that take gigabytes. `python -m iclip_hf.demo.decoder PATH` prints a line with the width and height of the
upright image in the file, then the image as PPM, with at most `MAX_SENT_SIDE` pixels per side. With exit code 1, it
prints an error message.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from PIL import Image

from ..model.images import open_image, to_rgb, upright


MAX_MEMORY = 2**29  # bytes
MAX_SECONDS = 30  # until the process is stopped: a JPEG file of a megabyte with thousands of scans takes minutes
# Pixels of an image that is converted to RGB, and of its longest side.
MAX_CONVERTED_PIXELS, MAX_CONVERTED_SIDE = 2**24, 2**14
# The preparation for the model takes twenty bytes for each pixel. Models see fewer pixels.
MAX_SENT_SIDE = 2048


def decode(path: str) -> tuple[Image.Image, tuple[int, int]]:
    """
    Loads an image as [`load_image`] does, but reduces a large one before it is converted. Returns the image, and the
    width and height that it would have without the reduction.
    """
    name = Path(path).name
    stored = reduced = open_image(path, name)
    scale = min(
        math.sqrt(MAX_CONVERTED_PIXELS / (stored.width * stored.height)), MAX_CONVERTED_SIDE / max(stored.size)
    )
    if scale < 1:
        size = (max(1, int(side * scale)) for side in stored.size)
        reduced = stored.resize(tuple(size), Image.Resampling.NEAREST)
    image = upright(reduced)
    return to_rgb(image, name), stored.size if image.size == reduced.size else stored.size[::-1]


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
        image, original_size = decode(sys.argv[1])
        sys.stdout.buffer.write(b"%d %d\n" % original_size)
        image.thumbnail((MAX_SENT_SIDE, MAX_SENT_SIDE))
        image.save(sys.stdout.buffer, "PPM")
    except (OSError, ValueError) as error:
        sys.stdout.buffer.write(str(error).encode(errors="replace"))
        sys.exit(1)
