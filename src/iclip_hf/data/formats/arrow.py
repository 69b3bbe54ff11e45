"""Data sets of the `datasets` library: Parquet files, folders of `save_to_disk`, and downloaded ones of the Hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...utils.errors import loading_errors, require_extra
from ..columns import IMAGE_COLUMNS, LABEL_COLUMNS, Columns
from .source import PackedRows, Source


if TYPE_CHECKING:
    import datasets


def open_arrow(path: Path, columns: Columns, split: str = "train", hub: bool = False) -> Source:
    """
    Opens a data set with images as bytes or as paths. Raises `ValueError` if the path is no data set, or has no such
    split or columns.
    """
    with require_extra("train"):
        import datasets
        import pyarrow.compute as pc
    with loading_errors(path, f"check the file, the split {split!r} and the columns"):
        if hub:
            rows = open_hub_dataset(os.fspath(path), split)
        elif path.is_dir():
            rows = datasets.load_from_disk(path)
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[split]
        else:
            rows = datasets.Dataset.from_parquet(glob.escape(os.fspath(path)))  # it takes patterns
        image_features = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if columns.image == IMAGE_COLUMNS and image_features:
            columns = columns._replace(image=(image_features[0],))
        columns.check(path, rows.features)
        image_column = next(name for name in columns.image if name in rows.features)
        kept = text_columns(rows.features, (*columns.caption, *LABEL_COLUMNS, "json"))
        rows = rows.with_format(None)  # some formats hide columns, or return no dict
        rows = rows.select_columns([image_column, *kept])
        if image_column != "image":
            rows = rows.rename_column(image_column, "image")
        rows = rows.cast_column("image", datasets.Image(decode=False))
    # Only the lengths of images within rows are read. Each counts as an image of its own, even if rows share a path.
    stored = rows.select_columns(["image"]).with_format("arrow")[:]["image"]
    lengths = pc.binary_length(pc.struct_field(stored, "bytes")).to_pylist()
    paths = pc.struct_field(stored, "path")
    names = (None if length else stored_path.as_py() for length, stored_path in zip(lengths, paths))
    if hub:
        names = (name if name and _is_downloaded(name) else None for name in names)
    files = [path] if path.is_file() else [file["filename"] for file in rows.cache_files]
    return Source(path, path.parent, columns, rows, PackedRows(names), files)


def text_columns(features: Mapping, names: Iterable[str]) -> list[str]:
    """
    Returns those of the columns `names` that a data set has and that hold no files, such as images or audio:
    `datasets` would open any file or URL that a row names.
    """
    from datasets.features.features import require_decoding

    return [name for name in names if name in features and not require_decoding(features[name])]


def is_saved_dataset(path: Path) -> bool:
    """Returns whether a folder was written by `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _is_downloaded(name: str) -> bool:
    # Strangers write the rows of the Hub. The rows may name downloaded files, but no other file of this machine.
    from datasets import config
    from huggingface_hub import constants

    folders = constants.HF_HUB_CACHE, config.EXTRACTED_DATASETS_PATH
    return any(Path(name).resolve().is_relative_to(Path(folder).resolve()) for folder in folders)


def open_hub_dataset(name: str, split: str, **kwargs) -> datasets.Dataset | datasets.IterableDataset:
    """Opens a dataset of the Hub. Further arguments and errors are those of `datasets.load_dataset`."""
    with require_extra("train"):
        from datasets import load_dataset
    return load_dataset(name, split=split, **kwargs)
