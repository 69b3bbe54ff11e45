"""What a format gives."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...utils.digests import file_state
from ..columns import Columns


@dataclass(eq=False)
class Source:
    """
    Rows of one file or folder.

    Attributes:
        path: the file or folder.
        folder: names of image files are relative to it.
        columns: names of the columns of the texts in `rows`; `USUAL_COLUMNS` for a format that names them itself, such
            as "caption".
        rows: `dict`s of columns, by number. `image` is as `datasets` stores it, `{"bytes": ..., "path": ...}`, for an
            image within the row. `__key__` names the row. Reading a row raises `ValueError` if it is unusable.
        names: the image file of each row, None for an image within the row and for a row without an image.
        files: the files of the source itself.
    """

    path: Path
    folder: Path
    columns: Columns
    rows: Sequence[dict]
    names: Sequence[str | None]
    files: Sequence[str | os.PathLike]

    def file(self, row: int) -> str | None:
        """Returns the path of the image file of a row."""
        name = self.names[row]
        return name and os.path.join(self.folder, name)

    @cached_property
    def state(self) -> bytes:
        """A digest of the files by their paths, sizes and modification times, and of the column of images in rows."""
        files = b"".join(map(file_state, self.files or [self.path]))
        return hashlib.sha256(files + repr(self.columns.image).encode()).digest()
