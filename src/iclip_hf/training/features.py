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

from ..backends.identity import digest, software, tokenizer_digest, tower_digest
from ..data.pairs import BadPairError, PairDataset
from ..model.configuration_iclip import ICLIPConfig
from ..model.modeling_iclip import ICLIPModel, normalize
from ..model.pooling import normalize_attention, pool, share_among_like
from ..model.processing_iclip import ICLIPProcessor
from ..utils.distributed import broadcast_from_main, shared_folder_lock
from ..utils.files import atomic_write
from ..utils.interrupts import ignore_signals


if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------------- of images


# Poolings of an image: all of Table 2, masked max with both normalisations of the attention. The recognition branch uses the first or the
# first two, and a branch that pools before the projection uses any of them.
POOLINGS = ("class_token", "average", "max", "masked_max/minmax", "masked_max/quantile")


def image_features(model: ICLIPModel, pixel_values: torch.Tensor, map_tokens: int) -> torch.Tensor:
    """
    Computes what the projections of all branches need of images (B, 3, H, W): all `POOLINGS` (B, 5, D), which are the same for all models
    with this tower; with `max_over="similarity"` the first two of them and the [`representative_tokens`], (B, 2 + K, D + 1), with the
    attention as the last column. [`branch_features`] takes the features of each branch from it.
    """
    image, config = model.encode_image(pixel_values), model.config

    def pooled(way: str) -> torch.Tensor:
        mode, _, norm = way.partition("/")
        attention = normalize_attention(image.attention, norm or "minmax", config.attention_quantile)
        return pool(image.patch_tokens, image.class_token, attention, mode)

    if config.max_over == "channels":
        return torch.stack([pooled(way) for way in POOLINGS], 1)
    tokens, attention = model.centered_tokens(image.patch_tokens), model.normalized_attention(image)
    tokens, attention = representative_tokens(tokens, attention, image.grid, map_tokens, config.map_affinity)
    features = torch.cat([torch.stack([pooled(way) for way in POOLINGS[:2]], 1), tokens], 1)
    return torch.cat([features, F.pad(attention, (2, 0)).unsqueeze(-1)], -1)


def branch_features(features: torch.Tensor, config: ICLIPConfig) -> list[tuple[torch.Tensor, ...]]:
    """
    Converts the result of [`image_features`] to the features of each branch: a vector (B, D), or (B, 2 D) for the recognition branch; with
    `max_over="similarity"`, those of the map branch are tokens (B, K, D) and their attention (B, K).
    """
    recognised = slice(2 if config.recognition_pooling == "class_and_average" else 1)
    if config.max_over == "similarity":
        return [(features[:, recognised, :-1].flatten(1),), (features[:, 2:, :-1], features[:, 2:, -1])]
    own = f"masked_max/{config.attention_norm}" if config.pooling == "masked_max" else config.pooling
    of_map = (features[:, POOLINGS.index(own)],)
    return [(features[:, recognised].flatten(1),), of_map] if config.dual_projection else [of_map]


def representative_tokens(
    tokens: torch.Tensor, attention: torch.Tensor, grid: tuple[int, int], count: int, affinity: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Selects few patches that represent an image. All but four are salient: the first has the largest attention, and each further one the
    largest product of attention and square root of the distance to the selected patches. The last four are in the middle of the image's
    quarters, so that an object or a ground counts by its area as well. The result for a patch is the mean over the patches with similar
    tokens.

    Args:
        tokens (`torch.Tensor` of shape `(B, N, D)`): tokens of the map branch, before sharing among similar patches, row-major.
        attention (`torch.Tensor` of shape `(B, N)`): in [0, 1].
        grid (`tuple[int, int]`): height and width in patches, N = h * w.
        count (`int`): number of patches to select, at least 5.
        affinity (`float`): see [`~pooling.share_among_like`]; 0 leaves tokens unchanged.

    Returns:
        `tuple`: tokens `(B, K, D)` and attention `(B, K)`, K = min(count, N).
    """
    batch = torch.arange(len(tokens), device=tokens.device)
    if count < tokens.shape[1]:
        units = normalize(tokens.float())
        wanted, distance = attention, torch.full_like(attention, 2.0)
        salient = []
        for _ in range(count - 4):
            salient.append(wanted.argmax(1))
            distance = torch.minimum(distance, 1 - (units @ units[batch, salient[-1]].unsqueeze(-1)).squeeze(-1))
            # Patches without attention can be selected too. The distance alone would leave a large object, whose patches are alike,
            # with fewer patches than what is around it.
            wanted = (attention + 0.05) * distance.clamp(min=0).sqrt()
        rows, columns = ((side // 4, side - 1 - side // 4) for side in grid)
        middles = torch.tensor([row * grid[1] + column for row in rows for column in columns], device=tokens.device)
        taken = torch.cat([torch.stack(salient, 1), middles.expand(len(tokens), -1)], 1)
    else:
        taken = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    queries = tokens[batch[:, None], taken]
    if affinity == 0:
        return queries, attention[batch[:, None], taken]
    values = torch.cat([tokens, attention.unsqueeze(-1).to(tokens.dtype)], -1)
    shared = share_among_like(values, tokens, affinity, queries)
    return shared[..., :-1], shared[..., -1].float()


@torch.no_grad()
def set_token_mean(model: ICLIPModel, images: Iterable[torch.Tensor]) -> None:
    """
    Sets `token_mean` of a model with `center_tokens`. Keeps the mean of an earlier training, which its branches learned with.

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


# Raise it with a change of the code between releases that gives other features, such as of `representative_tokens`.
_VERSION = 1


# Options of a model that [`image_features`] does not depend on: of the towers, which have digests, of the projections and what they
# compute, and of the choice among the poolings. Other options count, also those that a later version adds.
_OPTIONS_NOT_CACHED = """
    vision_config text_config lock_vision text_pooling projection_dim dual_projection projection_bias logit_scale_init_value
    max_sharpness map_attention recognition_share image_hidden_size text_hidden_size logit_bias_init_value presence_bias pooling recognition_pooling
""".split()
# With `max_over="channels"` the features hold both norms, and the patch tokens as they are.
_OPTIONS_NOT_POOLED = ("attention_norm", "center_tokens", "map_affinity")


def image_settings(config: ICLIPConfig, map_tokens: int) -> dict:
    """Returns the options of a model that [`image_features`] depends on, besides its image tower."""
    channels = config.max_over == "channels"
    names = {*type(config).__annotations__}.difference(_OPTIONS_NOT_CACHED, _OPTIONS_NOT_POOLED if channels else ())
    return {name: getattr(config, name) for name in names} | ({} if channels else {"map_tokens": map_tokens})


class FeatureShards:
    """
    Rows of features in a folder, memory-mapped. Shards are written atomically, so that an interrupted run can continue and
    several processes can share the folder, whose name stands for all that the features depend on.
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
    """The features of locked towers in a folder, computed unless they are there already. Parts of it belong to other models or data."""

    folder: Path
    model: ICLIPModel
    processor: ICLIPProcessor
    accelerator: Accelerator

    def images(
        self,
        pairs: PairDataset,
        *,
        map_tokens: int = 20,
        earlier_mean: list[float] | None = None,
        num_workers: int = 0,
    ) -> FeatureShards:
        """
        Computes [`image_features`] of the image of each pair. The captions do not count. `earlier_mean` is the model's `token_mean` if it is not
        that of these pairs. `num_workers` is for each process.

        Raises:
            `OSError`: the folder cannot be written, or another run fills it.
        """
        with self.accelerator.main_process_first():  # the first process caches the digests for the others
            content = hashlib.sha256(b"".join(pairs.image_digests())).hexdigest()
        shards = self._shards(
            "images",
            len(pairs),
            tower=tower_digest(self.model.vision_model),
            options=image_settings(self.model.config, map_tokens),
            token_mean=earlier_mean,
            images=content,
            image_processor=json.loads(self.processor.image_processor.to_json_string()),
        )

        def encode(items: list[tuple[torch.Tensor, bool]]) -> tuple[torch.Tensor, Sequence[bool]]:
            images, usable = zip(*items)
            return image_features(self.model, torch.stack(images).to(self.accelerator.device), map_tokens), usable

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
            tower=tower_digest(self.model.text_model),
            text_pooling=self.model.config.text_pooling,
            tokenizer=[tokenizer_digest(self.processor.tokenizer), probe],
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
        """Encodes the rows of missing shards, shared by the processes. A complete cache is not locked: several runs can read it."""
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
