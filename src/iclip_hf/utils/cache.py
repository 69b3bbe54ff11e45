"""The cache folder, what is kept in it, and digests of the files that it depends on."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .files import atomic_folder, atomic_write
from .prefetch import ThreadPool, prefetch_map


logger = logging.getLogger(__name__)

LARGE = 2**30  # bytes; larger data are identified by sizes and times instead of the content


def cache_folder() -> Path:
    """
    Returns the folder of converted models and indexes: `$ICLIP_CACHE` or, if it is not set, `iclip_hf` in
    `$XDG_CACHE_HOME` or `~/.cache`.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "iclip_hf")
    return Path(os.environ.get("ICLIP_CACHE") or default).expanduser()


def keep_in_cache(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file of the cache folder with `write`. A failure, such as a full disk, is logged and ignored."""
    try:
        with atomic_write(path) as temporary:
            write(temporary)
    except OSError as error:
        logger.warning("%s could not be kept: %s", path, error)


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """
    Fills a model folder with `build`, unless it is complete, and returns it. If several processes fill it at once, the
    result of the first one stays. Raises `FileExistsError` if the folder has files but is incomplete.
    """
    files = [folder / "model.safetensors", folder / "config.json"]
    if not all(map(Path.is_file, files)):
        try:
            with atomic_folder(folder) as built:
                build(built)
        except OSError:
            if not all(map(Path.is_file, files)):  # otherwise another process was first
                raise
    return folder


def content_digest(files: Sequence[str | os.PathLike], read: bool = True) -> str:
    """
    Returns 16 hex digits over names and content of files, in the given order. Names are relative to the innermost
    folder that holds all files. A file that cannot be read counts as absent. Without `read`, sizes and modification
    times replace the content.
    """
    if not files:
        return ""
    paths = [os.path.abspath(file) for file in files]
    folder = os.path.join(os.path.commonpath({os.path.dirname(path) for path in paths}), "")
    content = hashlib.sha256()
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:  # hashing and reading release the GIL
        digests = prefetch_map(pool, file_digest, paths, 64) if read else map(_size_and_time, paths)
        for path, digest in zip(paths, digests):
            content.update(os.fsencode(path.removeprefix(folder)) + b"\0" + (digest or bytes(32)))
    return content.hexdigest()[:16]


def total_size(files: Iterable[str | os.PathLike]) -> int:
    """Returns the total size of files in bytes. Absent files count as 0."""
    return sum(os.path.getsize(file) for file in files if os.path.exists(file))


def file_state(file: str | os.PathLike) -> bytes:
    """Returns path, size and modification time of a file as bytes, for a digest."""
    return os.fsencode(os.path.abspath(file)) + b"\0" + (_size_and_time(file) or b"absent")


def file_digest(file: str | os.PathLike) -> bytes | None:
    """Returns a digest of the content of a file, 32 bytes; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(file, "rb", buffering=0) as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
    except (OSError, ValueError):  # `ValueError` for a name in a table with a null character
        return None
    return digest.digest()


def _size_and_time(file: str | os.PathLike) -> bytes | None:
    if not os.path.exists(file):
        return None
    status = os.stat(file)
    return f"{status.st_size}\0{status.st_mtime_ns}\0".encode()
