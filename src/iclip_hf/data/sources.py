"""
Sources of image-text pairs on disk: tar shards, tables, image folders, folders of classes, Parquet, saved datasets.

A source lists the ranges of its pairs and reads one range at a time. No image is decoded, and torch is not imported, so that data
can be checked before a run.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import logging
import math
import os
import re
import tarfile
from array import array
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from ..images import IMAGE_SUFFIXES
from ..utils.digests import content_digest, file_state
from ..utils.extras import require_extra
from ..utils.files import cache_folder, keep_in_cache
from ..utils.hub_ids import may_be_hub_id


if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# Columns of the image's path and of the captions, in order of preference: the first column with a value is used. "captions" is a
# list, all others are text. Members of a shard become the columns "txt" and "json".
IMAGE_COLUMNS = ("image", "file_name", "image_path", "filepath", "path")
CAPTION_COLUMNS = ("captions", "txt", "caption", "text", "title")

CLASS_CAPTION = "a photo of a {}"  # of the images in a folder that is named by their class

# What `Source.read` may raise for a pair that cannot be used.
BAD_PAIR = (ValueError, RecursionError, tarfile.TarError, csv.Error)


class Columns(NamedTuple):
    """Names of the columns that may hold the image and the captions, in the order of preference."""

    image: tuple[str, ...] = IMAGE_COLUMNS
    caption: tuple[str, ...] = CAPTION_COLUMNS

    @classmethod
    def named(cls, image: str | None = None, caption: str | None = None) -> Columns:
        """Returns the usual columns, or only the given one."""
        return cls((image,) if image else IMAGE_COLUMNS, (caption,) if caption else CAPTION_COLUMNS)

    def check(self, where: str | os.PathLike, found: Sequence[str]) -> None:
        """Raises `ValueError` if a table has no column for the image or none for the captions."""
        for what, wanted in zip(("image", "caption"), self):
            if not set(wanted) & set(found):
                expected = repr(wanted[0]) if len(wanted) == 1 else f"one of {', '.join(wanted)}"
                raise ValueError(
                    f"{where}: expected the column of the {what} to be {expected}, but got {', '.join(map(repr, found))}; add "
                    f"a header line, or name the column by --{what}_column."
                )

    def captions(self, row: Mapping) -> list[str]:
        """Returns the captions of the first column with text, stripped. Raises `ValueError` if there is none."""
        within = row["json"] if isinstance(row.get("json"), Mapping) else {}
        for column in self.caption:
            for value in (row.get(column), within.get(column)):
                if captions := _captions(column, value):
                    return captions
        raise ValueError("no caption")


def _captions(column: str, value) -> list[str]:
    """Returns the captions in a value of a column, which may be none. Raises `ValueError` if it is not text."""
    if not (value.strip() if isinstance(value, str) else value):
        return []
    if column == "captions" and isinstance(value, str):  # of a .csv or .tsv
        value = json.loads(value)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(caption, str) for caption in value):
        raise ValueError(f"expected text or a list of texts in {column!r}, but got {value!r:.100}")
    # JSON escapes can contain lone surrogates, which tokenizers refuse.
    captions = (caption.encode(errors="ignore").decode().strip() for caption in value)
    return [caption for caption in captions if caption]


USUAL_COLUMNS = Columns()


class RawPair(NamedTuple):
    """
    A pair as it is stored.

    Attributes:
        image: encoded image, or path of its file.
        name: name of the image for errors; None if it is the path.
        row: columns with the captions.
        key: name of the pair.
    """

    image: bytes | Path
    name: str | None
    row: Mapping
    key: str


class Source:
    """`length` pairs in one place, each in a range of `unit`s, by default one."""

    unit = "rows"
    length: int

    def __init__(self, path: Path, columns: Columns = USUAL_COLUMNS):
        self.path, self.columns = path, columns

    def ranges(self) -> np.ndarray:
        """Returns the range (start, end) of each pair, `(N, 2)` int64."""
        first = np.arange(self.length, dtype=np.int64)
        return np.stack([first, first + 1], 1)

    def read(self, start: int, end: int) -> RawPair:
        """Returns the pair in a range. Raises `OSError` if the source no longer exists, one of `BAD_PAIR` if the pair is unusable."""
        raise NotImplementedError

    def image_files(self, ranges: np.ndarray) -> list[Path | None]:
        """Returns the image file of each pair, None for an image within the source and for a pair that cannot be read."""

        files = []
        for start, end in ranges.tolist():
            image = None
            with suppress(*BAD_PAIR):
                image = self.read(start, end).image
            files.append(image if isinstance(image, Path) else None)
        return files

    def files(self) -> list[str | Path]:
        """Returns the files of the source itself."""
        return [self.path]

    def fingerprint(self, ranges: np.ndarray) -> str:
        """Returns a digest over names and content of the source and of the image files that it names."""
        return content_digest([*self.files(), *filter(None, self.image_files(ranges))])


class _ByteRanges(Source):
    """A file of which each pair is a range of bytes."""

    unit = "bytes"

    def read(self, start: int, end: int) -> RawPair:
        try:
            with open(self.path, "rb", buffering=0) as opened:
                opened.seek(start)
                block = opened.read(end - start)
        except OSError as error:
            raise OSError(
                f"{self.path}: the run started with it, but now: {error}; restore it, then rerun to resume."
            ) from error
        return self.parse(block)


_INDEX_VERSION = b"2"  # of the ranges that are kept on disk


class TarShard(_ByteRanges):
    """
    A tar file in the form of webdataset. Adjacent members with the same key are a pair, and a member whose full name repeats begins
    the next one. Their bytes are a small tar file.

    Nothing is extracted to disk, and links are ignored, so no member can refer to a path outside.
    """

    def ranges(self) -> np.ndarray:
        """Returns the byte range of each pair. Cached on disk, because a million pairs take minutes."""
        cached = (
            cache_folder()
            / "shards"
            / f"{hashlib.sha256(file_state(self.path) + _INDEX_VERSION).hexdigest()[:32]}.npy"
        )
        try:
            return np.load(cached)
        except (OSError, ValueError, EOFError):  # missing or damaged
            ranges = self._scan()

        def write(partial: Path) -> None:
            with open(partial, "wb") as file:  # numpy would add a suffix to a file name
                np.save(file, ranges)

        keep_in_cache(cached, write)
        return ranges

    def image_files(self, ranges: np.ndarray) -> list[None]:
        return [None] * len(ranges)  # they are within the shard, which need not be read for this

    def parse(self, block: bytes) -> RawPair:
        row, image, name = {}, None, None
        with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
            for member in tar:
                key, suffix = _key_and_suffix(member)
                data = block[member.offset_data : member.offset_data + member.size]
                if suffix in IMAGE_SUFFIXES:
                    if image is not None:
                        raise ValueError(f"two images of the key {key!r}, in {name} and {member.name!r}")
                    image, image_key, name = data, key, f"{str(self.path)!r}: {member.name!r}"
                elif suffix in (".txt", ".json"):
                    row[suffix[1:]] = json.loads(data) if suffix == ".json" else data.decode()
        if image is None:
            raise ValueError("no image beside its text; members of a pair must be neighbours (`tar --sort=name`)")
        return RawPair(image, name, row, image_key)

    def _scan(self) -> np.ndarray:
        ranges, last_key, suffixes, size = array("q"), None, set(), self.path.stat().st_size
        try:
            with tarfile.open(self.path, "r:") as tar:
                # Without any member the offset is 0, and Python 3.10 would seek to -1.
                while tar.offset and (member := tar.next()) is not None:
                    if not member.offset < tar.offset <= size:  # the size in the header may exceed the file
                        raise tarfile.ReadError(f"unexpected end of data, in the member at byte {member.offset}")
                    key, suffix = _key_and_suffix(member)
                    if key is not None:
                        if key != last_key or suffix in suffixes:
                            ranges.extend((member.offset, 0))
                            suffixes.clear()
                        suffixes.add(suffix)
                        ranges[-1] = tar.offset  # start of the next member
                        last_key = key
                    tar.members.clear()  # tarfile would keep all members
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile ends silently at a damaged header
                    raise tarfile.ReadError(f"no member begins at byte {tar.offset}")
        # Numbers in a damaged header may have any value.
        except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError) as error:
            problem = str(error) or type(error).__name__
            raise ValueError(
                f"{self.path}: expected a whole tar file without compression, but got: {problem}; decompress it, or get it "
                "again."
            ) from error
        return np.array(ranges, np.int64).reshape(-1, 2)


class Table(_ByteRanges):
    """
    A text file in UTF-8 with one pair in each row: .csv or .tsv (without quoting) with a header line, or .jsonl. Fields of a .csv are
    separated by the character of ",", ";" and tab that its first line has most of.

    A line that is no row raises `ValueError` with its number: by the first pass over the file, so that a stray quote joins no rows.
    """

    def __init__(self, path: Path, columns: Columns = USUAL_COLUMNS):
        super().__init__(path, columns)
        self._kind, self._header = path.suffix.lower(), None
        self._form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        if self._kind == ".csv":
            with open(path, "rb") as file:
                delimiter = max(",;\t", key=file.readline().decode(errors="replace").count)
            self._form = {"delimiter": delimiter, "skipinitialspace": True, "strict": True}
        first = next((row for *_, row in self._rows()), None)
        if first is None:
            raise ValueError(
                f"{path}: expected a header line and a pair in each further line, but got an empty file; add pairs."
            )
        if self._kind != ".jsonl":
            self._header = [name.strip() for name in first]
        columns.check(path, sorted(self._header or first))
        for name in columns.image + columns.caption:
            if self._header is not None and self._header.count(name) > 1:
                raise ValueError(f"{path}: expected different columns, but got {name!r} more than once; rename one.")

    def ranges(self) -> np.ndarray:
        ranges = array("q", (position for start, end, _ in self._rows() for position in (start, end)))
        return np.array(ranges, np.int64).reshape(-1, 2)[self._header is not None :]

    def parse(self, block: bytes) -> RawPair:
        row = next(self._parsed(io.StringIO(block.decode("utf-8-sig"), newline="")))
        if self._header is not None:
            row = dict(zip(self._header, row))
        key = next((row[column] for column in self.columns.image if row.get(column)), None)
        if not isinstance(key, str):
            raise ValueError(f"no image path in the columns {list(row)}")
        if "://" in key:
            raise ValueError(f"expected an image path, but got the URL {key}; download the images first (img2dataset)")
        return RawPair(self.path.parent / key, None, row, key)

    def _rows(self) -> Iterator[tuple[int, int, list[str] | dict]]:
        """Yields the byte range (start, end) and the fields of each row that is not blank, including the header."""
        number = 0

        def lines(file: BinaryIO) -> Iterator[str]:
            nonlocal number
            for line in iter(file.readline, b""):
                number += 1
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")

        start, first = 0, 1  # `first`: line of the row
        with open(self.path, "rb") as file:
            try:
                for row in self._parsed(lines(file)):
                    end = file.tell()
                    if self._header and row and len(row) != len(self._header):
                        hint = " (text with a separator needs double quotes)" if self._kind == ".csv" else ""
                        raise ValueError(f"{len(row)} fields instead of {len(self._header)}{hint}")
                    if row not in (None, []):
                        yield start, end, row
                    start, first = end, number + 1
            except (ValueError, RecursionError, csv.Error) as error:
                raise ValueError(
                    f"{self.path}, line {first}: expected a row of a {self._kind} table in UTF-8, but got: {error}; correct it."
                ) from error

    def _parsed(self, lines: Iterable[str]) -> Iterator[list[str] | dict | None]:
        """Parses lines to rows; those of blank lines are `[]` or None."""
        return map(_json_object, lines) if self._kind == ".jsonl" else csv.reader(lines, **self._form)


def _json_object(line: str) -> dict | None:
    if not line.strip():
        return None
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, but got {type(row).__name__}")
    return row


class ClassFolders(Source):
    """
    A folder whose subfolders hold the images of one class each and have its name: `dog/1.jpg`. Images elsewhere in it are logged.
    Hidden files and folders are none, nor is `__MACOSX`.
    """

    unit = "images"

    def __init__(self, path: Path):
        super().__init__(path)
        self._images, elsewhere = [], []
        for image in image_files(path):
            of_class = image.parent != path and image.parent.parent == path
            (self._images if of_class else elsewhere).append(image)
        self._images.sort()
        self.length = len(self._images)
        left_out = f"{len(elsewhere)} images elsewhere, such as {min(elsewhere)}" if elsewhere else "none"
        if not self._images:
            raise FileNotFoundError(
                f"{str(path)!r}: expected metadata.jsonl, metadata.csv, .tar or .parquet files, or a folder of images for each class, but got "
                f"{left_out}; name another folder, or the table itself."
            )
        if elsewhere:
            logger.warning("%s: only images in the folders of classes are read, not %s", path, left_out)

    def read(self, start: int, end: int) -> RawPair:
        image = self._images[start]
        label = " ".join(image.parent.name.replace("_", " ").split())
        return RawPair(image, None, {"caption": CLASS_CAPTION.format(label)}, f"{image.parent.name}/{image.name}")

    def fingerprint(self, ranges: np.ndarray) -> str:
        return content_digest(self.image_files(ranges), self.path)  # names are those of the classes


class ArrowRows(Source):
    """The rows of a dataset of the `datasets` library: a Parquet file, a folder of `save_to_disk`, or a downloaded Hub dataset."""

    def __init__(self, path: Path, columns: Columns = USUAL_COLUMNS, split: str = "train", hub: bool = False):
        with require_extra("train"):
            import datasets
        super().__init__(path, columns)
        try:
            if hub:
                rows = open_hub_dataset(os.fspath(path), split)
            elif path.is_dir():
                rows = datasets.load_from_disk(path)
                rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
            else:
                rows = datasets.Dataset.from_parquet(os.fspath(path))
        except Exception as error:  # of many types, from an unknown split to damaged files
            if hub:
                raise
            raise ValueError(
                f"{path}: expected a dataset with split {split!r}, but it cannot be opened ({' '.join(str(error).split()):.300}); check "
                "the split, or download it again."
            ) from error
        images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if columns.image == IMAGE_COLUMNS and images:
            self.columns = columns = Columns((images[0],), columns.caption)
        columns.check(path, list(rows.features))
        for name in images:
            rows = rows.cast_column(name, datasets.Image(decode=False))
        self._rows, self.length = rows, len(rows)
        self._folders = None
        if hub:
            from huggingface_hub import constants

            downloaded = Path(constants.HF_HUB_CACHE, "--".join(("datasets", *path.parts)))
            self._folders = [downloaded.resolve(), Path(datasets.config.EXTRACTED_DATASETS_PATH).resolve()]
        self._image_column = next(name for name in columns.image if name in rows.features)

    def read(self, start: int, end: int) -> RawPair:
        row = self._rows[start]
        stored, key = row[self._image_column], f"{self.path.name} row {start}"
        if isinstance(stored, Mapping):
            stored, key = stored.get("bytes") or stored.get("path"), stored.get("path") or key
        if not stored or not isinstance(stored, (bytes, str)):
            raise ValueError(f"no image in {self._image_column!r}")
        if isinstance(stored, bytes):
            return RawPair(stored, repr(key), row, key)
        image = self._file(stored)
        if image is None:
            raise ValueError(f"expected an image of the data set itself, but got the path {stored!r:.200}")
        return RawPair(image, None, row, key)

    def image_files(self, ranges: np.ndarray) -> list[Path | None]:
        import pyarrow as pa
        import pyarrow.compute as pc

        def plain(values: pa.ChunkedArray) -> pa.ChunkedArray:  # few functions of pyarrow know views
            views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
            return values.cast(views.get(values.type, values.type))

        # Of images within the rows, only lengths are read.
        column = self._rows.select_columns([self._image_column]).with_format("arrow")[:][self._image_column]
        if pa.types.is_struct(column.type):
            within = pc.greater(pc.binary_length(plain(pc.struct_field(column, "bytes"))), 0)
            column = pc.if_else(pc.fill_null(within, False), None, plain(pc.struct_field(column, "path")))
        column = plain(column)
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            return [None] * len(ranges)
        return [self._file(name) if name else None for name in column.take(ranges[:, 0]).to_pylist()]

    def _file(self, name: str) -> Path | None:
        """Returns the path of an image; None if rows of the Hub, which others wrote, name a file that was not downloaded with them."""
        file = self.path.parent / name
        try:
            own = self._folders is None or any(file.resolve().is_relative_to(folder) for folder in self._folders)
        except ValueError:  # a name may hold any characters
            own = False
        return file if own else None

    def files(self) -> list[str | Path]:
        return [self.path] if self.path.is_file() else [file["filename"] for file in self._rows.cache_files]


def is_hub_id(source: str) -> bool:
    """Whether this names a Hub dataset, as `org/name`, see [`~iclip_hf.utils.hub_ids.may_be_hub_id`]."""
    return "/" in source and may_be_hub_id(source) and Path(source).suffix.lower() not in _KINDS


def open_hub_dataset(name: str, split: str, **options) -> datasets.Dataset | datasets.IterableDataset:
    """`datasets.load_dataset`, of which every error is a `FileNotFoundError`."""
    with require_extra("train"):
        from datasets import load_dataset
    try:
        return load_dataset(name, split=split, **options)
    except Exception as error:  # of many types, from an unknown id to a missing network
        raise FileNotFoundError(
            f"{name}: expected a local path, or a Hub dataset with split {split!r}, but the first is not there and the "
            f"second cannot be opened ({error}); check name, split and network."
        ) from error


def open_sources(
    sources: Sequence[str | os.PathLike], columns: Columns = USUAL_COLUMNS, split: str = "train"
) -> list[Source]:
    """Opens sources of pairs, see [`~iclip_hf.data.pairs.load_pairs`]; Hub datasets are downloaded."""
    opened = []
    for source in map(os.fspath, sources):
        if is_hub_id(source):
            opened.append(ArrowRows(Path(source), columns, split, hub=True))
        elif os.path.isfile(Path(source, "state.json")) or os.path.isfile(Path(source, "dataset_dict.json")):
            opened.append(ArrowRows(Path(source), columns, split))
        else:
            opened += [_open(path, columns) for path in _local_files(source)]
    return opened


class Pairs:
    """All pairs of some sources, by number. `ranges` (N, 2) are those of the pairs in their source."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = sources
        parts = [source.ranges() for source in tqdm(sources, desc="Indexing", unit="file", delay=2, leave=False)]
        self._select(np.concatenate([np.empty((0, 2), np.int64), *parts]), np.cumsum([len(part) for part in parts]))

    def _select(self, ranges: np.ndarray, ends: np.ndarray) -> Pairs:
        self.ranges, self._ends = ranges, ends  # `ends`: of each source's pairs
        return self

    def __len__(self) -> int:
        return len(self.ranges)

    def place(self, index: int) -> tuple[Source, int]:
        """Returns the source of a pair, and its number there."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which], index - int(self._ends[which - 1] if which else 0)

    def read(self, index: int) -> RawPair:
        """Returns a pair. Raises like [`Source.read`]."""
        return self.place(index)[0].read(*self.ranges[index].tolist())

    def _by_source(self) -> list[tuple[Source, np.ndarray]]:
        return list(zip(self.sources, np.split(self.ranges, self._ends[:-1])))

    def split(self, share: float) -> tuple[Pairs, Pairs]:
        """
        Splits off a part of the pairs, which is always the same. Pairs of one image stay together. `share`, in (0, 1), is that of the
        images, rounded up.

        Returns:
            `tuple`: the other pairs, and the part.

        Raises:
            `ValueError`: one of them would be empty.
        """
        groups = [
            (number, start) if file is None else _same_file(file)
            for number, (source, part) in enumerate(self._by_source())
            for start, file in zip(part[:, 0].tolist(), source.image_files(part))
        ]
        # In the order of the pairs, so that the place of the files does not count.
        distinct = list(dict.fromkeys(groups))
        count = math.ceil(share * len(distinct))
        if not 0 < count < len(distinct):
            raise ValueError(
                f"Expected a share that splits {len(distinct)} images in two, got {share}: change it, or add pairs."
            )
        order = np.random.default_rng(0).permutation(len(distinct))
        drawn = {distinct[place] for place in order[:count]}
        inside = np.array([group in drawn for group in groups])
        rows = np.flatnonzero(~inside), np.flatnonzero(inside)
        return tuple(copy(self)._select(self.ranges[part], np.searchsorted(part, self._ends)) for part in rows)

    def fingerprint(self) -> str:
        """See [`~iclip_hf.data.pairs.PairDataset.fingerprint`]."""
        digest = hashlib.sha256(self.ranges.tobytes())
        for source, ranges in self._by_source():
            digest.update(f"{source.fingerprint(ranges)}{[*source.columns]}".encode())
        return digest.hexdigest()[:16]


def _same_file(file: Path) -> Hashable:
    """Returns a value that is equal for all paths and links to a file."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):  # a name may hold any characters
        return os.path.abspath(file)
    return "file", found.st_dev, found.st_ino


_KINDS = {".tar": TarShard, ".csv": Table, ".tsv": Table, ".jsonl": Table, ".parquet": ArrowRows}


def _open(path: Path, columns: Columns) -> Source:
    if path.is_dir():
        return ClassFolders(path)
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: expected a file of one of the kinds {', '.join(_KINDS)}; convert or rename it.")
    return kind(path, columns)


def _local_files(source: str) -> list[Path]:
    folder = Path(source)
    if folder.is_dir():
        tables = [folder / f"metadata.{kind}" for kind in ("jsonl", "csv")]  # as in an `imagefolder` of `datasets`
        if table := next(filter(Path.is_file, tables), None):
            return [table]
        visible = sorted(file for file in folder.iterdir() if not is_hidden(file.name))
        return [file for file in visible if file.suffix.lower() in (".tar", ".parquet")] or [folder]
    if os.path.isfile(source):
        return [folder]
    files = [file for pattern in _expand_braces(source) for file in sorted(glob.glob(pattern)) or [pattern]]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing or not files:
        raise FileNotFoundError(
            f"{(missing or [source])[0]}: expected a file or folder of pairs, but there is none ({len(missing)} of {len(files)} "
            "missing); check the path."
        )
    return [Path(file) for file in files]


def image_files(folder: Path) -> Iterator[Path]:
    """Yields the images of a folder and its subfolders, without hidden ones."""
    for root, folders, files in os.walk(folder, followlinks=True):
        here = Path(root)
        # Subfolders may be links, as in subsets of ImageNet. Links within them may lead in circles.
        folders[:] = (
            name for name in folders if not is_hidden(name) and (here == folder or not (here / name).is_symlink())
        )
        yield from (here / name for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name))


def is_hidden(name: str) -> bool:
    """Whether a program added this file or folder, such as `.ipynb_checkpoints` or what macOS writes into zip files."""
    return name.startswith(".") or name == "__MACOSX"


def _expand_braces(pattern: str) -> list[str]:
    """Expands braces as a shell does: ranges with leading zeros, "{08..10}", and lists, "{a,b}"."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    count = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    parts = match[1].split(",")
    if count:
        parts = [str(number).zfill(len(count[1])) for number in range(int(count[1]), int(count[2]) + 1)]
    return [
        name for part in parts for name in _expand_braces(pattern[: match.start()] + part + pattern[match.end() :])
    ]


def _key_and_suffix(member: tarfile.TarInfo) -> tuple[str | None, str]:
    """Returns the key of webdataset (the path up to the first dot of the file name) and the suffix; (None, "") for other members."""
    folder, _, name = member.name.rpartition("/")
    stem, dot, suffix = name.partition(".")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not stem or not dot:
        return None, ""
    return f"{folder}/{stem}" if folder else stem, f".{suffix.lower()}"
