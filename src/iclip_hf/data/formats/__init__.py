"""
The formats of image-text pairs on disk, one in each module. A format opens a path as a [`~source.Source`] of rows. No
image is decoded, and torch is not imported, so that data can be checked before a run.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ...utils.published import is_hub_id
from ..columns import Columns
from ..files import expand_braces, is_hidden
from .arrow import is_saved_dataset, open_arrow
from .folders import read_class_folders
from .shards import open_shard
from .source import Source
from .tables import METADATA, TABLES, read_table


# For each suffix of a file, the function that opens it. A folder stands for the table that `METADATA` names, or for
# its files with these suffixes except those in `TABLES`, or else for folders of images, one for each class.
FORMATS = {".tar": open_shard, ".parquet": open_arrow, **dict.fromkeys(TABLES, read_table)}


def is_hub_dataset(source: str) -> bool:
    """Returns whether a source can be a dataset of the Hub: a Hub id that is not the name of a file of pairs."""
    return is_hub_id(source) and Path(source).suffix.lower() not in FORMATS


def open_sources(sources: Sequence[str | os.PathLike], columns: Columns, split: str = "train") -> list[Source]:
    """
    Opens sources of pairs, see [`~iclip_hf.data.pairs.load_pairs`]. Hub datasets are downloaded. A source that is
    named several times is opened once, and returned each time.
    """
    opened: dict[str, list[Source]] = {}
    names = [*map(os.fspath, sources)]
    for name in dict.fromkeys(names):
        if is_hub_dataset(name):
            opened[name] = [open_arrow(Path(name), columns, split, hub=True)]
        else:
            paths = tqdm(_local_paths(name), desc="Indexing", unit="file", delay=2, leave=False)
            opened[name] = [_open(path, columns, split) for path in paths]
    return [source for name in names for source in opened[name]]


def _open(path: Path, columns: Columns, split: str) -> Source:
    if path.is_dir():
        return open_arrow(path, columns, split) if is_saved_dataset(path) else read_class_folders(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a file of pairs is one of {', '.join(FORMATS)}; convert or rename it.")
    return FORMATS[path.suffix.lower()](path, columns)


def _local_paths(source: str) -> list[Path]:
    """Returns the files of a source, or its folder."""
    if os.path.isdir(source):
        folder = Path(source)
        if table := next(filter(Path.is_file, map(folder.joinpath, METADATA)), None):
            return [table]
        visible = sorted(file for file in folder.iterdir() if not is_hidden(file.name))
        return [file for file in visible if file.suffix.lower() in FORMATS.keys() - TABLES] or [folder]
    if os.path.isfile(source):
        return [Path(source)]
    files = []
    for pattern in expand_braces(source) or [source]:
        files += sorted(glob.glob(pattern)) or [pattern]
    if missing := [file for file in files if not os.path.isfile(file)]:
        raise FileNotFoundError(
            f"{missing[0]}: there is no such file or folder of pairs ({len(missing)} of {len(files)} are missing); "
            "check the path."
        )
    return [Path(file) for file in files]
