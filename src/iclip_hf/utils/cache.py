"""The cache folder, and what is kept in it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from .files import atomic_folder, atomic_write


logger = logging.getLogger(__name__)


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
