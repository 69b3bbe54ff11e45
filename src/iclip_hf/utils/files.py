"""Writing of whole files and folders, and checks of their names."""

from __future__ import annotations

import io
import itertools
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def check_outputs(outputs: Iterable[str | os.PathLike], inputs: Iterable[str | os.PathLike | None] = ()) -> None:
    """
    Checks the files that a command will write, before its work. Raises `FileExistsError` if an output is a folder, is
    an input or lies in one, and `PermissionError` if the folder of an output cannot be written. Inputs may be files
    and folders; None and names that do not exist are ignored.
    """
    inputs = [*filter(None, inputs)]
    for path in map(Path, outputs):
        for input_path in inputs:
            check_outside(path, input_path)
        if path.is_dir():
            raise FileExistsError(f"{path}: this output is a folder; name a file.")
        folder = next(parent for parent in Path(os.path.realpath(path)).parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise PermissionError(f"{path}: {folder} is not a folder that can be written; name another output.")


def check_outside(output: str | os.PathLike, input_path: str | os.PathLike) -> None:
    """
    Raises `FileExistsError` if an output is the file or folder `input_path`, or lies in it. Symbolic links are
    followed. `A.jpg` and `a.jpg` count as one file where the file system treats them as one.
    """
    path = Path(os.path.realpath(output))
    existing = filter(os.path.exists, (path, *path.parents))
    if os.path.exists(input_path) and any(os.path.samefile(file, input_path) for file in existing):
        raise FileExistsError(f"{output}: this output would change the input {input_path}; name another.")


def free_name(path: str | os.PathLike) -> Path:
    """Returns `path` or, if it exists, the first of `name-2.png`, `name-3.png`, ... that does not."""
    path = Path(path)
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yields a temporary path; renamed to `path` on success, deleted on error. Creates the file's folder. A symbolic
    link stays, and its target is written. Several processes can write the same file.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(path)
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors lets only the owner read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_new(path: str | os.PathLike, write: Callable[[Path], object]) -> Path:
    """
    Writes a file whose name the program chose. `write` writes to a temporary path, which then gets the [`free_name`]
    of `path`. Returns this name.
    """
    name = free_name(path)
    with atomic_write(name) as temporary:
        write(temporary)
    return name


def write_image(image, path: Path, **kwargs) -> None:
    """Writes a PIL image. `kwargs` are arguments of `Image.save`, among them the format."""
    # Pillow's own writing raises no error if the disk is full before the end of a JPEG file.
    content = io.BytesIO()
    image.save(content, **kwargs)
    path.write_bytes(content.getbuffer())


def _temporary_path(path: Path) -> Path:
    """Returns a new hidden path beside a file or folder. Its name is short enough for any file system."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.partial")


def check_new_folder(folder: Path) -> None:
    """Raises `FileExistsError` if an output folder holds files."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if names:
        raise FileExistsError(
            f"{folder}: this folder holds other files, such as {min(names)}; name a new or empty one."
        )


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """
    Yields a temporary folder of the same name; renamed to `folder` on success, deleted on error. If `folder` exists,
    the content is moved into it instead, because it may be a mount point or the working directory of a shell. Raises
    what [`check_new_folder`] raises.
    """
    folder = Path(os.path.realpath(folder))
    check_new_folder(folder)
    exists = folder.exists()
    work = _temporary_path(folder / folder.name if exists else folder)
    built = work / folder.name  # the model card takes this name
    built.mkdir(parents=True)
    try:
        yield built
        mode = built.stat().st_mode & 0o666  # as of any new file; safetensors lets only the owner read
        for path in built.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(mode)
        if not exists:
            os.replace(built, folder)
            return
        # The configuration is moved last, because a model does not load without it.
        for path in sorted(built.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
