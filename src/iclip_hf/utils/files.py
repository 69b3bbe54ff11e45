"""Cache folder, writing of files and folders, folder locks, and uniform errors of reading and writing."""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError


logger = logging.getLogger(__name__)

# Stands in every file that a command writes to a path of the user's, so that the next run knows it: as the software of pictures,
# the creator of vector graphics, in JSON, in the front matter of cards, and in the comment of .npz files.
SOFTWARE = "iclip-hf, ICLIP for Hugging Face"
_SEARCHED = 2**20  # bytes at each end of a file
# All files of this program's own in folders that others use too begin or end with `.iclip-hf`.
_MARKER, _LOCK, _HELD, _PARTIAL = ".iclip-hf", ".iclip-hf.lock", ".iclip-hf.held", ".iclip-hf.partial"
_DAY = 24 * 3600  # seconds
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder() -> Path:
    """Returns the folder of converted models and indexes: `$ICLIP_CACHE`, or `iclip_hf` in `$XDG_CACHE_HOME` (`~/.cache`)."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "iclip_hf")
    return Path(os.environ.get("ICLIP_CACHE") or default).expanduser()


# ---------------------------------------------------------------------------------------------------- files that users name


def check_outputs(
    outputs: Iterable[str | os.PathLike],
    inputs: Iterable[str | os.PathLike | None] = (),
    overwrite: bool = False,
    own: Callable[[Path], bool] | None = None,
) -> None:
    """
    Checks that files may be written: an output replaces no input, no other output, and no file that this program did not write.

    Args:
        outputs: files to write.
        inputs: what is read: files, names that are no files, or None. They are never replaced.
        overwrite: whether files that this program did not write may be replaced.
        own: tells of a file whether this program wrote it; [`is_own`] if not given.

    Raises:
        `FileExistsError`: an output may not be written. `OSError`: it cannot be.
    """
    taken = {_identity(read): read for read in inputs if read}
    for path in map(Path, outputs):
        identity = _identity(path)
        if identity in taken:
            raise FileExistsError(
                f"{path}: expected an output that is not also an input or another output, but it is the same file as {taken[identity]}; "
                "name another output."
            )
        taken[identity] = path
        place = next(parent for parent in Path(os.path.realpath(path)).parents if parent.exists())
        if not place.is_dir():
            raise NotADirectoryError(
                f"{path}: expected a file in a folder, but {place} is not a folder; name another output."
            )
        if not os.access(place, os.W_OK):
            raise PermissionError(
                f"{path}: expected a folder that can be written, but {place} cannot; name another output."
            )
        if path.exists() and not path.is_file():
            raise FileExistsError(
                f"{path}: expected a file to write, but got a folder or device; name another output."
            )
        if path.exists() and not overwrite and not (own or is_own)(path):
            raise FileExistsError(
                f"{path}: expected a new file or one that iclip wrote, but got another; name another output, or replace "
                "it by --overwrite."
            )


def is_own(path: Path) -> bool:
    """
    Whether this program wrote a file: its first or last megabyte names `SOFTWARE`. In JSON and in the front matter of a card this is
    the first value, and in a PDF the creator, because files of others may contain results and pictures of this program.
    """
    with open(path, "rb") as file:
        head = file.read(_SEARCHED)
        file.seek(max(len(head), path.stat().st_size - _SEARCHED))
        content = head + file.read()
    for start, field in ((b"{", rb'{\s*"software":\s*"%s"'), (b"---", rb"---\s*software: %s")):
        if head.startswith(start):
            return re.match(field % SOFTWARE.encode(), head) is not None
    return (b"/Creator (%s)" if head[:4] == b"%PDF" else b"%s") % SOFTWARE.encode() in content


@contextmanager
def new_file(
    path: str | os.PathLike, overwrite: bool = False, own: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """
    Yields a temporary path for a file that the user named; renamed to `path` on success, deleted on error. Checks by
    [`check_outputs`] before and after. Creates the file's folder; a symbolic link stays one, and its target is written.
    """
    check = partial(check_outputs, [path], overwrite=overwrite, own=own)
    check()
    with atomic_write(Path(os.path.realpath(path)), check) as temporary:  # another program may be faster
        yield temporary


def write_beside_others(folder: Path, contents: dict[str, bytes], overwrite: bool = False) -> None:
    """
    Writes files into a folder that may hold others, such as a clone. Those that have their content already stay.

    Raises:
        `FileExistsError`: a file has another content, and not `overwrite`; then none is written.
    """
    files = {folder / name: content for name, content in contents.items()}
    changed = {path: new for path, new in files.items() if not path.is_file() or path.read_bytes() != new}
    foreign = {"overwrite": overwrite, "own": lambda path: False}  # a readme of the user's may name this program
    check_outputs(changed, **foreign)
    for path, content in changed.items():
        with new_file(path, **foreign) as partial:
            partial.write_bytes(content)


def _identity(path: str | os.PathLike) -> object:
    """Returns what two paths of one file share, however they are written. Names of new files differ by more than case."""
    try:
        found = os.stat(path)
        return found.st_dev, found.st_ino
    except ValueError:  # a null character or a lone surrogate: no file has this name
        return os.fspath(path)
    except OSError:
        return os.path.realpath(path).casefold()


# ------------------------------------------------------------------------------------------------------------ any files


@contextmanager
def atomic_write(path: Path, check: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """
    Yields a temporary path; renamed to `path` on success, deleted on error. Several processes can write the same file. For paths in
    this program's own folders; see [`new_file`] for others. `check` is called before the renaming, and may raise.
    """
    with _workplace(path.parent, path.name) as work:
        with writing_errors(path):
            yield work / path.name
        check()
        with writing_errors(path):
            _readable(work)
            os.replace(work / path.name, path)


def short_name(name: str, size: int = 200) -> str:
    """Returns the beginning of a name of at most `size` bytes. File systems allow 255, with all prefixes and suffixes."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= size else encoded[:size].decode(errors="ignore")


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
            f"{path}: writing failed ({problem}); check free space and permissions, then run again."
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
            f"{name}: expected a whole folder or a Hub id, but {problem}; correct the name, or download it again."
        ) from error


# -------------------------------------------------------------------------------------------------------------- folders


def check_utf8(folder: Path) -> None:
    """Raises `ValueError` unless the path of a folder is UTF-8, as the libraries expect that write models and Parquet files."""
    path = os.fspath(folder.absolute())
    if path != path.encode(errors="ignore").decode():
        raise ValueError(f"{folder}: expected a folder whose path is UTF-8, but got other bytes in it; name another.")


def check_own_folder(folder: Path) -> None:
    """
    Checks that a folder, which need not exist, holds nothing that this program did not write.

    Raises:
        `FileExistsError`: it holds other files. `OSError`: it is no folder. `ValueError`: its path is not UTF-8.
    """
    check_utf8(folder)
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    others = [name for name in names if not name.startswith(_MARKER) and not name.endswith(_PARTIAL)]
    if others and _MARKER not in names:
        raise FileExistsError(
            f"{folder}: expected a new or empty folder, or that of an earlier run, but got one with other files, such as "
            f"{min(others)}; name another."
        )


@contextmanager
def folder_lock(folder: Path, own: bool = False) -> Iterator[None]:
    """
    Locks a folder against other runs. Creates the folder if it does not exist. The operating system releases the lock when the
    process ends. For a run of several processes see [`iclip_hf.utils.distributed.shared_folder_lock`].

    Args:
        folder: folder to write into.
        own: whether it must hold nothing that this program did not write; it is marked as such.

    Raises:
        `BlockingIOError`: another run holds the lock. `FileExistsError`: as [`check_own_folder`], if `own`. `OSError`: the folder
        cannot be written.
    """
    if own:
        check_own_folder(folder)
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
        if own:
            with writing_errors(folder):
                (folder / _MARKER).write_text("This folder belongs to iclip, which replaces its files.\n")
        yield
    finally:
        lock.release()


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """
    Yields a temporary folder; renamed to `folder` on success, deleted on error. First deletes those of killed runs.

    An existing empty folder stays the same folder, because it may be a mount point or the working directory of a shell. The
    temporary folder is then in it, and its content is renamed.

    Raises:
        `FileExistsError`: the folder exists and is not empty; it stays as it is. `OSError`: it cannot be written. `ValueError`: its
        path is not UTF-8.
    """
    folder = Path(os.path.realpath(folder))  # of a link that leads to itself, the link
    _delete_left_overs(folder.parent)
    check_empty(folder)
    place = folder if folder.exists() else folder.parent
    try:
        with _workplace(place, folder.name) as work:
            built = work / folder.name
            built.mkdir()
            yield built
            check_empty(folder)  # another run may have been faster
            _readable(work)
            if place == folder:
                for path in built.iterdir():
                    os.replace(path, folder / path.name)
            else:
                os.replace(built, folder)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in _DISK_FULL:
            raise  # errors of reading have their own messages
        raise OSError(f"{folder}: writing failed ({error}); check free space, then run again.") from error


@contextmanager
def _workplace(place: Path, name: str) -> Iterator[Path]:
    """Yields a temporary folder in `place` for the file or folder `name` that will be there. `place` is created if necessary."""
    with writing_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        _delete_left_overs(place.absolute())
        temporary = Path(tempfile.mkdtemp(dir=place, prefix=f".{short_name(name)}.", suffix=_PARTIAL))
    try:
        with folder_lock(temporary):
            (temporary / _HELD).write_text(platform.node())
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@cache
def _delete_left_overs(place: Path) -> None:
    """
    Deletes the temporary folders of killed runs, at the first writing into a folder: a scan before each of many files would take a
    time that grows with the square of their number.
    """
    for left_over in place.glob(f".*{_PARTIAL}"):
        held = left_over / _HELD  # created under the lock, so its run has had it
        with suppress(OSError):  # of another user's folder, or because a live run holds the lock
            # Locks may not reach other machines, so what another machine made is left alone for a day.
            if held.read_text() == platform.node() or held.stat().st_mtime < time.time() - _DAY:
                with folder_lock(left_over):
                    shutil.rmtree(left_over)


def _readable(work: Path) -> None:
    """Gives files the mode of any new file. Only their owner can read what safetensors writes."""
    mode = (work / _HELD).stat().st_mode & 0o666
    for path in work.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def check_empty(folder: Path) -> None:
    """Raises `FileExistsError` unless a folder is new, or holds nothing but temporary folders of runs; `ValueError` as [`check_utf8`]."""
    check_utf8(folder)
    if folder.exists() and not (folder.is_dir() and all(path.name.endswith(_PARTIAL) for path in folder.iterdir())):
        raise FileExistsError(
            f"{folder}: expected a new or empty folder, but got a full one; delete what is there or name another."
        )


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """
    Fills a model folder with `build`, unless the folder is complete already. Several processes can build it at the same time; the
    first to end wins.

    Raises:
        `FileExistsError`: the folder exists but is incomplete.
    """
    if not _is_complete(folder):
        try:
            with atomic_folder(folder) as built:
                build(built)
        except FileExistsError:
            if not _is_complete(folder):  # otherwise another process built the same folder first
                raise
    return folder


def _is_complete(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()
