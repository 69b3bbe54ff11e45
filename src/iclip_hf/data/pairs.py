"""
Image-text pairs for training. Local pairs have random access. Hub datasets can also be streamed.

Local images are neither unpacked nor read into memory. A pair is one row of its source, or all rows of one image. One
array holds the indices of all pairs, so any sampler can shuffle, split and resume exactly. Torch is not imported, so
that data can be checked before a run.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from tarfile import TarError
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from ..model.images import load_image
from ..utils.cache import LARGE, cache_folder, keep_in_cache
from ..utils.prefetch import ThreadPool, prefetch_map, spare_processors
from .columns import Columns, PairTexts, sample_caption
from .formats import is_hub_dataset, open_sources
from .formats.arrow import open_hub_dataset
from .formats.source import Source
from .items import BadPairError, BadPairTally, Epochs


if TYPE_CHECKING:
    from PIL import Image

    from .streams import PairStream


class RawPair(NamedTuple):
    """
    A pair as it is stored.

    Attributes:
        image: encoded image, or path of its file.
        name: name of the image in errors; None if `image` is a path.
        texts: captions and labels.
        key: name of the pair.
    """

    image: bytes | Path
    name: str | None
    texts: PairTexts
    key: str


class PairDataset(Epochs):
    """
    Local image-text pairs with random access, from [`load_pairs`].

    An item is a `dict` with

    - `image` (`PIL.Image.Image`): image of mode "RGB".
    - `captions` (`list[str]`): all captions of the pair.
    - `labels`, `complete`, `class_probabilities`: labels of the image, see [`~iclip_hf.data.columns.PairTexts`].
    - `caption` (`str`): one of the captions, sampled by seed, epoch and index.
    - `key` (`str`): name of the pair in its source.
    - `draw` (`tuple`): seed, epoch and index, on which random choices for the item depend.

    A bad pair is logged and replaced by a random good pair, so that batches have equal sizes on all processes. The
    choice of the good pair depends only on seed, epoch and index. `read` raises an error instead. The data set can be
    pickled.

    Args:
        sources: sources of the pairs, from [`~iclip_hf.data.formats.open_sources`]. A source may be repeated.
        seed (`int`, defaults to 0): seed of random choices.
        max_bad_share (`float` in [0, 1], defaults to 0.05): largest allowed share of bad pairs among the pairs that
            this process has read. Each loading process counts its own pairs.
    """

    def __init__(self, sources: Sequence[Source], seed: int = 0, max_bad_share: float = 0.05):
        self.seed, self.max_bad_share = seed, max_bad_share
        self.sources = [*dict.fromkeys(sources)]
        # A pair is an image. Images are numbered over all sources. For each source, `_ends` has the number after its
        # last image.
        self._ends = np.cumsum([source.num_images for source in self.sources], dtype=int)
        indices_by_source = {}
        for source, end in zip(self.sources, self._ends.tolist()):
            indices_by_source[source] = np.arange(end - source.num_images, end)
        self._image_indices = np.concatenate([np.empty(0, int), *map(indices_by_source.get, sources)])
        self._digests: np.ndarray | None = None
        if not len(self):
            raise ValueError(
                f"There are no pairs in {', '.join(str(source.path) for source in sources)}; name other data."
            )
        self.tally = BadPairTally(max_bad_share, len(self))

    def _select(self, indices: np.ndarray) -> PairDataset:
        """Returns a data set of the pairs with these indices, or of a boolean mask of all pairs."""
        part = copy(self)
        part._image_indices = self._image_indices[indices]
        part._digests = None if self._digests is None else self._digests[indices]
        part.tally, part._epoch = BadPairTally(self.max_bad_share, len(part)), 0
        return part

    def __len__(self) -> int:
        return len(self._image_indices)

    def __getitem__(self, index: int) -> dict:
        index, epoch = range(len(self))[index], self.epoch
        try:
            pair = self.read(index)
            self.tally.add(index)
        except BadPairError as error:
            self.tally.add(index, error)
            index, pair = self._replacement(random.Random(f"{self.seed}/{epoch}/{index}"))
        caption = sample_caption(pair["captions"], self.seed, epoch, index)
        return {**pair, "caption": caption, "draw": (self.seed, epoch, index)}

    def __repr__(self) -> str:
        return f"PairDataset(pairs={len(self)}, sources={len(self.sources)})"

    def read(self, index: int) -> dict:
        """
        Returns a pair: an item without `caption` and `draw`. Raises `BadPairError` if the pair is unusable, instead of
        replacing it.
        """
        pair = self.raw(index)
        return {"image": _load(pair), **pair.texts._asdict(), "key": pair.key}

    def image(self, index: int) -> Image.Image:
        """Returns the image of a pair. The pair needs no caption. Raises like `read`."""
        return _load(self.raw(index, need_captions=False))

    def captions(self, index: int) -> list[str]:
        """Returns all captions of a pair, at least one, without decoding its image. Raises like `read`."""
        return self.raw(index).texts.captions

    def raw(self, index: int, need_captions: bool = True) -> RawPair:
        """Returns a pair as it is stored, without decoding its image. Raises like `read`."""
        return self._raw(self._image_indices[index], need_captions)

    def _raw(self, image_index: int, need_captions: bool) -> RawPair:
        """Returns the pair of an image by its number over all sources, see `raw`."""
        source, row_indices = self._rows_of(image_index)
        first_index = row_indices[0]
        name, file = source.image_names[first_index], source.file(first_index)
        try:
            first, *more = map(source.rows.__getitem__, row_indices)
            texts = source.columns.texts(first)
            if more:
                texts = PairTexts.joined([texts, *map(source.columns.texts, more)])
            stored = first.get("image") or {}
            image = Path(file) if file else stored.get("bytes")
            if image is None:
                raise ValueError("no image")
            if file and "://" in name:
                raise ValueError(f"{name!r} is no image file; download images first (img2dataset)")
            if need_captions and not texts.captions:
                raise ValueError("no caption")
        except (ValueError, TarError) as error:
            raise BadPairError(f"{source.path}, row {first_index + 1}: {error}") from error
        key = first.get("__key__") or name or stored.get("path") or f"row {first_index + 1}"
        image_name = None if file else f"{source.path}: {stored.get('path') or key!r}"
        return RawPair(image, image_name, texts, key)

    def _rows_of(self, image_index: int) -> tuple[Source, list[int]]:
        source_index = np.searchsorted(self._ends, image_index, side="right")
        source = self.sources[source_index]
        first_image = self._ends[source_index] - source.num_images
        return source, source.row_indices_of_image(image_index - first_image)

    def some_texts(self) -> Iterator[PairTexts]:
        """Yields captions and labels of at most 4000 pairs, evenly spread over all, where they can be read."""
        for index in range(0, len(self), max(1, len(self) // 2000)):
            try:
                yield self.raw(index).texts
            except BadPairError:  # counted when the pair is read for training
                continue

    def _replacement(self, rng: random.Random) -> tuple[int, dict]:
        """Samples a good pair. Taking the next good pair would repeat it for each pair of a damaged shard."""
        for _ in range(1000):
            index = rng.randrange(len(self))
            try:
                return index, self.read(index)
            except BadPairError:
                continue
        raise ValueError("All of 1000 sampled pairs are bad; correct the pairs that the log names.")

    def split(self, share: float) -> tuple[PairDataset, PairDataset]:
        """
        Divides the pairs into two parts, always in the same way. Pairs whose images have equal `image_digests` stay
        in one part.

        Args:
            share (`float` in (0, 1)): share of the images in the second part, rounded up.

        Returns:
            `tuple`: both parts. The second part has the pairs of a repeated source only once.
        """
        digests = self.image_digests()
        # In the order of the pairs, so that the split does not depend on the paths of the files.
        distinct = list(dict.fromkeys(digests))
        num_held_out = math.ceil(share * len(distinct))
        if not 0 < num_held_out < len(distinct):
            raise ValueError(
                f"A share of {share} does not split {len(distinct)} images in two; change it, or add pairs."
            )
        order = np.random.default_rng(0).permutation(len(distinct))
        held_out = {distinct[index] for index in order[:num_held_out]}
        is_held_out = np.array([digest in held_out for digest in digests])
        return self._select(~is_held_out), self._select(is_held_out).distinct()[0]

    def readable(self) -> PairDataset:
        """
        Reads all pairs, and returns the pairs that can be read. Use this for measurements, where no pair may replace
        another. Logs the bad pairs. Raises `ValueError` if they are too many.
        """

        def error_of(index: int) -> BadPairError | None:
            try:
                self.read(index)
            except BadPairError as error:
                return error

        tally, is_good = BadPairTally(self.max_bad_share, len(self)), []
        with ThreadPool(spare_processors()) as pool:
            for index, error in enumerate(prefetch_map(pool, error_of, range(len(self)), 64)):
                tally.add(index, error)
                is_good.append(error is None)
        return self._select(np.array(is_good))

    def distinct(self) -> tuple[PairDataset, np.ndarray]:
        """
        Returns a data set with the pairs of a repeated source only once, in order, and for each pair of this data
        set its index there, `(num_pairs,)`.
        """
        _, first_indices, distinct_indices = np.unique(self._image_indices, return_index=True, return_inverse=True)
        return self._select(first_indices), distinct_indices.reshape(-1)

    def image_digests(self) -> list[bytes]:
        """
        Returns a digest of the encoded image of each pair, 32 bytes. The digests are computed once, also for the parts
        of a split. The cache folder keeps the digests of more than a gigabyte of data until a path, a size or a
        modification time changes.
        """
        if self._digests is None:
            large = sum(source.size for source in self.sources) > LARGE
            digests = [self._source_digests(index, large) for index in range(len(self.sources))]
            self._digests = np.concatenate(digests)[self._image_indices]
        return self._digests.tolist()

    def _source_digests(self, index: int, large: bool) -> np.ndarray:
        """Returns the digests of the images of a source, see `image_digests`."""
        source = self.sources[index]
        cached = cache_folder() / "digests" / f"{source.state}.bin" if large else None
        if large and cached.is_file():
            return np.fromfile(cached, "V32")
        image_indices = range(self._ends[index] - source.num_images, self._ends[index])
        with ThreadPool(min(8, os.cpu_count() or 1)) as pool:  # reading and hashing release the GIL
            computed = prefetch_map(pool, self._image_digest, image_indices, 64)
            bar = tqdm(computed, "Comparing images", len(image_indices), unit="pair", delay=2, leave=False)
            digests = np.array([*bar], "V32")
        if large:
            # `tofile` raises no error if the disk is full at the end of the array.
            keep_in_cache(cached, lambda temporary: temporary.write_bytes(digests))
        return digests

    def _image_digest(self, image_index: int) -> bytes:
        """Returns a digest of an encoded image. The digest of a bad image is that of its location."""
        try:
            image = self._raw(image_index, need_captions=False).image
            return hashlib.sha256(image if isinstance(image, bytes) else image.read_bytes()).digest()
        except (OSError, ValueError):  # counted when the pair is read for training
            source, (first_index, *_) = self._rows_of(image_index)
            location = os.path.abspath(source.file(first_index) or f"{source.path}, row {first_index + 1}")
            return hashlib.sha256(location.encode(errors="surrogatepass")).digest()

    def files(self) -> set[str]:
        """Returns the absolute paths of the sources and of the images that they name."""
        return {os.path.abspath(file) for source in self.sources for file in source.all_files()}


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
    Opens image-text pairs for training. The guide (`docs/guide/train.md`) describes sources and columns of labels. A
    source is one of:

    - Tar shards of webdataset or img2dataset: a file, a folder, or a pattern such as "cc3m/{00000..00331}.tar" or
      "cc3m/*.tar". The captions are the list `captions` in the JSON, else the text, else `caption` in the JSON.
    - A `.csv`, `.tsv` or `.jsonl` table, or a folder with `metadata.jsonl` or `metadata.csv`. Values are literal, also
      "null". In a .tsv, quotes have no special meaning. Paths are relative to the table.
    - A folder with a subfolder of images for each class.
    - A `.parquet` file, a folder of them, or a folder of `save_to_disk` of `datasets`, with images as bytes or paths.
    - The Hub id of a dataset ("org/name"), if there is no local file or folder of this name.

    Args:
        source (`str`, `os.PathLike` or a list of these): one source, or several local sources.
        split (`str`, defaults to `"train"`): split of a Hub dataset or of a saved one.
        image_column, caption_column (`str`, *optional*): names of columns that are not among the usual ones.
        streaming (`bool`, defaults to `True`): whether a Hub dataset is streamed instead of downloaded.
        seed (`int`, defaults to 0): seed of the sampled captions, of augmentations and of the order of a stream.
        max_bad_share (`float` in [0, 1], defaults to 0.05): largest allowed share of bad pairs (broken image, no
            caption).
        rank, world_size (`int`): index of this process and number of processes, for a stream. A [`PairDataset`] is
            split by its sampler.

    Returns:
        [`PairDataset`], or [`PairStream`] for a streamed Hub dataset.

    Raises:
        `FileNotFoundError`: a file or folder does not exist. `OSError`: a Hub dataset does not exist or cannot be
        reached. `ValueError`: a source is not as described.
    """
    columns = Columns.named(image_column, caption_column)
    if isinstance(source, (str, os.PathLike)):
        if streaming and is_hub_dataset(os.fspath(source)):
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
