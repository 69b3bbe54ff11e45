"""The rows of image-text pairs that a format reads."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from ...utils.cache import file_state, total_size
from ..columns import Columns


class PackedRows(Sequence):
    """
    JSON values in one block of memory. As Python objects, the rows of a million pairs take several times as much, and
    each loading process would end up with a copy of them.
    """

    def __init__(self, rows: Iterable = ()):
        self._content, self._ends = bytearray(), array("q")
        for row in rows:
            self.append(row)

    def append(self, row) -> None:
        self._content += _encode(row).encode(errors="surrogatepass")
        self._ends.append(len(self._content))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int):
        end = self._ends[index]
        start = self._ends[index - 1] if index else 0
        return json.loads(self._content[start:end].decode(errors="surrogatepass"))


_encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(eq=False)
class Source:
    """
    Rows of one file or folder.

    Attributes:
        path: the file or folder.
        folder: folder that names of image files are relative to.
        columns: names of the columns in `rows`; `USUAL_COLUMNS` for a format that names its columns itself.
        rows: `dict`s of columns. For an image within the row, `image` is `{"bytes": ..., "path": ...}`, as `datasets`
            stores it. `__key__` names the row. Reading an unusable row raises `ValueError`.
        image_names: the image file of each row; None for an image within the row and for a row without an image.
        files: the files of the source, without image files.
    """

    path: Path
    folder: Path
    columns: Columns
    rows: Sequence[dict]
    image_names: Sequence[str | None]
    files: Sequence[str | os.PathLike]

    def file(self, row_index: int) -> str | None:
        """Returns the path of the image file of a row; None if the row names none."""
        name = self.image_names[row_index]
        return name and os.path.join(self.folder, name)

    def all_files(self) -> Iterable[str | os.PathLike]:
        """Yields the files of the source, and its image files."""
        return chain(self.files, filter(None, map(self.file, range(len(self.image_names)))))

    @cached_property
    def size(self) -> int:
        """The bytes of all files."""
        return total_size(self.all_files())

    @cached_property
    def state(self) -> str:
        """A digest of all files by their paths, sizes and modification times, and of the column of images in rows."""
        state = hashlib.sha256(f"{self.path.absolute()}\0{self.columns.image}".encode(errors="surrogatepass"))
        for file in self.all_files():
            state.update(file_state(file))
        return state.hexdigest()[:32]

    @property
    def num_images(self) -> int:
        return len(self._row_indices_by_image[1]) - 1

    def row_indices_of_image(self, image_index: int) -> list[int]:
        """
        Returns the indices of the rows of an image. They are one pair, because in a batch, the captions of other pairs
        count as wrong ones. Images are numbered in the order of their first rows.
        """
        row_indices, bounds = self._row_indices_by_image
        return row_indices[bounds[image_index] : bounds[image_index + 1]].tolist()

    @cached_property
    def _row_indices_by_image(self) -> tuple[np.ndarray, np.ndarray]:
        """The indices of all rows, grouped by image, and the bounds `(num_images + 1,)` of the groups."""
        digests = bytearray()
        for row_index in range(len(self.image_names)):
            file = self.file(row_index)
            name = os.path.normpath(file).encode(errors="surrogatepass") if file else b"\0%d" % row_index
            digests += hashlib.blake2b(name, digest_size=16).digest()
        digests = np.frombuffer(digests, "S16")
        _, first_of_image, image_of_row = np.unique(digests, return_index=True, return_inverse=True)
        first_rows = first_of_image[image_of_row.reshape(-1)]  # for each row, the first row of its image
        row_indices = np.argsort(first_rows, kind="stable")
        starts = np.flatnonzero(np.diff(first_rows[row_indices], prepend=-1))
        return row_indices, np.append(starts, len(row_indices))
