"""
Features of images and texts, which the projections learn from: of a batch, and in a cache for towers that are locked.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..backends.identity import digest, software
from ..data.pairs import BadPairError, PairDataset
from ..model.configuration_iclip import ICLIPConfig
from ..model.modeling_iclip import ICLIPModel, ImageInputs, ImageTokens
from ..model.pooling import EVEN_PATCHES, POOLINGS, normalize_attention, pool
from ..model.processing_iclip import ICLIPProcessor
from ..utils.distributed import broadcast_from_main, shared_folder_lock
from ..utils.files import atomic_write
from ..utils.interrupts import ignore_signals


if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------------- of images


def pack_inputs(model: ICLIPModel, image: ImageTokens) -> torch.Tensor:
    """
    Converts images to a tensor to keep, from which [`unpack_inputs`] makes what the projections read: all `POOLINGS`
    (B, 5, D), which are the same for all models with this tower; with `max_over="similarity"` the first two of them
    and the patches that the loss reads, (B, 2 + K, D + 1), with their attention as the last column; with
    `known_competition` the evenly spread patches behind them, (B, 2 + K + 64, D + 1). Before all of these are the
    averages of earlier layers with `average_layers`.
    """
    config = model.config

    def pooled(mode: str) -> torch.Tensor:
        mode, _, norm = mode.partition("/")
        attention = normalize_attention(image.attention, norm or "minmax", config.attention_quantile)
        return pool(image.patch_tokens, image.class_token, attention, mode)

    earlier = [] if image.earlier_averages is None else [image.earlier_averages]
    if config.max_over == "channels":
        return torch.cat([*earlier, torch.stack([pooled(mode) for mode in POOLINGS], 1)], 1)
    inputs = model.image_inputs(image)
    vectors = torch.cat([*earlier, torch.stack([pooled(mode) for mode in POOLINGS[:2]], 1)], 1)
    attention = F.pad(inputs.attention, (vectors.shape[1], 0)).unsqueeze(-1)
    features = torch.cat([torch.cat([vectors, inputs.patches], 1), attention], -1)
    if inputs.even_patches is not None:
        features = torch.cat([features, F.pad(inputs.even_patches, (0, 1))], 1)
    return features


def unpack_inputs(features: torch.Tensor, config: ICLIPConfig) -> ImageInputs:
    """Returns what the projections of a model read of images, from the result of [`pack_inputs`]."""

    def pooled(mode: str) -> torch.Tensor:
        return vectors[:, POOLINGS.index(f"masked_max/{config.attention_norm}" if mode == "masked_max" else mode)]

    recognised, of_map = config.poolings
    vectors, patches, attention, even, earlier = features, None, None, None, config.average_layers - 1
    if config.max_over == "similarity":
        if config.known_competition:
            features, even = features[:, :-EVEN_PATCHES], features[:, -EVEN_PATCHES:, :-1]
        vectors, patches = features[:, : earlier + 2, :-1], features[:, earlier + 2 :, :-1]
        attention = features[:, earlier + 2 :, -1]
    averages, vectors = vectors[:, :earlier].flatten(1), vectors[:, earlier:]
    recognition = torch.cat([averages, *map(pooled, recognised)], -1)
    return ImageInputs(recognition, of_map and pooled(of_map), patches, attention, even)


@torch.no_grad()
def set_token_mean(model: ICLIPModel, images: Iterable[torch.Tensor]) -> None:
    """
    Sets `token_mean` of a model with `center_tokens`. Keeps the mean of an earlier training, which its branches
    learned with.

    Args:
        model: model on its device.
        images (iterable of `torch.Tensor` of shape `(3, H, W)`): a few hundred images.
    """
    if model.config.center_tokens and not model.token_mean.any():
        images, means = iter(images), []
        while batch := list(itertools.islice(images, 32)):
            means.append(model.encode_image(torch.stack(batch).to(model.device)).patch_tokens.float().mean(1))
        model.token_mean.copy_(torch.cat(means).mean(0))


# ---------------------------------------------------------------------------------------------------------- on disk


# Raise it with a change of the code between releases that gives other features, such as of `representative_patches`.
_VERSION = 2


class FeatureShards:
    """
    Rows of features in a folder, memory-mapped. Shards are written atomically, so that an interrupted run can continue
    and several processes can share the folder, whose name stands for all that the features depend on.
    """

    def __init__(self, folder: Path, rows: int):
        self.folder, self.rows = folder, rows
        self.shard_rows = max(256, math.ceil(rows / 256))
        self.num_shards = math.ceil(rows / self.shard_rows)
        self._arrays: list[np.ndarray] = []

    def missing(self) -> list[int]:
        """Returns the indices of shards that do not exist yet."""
        return [shard for shard in range(self.num_shards) if not self._file(shard).exists()]

    def rows_of(self, shard: int) -> range:
        """Returns the rows of a shard."""
        return range(self.rows)[shard * self.shard_rows : (shard + 1) * self.shard_rows]

    def write(self, shard: int, features: np.ndarray, usable: list[bool] | None = None) -> None:
        """Writes a shard, and which of its rows can be used: those of an image that was read."""
        if usable is not None:
            with atomic_write(self._file(shard, ".json")) as partial:
                partial.write_text(json.dumps(usable))
        # An open file, because `np.save` would add a suffix to a file name.
        with atomic_write(self._file(shard)) as partial, open(partial, "wb") as opened:
            np.save(opened, features)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Returns the features of these rows, (len(rows), ...), float16."""
        if not self._arrays:
            self._arrays = self._read(".npy", partial(np.load, mmap_mode="r"))
        features = np.empty((len(rows), *self._arrays[0].shape[1:]), self._arrays[0].dtype)
        shards = rows // self.shard_rows
        for shard in np.unique(shards):
            here = shards == shard
            features[here] = self._arrays[shard][rows[here] - shard * self.shard_rows]
        return features

    def usable(self) -> list[bool]:
        """Returns for each row whether it can be used."""
        parts = self._read(".json", lambda file: json.loads(file.read_text()))
        return [bool(entry) for part in parts for entry in part]

    def _read(self, suffix: str, read: Callable[[Path], Sequence]) -> list[Sequence]:
        """Reads a file of each shard. Raises `ValueError` if one is damaged."""
        parts = []
        for shard in range(self.num_shards):
            file = self._file(shard, suffix)
            try:
                parts.append(read(file))
                whole = len(parts[-1]) == len(self.rows_of(shard))
            except (EOFError, ValueError, TypeError):
                whole = False
            if not whole:
                raise ValueError(
                    f"{file}: this file of the feature cache is damaged; delete {self.folder}, and run again."
                )
        return parts

    def _file(self, shard: int, suffix: str = ".npy") -> Path:
        return self.folder / f"{shard:05d}{suffix}"


class CachedTexts:
    """Features (D,) of texts, by text."""

    def __init__(self, texts: Sequence[str], shards: FeatureShards):
        self._rows, self._shards = {text: row for row, text in enumerate(texts)}, shards

    def __getitem__(self, texts: Sequence[str]) -> torch.Tensor:
        """Returns the features of texts, (len(texts), D), float32."""
        return torch.from_numpy(self._shards[np.array([self._rows[text] for text in texts])]).float()


class _PairReader(Dataset):
    """Images as tensors, and whether they could be read. A broken one is black."""

    def __init__(self, pairs: PairDataset, processor: ICLIPProcessor):
        self.pairs, self.processor = pairs, processor

    def __getitem__(self, index: int) -> tuple[torch.Tensor, bool]:
        try:
            image, usable = self.pairs.image(index), True
        except BadPairError as error:
            logger.warning("Left out: %s", error)
            image, usable = Image.new("RGB", (64, 64)), False
        return self.processor(images=image)["pixel_values"][0], usable


@dataclass(eq=False, repr=False)
class FeatureCache:
    """
    The features of locked towers in a folder, computed unless they are there already. Parts of it belong to other
    models or data.
    """

    folder: Path
    model: ICLIPModel
    processor: ICLIPProcessor
    accelerator: Accelerator

    def images(
        self,
        pairs: PairDataset,
        *,
        earlier_mean: list[float] | None = None,
        num_workers: int = 0,
    ) -> FeatureShards:
        """
        Computes [`pack_inputs`] of the image of each pair. The captions do not count. `earlier_mean` is the model's
        `token_mean` if it is not that of these pairs. `num_workers` is for each process.

        Raises:
            `OSError`: the folder cannot be written, or another run fills it.
        """
        content = hashlib.sha256(b"".join(pairs.image_digests())).hexdigest()
        shards = self._shards(
            "images",
            len(pairs),
            tower=[self.model.vision_model.config, self.model.vision_model.state_dict()],
            options=self.model.config.feature_options,
            token_mean=earlier_mean,
            images=content,
            image_processor=json.loads(self.processor.image_processor.to_json_string()),
        )

        def encode(items: list[tuple[torch.Tensor, bool]]) -> tuple[torch.Tensor, Sequence[bool]]:
            images, usable = zip(*items)
            image = self.model.encode_image(torch.stack(images).to(self.accelerator.device))
            return pack_inputs(self.model, image), usable

        self._fill(shards, _PairReader(pairs, self.processor), encode, 64, num_workers)
        return shards

    def texts(self, texts: Iterable[str], name: str = "texts") -> CachedTexts:
        """Computes the text tower's feature of each distinct text, in the folder `name` of the cache."""
        texts = sorted(set(texts), key=lambda text: (len(text), text))  # batches of similar length need little padding
        # The probe shows what the processor adds: length and padding.
        probe = self.processor(text=["A photo of Two Dogs, naïve.", "long " * 1000])["input_ids"].tolist()
        shards = self._shards(
            name,
            len(texts),
            tower=[self.model.text_model.config, self.model.text_model.state_dict()],
            text_pooling=self.model.config.text_pooling,
            tokenizer=[self.processor.tokenizer, probe],
            texts=texts,
        )

        def encode(batch: list[str]) -> tuple[torch.Tensor, None]:
            return self.model.encode_text(**self.processor(text=batch).to(self.accelerator.device))[0], None

        self._fill(shards, texts, encode, 256)
        return CachedTexts(texts, shards)

    def _shards(self, name: str, rows: int, **depends_on) -> FeatureShards:
        """Returns the shards of a kind of features, in a folder that is named by all that they depend on."""
        depends_on |= {
            "mixed_precision": self.accelerator.mixed_precision,
            "software": software(),
            "version": _VERSION,
        }
        return FeatureShards(self.folder / name / digest(depends_on), rows)

    def _fill(
        self,
        shards: FeatureShards,
        dataset: Dataset | Sequence,
        encode: Callable,
        batch_size: int,
        num_workers: int = 0,
    ) -> None:
        """
        Encodes the rows of missing shards, shared by the processes. A complete cache is not locked: several runs can
        read it.
        """
        accelerator = self.accelerator
        if not broadcast_from_main(shards.missing()):
            return
        with shared_folder_lock(shards.folder, accelerator):
            missing = shards.missing()
            accelerator.wait_for_everyone()  # before any process writes a shard
            todo = missing[accelerator.process_index :: accelerator.num_processes]
            batches = [
                list(rows[start : start + batch_size])
                for rows in map(shards.rows_of, todo)
                for start in range(0, len(rows), batch_size)
            ]
            options = {"num_workers": num_workers, "collate_fn": list, "worker_init_fn": ignore_signals}
            loader = DataLoader(dataset, batch_sampler=batches, **options)
            features, usable = [], []
            title = f"Features of {self.folder.name} {shards.folder.parent.name}"
            rows = sum(map(len, batches))
            with tqdm(total=rows, desc=title, disable=not accelerator.is_main_process) as bar:
                for items in loader:
                    with torch.inference_mode(), accelerator.autocast():
                        encoded, read = encode(items)
                    features.append(encoded.half().cpu().numpy())
                    usable += read or []
                    bar.update(len(items))
                    if sum(map(len, features)) == len(shards.rows_of(todo[0])):
                        shards.write(todo.pop(0), np.concatenate(features), usable or None)
                        features, usable = [], []
            accelerator.wait_for_everyone()
