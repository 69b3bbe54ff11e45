"""Folders of images, of which each subfolder holds those of one class."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from ...model.images import image_suffixes
from ..columns import USUAL_COLUMNS
from .source import Source


logger = logging.getLogger(__name__)

CLASS_CAPTION = "a photo of a {}"  # of the images in a folder that is named by their class

# The names by default of pictures and label maps that the commands write.
_WRITTEN_NAME = re.compile(r"-(explanation|segments|labels|comparison)(-\d+)?\.[a-z]+$", re.IGNORECASE)
_OTHERS = (".heic", ".heif", ".avif", ".pdf")  # which Pillow may not read


def read_class_folders(path: Path) -> Source:
    """
    Reads a folder whose subfolders hold the images of one class each and have its name: `dog/1.jpg`. Images elsewhere
    are logged. Raises `FileNotFoundError` if there are no such images.
    """
    found = [image.relative_to(path) for image in image_files(path)]
    images = [image for image in found if len(image.parts) == 2]
    if not images:
        raise FileNotFoundError(
            f"{path}: there is neither metadata.jsonl, metadata.csv, a .tar or .parquet file, nor an image in a "
            "folder of its class, such as dog/1.jpg; name another folder, or the table itself."
        )
    if elsewhere := [image for image in found if len(image.parts) != 2]:
        logger.warning(
            "%s: left out %d images in no folder of a class, such as %r", path, len(elsewhere), str(elsewhere[0])
        )
    labels = (" ".join(image.parent.name.replace("_", " ").split()) for image in images)
    rows = [{"caption": CLASS_CAPTION.format(label)} for label in labels]
    return Source(path, path, USUAL_COLUMNS, rows, [image.as_posix() for image in images], [])


def image_files(folder: Path) -> list[Path]:
    """
    Returns the images of a folder and its subfolders, sorted. Hidden files and folders are left out, and, with a
    warning, pictures with the names of those that the commands write, and files such as HEIC that cannot be read.
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


def is_written(name: str) -> bool:
    """Returns whether a file has the name by default of a picture that the commands write."""
    return _WRITTEN_NAME.search(name) is not None


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
