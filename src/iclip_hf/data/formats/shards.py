"""Tar shards in the form of webdataset and img2dataset, with random access."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...model.images import image_suffixes
from ...utils.cache import cache_folder, file_state, keep_in_cache
from ..columns import Columns
from .source import Source


def open_shard(path: Path, columns: Columns) -> Source:
    """Opens a tar file. Raises `ValueError` if the file is no tar file, or is compressed."""
    rows = TarRows(path)
    return Source(path, path.parent, columns, rows, [None] * len(rows), [path])


class TarRows(Sequence):
    """
    The rows of a tar file. Adjacent members with the same key are a row; a repeated suffix begins another row. The
    bytes of a row are read as a small tar file. Nothing is extracted to disk, and links are ignored.
    """

    def __init__(self, path: Path):
        self.path = path
        # Cached, because finding the ranges of a million pairs takes minutes.
        cached = cache_folder() / "shards" / f"{hashlib.sha256(file_state(path)).hexdigest()[:32]}.bin"
        content = cached.read_bytes() if cached.is_file() else self._ranges()
        if not cached.is_file():
            keep_in_cache(cached, lambda temporary: temporary.write_bytes(content))
        self._starts_and_ends = np.frombuffer(content, np.int64).reshape(-1, 2)

    def _ranges(self) -> bytes:
        """Returns the byte range of each row: its start and its end, int64."""
        ranges, last_key, suffixes = array("q"), None, set()
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    key, suffix = _key_and_suffix(member)
                    if key is not None:
                        if key != last_key or suffix in suffixes:
                            ranges.extend((member.offset, 0))
                            suffixes.clear()
                        suffixes.add(suffix)
                        ranges[-1] = tar.offset  # start of the next member
                        last_key = key
                    tar.members.clear()  # tarfile would keep all members
        except tarfile.TarError as error:
            raise ValueError(
                f"{self.path}: this is not a complete and uncompressed tar file ({error}); decompress it, or get it "
                "again."
            ) from error
        return ranges.tobytes()

    def __len__(self) -> int:
        return len(self._starts_and_ends)

    def __getitem__(self, index: int) -> dict:
        start, end = self._starts_and_ends[index].tolist()
        with open(self.path, "rb", buffering=0) as opened:
            opened.seek(start)
            small_tar = opened.read(end - start)
        row = {}
        with tarfile.open(fileobj=io.BytesIO(small_tar), mode="r:") as tar:
            for member in tar:
                key, suffix = _key_and_suffix(member)
                data = small_tar[member.offset_data : member.offset_data + member.size]
                if suffix in image_suffixes():
                    if "image" in row:
                        other = row["image"]["path"]
                        raise ValueError(f"two images of the key {key!r}, in {other!r} and {member.name!r}")
                    row |= {"image": {"bytes": data, "path": member.name}, "__key__": key}
                elif suffix == ".txt":
                    row["txt"] = data.decode()
                elif suffix == ".json":
                    row["json"] = json.loads(data)
        if "image" not in row:
            raise ValueError("no image beside its text; members of a pair must be neighbours (`tar --sort=name`)")
        return row


def _key_and_suffix(member: tarfile.TarInfo) -> tuple[str | None, str]:
    """Returns webdataset's key, the path up to the first dot, and the suffix; (None, "") if it is no part of a row."""
    folder, slash, name = member.name.rpartition("/")
    stem, dot, suffix = name.partition(".")
    if not member.isreg() or not stem or not dot:
        return None, ""
    return f"{folder}{slash}{stem}", f".{suffix.lower()}"
