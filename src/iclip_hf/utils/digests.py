"""Digests of files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence

from .prefetch import ThreadPool, prefetch_map


LARGE = 2**30  # bytes of data; of more, sizes and times stand for the content


def content_digest(
    files: Sequence[str | os.PathLike], folder: str | os.PathLike | None = None, read: bool = True
) -> str:
    """
    Computes a digest, 16 hex digits, over names and content of files, in the given order. Names are relative to
    `folder`, by default the innermost one that holds all files, whose own place does not count. A file that cannot be
    read counts as absent. Without `read`, size and modification time of a file stand for its content.
    """
    if not files:
        return ""
    paths = [os.path.abspath(file) for file in files]
    folder = os.path.abspath(folder or os.path.commonpath({os.path.dirname(path) for path in paths}))
    before_names = os.path.join(folder, "")
    content = hashlib.sha256()
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:  # hashing and reading release the GIL
        digests = prefetch_map(pool, file_digest, paths, 64) if read else map(_size_and_time, paths)
        for path, of_file in zip(paths, digests):
            content.update(path.removeprefix(before_names).encode(errors="surrogatepass") + b"\0")
            content.update(of_file or bytes(32))
    return content.hexdigest()[:16]


def total_size(files: Iterable[str | os.PathLike]) -> int:
    """Returns the bytes of these files. Those that cannot be read have none."""
    return sum(found.st_size for found in map(_stat, files) if found)


def file_state(file: str | os.PathLike) -> bytes:
    """Returns path, size and modification time of a file, which stand for its content."""
    return os.path.abspath(file).encode(errors="surrogatepass") + b"\0" + (_size_and_time(file) or b"absent")


def file_digest(file: str | os.PathLike) -> bytes | None:
    """
    Returns a digest of the content of a file, 32 bytes; None if it cannot be read, or is a device or a pipe, which may
    never end.
    """
    digest = hashlib.sha256()
    try:
        if not os.path.isfile(file):
            return None
        with open(file, "rb", buffering=0) as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
    except (OSError, ValueError):  # a name may hold any characters
        return None
    return digest.digest()


def _stat(file: str | os.PathLike) -> os.stat_result | None:
    try:
        return os.stat(file)
    except (OSError, ValueError):
        return None


def _size_and_time(file: str | os.PathLike) -> bytes | None:
    found = _stat(file)
    return found and f"{found.st_size}\0{found.st_mtime_ns}\0".encode()
