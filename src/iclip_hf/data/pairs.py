"""
Image-text pairs for training: tar shards, image folders and tables with random access, and Hub datasets as streams.

Local data is neither unpacked nor loaded into memory. A pair is a byte range of a shard or table. One pass over the files finds
all ranges, which are kept in one array, so any sampler can shuffle, split and resume exactly.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import logging
import os
import random
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from ..images import IMAGE_SUFFIXES, load_image
from ..utils.digests import content_digest, file_state
from ..utils.extras import require_extra
from ..utils.files import cache_folder, keep_in_cache


if TYPE_CHECKING:
    import datasets
    from PIL import Image

logger = logging.getLogger(__name__)

# Columns of the image's path and of the captions, in order of preference: the first column with a value is used. "captions" is a
# list, all others are text. Members of a shard become the columns "txt" and "json".
IMAGE_COLUMNS = ("image", "file_name", "image_path", "filepath", "path")
CAPTION_COLUMNS = ("captions", "txt", "caption", "text", "title")

_SHUFFLE_BUFFER = 2000  # pairs of a stream that wait undecoded


class BadPairError(ValueError):
    """A pair is unusable: its image is broken or missing, or it has no caption."""


class DroppedConnectionError(ConnectionError):
    """A stream lost its connection."""


class PairDataset(Dataset):
    """
    Local image-text pairs with random access, from [`load_pairs`].

    An item is a `dict` with

    - `image` (`PIL.Image.Image`): image of mode "RGB".
    - `captions` (`list[str]`): all captions of the pair.
    - `caption` (`str`): one of the captions. The draw depends only on seed, epoch and index.
    - `key` (`str`): name of the pair in its source.
    - `skipped` (`int`): number of bad pairs that the item replaces, 0 or 1.

    A bad pair is replaced by a random good pair, so that batches have equal sizes on all processes. The draw depends only on seed,
    epoch and index. Bad pairs are logged. `read` returns pairs without replacement. The data set can be pickled. `set_epoch` also
    reaches running workers.

    Args:
        files: shards and tables.
        seed (`int`, defaults to 0): seed of the draws.
        max_bad_share (`float` in [0, 1], defaults to 0.05): largest allowed share of bad pairs among those that this process read.

    Raises:
        `ValueError`: there are no pairs. During access, too many pairs are bad.
    """

    def __init__(self, files: Sequence[_TarShard | _Table], seed: int = 0, max_bad_share: float = 0.05):
        ranges = [file.ranges() for file in tqdm(files, desc="Indexing", unit="file", delay=2, leave=False)]
        self.seed = seed
        self._files = files
        self._ranges = np.concatenate([np.empty((0, 2), np.int64), *ranges])
        self._ends = np.cumsum([len(part) for part in ranges])  # where each file's pairs end in `_ranges`
        self._tally = _Tally(max_bad_share, counts_from=min(100, len(self)))
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared with persistent workers
        if not len(self):
            raise ValueError(
                f"Expected at least one pair, got none in {[str(file.path) for file in files]}: name others."
            )

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        epoch = int(self._epoch)
        try:
            pair = self.read(index)
            self._tally.good()
            skipped = 0
        except BadPairError as error:
            self._tally.bad(error)
            index, pair = self._replacement(random.Random(f"{self.seed}/{epoch}/{index}"))
            skipped = 1
        caption = _draw(pair["captions"], self.seed, epoch, index)
        return {**pair, "caption": caption, "skipped": skipped}

    def __repr__(self) -> str:
        return f"PairDataset(pairs={len(self)}, files={len(self._files)})"

    def read(self, index: int) -> dict:
        """
        Returns a pair without replacement.

        Returns:
            `dict` with `image`, `captions` and `key`, see [`PairDataset`].

        Raises:
            `BadPairError`: the pair is unusable. `OSError`: its shard or table no longer exists.
        """
        image, name, captions, key = self._parse(index)
        return {"image": _load(image, name), "captions": captions, "key": key}

    def image(self, index: int) -> tuple[str, Image.Image]:
        """Returns key and image of a pair, which needs no caption. Raises like `read`."""
        image, name, _, key = self._parse(index, need_captions=False)
        return key, _load(image, name)

    def captions(self, index: int) -> list[str]:
        """Returns all captions of a pair, at least one, without decoding its image. Raises like `read`."""
        return self._parse(index)[2]

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which the draws depend."""
        self._epoch.fill_(epoch)

    def fingerprint(self) -> str:
        """
        Computes a digest over the positions of the pairs and the content of shards, tables and the images that tables name. The
        first call reads all files. Later calls, also in other processes, only read files again after one has changed.

        Returns:
            `str`: 16 hex digits.
        """
        digest = hashlib.sha256(self._ranges.tobytes())
        for file, ranges in zip(self._files, np.split(self._ranges, self._ends[:-1])):
            digest.update(content_digest([file.path]).encode())
            if images := file.image_files(ranges):
                digest.update(content_digest(images).encode())
        return digest.hexdigest()[:16]

    def _replacement(self, draws: random.Random) -> tuple[int, dict]:
        """Draws a good pair from all pairs. Taking the next good pair would repeat the one after a damaged shard."""
        for _ in range(1000):
            index = draws.randrange(len(self))
            try:
                return index, self.read(index)
            except BadPairError:
                continue
        raise ValueError("Expected at least one good pair in 1000, but got none: correct the data, as the log says.")

    def _parse(self, index: int, need_captions: bool = True) -> tuple[bytes | Path, str, list[str], str]:
        index = range(len(self))[index]
        file = self._files[np.searchsorted(self._ends, index, side="right")]
        start, end = self._ranges[index].tolist()
        try:
            with open(file.path, "rb", buffering=0) as opened:
                opened.seek(start)
                block = opened.read(end - start)
        except OSError as error:
            raise OSError(
                f"{file.path}: it was there at the start, but now: {error}; restore it, then resume."
            ) from error
        try:
            image, name, row, key = file.parse(block)
            return image, name, _captions(row) if need_captions else [], key
        except (ValueError, RecursionError, tarfile.TarError, csv.Error) as error:
            raise BadPairError(
                f"{file.path}, bytes {start} to {end}: expected an image and a caption, but got: {error}; correct it."
            ) from error


class PairStream(IterableDataset):
    """
    Image-text pairs of a Hub dataset as a stream, from [`load_pairs`]. Items are those of [`PairDataset`].

    An iteration is one pass over the part of this process. The order depends on seed and epoch, and is shuffled through a buffer.
    Bad pairs are left out; `skipped` of the next item counts them. The stream splits itself over processes and DataLoader workers,
    so it must not be passed to `Accelerator.prepare`, which splits again. The parts differ in length, so training counts steps
    instead of passes. A resumed run begins a new pass.

    Args:
        dataset (`datasets.IterableDataset`): rows with an image column and a caption column.
        seed (`int`, defaults to 0): seed of the order and of the drawn captions.
        max_bad_share (`float` in [0, 1], defaults to 0.05): largest allowed share of bad pairs among those that were read.
        rank, world_size (`int`): index of this process and number of processes.

    Raises:
        `ValueError`: there is no image column. During iteration, too many pairs are bad. `DroppedConnectionError`: during
        iteration, the connection is lost.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        seed: int = 0,
        max_bad_share: float = 0.05,
        rank: int = 0,
        world_size: int = 1,
    ):
        from datasets import Image
        from datasets.distributed import split_dataset_by_node

        features = dataset.features or {}
        self._image_column = next((name for name, feature in features.items() if isinstance(feature, Image)), None)
        if self._image_column is None:
            raise ValueError(
                f"Expected a dataset with an image column, but got columns {list(features)}: name another one."
            )
        # Other columns are dropped. `datasets` infers types from the first rows, and a later row of another type ends the stream.
        kept = [column for column in (self._image_column, "__key__", *CAPTION_COLUMNS) if column in features]
        if isinstance(features.get("json"), Mapping):
            captions = {column: kind for column, kind in features["json"].items() if column in CAPTION_COLUMNS}
            dataset = dataset.cast_column("json", captions)
            kept.append("json")
        dataset = dataset.select_columns(kept)
        # Without decoding, because one bad image would end the stream.
        dataset = dataset.cast_column(self._image_column, Image(decode=False))
        dataset = dataset.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        self._rows = split_dataset_by_node(dataset, rank=rank, world_size=world_size)
        self.seed = seed
        self._tally = _Tally(max_bad_share, counts_from=100)

    def __iter__(self) -> Iterator[dict]:
        skipped = 0
        rows = iter(self._rows)
        while True:
            with _connection_errors():
                row = next(rows, None)
            if row is None:
                return
            stored = row[self._image_column] or {}
            key = row.get("__key__") or stored.get("path") or "a pair without a name"
            try:
                captions = _captions(row)
                image = load_image(_image_bytes(stored), repr(key))
            except DroppedConnectionError:
                raise
            except (ValueError, OSError) as error:
                skipped += 1
                self._tally.bad(BadPairError(f"{key}: {error}"))
                continue
            self._tally.good()
            caption = _draw(captions, self.seed, self._rows.epoch, key)
            yield {"image": image, "captions": captions, "key": key, "caption": caption, "skipped": skipped}
            skipped = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which the order of the next pass and the drawn captions depend."""
        self._rows.set_epoch(epoch)


def load_pairs(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    split: str = "train",
    seed: int = 0,
    max_bad_share: float = 0.05,
    rank: int = 0,
    world_size: int = 1,
) -> PairDataset | PairStream:
    """
    Opens image-text pairs for training. A source is one of these, or a list of local ones:

    - Tar shards of webdataset or img2dataset (`key.jpg` with `key.txt`, `key.json` or both): a file, a folder of shards, or a
      pattern such as "cc3m/{00000..00331}.tar" or "cc3m/*.tar". The captions are the list `captions` in the JSON, else the text,
      else `caption` in the JSON.
    - An image folder with `metadata.jsonl`, or such a file. Each line has one of `IMAGE_COLUMNS`, a path relative to the file, and
      one of `CAPTION_COLUMNS`.
    - A `.csv` or `.tsv` table with a header line and the same columns; `captions` is a JSON list. Values are literal, also "null".
      In a .tsv, quotes have no special meaning.
    - The Hub id of a dataset ("org/name"), if there is no such local path. It is streamed.

    Args:
        source (`str`, `os.PathLike` or a list of them): the source.
        split (`str`, defaults to `"train"`): split of a Hub dataset.
        seed (`int`, defaults to 0): seed of the drawn captions and of the order of a stream.
        max_bad_share (`float` in [0, 1], defaults to 0.05): largest allowed share of bad pairs (broken image, no caption).
        rank, world_size (`int`): index of this process and number of processes, for a stream. A [`PairDataset`] is split by its
            sampler.

    Returns:
        [`PairDataset`], or [`PairStream`] for a Hub dataset.

    Raises:
        `FileNotFoundError`: a file, folder or Hub dataset does not exist. `ValueError`, `TypeError`: a source is not as described.
    """
    if isinstance(source, (str, os.PathLike)):
        if _is_hub_id(os.fspath(source)):
            return PairStream(_open_hub_dataset(source, split), seed, max_bad_share, rank, world_size)
        source = [source]
    if not isinstance(source, Sequence):
        raise TypeError(
            f"Expected a path, the id of a Hub dataset or a list of paths, got {source!r:.100}: name the data by one of these."
        )
    paths = [path for part in source for path in _local_files(os.fspath(part))]
    return PairDataset([_open_file(path) for path in paths], seed, max_bad_share)


class _TarShard:
    """
    A tar file in the form of webdataset. Adjacent members with the same key are a pair. Their bytes are a small tar file.

    Nothing is extracted to disk, and links are ignored, so no member can refer to a path outside.
    """

    def __init__(self, path: Path):
        self.path = path

    def ranges(self) -> np.ndarray:
        """Returns the byte range (start, end) of each pair, `(N, 2)` int64. Cached on disk, because a million pairs take minutes."""
        state, _ = file_state(self.path)
        cached = cache_folder() / "shards" / f"{hashlib.sha256(state).hexdigest()[:32]}.npy"
        try:
            return np.load(cached)
        except (OSError, ValueError, EOFError):  # missing or damaged
            ranges = self._scan()

        def write(partial: Path) -> None:
            with open(partial, "wb") as file:  # numpy would add a suffix to a file name
                np.save(file, ranges)

        keep_in_cache(cached, write)
        return ranges

    def image_files(self, ranges: np.ndarray) -> list[Path]:
        """Returns an empty list, because the images are inside the shard."""
        return []

    def parse(self, block: bytes) -> tuple[bytes, str, dict, str]:
        """Returns the image of one pair, its name for errors, the row with the captions, and the key."""
        row, image = {}, None
        with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
            for member in tar:
                key, suffix = _key_and_suffix(member)
                data = block[member.offset_data : member.offset_data + member.size]
                if suffix in IMAGE_SUFFIXES:
                    image, image_key, name = data, key, f"{str(self.path)!r}: {member.name!r}"
                elif suffix in (".txt", ".json"):
                    row[suffix[1:]] = json.loads(data) if suffix == ".json" else data.decode()
        if image is None:
            raise ValueError("no image beside its text; members of a pair must be neighbours (`tar --sort=name`)")
        return image, name, row, image_key

    def _scan(self) -> np.ndarray:
        ranges, last_key, size = array("q"), None, self.path.stat().st_size
        try:
            with tarfile.open(self.path, "r:") as tar:
                # Without any member the offset is 0, and Python 3.10 would seek to -1.
                while tar.offset and (member := tar.next()) is not None:
                    if not member.offset < tar.offset <= size:  # the size in the header may exceed the file
                        raise tarfile.ReadError(f"unexpected end of data, in the member at byte {member.offset}")
                    key, _ = _key_and_suffix(member)
                    if key is not None:
                        if key != last_key:
                            ranges.extend((member.offset, 0))
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


class _Table:
    """A text file with one pair in each row: .csv or .tsv (without quoting) with a header line, or .jsonl."""

    def __init__(self, path: Path):
        self.path = path
        self._kind = path.suffix.lower()
        try:
            start, end = next(self._rows(), (0, 0))
            with open(path, "rb") as file:
                first = self._values(file.read(end)[start:])
        except (ValueError, RecursionError, csv.Error) as error:
            raise ValueError(f"{path}: expected {self._kind} rows in UTF-8, but got: {error}; correct it.") from error
        self._header = None if self._kind == ".jsonl" else [name.strip() for name in first]
        columns = set(self._header or first)
        if not (columns & set(IMAGE_COLUMNS) and columns & set(CAPTION_COLUMNS)):
            raise ValueError(
                f"{path}: expected a column out of {IMAGE_COLUMNS} and one out of {CAPTION_COLUMNS}, but got "
                f"{sorted(columns)}; add a header line or rename the columns."
            )

    def ranges(self) -> np.ndarray:
        """Returns the byte range (start, end) of each row, `(N, 2)` int64."""
        try:
            ranges = array("q", (position for row in self._rows() for position in row))
        except csv.Error as error:
            raise ValueError(f"{self.path}: expected well-formed CSV, but got: {error}; correct it.") from error
        return np.array(ranges, np.int64).reshape(-1, 2)[self._header is not None :]

    def parse(self, block: bytes) -> tuple[Path, None, dict, str]:
        """Returns the image path of one row, None (the path is the name for errors), the row with the captions, and the key."""
        row = self._values(block)
        if self._header is not None:
            if len(row) != len(self._header):
                raise ValueError(f"{len(row)} fields instead of {len(self._header)}")
            row = dict(zip(self._header, row))
        key = next((row[column] for column in IMAGE_COLUMNS if row.get(column)), None)
        if not isinstance(key, str):
            raise ValueError(f"no image path in the columns {list(row)}")
        if "://" in key:
            raise ValueError(f"expected an image path, but got the URL {key}; download the images first (img2dataset)")
        return self.path.parent / key, None, row, key

    def image_files(self, ranges: np.ndarray) -> list[Path]:
        """Returns the image files of these rows. Unreadable rows are skipped."""
        files = []
        with open(self.path, "rb") as opened:
            for start, end in ranges.tolist():
                opened.seek(start)
                try:
                    files.append(self.parse(opened.read(end - start))[0])
                except (ValueError, RecursionError, csv.Error):
                    continue
        return files

    def _rows(self) -> Iterator[tuple[int, int]]:
        """Yields the byte range (start, end) of each row that is not blank, including the header."""
        end = 0

        def lines() -> Iterator[str]:
            nonlocal end
            with open(self.path, "rb") as file:
                for line in file:
                    end += len(line)
                    yield line.decode(errors="surrogateescape").rstrip("\r\n") + "\n"

        start = 0
        for row in csv.reader(lines(), strict=True) if self._kind == ".csv" else lines():
            if row and row != "\n":
                yield start, end
            start = end

    def _values(self, block: bytes) -> list[str] | dict:
        text = block.decode("utf-8-sig")
        if self._kind == ".jsonl":
            row = json.loads(text)
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, but got {type(row).__name__}")
            return row
        if self._kind == ".tsv":
            return text.rstrip("\r\n").split("\t")
        return next(csv.reader(io.StringIO(text, newline=""), strict=True), [])


class _Tally:
    """Counts good and bad pairs of this process. Logs bad pairs, and raises `ValueError` if their share is too large."""

    def __init__(self, max_bad_share: float, counts_from: int):
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"Expected max_bad_share from 0 to 1, but got {max_bad_share}: set a share such as 0.05.")
        self._max_bad_share = max_bad_share
        self._counts_from = counts_from  # number of pairs from which the share is meaningful
        self._read = self._bad = 0
        self._last_error: BadPairError | None = None

    def good(self) -> None:
        self._read += 1
        self._check()

    def bad(self, error: BadPairError) -> None:
        self._read += 1
        self._bad += 1
        self._last_error = error
        if self._bad <= 10 or self._bad.bit_count() == 1:  # later only the 16th, 32nd, 64th, ...
            logger.warning("Bad pair, number %d among %d: %s", self._bad, self._read, error)
        self._check()

    def _check(self) -> None:
        if self._read >= self._counts_from and self._bad > self._max_bad_share * self._read:
            raise ValueError(
                f"Expected at most {self._max_bad_share:.2%} bad pairs, but {self._bad} of the {self._read} read so far "
                f"are; mend the data or raise max_bad_share. The last one: {self._last_error}"
            )


# Libraries that streams read with. Their errors have no common base class.
_NETWORK_LIBRARIES = ("aiohttp", "fsspec", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3")


@contextmanager
def _connection_errors() -> Iterator[None]:
    """Converts the errors of a lost connection into `DroppedConnectionError`."""
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if not isinstance(error, (ConnectionError, TimeoutError)) and library not in _NETWORK_LIBRARIES:
            raise
        raise DroppedConnectionError(" ".join(str(error).split()) or type(error).__name__) from error


def _load(image: bytes | Path, name: str | None) -> Image.Image:
    try:
        return load_image(image, name)
    except (ValueError, FileNotFoundError) as error:
        raise BadPairError(str(error)) from error


def _captions(row: Mapping) -> list[str]:
    """Returns all captions of a row, stripped. Raises `ValueError` if there are none."""
    if isinstance(row.get("json"), Mapping):
        row = {**row["json"], **row}
    column = next((column for column in CAPTION_COLUMNS if row.get(column)), None)
    if column is None:
        raise ValueError("no caption")
    value = row[column]
    if column == "captions" and isinstance(value, str):  # of a .csv or .tsv
        value = json.loads(value)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(caption, str) for caption in value):
        raise ValueError(f"expected text or a list of texts in {column!r}, but got {value!r:.100}")
    # JSON escapes can contain lone surrogates, which tokenizers refuse.
    captions = [caption.encode(errors="ignore").decode().strip() for caption in value]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise ValueError(f"no caption but blank text in {column!r}")
    return captions


def _draw(captions: list[str], seed: int, epoch: int, key: int | str) -> str:
    return random.Random(f"{seed}/{epoch}/{key!r}").choice(captions) if len(captions) > 1 else captions[0]


def _key_and_suffix(member: tarfile.TarInfo) -> tuple[str | None, str]:
    """Returns the key of webdataset (the path up to the first dot of the file name) and the suffix; (None, "") for other members."""
    folder, _, name = member.name.rpartition("/")
    stem, dot, suffix = name.partition(".")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not stem or not dot:
        return None, ""
    return f"{folder}/{stem}" if folder else stem, f".{suffix.lower()}"


def _image_bytes(stored: Mapping) -> bytes:
    """Returns the encoded image of a streamed row, which holds its bytes or a path, possibly on the Hub."""
    if stored.get("bytes") or not stored.get("path"):
        return stored.get("bytes") or b""
    import fsspec

    with _connection_errors(), fsspec.open(stored["path"], "rb") as file:
        return file.read()


_FILE_KINDS = {".tar": _TarShard, ".csv": _Table, ".tsv": _Table, ".jsonl": _Table}


def _open_file(path: Path) -> _TarShard | _Table:
    kind = _FILE_KINDS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: expected a file of one of the kinds {list(_FILE_KINDS)}; convert or rename it.")
    return kind(path)


def _local_files(source: str) -> list[Path]:
    if os.path.isdir(source):
        metadata = Path(source, "metadata.jsonl")
        files = [metadata] if metadata.is_file() else sorted(Path(source).glob("*.tar"))
        if not files:
            raise FileNotFoundError(
                f"{source}: expected metadata.jsonl or .tar shards in this folder, but got neither; name another."
            )
        return files
    if os.path.isfile(source):
        return [Path(source)]
    files = [file for pattern in _expand_braces(source) for file in sorted(glob.glob(pattern)) or [pattern]]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]}: expected a file or folder of pairs, but there is none ({len(missing)} of {len(files)} "
            "missing); check the path."
        )
    return [Path(file) for file in files]


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


def _is_hub_id(source: str) -> bool:
    return (
        re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None
        and Path(source).suffix.lower() not in _FILE_KINDS
        and not os.path.exists(source)
    )


def _open_hub_dataset(name: str, split: str) -> datasets.IterableDataset:
    with require_extra("train"):
        from datasets import load_dataset
    try:
        return load_dataset(name, split=split, streaming=True)
    except Exception as error:  # of many types, from an unknown id to a missing network
        raise FileNotFoundError(
            f"{name}: expected a local path, or a Hub dataset with split {split!r}, but the first is not there and the "
            f"second cannot be opened ({error}); check name, split and network."
        ) from error
