"""Digests of files, cached by size and times."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from .files import cache_folder, keep_in_cache
from .prefetch import prefetch_map


def content_digest(files: Sequence[str | os.PathLike], folder: str | os.PathLike | None = None) -> str:
    """
    Computes a digest, 16 hex digits, over names, sizes and content of files, in the given order. Names are relative to `folder`, by
    default the innermost one that holds all files, whose own place does not count. A file that cannot be read counts as absent. The
    digest is cached on disk; a later call reads the files again only if a size or a time changed.
    """
    if not files:
        return ""
    paths = [os.path.abspath(file) for file in files]
    folder = os.path.abspath(folder or os.path.commonpath({os.path.dirname(path) for path in paths}))
    before_names = os.path.join(folder, "")
    names = [path.removeprefix(before_names).encode(errors="surrogatepass") + b"\0" for path in paths]
    kept = cache_folder() / "digests" / hashlib.sha256(b"".join([*names, *map(file_state, paths)])).hexdigest()[:32]
    # After a crash of the machine, a file may be empty or hold zeros.
    if kept.is_file() and re.fullmatch("[0-9a-f]{16}", found := kept.read_text(errors="replace")):
        return found
    content = hashlib.sha256()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing and reading release the GIL
        for name, of_file in zip(names, prefetch_map(pool, file_digest, paths, 64)):
            content.update(name + (of_file or bytes(32)))
    digest = content.hexdigest()[:16]
    keep_in_cache(kept, lambda temporary: temporary.write_text(digest))
    return digest


def file_state(file: str | os.PathLike) -> bytes:
    """Returns path, number, size and times of a file, one of which changes with its content."""
    path = os.path.abspath(file).encode(errors="surrogatepass")
    try:
        found = os.stat(file)
    except (OSError, ValueError):  # a name may hold any characters
        return path + b"\0absent\0"
    # Programs can set the time of the content (mtime), as unpacking does, but not that of the entry (ctime).
    return path + f"\0{found.st_ino}\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ctime_ns}\0".encode()


def file_digest(file: str | os.PathLike) -> bytes | None:
    """
    Returns a digest of the content of a file, 32 bytes; None if it cannot be read, or is a device or a pipe, which may never end. A process
    reads a file once, until it changes.
    """
    return _file_digest(os.fspath(file), file_state(file))


@lru_cache(2**18)
def _file_digest(file: str, state: bytes) -> bytes | None:
    digest = hashlib.sha256()
    if not os.path.isfile(file):
        return None
    try:
        with open(file, "rb", buffering=0) as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
    except (OSError, ValueError):
        return None
    return digest.digest()
