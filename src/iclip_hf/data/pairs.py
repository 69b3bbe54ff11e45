"""
Image-text pairs for training: local ones by random access, Hub datasets also as a stream.

Local data is neither unpacked nor read into memory. A pair is a range of its source, such as bytes of a shard. One pass finds the
ranges, and one array holds them, so any sampler can shuffle, split and resume exactly.
"""

from __future__ import annotations

import copy
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset, IterableDataset

from ..images import MAX_DOWNLOAD, load_image
from .sources import (
    BAD_PAIR,
    USUAL_COLUMNS,
    Columns,
    Pairs,
    RawPair,
    Source,
    is_hub_id,
    open_hub_dataset,
    open_sources,
)


if TYPE_CHECKING:
    import datasets
    from PIL import Image

logger = logging.getLogger(__name__)

_SHUFFLE_BUFFER = 2000  # pairs of a stream, not decoded yet


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

    A bad pair is logged and replaced by a random good pair, so that batches have equal sizes on all processes. The draw depends only
    on seed, epoch and index. `read` returns pairs without replacement. The data set can be pickled. `set_epoch` also reaches
    running workers.

    Args:
        sources: of the pairs, see [`~iclip_hf.data.sources.open_sources`].
        seed (`int`, defaults to 0): seed of the draws.
        max_bad_share (`float` in [0, 1], defaults to 0.05): largest allowed share of bad pairs among those that this process read.

    Raises:
        `ValueError`: there are no pairs. During access, too many pairs are bad.
    """

    def __init__(self, sources: Sequence[Source], seed: int = 0, max_bad_share: float = 0.05):
        self.seed, self.max_bad_share = seed, max_bad_share
        self._select(Pairs(sources))
        if not len(self):
            raise ValueError(
                f"Expected at least one pair, got none in {[str(source.path) for source in sources]}: name others."
            )

    def _select(self, pairs: Pairs) -> PairDataset:
        self._pairs, self._tally = pairs, _Tally(self.max_bad_share, len(pairs))
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared with persistent workers
        return self

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict:
        index, epoch, skipped = range(len(self))[index], int(self._epoch), 0
        try:
            pair = self.read(index)
            self._tally.add(index)
        except BadPairError as error:
            self._tally.add(index, error)
            index, pair = self._replacement(random.Random(f"{self.seed}/{epoch}/{index}"))
            skipped = 1
        return {**pair, "caption": _draw(pair["captions"], self.seed, epoch, index), "skipped": skipped}

    def __repr__(self) -> str:
        return f"PairDataset(pairs={len(self)}, sources={len(self._pairs.sources)})"

    def read(self, index: int) -> dict:
        """
        Returns a pair without replacement.

        Returns:
            `dict` with `image`, `captions` and `key`, see [`PairDataset`].

        Raises:
            `BadPairError`: the pair is unusable. `OSError`: its shard or table no longer exists.
        """
        pair, captions = self._parse(index)
        return {"image": _load(pair), "captions": captions, "key": pair.key}

    def image(self, index: int) -> tuple[str, Image.Image]:
        """Returns key and image of a pair, which needs no caption. Raises like `read`."""
        pair, _ = self._parse(index, need_captions=False)
        return pair.key, _load(pair)

    def captions(self, index: int) -> list[str]:
        """Returns all captions of a pair, at least one, without decoding its image. Raises like `read`."""
        return self._parse(index)[1]

    def caption(self, index: int) -> str:
        """Returns the caption of this pair in this epoch; empty for a bad pair. Raises `OSError` like `read`."""
        try:
            return _draw(self.captions(index), self.seed, int(self._epoch), range(len(self))[index])
        except BadPairError:
            return ""

    def image_file(self, index: int) -> Path | None:
        """Returns the image file of a pair, or None if the image lies within the source. Raises like `read`."""
        image = self._parse(index, need_captions=False)[0].image
        return image if isinstance(image, Path) else None

    def split(self, share: float) -> tuple[PairDataset, PairDataset]:
        """
        Splits off a part of the pairs, which is always the same, see [`~iclip_hf.data.sources.Pairs.split`].

        Returns:
            `tuple`: the other pairs, and the part.
        """
        return tuple(copy.copy(self)._select(part) for part in self._pairs.split(share))

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which the draws depend."""
        self._epoch.fill_(epoch)

    def fingerprint(self) -> str:
        """
        Computes a digest, 16 hex digits, over the positions of the pairs, the content of shards, tables and the images that tables name,
        and the names of the columns. The first call reads all files; later calls, also in other processes, only after a change.
        """
        return self._pairs.fingerprint()

    def _replacement(self, draws: random.Random) -> tuple[int, dict]:
        """Draws a good pair from all pairs. Taking the next good pair would repeat the one after a damaged shard."""
        for _ in range(1000):
            index = draws.randrange(len(self))
            try:
                return index, self.read(index)
            except BadPairError:
                continue
        raise ValueError("Expected at least one good pair in 1000, but got none: correct the data, as the log says.")

    def _parse(self, index: int, need_captions: bool = True) -> tuple[RawPair, list[str]]:
        index = range(len(self))[index]
        source, _ = self._pairs.place(index)
        try:
            pair = self._pairs.read(index)
            return pair, source.columns.captions(pair.row) if need_captions else []
        except BAD_PAIR as error:
            start, end = self._pairs.ranges[index]
            raise BadPairError(
                f"{source.path}, {source.unit} {start} to {end}: expected an image and a caption, but got: {error}; correct it."
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
        seed, max_bad_share, rank, world_size: see [`load_pairs`].
        columns ([`~iclip_hf.data.sources.Columns`]): names of the columns; the usual ones by default.
        hub_id (`str`, *optional*): id of the Hub dataset, whose files the rows may name. Other rows must hold the bytes of their images.

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
        columns: Columns = USUAL_COLUMNS,
        hub_id: str | None = None,
    ):
        from datasets import Image
        from datasets.distributed import split_dataset_by_node

        features = dataset.features or {}
        images = [name for name, feature in features.items() if isinstance(feature, Image)]
        if columns.image != USUAL_COLUMNS.image:
            images = [name for name in columns.image if name in images]
        if not images:
            raise ValueError(
                f"Expected a dataset with an image column, but got columns {list(features)}: name another one."
            )
        self._image_column, self._columns, self._hub_id = images[0], columns, hub_id
        # Only these columns are kept: datasets infers types from the first rows, and a different type later ends the stream.
        kept = [column for column in (self._image_column, "__key__", *columns.caption) if column in features]
        if isinstance(features.get("json"), Mapping):
            captions = {column: kind for column, kind in features["json"].items() if column in columns.caption}
            dataset = dataset.cast_column("json", captions)
            kept.append("json")
        dataset = dataset.select_columns(kept)
        # Without decoding, because one bad image would end the stream.
        dataset = dataset.cast_column(self._image_column, Image(decode=False))
        dataset = dataset.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        self._rows = split_dataset_by_node(dataset, rank=rank, world_size=world_size)
        self.seed = seed
        self._tally = _Tally(max_bad_share)

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
                captions = self._columns.captions(row)
                image = load_image(_image_bytes(stored, self._hub_id), repr(key))
            except DroppedConnectionError:
                raise
            except (ValueError, OSError) as error:
                skipped += 1
                self._tally.add(error=BadPairError(f"{key}: {error}"))
                continue
            self._tally.add()
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
    image_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = True,
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
    - An image folder with `metadata.jsonl` or `metadata.csv`, or such a file. Each line has one of `sources.IMAGE_COLUMNS`, a
      path relative to the file, and one of `sources.CAPTION_COLUMNS`.
    - A `.csv` or `.tsv` table with a header line and the same columns; `captions` is a JSON list. Values are literal, also "null".
      Commas, semicolons or tabs separate the fields of a .csv. In a .tsv, quotes have no special meaning.
    - A folder with a subfolder of images for each class. The caption of `dog/1.jpg` is "a photo of a dog".
    - A `.parquet` file, a folder of them, or a folder of `save_to_disk` of `datasets`, with images as bytes or paths.
    - The Hub id of a dataset ("org/name"), if there is no local folder "org".

    Args:
        split (`str`, defaults to `"train"`): split of a Hub dataset or of a saved one.
        image_column, caption_column (`str`, *optional*): names of columns that are not among the usual ones.
        streaming (`bool`, defaults to `True`): whether a Hub dataset is streamed instead of downloaded.
        seed (`int`, defaults to 0): seed of the drawn captions and of the order of a stream.
        max_bad_share (`float` in [0, 1], defaults to 0.05): largest allowed share of bad pairs (broken image, no caption).
        rank, world_size (`int`): index of this process and number of processes, for a stream. A [`PairDataset`] is split by its
            sampler.

    Returns:
        [`PairDataset`], or [`PairStream`] for a streamed Hub dataset.

    Raises:
        `FileNotFoundError`: a file, folder or Hub dataset does not exist. `ValueError`, `TypeError`: a source is not as described.
    """
    columns = Columns.named(image_column, caption_column)
    if isinstance(source, (str, os.PathLike)):
        if streaming and is_hub_id(os.fspath(source)):
            rows = open_hub_dataset(source, split, streaming=True)
            return PairStream(rows, seed, max_bad_share, rank, world_size, columns, hub_id=os.fspath(source))
        source = [source]
    if not isinstance(source, Sequence):
        raise TypeError(
            f"Expected a path, the id of a Hub dataset or a list of paths, got {source!r:.100}: name the data by one of these."
        )
    return PairDataset(open_sources(source, columns, split), seed, max_bad_share)


class _Tally:
    """
    Counts good and bad pairs of this process. Logs bad pairs, and raises `ValueError` if their share is too large. A pair of a data
    set counts once, in whatever number of epochs it is read; those of a stream have no index and count each time.
    """

    def __init__(self, max_bad_share: float, pairs: int | None = None):
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"Expected max_bad_share from 0 to 1, but got {max_bad_share}: set a share such as 0.05.")
        self._max_bad_share = max_bad_share
        self._counts_from = 100 if pairs is None else min(100, pairs)  # from so many on, the share is meaningful
        self._seen = bytearray(pairs or 0)
        self._read = self._bad = 0
        self._last_error: BadPairError | None = None

    def add(self, index: int | None = None, error: BadPairError | None = None) -> None:
        if index is not None:
            if self._seen[index]:
                return
            self._seen[index] = True
        self._read += 1
        if error is not None:
            self._bad += 1
            self._last_error = error
            if self._bad <= 10 or self._bad.bit_count() == 1:  # later only the 16th, 32nd, 64th, ...
                logger.warning("Bad pair, number %d among %d: %s", self._bad, self._read, error)
        if self._read >= self._counts_from and self._bad > self._max_bad_share * self._read:
            raise ValueError(
                f"Expected at most {self._max_bad_share:.2%} bad pairs, but {self._bad} of the {self._read} read so far "
                f"are; fix the data or raise max_bad_share. The last one: {self._last_error}"
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


def _load(pair: RawPair) -> Image.Image:
    try:
        return load_image(pair.image, pair.name)
    except (ValueError, FileNotFoundError) as error:
        raise BadPairError(str(error)) from error


def _draw(captions: list[str], seed: int, epoch: int, key: int | str) -> str:
    return random.Random(f"{seed}/{epoch}/{key!r}").choice(captions) if len(captions) > 1 else captions[0]


def _image_bytes(stored: Mapping, hub_id: str | None) -> bytes:
    """Returns the encoded image of a streamed row, which holds its bytes or names a file of its Hub dataset."""
    path = stored.get("path")
    if stored.get("bytes") or not path:
        return stored.get("bytes") or b""
    # Whoever wrote the rows could name any file of this machine and its network. A zip file may hold the images.
    *archives, file = path.split("::")
    own = file.startswith(f"hf://datasets/{hub_id}@") and all(archive.startswith("zip://") for archive in archives)
    if hub_id is None or not own or ".." in path.split("/"):
        raise ValueError(
            f"expected the image's bytes or a file of the data set itself, but got the path {path!r:.200}"
        )
    import fsspec

    with _connection_errors(), fsspec.open(path, "rb") as opened:
        content = opened.read(MAX_DOWNLOAD + 1)
    if len(content) > MAX_DOWNLOAD:  # a zip file of kilobytes may hold gigabytes
        raise ValueError(f"expected an image of at most {MAX_DOWNLOAD // 2**20} MiB, but got more in {path!r:.200}")
    return content
