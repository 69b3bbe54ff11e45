"""Image-text pairs of a Hub dataset as a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch.utils.data import IterableDataset

from ..model.images import load_image
from .columns import LABEL_COLUMNS, USUAL_COLUMNS, Columns, PairTexts, sample_caption
from .formats.arrow import text_columns
from .items import BadPairError, BadPairTally, Epochs


if TYPE_CHECKING:
    import datasets

_SHUFFLE_BUFFER = 2000  # pairs of a stream, not decoded yet
_FIRST_PAIRS = 256  # pairs whose labels are checked before a training


class PairStream(Epochs, IterableDataset):
    """
    Image-text pairs of a Hub dataset as a stream, from [`~iclip_hf.data.pairs.load_pairs`]. Its items are like those
    of [`~iclip_hf.data.pairs.PairDataset`].

    An iteration is one pass over this process's part of the pairs, shuffled through a buffer by seed and epoch. Bad
    pairs are left out. The stream splits itself over processes and DataLoader workers, so it must not be passed to
    `Accelerator.prepare`, which would split it again. The parts differ in length, so training counts steps instead of
    passes.

    Args:
        dataset (`datasets.IterableDataset`): rows with an image column and a caption column.
        seed, max_bad_share, rank, world_size: see [`~iclip_hf.data.pairs.load_pairs`].
        columns ([`~iclip_hf.data.columns.Columns`]): names of the columns; the usual ones by default.
        hub_id (`str`, *optional*): id of the Hub dataset. Its rows may name image files of this dataset. Without an
            id, each row must hold the bytes of its image.
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
        image_columns = [name for name, feature in features.items() if isinstance(feature, Image)]
        if columns.image != USUAL_COLUMNS.image:
            image_columns = [name for name in columns.image if name in image_columns]
        if not image_columns:
            raise ValueError(
                f"None of the columns {', '.join(features)} has images; name another dataset or image_column."
            )
        self._image_column, self._columns, self._hub_id = image_columns[0], columns, hub_id
        # Only these columns are kept: datasets infers types from the first rows, and a later row of another type would
        # end the stream.
        kept = ("__key__", *columns.caption, *LABEL_COLUMNS)
        names = [self._image_column, *text_columns(features, kept)]
        json_features = features.get("json")
        json_names = text_columns(json_features, kept) if isinstance(json_features, Mapping) else []
        if json_names:
            dataset = dataset.cast_column("json", {name: json_features[name] for name in json_names})
            names.append("json")
        dataset = dataset.select_columns(names)
        # Without decoding, because one bad image would end the stream.
        dataset = dataset.cast_column(self._image_column, Image(decode=False))
        self._first_rows = dataset.take(_FIRST_PAIRS)
        self._rows = split_dataset_by_node(dataset, rank=rank, world_size=world_size)
        self.seed = seed
        self.tally = BadPairTally(max_bad_share)

    def __iter__(self) -> Iterator[dict]:
        return self.one_pass(self.epoch)

    def one_pass(self, epoch: int) -> Iterator[dict]:
        """Yields the pairs in the order and with the captions of an epoch."""
        # Another data set for each pass, because loading processes share the epoch of a data set, but may be in
        # different passes.
        rows = self._rows.shuffle(seed=self.seed, buffer_size=_SHUFFLE_BUFFER)
        rows.set_epoch(epoch)
        for row in rows:
            stored = row[self._image_column] or {}
            name = row.get("__key__") or stored.get("path")
            key = name or "a pair without a name"
            try:
                texts = self._columns.texts(row)
                if not texts.captions:
                    raise ValueError("it has no caption")
                image = load_image(_image_bytes(stored, self._hub_id), repr(key))
            except ConnectionError:
                raise
            except (ValueError, OSError) as error:
                self.tally.add(error=BadPairError(f"{key}: {error}"))
                continue
            self.tally.add()
            # Without a name, the content stands for it: otherwise, all images would be augmented alike.
            draw = (self.seed, epoch, name or hashlib.sha256(stored["bytes"]).hexdigest())
            caption = sample_caption(texts.captions, *draw)
            yield {"image": image, **texts._asdict(), "key": key, "caption": caption, "draw": draw}

    def some_texts(self) -> Iterator[PairTexts]:
        """Yields captions and labels of the first 256 pairs of the data set, where they can be read."""
        for row in self._first_rows:
            try:
                yield self._columns.texts(row)
            except ValueError:  # counted when the pair is read for training
                continue


def _image_bytes(stored: Mapping, hub_id: str | None) -> bytes:
    """Returns the encoded image of a streamed row. The row holds the bytes, or names a file of its Hub dataset."""
    path = stored.get("path")
    if stored.get("bytes") or not path:
        return stored.get("bytes") or b""
    # Whoever wrote the rows could name any file of this machine and its network. A zip file may hold the images.
    *archives, file = path.split("::")
    is_own = file.startswith(f"hf://datasets/{hub_id}@") and all(archive.startswith("zip://") for archive in archives)
    if hub_id is None or not is_own or ".." in path.split("/"):
        raise ValueError(f"the row holds no image and names no file of the data set itself, but {path!r:.200}")
    import fsspec

    with fsspec.open(path, "rb") as opened:
        return opened.read()
