"""Files of data: the images of a folder, patterns of file names, text files."""

from __future__ import annotations

import glob
import logging
import os
import re
from pathlib import Path

from ..model.images import image_suffixes


logger = logging.getLogger(__name__)

# Matches the default names of pictures and label maps that the commands write.
is_output_name = re.compile(r"-(explanation|segments|labels|comparison)(-\d+)?\.[a-z]+$", re.IGNORECASE).search
_SOMETIMES_UNREADABLE = (".heic", ".heif", ".avif", ".pdf")  # suffixes that not every Pillow reads


def image_files(folder: Path) -> list[Path]:
    """
    Returns the images of a folder and its subfolders, sorted. Hidden files and folders are left out. Pictures with the
    name of an output of the commands, and images that cannot be read, such as HEIC, are left out with a warning.
    """
    files = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = (name for name in folders if not is_hidden(name))
        files += (Path(root, name) for name in names if not is_hidden(name))
    images = [file for file in files if file.suffix.lower() in image_suffixes()]
    unreadable_suffixes = {*_SOMETIMES_UNREADABLE} - image_suffixes()
    unreadable = [file.name for file in files if file.suffix.lower() in unreadable_suffixes]
    outputs = [file.name for file in images if is_output_name(file.name)]
    for left_out, reason in (
        (unreadable, "HEIC needs `pip install pillow-heif`; convert others to JPEG or PNG"),
        (outputs, "this is the name of an output"),
    ):
        if left_out:
            logger.warning("%s: left out %d files such as %r: %s", folder, len(left_out), min(left_out), reason)
    return sorted(file for file in images if not is_output_name(file.name))


def images_of(name: str | os.PathLike) -> list[Path] | None:
    """
    Returns the images of a folder, or the files of a pattern such as "photos/*.jpg"; None for another name. Raises
    `FileNotFoundError` if there are none.
    """
    if os.path.isdir(name):
        images = image_files(Path(name))
    elif "*" in os.fspath(name) and not os.path.exists(name):
        images = [Path(file) for file in sorted(glob.glob(name, recursive=True))]
    else:
        return None
    if not images:
        raise FileNotFoundError(f"{name}: there are no images here.")
    return images


def is_hidden(name: str) -> bool:
    """Returns whether a name is that of a hidden file, or of the folder that macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def expand_braces(pattern: str) -> list[str]:
    """Expands braces as a shell does: ranges with leading zeros, "{08..10}", and lists, "{a,b}"."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    alternatives = match[1].split(",")
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = bounds.groups()
        alternatives = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for chosen in alternatives for name in expand_braces(before + chosen + after)]


def read_text(path: Path) -> str:
    """Reads a file in UTF-8, with or without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this file is not UTF-8 ({error}); save it as UTF-8.") from error
