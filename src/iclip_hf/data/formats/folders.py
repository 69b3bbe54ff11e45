"""Folders with a subfolder of images for each class."""

from __future__ import annotations

import logging
from pathlib import Path

from ..columns import USUAL_COLUMNS
from ..files import image_files
from .source import PackedRows, Source
from .tables import METADATA, TABLES


logger = logging.getLogger(__name__)

CLASS_CAPTION = "a photo of a {}"  # caption of the images of a class


def read_class_folders(path: Path) -> Source:
    """
    Reads a folder with a subfolder of images for each class, named like the class: `dog/1.jpg`. Images elsewhere are
    left out with a warning, and so are tables. Raises `FileNotFoundError` if no subfolder has an image, and
    `ValueError` if a subfolder has its own table of captions, as the splits of an `imagefolder` of `datasets`.
    """
    if tables := sorted(table for name in METADATA for table in path.glob(f"*/{name}")):
        raise ValueError(f"{tables[0]}: this table has the captions of its folder; name that folder, not {path}.")
    found = [image.relative_to(path) for image in image_files(path)]
    images = [image for image in found if len(image.parts) == 2]
    if not images:
        raise FileNotFoundError(
            f"{path}: there is neither a file of pairs nor an image in a folder of its class, such as dog/1.jpg; name "
            "another folder, or a table itself if it is not called metadata.jsonl or metadata.csv."
        )
    if elsewhere := [image for image in found if len(image.parts) != 2]:
        logger.warning(
            "%s: left out %d images in no folder of a class, such as %r", path, len(elsewhere), str(elsewhere[0])
        )
    # As in data sets of Kaggle and COCO, whose folders are splits.
    files = (file for pattern in ("*", "annotations/*") for file in path.glob(pattern))
    if tables := [file for file in files if file.suffix.lower() in (*TABLES, ".json")]:
        logger.warning("%s: left out; captions are the names of folders, such as %r", min(tables), images[0].parts[0])
    class_names = (" ".join(image.parent.name.replace("_", " ").split()) for image in images)
    rows = PackedRows({"caption": CLASS_CAPTION.format(name)} for name in class_names)
    return Source(path, path, USUAL_COLUMNS, rows, PackedRows(image.as_posix() for image in images), [])
