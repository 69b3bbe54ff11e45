"""The folder in which converted models and indexes are kept, and how files and models appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def cache_folder() -> Path:
    """Where they are kept: `$ICLIP_CACHE`, or else `iclip_hf` in `$XDG_CACHE_HOME` (`~/.cache`)."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "iclip_hf")
    return Path(os.environ.get("ICLIP_CACHE") or default).expanduser()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """
    Gives a path beside `path` to write to, which takes its place at the end and is removed after an exception. Its name is
    this process's own: another may be writing the same.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with writing_errors(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """What a full disk or a missing right raises inside, in each library something else, becomes one clear `OSError`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # the part of torch that writes
            raise
        problem = str(error).splitlines()[0]
        raise OSError(
            f"{path}: writing failed ({problem}); see to the disk's room and rights, then run again."
        ) from error


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """
    Gives a folder to fill that appears under its name whole or not at all.

    Raises:
        `FileExistsError`: there is something in the folder, which stays as it is.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder}: expected a new or empty folder; delete what is there or name another.")
    with _built_beside(folder) as built:
        try:
            yield built
        except SafetensorError as error:  # of writing: what reading raises is clear already
            raise OSError(f"{folder}: writing failed ({error}); see to the disk's room, then run again.") from error
        os.replace(built, folder)


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """
    Let `build` fill a model folder unless that was done before. It appears whole or not at all, also under a race.

    Raises:
        `FileExistsError`: the folder is there but incomplete.
    """
    if _is_complete(folder):
        return folder
    with _built_beside(folder) as built:
        build(built)
        try:
            os.replace(built, folder)
        except OSError as error:  # a folder that is not empty is never replaced
            if not _is_complete(folder):  # else another process was faster, with the same bytes
                raise FileExistsError(
                    f"Expected {folder} to be absent or to hold a complete model, but it lacks model.safetensors or "
                    "config.json. Delete it and try again."
                ) from error
    return folder


@contextmanager
def _built_beside(folder: Path) -> Iterator[Path]:
    """A new folder on the same disk, to be renamed to `folder`; what was not is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        built = Path(scratch, folder.name)
        built.mkdir()
        yield built


def _is_complete(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()
