"""Files and lines that the commands write: checks of `--output`, pictures, errors."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ..model.images import is_url


PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf")
_LONGEST_CELL = 60  # of a printed table, in characters


def check_output_file(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises `ValueError` unless an `--output` has one of these suffixes."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"--output is a file name that ends in {' or '.join(suffixes)}, not {path}: name another.")


def check_output_folder(path: Path) -> None:
    """Raises `ValueError` unless an `--output` is a folder, or a new name without a suffix."""
    if not path.is_dir() and (path.suffix or path.exists()):
        raise ValueError(f"--output is a folder here, not the file name {path}: name a folder.")


def file_name(image: str | Path) -> str:
    """Returns the file name of an image: "photo.jpg" of "data/photo.jpg", or of "http://a.b/photo.jpg?token=c"."""
    return Path(re.split("[?#]", image)[0] if is_url(image) else image).name


def name_for(image: str | Path, ending: str) -> str:
    """Returns the name of an output of an image: `photo-explanation.png` for "photo.jpg" or "http://a.b/photo.jpg?c"."""
    # A file name has at most 255 bytes. A Chinese character takes three.
    stem = os.fsencode(Path(file_name(image)).stem)[:200].decode(errors="ignore")
    return f"{stem}-{ending}"


def model_folders(model: str) -> list[Path]:
    """Returns the local folder of a model as a list, which is empty for a model without one."""
    return [Path(model)] if model != "embedded" and Path(model).is_dir() else []


def resolution(picture: Path) -> int:
    """Returns the dots per inch of a picture: 300 for PDF, which is printed, otherwise 120."""
    return 300 if picture.suffix.lower() == ".pdf" else 120


def save_picture(image, path: Path, dpi: int, replace: bool) -> Path:
    """Writes a PIL image by the suffix of a path, or of a new name without `replace`. Returns the path."""
    from PIL import Image

    from ..utils.files import atomic_write, write_image, write_new

    suffix = path.suffix.lower()
    # Run lengths compress a photograph as well as the default of PNG, in a quarter of the time.
    kwargs = {"compress_type": zlib.Z_RLE} if suffix == ".png" else {"quality": 92}
    kwargs |= {"format": Image.registered_extensions()[suffix], "dpi": (dpi, dpi)}
    if not replace:
        return write_new(path, partial(write_image, image, **kwargs))
    with atomic_write(path) as temporary:
        write_image(image, temporary, **kwargs)
    return path


def report_error(command: str, error: BaseException) -> None:
    """Prints an error as one line on stderr. If all processes are interrupted, only the first one prints it."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    if not isinstance(error, KeyboardInterrupt) or os.environ.get("RANK", "0") == "0":
        print_to_stderr(command, text)


def print_lines(*lines: str) -> None:
    """Prints lines on stdout, without a buffer."""
    print("\n".join(lines), flush=True)


def print_to_stderr(command: str, text: str) -> None:
    """Prints a line on stderr, after the name of the command."""
    print(f"iclip {command}: {text}", file=sys.stderr, flush=True)


@contextmanager
def printed_steps() -> Iterator[None]:
    """Prints the steps of functions on stderr, which they log at the level INFO."""
    logger = logging.getLogger(__package__.partition(".")[0])
    handler = logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def print_folder(folder: Path, *command_line: str) -> None:
    """Prints the size of a folder that was written, and a command line that uses it."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    megabytes = sum(sizes) / 1e6
    print_lines(f"{folder}: {len(sizes)} files, {megabytes:,.1f} MB. Next:", f"  {shlex.join(command_line)}")


def cut(cell: str) -> str:
    """Cuts a long text for a cell of a table."""
    return cell if len(cell) <= _LONGEST_CELL else f"{cell[: _LONGEST_CELL - 3]}..."
