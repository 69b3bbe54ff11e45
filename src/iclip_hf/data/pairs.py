"""
Image-text pairs for training: local ones by random access, Hub datasets also as a stream.

Local images are neither unpacked nor read into memory. A pair is a range of its source, such as bytes of a shard. One
pass finds the ranges, and one array holds them, so any sampler can shuffle, split and resume exactly. Neither this
module nor `sources` imports torch, so that data can be checked before a run.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ..model.images import load_image
from ..utils.digests import LARGE, content_digest, file_digest, file_state, total_size
from ..utils.files import cache_folder, keep_in_cache
from ..utils.hub_ids import is_hub_id
from ..utils.prefetch import ThreadPool, prefetch_map, spare_processors
from .sources import (
    BAD_PAIR,
    BadPairError,
    BadPairTally,
    Columns,
    PairTexts,
    RawPair,
    Source,
    open_hub_dataset,
    open_sources,
    sample_caption,
)


if TYPE_CHECKING:
    from PIL import Image

    from .streams import PairStream


class PairDataset:
    """
    Local image-text pairs with random access, from [`load_pairs`].

    An item is a `dict` with

    - `image` (`PIL.Image.Image`): image of mode "RGB".
    - `captions` (`list[str]`): all captions of the pair.
    - `labels`, `complete` (`list[str]`): names of what the image shows, and names that these labels are complete for.
    - `caption` (`str`): one of the captions, sampled by seed, epoch and index.
    - `key` (`str`): name of the pair in its source.
    - `skipped` (`int`): number of bad pairs that the item replaces, 0 or 1.

    A bad pair is logged and replaced by a random good pair, so that batches have equal sizes on all processes. The
    choice depends only on seed, epoch and index. `read` returns pairs without replacement. The data set can be
    pickled.

    Args:
        sources: of the pairs, see [`~iclip_hf.data.sources.open_sources`]. A source may be repeated.
        seed (`int`, defaults to 0): seed of random choices.
        max_bad_share (`float` in [0, 1], defaults to 0.05): largest allowed share of bad pairs among those that this
            process read. Loading processes count for themselves; `tally` of a data set can count what they read.

    Raises:
        `ValueError`: there are no pairs. During access, too many pairs are bad.
    """

    def __init__(self, sources: Sequence[Source], seed: int = 0, max_bad_share: float = 0.05):
        self.seed, self.max_bad_share = seed, max_bad_share
        ranges = {}
        for source in tqdm(sources, desc="Indexing", unit="file", delay=2, leave=False):
            if source not in ranges:
                ranges[source] = np.insert(source.ranges(), 0, len(ranges), axis=1)
        self.sources = [*ranges]
        self._opened = np.concatenate([np.empty((0, 3), np.int64), *(ranges[source] for source in sources)])
        self._digests: list[bytes] = []  # of the images of all opened pairs, once known; parts share it
        self._select(self._opened)
        if not len(self):
            raise ValueError(
                f"There are no pairs in {', '.join(str(source.path) for source in sources)}; name others."
            )

    def _select(self, ranges: np.ndarray) -> PairDataset:
        self._ranges = ranges  # (N, 3): number of the source, start and end of each pair
        self.tally, self._epoch = BadPairTally(self.max_bad_share, len(ranges)), 0
        return self

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, index: int) -> dict:
        index, epoch, skipped = range(len(self))[index], self._epoch, 0
        try:
            pair = self.read(index)
            self.tally.add(index)
        except BadPairError as error:
            self.tally.add(index, error)
            index, pair = self._replacement(random.Random(f"{self.seed}/{epoch}/{index}"))
            skipped = 1
        return {**pair, "caption": sample_caption(pair["captions"], self.seed, epoch, index), "skipped": skipped}

    def __repr__(self) -> str:
        return f"PairDataset(pairs={len(self)}, sources={len(self.sources)})"

    def read(self, index: int) -> dict:
        """
        Returns a pair without replacement.

        Returns:
            `dict` with `image`, `captions`, `labels`, `complete` and `key`, see [`PairDataset`].

        Raises:
            `BadPairError`: the pair is unusable. `OSError`: its shard or table no longer exists.
        """
        pair = self.raw(index)
        return {"image": _load(pair), **pair.texts._asdict(), "key": pair.key}

    def image(self, index: int) -> Image.Image:
        """Returns the image of a pair, which needs no caption. Raises like `read`."""
        return _load(self.raw(index, need_captions=False))

    def captions(self, index: int) -> list[str]:
        """Returns all captions of a pair, at least one, without decoding its image. Raises like `read`."""
        return self.raw(index).texts.captions

    def raw(self, index: int, need_captions: bool = True) -> RawPair:
        """Returns a pair as it is stored, with its image not decoded. Raises like `read`."""
        number, start, end = self._ranges[index].tolist()
        source = self.sources[number]
        try:
            pair = source.read(start, end)
            if need_captions and not pair.texts.captions:
                raise ValueError("no caption")
            return pair
        except BAD_PAIR as error:
            raise BadPairError(f"{source.place(start)}: {error}") from error

    def some_texts(self) -> Iterator[PairTexts]:
        """Yields captions and labels of 2000 to 4000 pairs evenly spread over all, or of fewer, without bad ones."""
        for index in range(0, len(self), max(1, len(self) // 2000)):
            try:
                yield self.raw(index).texts
            except BadPairError:  # is counted when it is read for training
                continue

    def _replacement(self, rng: random.Random) -> tuple[int, dict]:
        """Samples a good pair from all pairs. Taking the next good pair would repeat the one after a damaged shard."""
        for _ in range(1000):
            index = rng.randrange(len(self))
            try:
                return index, self.read(index)
            except BadPairError:
                continue
        raise ValueError("1000 sampled pairs are all bad; correct the data, as the log says.")

    def split(self, share: float) -> tuple[PairDataset, PairDataset]:
        """
        Splits off a part of the pairs, which is always the same. Pairs of one image stay together, also those of
        copies of its file or of its bytes in a shard or table, which are read. `share`, in (0, 1), is that of the
        images, rounded up.

        Returns:
            `tuple`: the other pairs, and the part, in which a pair of a repeated source is contained once.

        Raises:
            `ValueError`: one of them would be empty.
        """
        groups = self.image_digests()
        # In the order of the pairs, so that the place of the files does not count.
        distinct = list(dict.fromkeys(groups))
        count = math.ceil(share * len(distinct))
        if not 0 < count < len(distinct):
            raise ValueError(
                f"A share of {share} does not split {len(distinct)} images in two; change it, or add pairs."
            )
        order = np.random.default_rng(0).permutation(len(distinct))
        held_out = {distinct[place] for place in order[:count]}
        inside = np.array([group in held_out for group in groups])
        return copy(self)._select(self._ranges[~inside]), copy(self)._select(np.unique(self._ranges[inside], axis=0))

    def readable(self) -> PairDataset:
        """
        Returns the pairs that can be read, for measurements, in which a pair must not be replaced by another. Reads
        all pairs, and logs the others.

        Raises:
            `ValueError`: none can be read, or too many cannot.
        """

        def error_of(index: int) -> BadPairError | None:
            try:
                self.read(index)
            except BadPairError as error:
                return error

        tally, good = BadPairTally(self.max_bad_share, len(self)), []
        with ThreadPool(spare_processors()) as pool:
            for index, error in enumerate(prefetch_map(pool, error_of, range(len(self)), 64)):
                tally.add(index, error)
                good.append(error is None)
        if not any(good):
            raise ValueError(f"{self.sources[0].path}: none of its {len(self)} pairs can be read.")
        return copy(self)._select(self._ranges[good])

    def distinct(self) -> tuple[PairDataset, np.ndarray]:
        """
        Returns the pairs without the repetitions of sources that are named several times, in order, and for each pair
        its row among them, `(N,)`.
        """
        ranges, rows = np.unique(self._ranges, axis=0, return_inverse=True)
        return copy(self)._select(ranges), rows.reshape(-1)

    def image_digests(self) -> list[bytes]:
        """
        Returns a digest of the encoded image of each pair, which pairs of one image share. Reads all images that were
        opened, for all parts once, and in other processes only after a change of a file.
        """
        # A part has the rows of the opened pairs.
        ranges, rows = np.unique(np.concatenate([self._opened, self._ranges]), axis=0, return_inverse=True)
        if not self._digests:
            self._digests.append(copy(self)._select(ranges)._all_image_digests())
        (digests,) = self._digests
        return [digests[32 * row : 32 * row + 32] for row in rows.reshape(-1)[len(self._opened) :].tolist()]

    def _all_image_digests(self) -> bytes:
        sources, state = self._by_source(), hashlib.sha256(self._ranges.tobytes())
        for source, _, files in sources:
            state.update(repr(source.columns.image).encode())  # rows may hold several images
            for file in dict.fromkeys([*source.files(), *filter(None, files)]):
                state.update(file_state(file))
        cached = cache_folder() / "images" / f"{state.hexdigest()[:32]}.bin"
        digests = cached.read_bytes() if cached.is_file() else b""
        if len(digests) != 32 * len(self):
            digests = b"".join(self._compute_image_digests(sources))
            keep_in_cache(cached, lambda temporary: temporary.write_bytes(digests))
        return digests

    def _compute_image_digests(
        self, sources: Sequence[tuple[Source, np.ndarray, list[Path | None]]]
    ) -> Iterator[bytes]:
        with tqdm(total=len(self), desc="Comparing images", unit="pair", delay=2, leave=False) as bar:
            for number, (source, ranges, files) in enumerate(sources):
                for (start, end), file in zip(ranges.tolist(), files):
                    try:
                        digest = file_digest(file) if file else hashlib.sha256(source.read(start, end).image).digest()
                    except BAD_PAIR:
                        digest = None
                    yield digest or hashlib.sha256(f"{number}/{file or start}".encode(errors="replace")).digest()
                    bar.update()

    def files(self) -> set[str]:
        """Returns the absolute paths of the sources and of the images that they name."""
        return {
            os.path.abspath(file)
            for source, _, images in self._by_source()
            for file in (*source.files(), *filter(None, images))
        }

    def _by_source(self) -> list[tuple[Source, np.ndarray, list[Path | None]]]:
        """Returns the sources with the ranges (start, end) of their pairs, and the image files of these."""
        ranges = (self._ranges[self._ranges[:, 0] == number, 1:] for number in range(len(self.sources)))
        return [(source, of_source, source.image_files(of_source)) for source, of_source in zip(self.sources, ranges)]

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which random choices depend."""
        self._epoch = epoch

    def fingerprint(self) -> str:
        """
        Computes a digest, 16 hex digits, over the positions of the pairs, the content of shards, tables and the images
        that tables name, and the names of the columns. Of more than a gigabyte, names, sizes and modification times of
        the files stand for the content.
        """
        digest, read = hashlib.sha256(self._ranges[:, 1:].tobytes()), total_size(self.files()) <= LARGE
        for source, _, images in self._by_source():
            content = content_digest([*source.files(), *filter(None, images)], source.root, read)
            digest.update(f"{content}{[*source.columns]}".encode())
        return digest.hexdigest()[:16]


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

    - Tar shards of webdataset or img2dataset (`key.jpg` with `key.txt`, `key.json` or both): a file, a folder of
      shards, or a pattern such as "cc3m/{00000..00331}.tar" or "cc3m/*.tar". The captions are the list `captions` in
      the JSON, else the text, else `caption` in the JSON.
    - An image folder with `metadata.jsonl` or `metadata.csv`, or such a file. Each line has one of
      `sources.IMAGE_COLUMNS`, a path relative to the file, and one of `sources.CAPTION_COLUMNS`.
    - A `.csv` or `.tsv` table with a header line and the same columns; `captions` is a JSON list. Values are literal,
      also "null". Commas, semicolons or tabs separate the fields of a .csv. In a .tsv, quotes have no special meaning.
      Rows of one image file, here, in an image folder and in Parquet with paths, are one pair with all their captions.
    - A folder with a subfolder of images for each class. The caption of `dog/1.jpg` is "a photo of a dog".
    - A `.parquet` file, a folder of them, or a folder of `save_to_disk` of `datasets`, with images as bytes or paths.
    - The Hub id of a dataset ("org/name"), if there is no local folder "org".

    A row or JSON may also have `labels`, a list of names of what the image shows, and `complete`, names that these
    labels are complete for: a list, or one of [`~iclip_hf.data.class_names.CLASS_NAMES`], which a list may name too,
    in upper or lower case. With `complete`, `labels` is a list, which may be empty.

    Args:
        split (`str`, defaults to `"train"`): split of a Hub dataset or of a saved one.
        image_column, caption_column (`str`, *optional*): names of columns that are not among the usual ones.
        streaming (`bool`, defaults to `True`): whether a Hub dataset is streamed instead of downloaded.
        seed (`int`, defaults to 0): seed of the sampled captions and of the order of a stream.
        max_bad_share (`float` in [0, 1], defaults to 0.05): largest allowed share of bad pairs (broken image, no
            caption).
        rank, world_size (`int`): index of this process and number of processes, for a stream. A [`PairDataset`] is
            split by its sampler.

    Returns:
        [`PairDataset`], or [`PairStream`] for a streamed Hub dataset.

    Raises:
        `FileNotFoundError`: a file, folder or Hub dataset does not exist. `ValueError`: a source is not as described.
    """
    columns = Columns.named(image_column, caption_column)
    if isinstance(source, (str, os.PathLike)):
        if streaming and is_hub_id(os.fspath(source)):
            from .streams import PairStream  # imports torch

            rows = open_hub_dataset(source, split, streaming=True)
            return PairStream(rows, seed, max_bad_share, rank, world_size, columns, hub_id=os.fspath(source))
        source = [source]
    return PairDataset(open_sources(source, columns, split), seed, max_bad_share)


def _load(pair: RawPair) -> Image.Image:
    try:
        return load_image(pair.image, pair.name)
    except (ValueError, FileNotFoundError) as error:
        raise BadPairError(str(error)) from error
