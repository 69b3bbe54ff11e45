"""
Sources of image-text pairs on disk: tar shards, tables, image folders, folders of classes, Parquet, saved datasets.

A source lists the ranges of its pairs and reads one range at a time. No image is decoded, and torch is not imported,
so that data can be checked before a run.
"""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import io
import logging
import os
import random
import re
import tarfile
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, dropwhile
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..model.images import IMAGE_SUFFIXES, open_image
from ..utils.digests import file_state
from ..utils.extras import require_extra
from ..utils.files import cache_folder, keep_in_cache, parse_json
from ..utils.hub_ids import is_hub_id
from ..utils.terminal import printable
from .class_names import CLASS_NAMES


if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# Columns of the image's path and of the captions, in order of preference: the first column with a value is used.
# "captions" is a list, all others are text. Members of a shard become the columns "txt" and "json".
IMAGE_COLUMNS = ("image", "file_name", "image_path", "filepath", "path")
CAPTION_COLUMNS = ("captions", "txt", "caption", "text", "title")
LABEL_COLUMNS = ("labels", "complete")  # lists of names, see `PairTexts`; `complete` may name a list of `CLASS_NAMES`

CLASS_CAPTION = "a photo of a {}"  # of the images in a folder that is named by their class

# The field Software in the EXIF data of pictures and label maps that the commands write, and their names by default.
WRITTEN_BY = "iclip_hf"
_WRITTEN_NAME = re.compile(r"-(explanation|segments|labels|comparison)(-\d+)?\.[a-z]+$", re.IGNORECASE)

# What `Source.read` may raise for a pair that cannot be used.
BAD_PAIR = (ValueError, tarfile.TarError)


class Columns(NamedTuple):
    """Names of the columns that may hold the image and the captions, in the order of preference."""

    image: tuple[str, ...] = IMAGE_COLUMNS
    caption: tuple[str, ...] = CAPTION_COLUMNS

    @classmethod
    def named(cls, image: str | None = None, caption: str | None = None) -> Columns:
        """Returns the usual columns, or only the given one."""
        return cls((image,) if image else IMAGE_COLUMNS, (caption,) if caption else CAPTION_COLUMNS)

    def check(self, where: str | os.PathLike, names: Iterable[str]) -> None:
        """Raises `ValueError` if a table has no column for the image or none for the captions."""
        for what, wanted in zip(("image", "caption"), self):
            if not set(wanted) & set(names):
                raise ValueError(
                    f"{where}: no column for the {what} ({' or '.join(map(repr, wanted))}) is among "
                    f"{', '.join(map(repr, names))}; add a header line, or name the column by --{what}_column."
                )

    def texts(self, row: Mapping) -> PairTexts:
        """
        Returns the captions of the first column with text, none without text, and the labels. Raises `ValueError` if
        `labels` or `complete` are neither lists of names nor numbers, if `complete` names an unknown list, and if
        there is `complete` without a list of names as labels.
        """
        nested = row["json"] if isinstance(row.get("json"), Mapping) else {}
        captions_of_columns = (_texts(column, of.get(column)) for column in self.caption for of in (row, nested))
        captions = next(filter(None, captions_of_columns), [])
        stored = ([of[name] for of in (row, nested) if not _is_empty(of.get(name))] for name in LABEL_COLUMNS)
        labels, complete = (next(iter(values), None) for values in stored)
        if isinstance(complete, str) and not complete.lstrip().startswith("["):
            if complete.lower() not in CLASS_NAMES:
                raise ValueError(
                    f"complete: {complete!r:.100} is neither a list of names nor one of {', '.join(CLASS_NAMES)}"
                )
            complete = [complete]
        names, listed = _names("labels", labels), _names("complete", complete)
        if listed:
            if names is None:  # all of these would count as absent
                raise ValueError(
                    f"labels: {labels!r:.100} is no list of names, which complete needs; that of an image which shows "
                    "none of them is []"
                )
            lists = [CLASS_NAMES.get(name.lower(), (name,)) for name in listed]
            listed = lists[0] if len(lists) == 1 else [name for of_entry in lists for name in of_entry]
        return PairTexts(captions, names or [], listed or [])


class PairTexts(NamedTuple):
    """
    Captions and labels of an image.

    Attributes:
        captions: all captions; none for a pair without.
        labels: names of what the image shows.
        complete: names that the labels are complete for: the image does not show one of them that is no label.
    """

    captions: Sequence[str]
    labels: Sequence[str] = ()
    complete: Sequence[str] = ()

    @classmethod
    def joined(cls, parts: Iterable[PairTexts]) -> PairTexts:
        """Returns the texts of all parts, each once."""
        return cls(*([*dict.fromkeys(chain(*of_parts))] for of_parts in zip(*parts)))


def _texts(column: str, value) -> list[str]:
    """Returns the texts in a value of a column of captions, stripped; none if it is neither text nor has texts."""
    value = _parsed(column, value)
    items = _items(value)
    texts = (text for text in ([value] if items is None else items) if isinstance(text, str))
    return [text for text in map(_stripped, texts) if text]


def _names(column: str, value) -> list[str] | None:
    """
    Returns the names in a value of a column of labels; "dog, cat" are two. None without a list, and for numbers, which
    have another meaning, such as ids of classes. Raises `ValueError` for anything else.
    """
    parsed = _parsed(column, value)
    items = _items(parsed)
    of_value = [parsed] if items is None else items
    if _is_empty(parsed) or (of_value and all(isinstance(item, Number) for item in of_value)):
        return None
    if items is None or not all(isinstance(item, str) for item in items):
        raise ValueError(f'{column}: {value!r:.100} is no list of names, such as ["dog"]')
    names = (_stripped(name) for item in items for name in item.split(","))
    return [name for name in names if name]


def _items(value) -> list | None:
    """Returns the items of a list, a tuple or an array; None of anything else."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return [*value] if isinstance(value, (list, tuple)) else None


def _is_empty(value) -> bool:
    return value is None or (isinstance(value, str) and value == "")


def _stripped(text: str) -> str:
    # JSON escapes can contain lone surrogates, which tokenizers refuse, and text files of Windows a byte order mark.
    return text.encode(errors="ignore").decode("utf-8-sig").strip()


def _parsed(column: str, value):
    """
    Returns a value of a column; that of a list in a .csv or .tsv is parsed. Raises `ValueError` for labels as text
    that is no JSON.
    """
    if column in ("captions", *LABEL_COLUMNS) and isinstance(value, str):
        try:
            return parse_json(value)
        except ValueError:
            if column in LABEL_COLUMNS:
                raise ValueError(f'{column}: {value!r:.100} is no list of names in JSON, such as ["dog"]') from None
            return None
    return value


USUAL_COLUMNS = Columns()


class RawPair(NamedTuple):
    """
    A pair as it is stored.

    Attributes:
        image: encoded image, or path of its file.
        name: name of the image for errors; None if it is the path.
        texts: captions and labels.
        key: name of the pair.
    """

    image: bytes | Path
    name: str | None
    texts: PairTexts
    key: str


class BadPairError(ValueError):
    """A pair is unusable: its image is broken or missing, or it has no caption."""


class BadPairTally:
    """
    Counts good and bad pairs. Logs bad pairs, and raises `ValueError` if their share is too large. A pair of a data
    set counts once, in whatever number of epochs it is read; those of a stream have no index and count each time.
    """

    def __init__(self, max_bad_share: float, pairs: int | None = None):
        self._max_bad_share = max_bad_share
        self._counts_from = 100 if pairs is None else min(100, pairs)  # from so many on, the share is meaningful
        self._seen = bytearray(pairs or 0)
        self._read = self._bad = 0
        self._last_error: BadPairError | str = "see the log"

    def add(self, index: int | None = None, error: BadPairError | None = None) -> None:
        """Counts a pair that this process read."""
        if error is not None and not (index is not None and self._seen[index]):
            self._last_error, bad = error, self._bad + 1
            if bad <= 10 or bad.bit_count() == 1:  # later only the 16th, 32nd, 64th, ...
                logger.warning("Bad pair, number %d among %d: %s", bad, self._read + 1, printable(error))
        self.count(index, 1, int(error is not None))

    def count(self, index: int | None, read: int, bad: int) -> None:
        """Counts pairs that were read, also by a loading process, which logs the bad ones."""
        if index is not None:
            if self._seen[index]:
                return
            self._seen[index] = True
        self._read += read
        self._bad += bad
        if self._read >= self._counts_from and self._bad > self._max_bad_share * self._read:
            raise ValueError(
                f"{self._bad} of the {self._read} pairs read so far are bad, more than max_bad_share "
                f"({self._max_bad_share:.2%}): fix the data, or raise it. The last one: {self._last_error}"
            )


def sample_caption(captions: list[str], seed: int, epoch: int, key: int | str) -> str:
    return random.Random(f"{seed}/{epoch}/{key!r}").choice(captions) if len(captions) > 1 else captions[0]


class Source:
    """
    `count` pairs in one place, each in a range of it, by default one row. Folders below `root`, if any, name what
    images show.
    """

    count: int
    root: Path | None = None

    def __init__(self, path: Path, columns: Columns = USUAL_COLUMNS):
        self.path, self.columns = path, columns

    def ranges(self) -> np.ndarray:
        """Returns the range (start, end) of each pair, `(N, 2)` int64."""
        return np.arange(self.count, dtype=np.int64)[:, None] + [0, 1]

    def read(self, start: int, end: int) -> RawPair:
        """
        Returns the pair in a range. Raises `OSError` if the source no longer exists, one of `BAD_PAIR` if the pair is
        unusable.
        """
        raise NotImplementedError

    def place(self, start: int) -> str:
        """Returns how errors name the pair that begins there."""
        return f"{self.path}, row {start + 1}"

    def image_files(self, ranges: np.ndarray) -> list[Path | None]:
        """Returns the image file of each pair, None for an image within the source and for a pair without an image."""
        return [None] * len(ranges)

    def files(self) -> list[str | Path]:
        """Returns the files of the source itself."""
        return [self.path]


_INDEX_VERSION = b"3"  # of the ranges that are kept on disk


class TarShard(Source):
    """
    A tar file in the form of webdataset. Adjacent members with the same key are a pair, and a member whose full name
    repeats begins the next one. Their bytes are a small tar file.

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

    def _scan(self) -> np.ndarray:
        ranges, last_key, suffixes = array("q"), None, set()
        try:
            with tarfile.open(self.path, "r:") as tar:
                size = os.path.getsize(self.path)
                for member in tar:
                    if member.size > size:  # stated by a damaged header
                        raise tarfile.ReadError(f"{member.name!r} has more bytes than the file")
                    key, suffix = _key_and_suffix(member)
                    if key is not None:
                        if key != last_key or suffix in suffixes:
                            ranges.extend((member.offset, 0))
                            suffixes.clear()
                        suffixes.add(suffix)
                        ranges[-1] = tar.offset  # start of the next member
                        last_key = key
                    tar.members.clear()  # tarfile would keep all members
                if tar.offset == size:  # cut between two members, of which tarfile says nothing
                    raise tarfile.ReadError("the zeros at its end are missing")
                # tarfile ends silently at a damaged header, and before an archive that was appended to this one.
                tar.fileobj.seek(tar.offset)
                while block := tar.fileobj.read(2**20):
                    if block.strip(b"\0"):
                        raise tarfile.ReadError(
                            f"its members end at byte {tar.offset}, but more bytes follow; `tar --concatenate` joins "
                            "archives"
                        )
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(
                f"{self.path}: this is no whole tar file without compression ({error}); decompress it, or get it "
                "again."
            ) from error
        return np.array(ranges, np.int64).reshape(-1, 2)

    def read(self, start: int, end: int) -> RawPair:
        row, image, name = {}, None, None
        with open(self.path, "rb", buffering=0) as opened:
            opened.seek(start)
            block = opened.read(end - start)
        with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
            for member in tar:
                key, suffix = _key_and_suffix(member)
                data = block[member.offset_data : member.offset_data + member.size]
                if suffix in IMAGE_SUFFIXES:
                    if image is not None:
                        raise ValueError(f"two images of the key {key!r}, in {name} and {member.name!r}")
                    image, image_key, name = data, key, f"{str(self.path)!r}: {member.name!r}"
                elif suffix in (".txt", ".json"):
                    row[suffix[1:]] = parse_json(data) if suffix == ".json" else data.decode()
        if image is None:
            raise ValueError("no image beside its text; members of a pair must be neighbours (`tar --sort=name`)")
        return RawPair(image, name, self.columns.texts(row), image_key)

    def place(self, start: int) -> str:
        return f"{self.path}, byte {start}"


def _key_and_suffix(member: tarfile.TarInfo) -> tuple[str | None, str]:
    """
    Returns the key of webdataset (the path up to the first dot of the file name) and the suffix; (None, "") for other
    members.
    """
    folder, slash, name = member.name.rpartition("/")
    stem, dot, suffix = name.partition(".")
    if not member.isreg() or not stem or not dot:
        return None, ""
    return f"{folder}{slash}{stem}", f".{suffix.lower()}"


class ImageList(Source):
    """
    Image files by name, each with its texts, which are None for a row that is part of an earlier one. Names are
    relative to the table `path` that lists them, or to the folder `path`; an empty one is a pair without an image.
    """

    def __init__(self, path: Path, columns: Columns, names: Sequence[str], texts: Sequence[PairTexts | None]):
        super().__init__(path, columns)
        self.root = path if path.is_dir() else None
        self._folder = self.root or path.parent
        self._names, self._texts, self.count = names, texts, len(names)

    def ranges(self) -> np.ndarray:
        """Returns the range of each row with texts of its own."""
        return super().ranges()[[texts is not None for texts in self._texts]]

    def read(self, start: int, end: int) -> RawPair:
        name = self._names[start]
        if not name or "://" in name:
            raise ValueError(f"{name!r} is no image file; download images first (img2dataset)")
        return RawPair(self._folder / name, None, self._texts[start], name)

    def image_files(self, ranges: np.ndarray) -> list[Path | None]:
        names = (self._names[row] for row in ranges[:, 0])
        return [self._folder / name if name else None for name in names]

    def files(self) -> list[Path]:
        return [] if self.root else [self.path]


def read_table(path: Path, columns: Columns = USUAL_COLUMNS) -> ImageList:
    """
    Reads a text file in UTF-8 with one pair in each row: .csv or .tsv (without quoting) with a header line, or .jsonl.
    Fields of a .csv are separated by the character of ",", ";" and tab that its header has most of. Blank lines
    do not count. Rows of one image are one pair with the captions and labels of all, because in a batch the captions
    of other pairs count as wrong.

    Raises:
        `ValueError`: there are no columns of images and captions, a line is no row, labels are no list, or complete
        for an unknown one.
    """
    names, texts, found = [], [], {}
    for number, row in enumerate(_table_rows(path)):
        found |= dict.fromkeys(row)  # a row of a .jsonl may lack some
        name = next((row[column] for column in columns.image if row.get(column)), "")
        names.append(name if isinstance(name, str) else "")
        try:
            texts.append(columns.texts(row))
        except ValueError as error:
            raise ValueError(f"{path}, row {number + 1}: {error}") from error
    if names:
        columns.check(path, found)
    for first, others in _later_rows(names).items():
        texts[first] = PairTexts.joined(texts[row] for row in (first, *others))
        for row in others:
            texts[row] = None
    return ImageList(path, columns, names, texts)


def _later_rows(names: Iterable[str | None]) -> dict[int, list[int]]:
    """Returns the later rows of each image that several rows name, by the first of its rows."""
    first_rows, later = {}, defaultdict(list)
    for row, name in enumerate(names):
        if name and (first := first_rows.setdefault(name, row)) < row:
            later[first].append(row)
    return later


def _table_rows(path: Path) -> Iterator[dict]:
    is_json = path.suffix.lower() == ".jsonl"
    with open(path, "rb") as file:
        start = file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
        form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        if path.suffix.lower() == ".csv":
            first = next(filter(bytes.strip, file), b"").decode(errors="replace")
            delimiter = max(",;\t", key=first.count)
            form = {"delimiter": delimiter, "skipinitialspace": True, "strict": True}
            file.seek(start)
        lines = dropwhile(lambda line: not line.strip(), map(bytes.decode, file))
        rows = map(parse_json, filter(str.strip, lines)) if is_json else csv.DictReader(lines, **form)
        try:
            header = [] if is_json else rows.fieldnames or []
            if twice := next((name for name in filter(None, header) if header.count(name) > 1), None):
                raise ValueError(f"two columns are named {twice!r}; rename or remove one")
            start = file.tell()
            for row in rows:
                if not isinstance(row, dict):
                    raise ValueError(f"{row!r:.100} is no JSON object")
                if header and (None in row or None in row.values()):
                    raise ValueError(f"it has not {len(header)} fields (text with a separator needs double quotes)")
                yield row
                start = file.tell()
        except (ValueError, csv.Error) as error:
            # Strict reading finds a stray quote lines later, where it would have joined rows: the first of these lines
            # is named.
            file.seek(0)
            number = file.read(start).count(b"\n") + 1
            while not file.readline().strip():
                number += 1
            raise ValueError(
                f"{path}, line {number}: this is no row of a {path.suffix} table in UTF-8: {error}"
            ) from error


def read_class_folders(path: Path) -> ImageList:
    """
    Reads a folder whose subfolders hold the images of one class each and have its name: `dog/1.jpg`. Images elsewhere
    in it are logged. Pictures that the commands wrote under a name by default are left out; reading the header of each
    image would take long.

    Raises:
        `FileNotFoundError`: there are no such images.
    """
    all_paths = sorted(
        image.relative_to(path)
        for image in image_files(path)
        if not (_WRITTEN_NAME.search(image.name) and is_written_picture(image))
    )
    images = [image for image in all_paths if len(image.parts) == 2]
    if not images:
        raise FileNotFoundError(
            f"{path}: there is neither metadata.jsonl, metadata.csv, a .tar or .parquet file, nor an image in a "
            "folder of its class, such as dog/1.jpg; name another folder, or the table itself."
        )
    if elsewhere := [image for image in all_paths if len(image.parts) != 2]:
        logger.warning(
            "%s: left out %d images in no folder of a class, such as %r", path, len(elsewhere), str(elsewhere[0])
        )
    labels = (" ".join(image.parent.name.replace("_", " ").split()) for image in images)
    texts = [PairTexts([CLASS_CAPTION.format(label)]) for label in labels]
    return ImageList(path, USUAL_COLUMNS, [image.as_posix() for image in images], texts)


class ArrowRows(Source):
    """
    The rows of a dataset of the `datasets` library: a Parquet file, a folder of `save_to_disk`, or a downloaded Hub
    dataset. Rows that name one image file are one pair, as in a table. Each row with the bytes of its image is a pair:
    all images would have to be read to compare them.
    """

    def __init__(self, path: Path, columns: Columns = USUAL_COLUMNS, split: str = "train", hub: bool = False):
        with require_extra("train"):
            import datasets
            from huggingface_hub import constants
        try:
            if hub:
                rows = open_hub_dataset(os.fspath(path), split)
            elif path.is_dir():
                rows = datasets.load_from_disk(path)
                rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
            else:
                rows = datasets.Dataset.from_parquet(os.fspath(path))
        except ConnectionError:
            raise
        except Exception as error:  # of many types, from an unknown split to damaged files
            raise ValueError(f"{path}: this is no dataset with the split {split!r}: {error}") from error
        images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if columns.image == IMAGE_COLUMNS and images:
            columns = Columns((images[0],), columns.caption)
        columns.check(path, rows.features)
        super().__init__(path, columns)
        self._image_column = next(name for name in columns.image if name in rows.features)
        if isinstance(rows.features[self._image_column], dict):  # of pandas, which may lack the bytes or the paths
            images.append(self._image_column)
        for name in images:
            rows = rows.cast_column(name, datasets.Image(decode=False))
        self._rows, self.count = rows.with_format(None), len(rows)  # some formats hide columns, or return no dict
        # Others wrote the rows of the Hub: they may name files that were downloaded, but no other file of this
        # machine.
        downloaded = constants.HF_HUB_CACHE, datasets.config.EXTRACTED_DATASETS_PATH
        self._allowed = [Path(folder).resolve() for folder in downloaded] if hub else None
        self._later_rows = _later_rows(self._names())

    def ranges(self) -> np.ndarray:
        """Returns the range of the first row of each pair."""
        return np.delete(super().ranges(), [*chain(*self._later_rows.values())], axis=0)

    def read(self, start: int, end: int) -> RawPair:
        row, *others = map(self._rows.__getitem__, (start, *self._later_rows.get(start, ())))
        texts = PairTexts.joined(map(self.columns.texts, (row, *others)))
        stored, key = row[self._image_column], f"{self.path.name} row {start}"
        if isinstance(stored, Mapping):
            stored, key = stored.get("bytes") or stored.get("path"), stored.get("path") or key
        if isinstance(stored, bytes):
            return RawPair(stored, repr(key), texts, key)
        image = self._file(stored)
        if image is None:
            raise ValueError(f"no image of the data set in {self._image_column!r}, but {stored!r:.200}")
        return RawPair(image, None, texts, key)

    def image_files(self, ranges: np.ndarray) -> list[Path | None]:
        names = self._names()
        return [self._file(names[row]) for row in ranges[:, 0]]

    def _names(self) -> list[str | None]:
        """Returns the name of the image file in each row, None for an image within the row."""
        import pyarrow as pa
        import pyarrow.compute as pc

        # Of images within the rows, no byte is read.
        column = self._rows.select_columns([self._image_column]).with_format("arrow")[:][self._image_column]
        if pa.types.is_struct(column.type):
            names = pc.struct_field(column, "path").to_pylist()
            lengths = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
            return [None if length else name for length, name in zip(lengths, names)]
        return column.to_pylist() if str(column.type).endswith(("string", "string_view")) else [None] * len(column)

    def _file(self, name: str | None) -> Path | None:
        """Returns the path of an image; None without a name, and for a file that may not be read."""
        file = self.path.parent / name if name and isinstance(name, str) else None
        if file and self._allowed and not any(file.resolve().is_relative_to(folder) for folder in self._allowed):
            return None
        return file

    def files(self) -> list[str | Path]:
        return [self.path] if self.path.is_file() else [file["filename"] for file in self._rows.cache_files]


def open_hub_dataset(name: str, split: str, **options) -> datasets.Dataset | datasets.IterableDataset:
    """
    Opens a dataset of the Hub. Options and errors are those of `datasets.load_dataset`. Raises `ConnectionError` at
    once if the Hub cannot be reached and the dataset is not in the cache; `load_dataset` would retry for half a
    minute.
    """
    with require_extra("train"):
        from datasets import load_dataset
    from huggingface_hub import errors, resolve_revision

    try:
        resolve_revision(name, repo_type="dataset")
    except errors.HfHubHTTPError:
        pass  # the Hub answers, and `load_dataset` says more
    except Exception as error:  # also of a proxy
        raise ConnectionError(
            f"{name}: there is no such file or folder, and the Hub, where this could be a dataset, cannot be reached; "
            "check the name or the connection."
        ) from error
    return load_dataset(name, split=split, **options)


def open_sources(
    sources: Sequence[str | os.PathLike], columns: Columns = USUAL_COLUMNS, split: str = "train"
) -> list[Source]:
    """
    Opens sources of pairs, see [`~iclip_hf.data.pairs.load_pairs`]; Hub datasets are downloaded. A source that is
    named several times is opened once and returned as often.
    """
    opened: dict[str, list[Source]] = {}
    names = [*map(os.fspath, sources)]
    for name in dict.fromkeys(names):
        if is_hub_id(name):
            opened[name] = [ArrowRows(Path(name), columns, split, hub=True)]
        else:
            opened[name] = [_open(path, columns, split) for path in _local_paths(name)]
    return [source for name in names for source in opened[name]]


_KINDS = {".tar": TarShard, ".csv": read_table, ".tsv": read_table, ".jsonl": read_table, ".parquet": ArrowRows}


def _open(path: Path, columns: Columns, split: str) -> Source:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return ArrowRows(path, columns, split)
    if path.is_dir():
        return read_class_folders(path)
    if path.suffix.lower() not in _KINDS:
        raise ValueError(f"{path}: a file of pairs is one of {', '.join(_KINDS)}; convert or rename it.")
    return _KINDS[path.suffix.lower()](path, columns)


def _local_paths(source: str) -> list[Path]:
    """Returns the files of a source, or its folder."""
    if os.path.isdir(source):
        folder = Path(source)
        tables = [folder / f"metadata.{kind}" for kind in ("jsonl", "csv")]  # as in an `imagefolder` of `datasets`
        if table := next(filter(Path.is_file, tables), None):
            return [table]
        visible = sorted(file for file in folder.iterdir() if not _is_hidden(file.name))
        return [file for file in visible if file.suffix.lower() in (".tar", ".parquet")] or [folder]
    if os.path.isfile(source):
        return [Path(source)]
    files = [file for pattern in expand_braces(source) for file in sorted(glob.glob(pattern)) or [pattern]]
    if missing := [file for file in files if not os.path.isfile(file)]:
        raise FileNotFoundError(
            f"{missing[0]}: there is no such file or folder of pairs ({len(missing)} of {len(files)} are missing); "
            "check the path."
        )
    return [Path(file) for file in files]


def expand_braces(pattern: str) -> list[str]:
    """Expands braces as a shell does: ranges with leading zeros, "{08..10}", and lists, "{a,b}"."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    count = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    parts = match[1].split(",")
    if count:
        parts = [str(number).zfill(len(count[1])) for number in range(int(count[1]), int(count[2]) + 1)]
    return [name for part in parts for name in expand_braces(pattern[: match.start()] + part + pattern[match.end() :])]


def image_files(folder: Path) -> Iterator[Path]:
    """
    Yields the images of a folder and its subfolders, without hidden files and folders, such as `.ipynb_checkpoints`,
    and without `__MACOSX`.
    """
    for root, folders, files in os.walk(folder, followlinks=True):
        here = Path(root)
        # Subfolders may be links, as in subsets of ImageNet. Links within them may lead in circles.
        folders[:] = (
            name for name in folders if not _is_hidden(name) and (here == folder or not (here / name).is_symlink())
        )
        yield from (here / name for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not _is_hidden(name))


def is_written_picture(path: Path) -> bool:
    """Returns whether a command wrote a picture, by its EXIF data."""
    try:
        return WRITTEN_BY.encode() in open_image(path, decode=False).info.get("exif", b"")
    except (ValueError, FileNotFoundError):  # it is named where it is read, also a link to nothing
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
