"""Cache folder, atomic writes of files and folders, folder locks, and uniform errors of reading and writing."""

from __future__ import annotations

import errno
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError


logger = logging.getLogger(__name__)

_LOCK, _WORK = ".lock", "partial"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder() -> Path:
    """Returns the folder of converted models and indexes: `$ICLIP_CACHE`, or `iclip_hf` in `$XDG_CACHE_HOME` (`~/.cache`)."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "iclip_hf")
    return Path(os.environ.get("ICLIP_CACHE") or default).expanduser()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """
    Yields a temporary path; renamed to `path` on success, deleted on error. Its name contains the process id, so that
    several processes can write the same file.
    """
    name = os.fsdecode(os.fsencode(path.name)[:200])  # with the suffix within the 255 bytes that file systems allow
    partial = path.with_name(f"{name}.{os.getpid()}.partial")
    try:
        with writing_errors(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def keep_in_cache(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file of the cache folder with `write`. A failure, such as a full disk, is logged and ignored."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            write(partial)
    except OSError as error:
        logger.warning("%s could not be kept: %s", path, error)


@contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """Converts the errors that libraries raise for a full disk or missing permissions into an `OSError` with one message."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch's file writer
            raise
        problem = str(error).splitlines()[0]
        raise OSError(
            f"{path}: writing failed ({problem}); see to the disk's room and rights, then run again."
        ) from error


@contextmanager
def loading_errors(name: str | Path) -> Iterator[None]:
    """Converts any exception of loading, such as `KeyError`, into a `ValueError` or `OSError` with one message."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(f"{name}: expected"):  # has that form already
            raise
        problem = f"loading failed ({str(error) or type(error).__name__})"
        if "ignore_mismatched_sizes" in problem:  # the details are in a log that the commands disable
            problem = "its weights have other shapes than its config.json says"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{name}: expected a whole folder or a Hub id, but {problem}; correct the name, or get it again."
        ) from error


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """
    Locks a folder against other runs. Creates the folder if it does not exist, and deletes temporary files of killed runs.
    The operating system releases the lock when the process ends. For a run of several processes see
    [`iclip_hf.utils.distributed.shared_folder_lock`].

    Raises:
        `BlockingIOError`: another run holds the lock. `OSError`: the folder cannot be written.
    """
    lock = FileLock(folder / _LOCK)
    try:
        with writing_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout):
                lock.acquire(timeout=0)
        if not lock.is_locked:
            raise BlockingIOError(
                f"{folder}: expected no other run here, but one is writing; wait until it ends, or name another folder."
            )
        for left_over in folder.glob("*.[0-9]*.partial"):  # of `atomic_write`
            left_over.unlink()
        yield
    finally:
        lock.release()


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """
    Yields a temporary folder; renamed to `folder` on success, deleted on error.

    Raises:
        `FileExistsError`: the folder exists and is not empty; it stays as it is. `OSError`: it cannot be written.
    """
    folder = Path(folder).resolve()
    _clear_left_overs(folder)
    _check_empty(folder)
    with _built_beside(folder) as built:
        yield built
        _check_empty(folder)  # another run may have been faster
        os.replace(built, folder)


def _check_empty(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(
            f"{folder}: expected a new or empty folder, but got a full one; delete what is there or name another."
        )


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """
    Fills a model folder with `build`, unless the folder is complete already. The folder is renamed into place at the end, so
    that several processes can build it at the same time.

    Raises:
        `FileExistsError`: the folder exists but is incomplete.
    """
    _clear_left_overs(folder)
    if _is_complete(folder):
        return folder
    with _built_beside(folder) as built:
        build(built)
        try:
            os.replace(built, folder)
        except OSError as error:  # a folder that is not empty cannot be replaced
            if not _is_complete(folder):  # otherwise another process built the same folder first
                raise FileExistsError(
                    f"Expected {folder} to be absent or to hold a complete model, but it lacks model.safetensors or "
                    "config.json. Delete it and try again."
                ) from error
    return folder


@contextmanager
def _built_beside(folder: Path) -> Iterator[Path]:
    """Yields a new folder on the same disk, to be renamed to `folder`; deleted at the end if it was not."""
    with writing_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True)
    with scratch as name, folder_lock(Path(name)):
        # `_clear_left_overs` deletes only folders with `_WORK`, so it is created under the lock.
        built = Path(name, _WORK, folder.name)
        built.mkdir(parents=True)
        try:
            yield built
        except (OSError, SafetensorError) as error:
            if isinstance(error, OSError) and error.errno not in _DISK_FULL:
                raise  # errors of reading have their own messages
            raise OSError(f"{folder}: writing failed ({error}); see to the disk's room, then run again.") from error


def _clear_left_overs(folder: Path) -> None:
    """Deletes the temporary folders that killed runs left beside a folder."""
    for lock in folder.parent.glob(f".{glob.escape(folder.name)}-*/{_LOCK}"):
        left_over = lock.parent
        if (left_over / _WORK).is_dir():
            with suppress(OSError):  # held by a live run
                with folder_lock(left_over):
                    shutil.rmtree(left_over / _WORK)
                shutil.rmtree(left_over)


def _is_complete(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()
