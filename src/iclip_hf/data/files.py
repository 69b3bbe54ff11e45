"""Files of data: the images of a folder, patterns of names, text files."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from ..model.images import image_suffixes


logger = logging.getLogger(__name__)

# Matches the default names of pictures and label maps that the commands write.
is_written = re.compile(r"-(explanation|segments|labels|comparison)(-\d+)?\.[a-z]+$", re.IGNORECASE).search
_OTHERS = (".heic", ".heif", ".avif", ".pdf")  # Pillow may not read them


def image_files(folder: Path) -> list[Path]:
    """
    Returns the images of a folder and its subfolders, sorted. Leaves out hidden files and folders and, with a warning,
    pictures that are named like outputs of the commands, and files that cannot be read, such as HEIC.
    """
    files = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = (name for name in folders if not is_hidden(name))
        files += (Path(root, name) for name in names if not is_hidden(name))
    images = [file for file in files if file.suffix.lower() in image_suffixes()]
    unread = {*_OTHERS} - image_suffixes()
    others = [file.name for file in files if file.suffix.lower() in unread]
    written = [file.name for file in images if is_written(file.name)]
    for left_out, reason in (
        (others, "HEIC needs `pip install pillow-heif`; convert others to JPEG or PNG"),
        (written, "this is the name of an output"),
    ):
        if left_out:
            logger.warning("%s: left out %d files such as %r: %s", folder, len(left_out), min(left_out), reason)
    return sorted(file for file in images if not is_written(file.name))


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def expand_braces(pattern: str) -> list[str]:
    """Expands braces as a shell does: ranges with leading zeros, "{08..10}", and lists, "{a,b}"."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    parts = match[1].split(",")
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = bounds.groups()
        parts = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [name for part in parts for name in expand_braces(pattern[: match.start()] + part + pattern[match.end() :])]


def read_text(path: Path) -> str:
    """Reads a file in UTF-8, with or without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this file is not UTF-8 ({error}); save it as UTF-8.") from error
