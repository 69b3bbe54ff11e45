"""Cache folder, writing of files and folders, and uniform errors of reading and writing."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub.errors import RevisionResolutionError
from safetensors import SafetensorError

from .hub_ids import is_hub_id


logger = logging.getLogger(__name__)

# Where configurations and tokenizers of Transformers keep what they were loaded from.
_SOURCES = ("_name_or_path", "name_or_path")


def cache_folder() -> Path:
    """Returns the folder of converted models and indexes: `$ICLIP_CACHE`, or `iclip_hf` in `~/.cache`."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "iclip_hf")
    return Path(os.environ.get("ICLIP_CACHE") or default).expanduser()


# --------------------------------------------------------------------------------------------------------------- files


def check_outputs(outputs: Iterable[str | os.PathLike], inputs: Iterable[str | os.PathLike | None] = ()) -> None:
    """
    Checks the files that a command will write, before its work. Raises `FileExistsError` if one of them is an input
    (file or folder; other names and None do not count) or in one, or a folder, and `PermissionError` if its folder
    cannot be written.
    """
    inputs = [*filter(None, inputs)]
    for path in map(Path, outputs):
        for read in inputs:
            check_outside(path, read)
        if path.is_dir():
            raise FileExistsError(f"{path}: this output is a folder; name a file.")
        place = next(parent for parent in Path(os.path.realpath(path)).parents if parent.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise PermissionError(f"{path}: {place} is not a folder that can be written; name another output.")


def check_outside(path: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Raises `FileExistsError` if an output is a file or folder that is read, or in it, also by symbolic links."""
    if os.path.exists(folder) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise FileExistsError(f"{path}: this output would change the input {folder}; name another.")


def free_name(path: str | os.PathLike) -> Path:
    """Returns `path` or, if it exists, the first of `name-2.png`, `name-3.png`, ... that does not."""
    path = Path(path)
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], numbered) if not os.path.lexists(one))


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yields a temporary path; renamed to `path` on success, deleted on error. Creates the file's folder. A symbolic link
    stays one, and its target is written. Several processes can write the same file.
    """
    path = Path(os.path.realpath(path))
    with _temporary_file(path) as temporary:
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # only the owner can read what safetensors writes
        os.replace(temporary, path)


def write_new(path: str | os.PathLike, write: Callable[[Path], object] = lambda temporary: None) -> Path:
    """
    Writes a file whose name the program chose, by default an empty one: `write` writes to a temporary path, which then
    gets the [`free_name`] of `path`, and returns this. So no file is replaced that the user did not name, also if
    several processes choose the same name at once.
    """
    with _temporary_file(Path(path)) as temporary:
        write(temporary)
        while True:
            name = free_name(path)
            with suppress(FileExistsError):  # another process took the name
                name.touch(exist_ok=False)
                os.replace(temporary, name)
                return name


@contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """Yields an empty temporary file beside `path`, which is deleted at the end, and creates its folder."""
    with writing_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        temporary.touch(exist_ok=False)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Returns a new hidden name beside a file or folder, also for a name of the greatest length."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.partial")


def keep_in_cache(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file of the cache folder with `write`. A failure, such as a full disk, is logged and ignored."""
    try:
        with atomic_write(path) as temporary:
            write(temporary)
    except OSError as error:
        logger.warning("%s could not be kept: %s", path, error)


@contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """Converts the errors of libraries for a full disk or missing permissions into one `OSError`."""
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
def loading_errors(name: str | Path, cure: str = "correct the name, or download it again") -> Iterator[None]:
    """
    Converts any exception of loading, such as `KeyError`, into a `ValueError` or `OSError` with one message, except
    for the `ImportError` of a missing package.
    """
    try:
        yield
    except RevisionResolutionError as error:
        raise ConnectionError(
            f"{name}: there is no such folder, and the Hub cannot be reached; check the name or the connection."
        ) from error
    except Exception as error:
        if isinstance(error, ImportError) or str(error).startswith(f"{name}: "):  # says what to do already
            raise
        problem = f"loading failed ({' '.join(str(error).split()) or type(error).__name__})"
        if "ignore_mismatched_sizes" in problem:  # the details are in a log that the commands disable
            problem = "its weights have other shapes than its configuration says"
        error_type = OSError if isinstance(error, OSError) else ValueError
        raise error_type(f"{name}: expected a whole folder or a Hub id, but {problem}; {cure}.") from error


# ------------------------------------------------------------------------------------------------------------- folders


def clean_configs(folder: str | Path) -> None:
    """
    Removes from the configurations in a saved folder what they have of the folder that they were loaded from: its path
    on this machine, and the code that it named, which would run for anybody who trusts the new folder.
    """

    def stays(name: str, part) -> bool:
        return name not in ("auto_map", "custom_pipelines") and (name not in _SOURCES or is_hub_id(part or ""))

    def cleaned(value):
        if not isinstance(value, dict):
            return value
        return {name: cleaned(part) for name, part in value.items() if stays(name, part)}

    for file in Path(folder).glob("*config.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if (kept := cleaned(content)) != content:
            file.write_text(json.dumps(kept, indent=2) + "\n")


def check_new_folder(folder: Path) -> None:
    """Raises `FileExistsError` unless a folder to write is new or empty, and is not named as the embedded model."""
    if str(folder) == "embedded":
        raise FileExistsError(f"{folder}: this is the name of the embedded model; name another folder.")
    if names := [path.name for path in folder.iterdir()] if folder.exists() else []:
        raise FileExistsError(
            f"{folder}: this folder holds other files, such as {min(names)}; name a new or empty one."
        )


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """
    Yields a temporary folder of the same name; renamed to `folder` on success, deleted on error. An existing empty
    folder stays the same folder, because it may be a mount point or the working directory of a shell: its content is
    renamed. Raises what [`check_new_folder`] raises.
    """
    folder = Path(os.path.realpath(folder))
    check_new_folder(folder)
    exists = folder.exists()
    work = _temporary(folder / folder.name if exists else folder)
    built = work / folder.name  # cards take the name
    built.mkdir(parents=True)
    try:
        yield built
        mode = built.stat().st_mode & 0o666  # of any new file; only the owner can read what safetensors writes
        for path in built.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(mode)
        if not exists:
            os.replace(built, folder)
            return
        # The configuration last: without it no part of a model loads.
        for path in sorted(built.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOSPC:
            raise
        problem = getattr(error, "strerror", error)
        raise OSError(f"{folder}: writing failed ({problem}); check free space, then run again.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """
    Fills a model folder with `build`, unless it is complete. Of several processes, the first to end wins. Raises
    `FileExistsError` if the folder is incomplete.
    """
    files = [folder / "model.safetensors", folder / "config.json"]
    if not all(map(Path.is_file, files)):
        try:
            with atomic_folder(folder) as built:
                build(built)
        except OSError:
            if not all(map(Path.is_file, files)):  # otherwise another process built the same folder first
                raise
    return folder
