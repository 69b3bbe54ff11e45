"""From pairs to batches: tensors of images and texts or their cached features, in an order that any number of processes share."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from tqdm import tqdm

from ..backends.identity import digest, software, tokenizer_digest, tower_digest
from ..data.nouns import NounPrompts
from ..data.pairs import BadPairError, PairDataset, load_pairs
from ..data.segmentation import SegmentationDataset, load_segmentation
from ..data.sources import PairTexts
from ..data.streams import PairStream
from ..model.configuration_iclip import ICLIPConfig
from ..model.modeling_iclip import ICLIPModel
from ..model.pooling import normalize_attention, pool
from ..model.processing_iclip import ICLIPProcessor
from ..utils.distributed import broadcast_from_main, shared_folder_lock
from ..utils.extras import require_extra
from ..utils.files import atomic_write
from ..utils.interrupts import ignore_signals
from .contrastive import map_features, set_token_mean
from .settings import Settings


with require_extra("train"):
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------- what a run reads


class Inputs(NamedTuple):
    """What a run reads, opened but not read."""

    pairs: PairDataset | PairStream
    held_out: PairDataset | None
    nouns: NounPrompts | None
    segmentation: SegmentationDataset | None  # for the evaluation of maps

    def fingerprints(self, accelerator: Accelerator) -> dict[str, object]:
        """Returns digests of the content, by the name of the setting."""
        with accelerator.main_process_first():  # the first process caches the digests of the files for the others
            return {
                "data": self.pairs.fingerprint(),
                "validation_data": self.held_out and self.held_out.fingerprint(),
                "nouns": self.nouns and digest([self.nouns.nouns, self.nouns.is_background.tolist()]),
                "eval_root": self.segmentation and self.segmentation.fingerprint(),
            }


def open_inputs(settings: Settings, accelerator: Accelerator) -> Inputs:
    """
    Opens what the settings name, and leaves out the held-out pairs that cannot be read.

    Raises:
        `ValueError`: a share of a stream is to be held out, `batch_size` does not fit, or too many held-out pairs are bad.
    """
    segmentation = None  # first, because it is quickly found to be missing
    if settings.eval_dataset != "none":
        segmentation = load_segmentation(settings.eval_dataset, settings.eval_root, settings.eval_split or None)
    shared = {"seed": settings.seed, "max_bad_share": settings.max_bad_share}
    shared |= {"image_column": settings.image_column or None, "caption_column": settings.caption_column or None}
    source = settings.data[0] if len(settings.data) == 1 else settings.data
    placed = {"rank": accelerator.process_index, "world_size": accelerator.num_processes, "split": settings.split}
    placed["streaming"] = settings.pairs_per_epoch > 0
    with accelerator.main_process_first():  # the first process caches the indexes of tar shards for the others
        pairs = load_pairs(source, **shared, **placed)
        held_out = load_pairs(settings.validation_data, **shared) if settings.validation_data else None
        streamed = isinstance(pairs, PairStream)
        if settings.validation_data and not streamed and (common := pairs.files() & held_out.files()):
            logger.warning(
                "%d files are in data and validation_data, such as %s: scores on them say nothing of other images.",
                len(common),
                min(common),
            )
        if settings.validation_share:
            if streamed:
                raise ValueError("validation_share: no part of a stream can be held out; name local validation_data.")
            pairs, held_out = pairs.split(settings.validation_share)  # which caches the digests of the images
    check_batch(settings.pairs_per_epoch if streamed else len(pairs), settings.batch_size, accelerator.num_processes)
    if held_out is not None:
        held_out = broadcast_from_main(held_out.readable() if accelerator.is_main_process else None)
    nouns = NounPrompts.from_file(settings.nouns, seed=settings.seed) if settings.nouns else None
    return Inputs(pairs, held_out, nouns, segmentation)


def load_datasets(
    settings: Settings, inputs: Inputs, model: ICLIPModel, processor: ICLIPProcessor, accelerator: Accelerator
) -> tuple[Dataset, Dataset | None]:
    """
    Prepares the pairs for training and validation, and computes the feature cache if the settings have one. The model is moved to the
    device; its `token_mean` is set if it centers tokens.

    Raises:
        `ValueError`: `cache_features` with an image tower that learns or with a stream, or too many pairs are bad.
    """
    pairs, held_out, nouns, _ = inputs
    streamed = isinstance(pairs, PairStream)
    if settings.cache_features and (streamed or not model.config.lock_vision):
        raise ValueError("cache_features: it needs a locked image tower and local pairs; leave it out.")
    model.to(accelerator.device).eval()
    few = itertools.islice(pairs, 256)
    if not streamed:
        distinct, _ = pairs.distinct()
        few = (distinct[i] for i in range(0, len(distinct), max(1, len(distinct) // 256)))
    # Of an earlier training; otherwise it depends on the tower and the images, as the features do, and is rounded anew by each run.
    earlier_mean = model.token_mean.tolist() if model.config.center_tokens and model.token_mean.any() else None
    set_token_mean(model, (whole_image(processor, pair["image"]) for pair in few))
    if settings.cache_features:
        shared = {
            name: getattr(settings, name)
            for name in ("lock_text", "seed", "num_workers", "max_bad_share", "map_tokens")
        }

        def cached(part: str, pairs: PairDataset, nouns: NounPrompts | None = None) -> CachedPairs:
            cache = FeatureCache(Path(settings.cache_features, part), model, processor, accelerator)
            return cache.pairs(pairs, nouns=nouns, earlier_mean=earlier_mean, **shared)

        return cached("training", pairs, nouns), held_out and cached("validation", held_out)
    transform = augmentation(processor, settings.crop_scale, settings.auto_augment, settings.random_erasing)
    prepared = TrainingStream if streamed else TrainingPairs
    training = prepared(pairs, transform, processor, settings.seed, nouns)
    return training, held_out and TrainingPairs(held_out, partial(whole_image, processor), processor, settings.seed)


# ---------------------------------------------------------------------------------------------------- pairs as tensors


def whole_image(processor: ICLIPProcessor, image: Image.Image) -> torch.Tensor:
    """Converts an image to `pixel_values` (3, H, W) with the processor, as for evaluation."""
    return processor(images=image)["pixel_values"][0]


def augmentation(
    processor: ICLIPProcessor,
    crop_scale: float = Settings.crop_scale,
    auto_augment: str = Settings.auto_augment,
    random_erasing: float = Settings.random_erasing,
) -> Callable[[Image.Image], torch.Tensor]:
    """
    Returns the conversion of an image to `pixel_values` (3, H, W) of the processor's size, cropped and augmented by timm's transforms.
    The options are those of [`~settings.Settings`]; their defaults are DeiT's recipe. Raises `ValueError` for an unknown policy.
    """
    with require_extra("train"):
        from timm.data import create_transform

    image_processor = processor.image_processor
    try:
        return create_transform(
            is_training=True,
            input_size=(3, image_processor.size["height"], image_processor.size["width"]),
            scale=(crop_scale, 1.0),
            auto_augment=auto_augment or None,
            color_jitter=None,  # DeiT's is off where its RandAugment is on
            interpolation="bicubic",
            re_prob=random_erasing,
            re_mode="pixel",
            mean=tuple(image_processor.image_mean),
            std=tuple(image_processor.image_std),
        )
    except AssertionError as error:  # of timm's parser
        raise ValueError(f"auto_augment: {auto_augment!r} is no policy of timm.") from error


class TrainingPairs(Dataset):
    """
    Pairs of a [`PairDataset`] as tensors; the images by `transform`. Random numbers depend only on (seed, epoch, pair), so a resumed
    run repeats them.
    """

    def __init__(
        self,
        pairs: PairDataset | PairStream,
        transform: Callable,
        processor: ICLIPProcessor,
        seed: int = 0,
        nouns: NounPrompts | None = None,
    ):
        self.pairs, self.transform, self.processor, self.seed, self.nouns = pairs, transform, processor, seed, nouns
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        return self.prepare(self.pairs[index], index)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.pairs.set_epoch(epoch)

    def sampled_captions(self) -> list[str]:
        """Returns the caption of each pair in this epoch."""
        return [self.pairs.caption(index) for index in range(len(self))]

    def prepare(self, pair: dict, key: int | str) -> dict:
        seed_everything(self.seed, self.epoch, key)
        pair = {**pair, "image": self.transform(pair["image"])}
        if self.nouns:
            pair["caption"] = random.choice(self.nouns.sentences(pair["captions"]))
            pair["nouns"] = self.nouns.of_image(pair["captions"], pair["labels"], pair["complete"])
        return pair

    def collate(self, items: Sequence[dict]) -> dict:
        """
        Collates B items to `pixel_values` (B, 3, H, W) and the tokenizer's tensors (M, L), in which noun prompts follow the captions.
        """
        prompts, nouns = [], {}
        if self.nouns:
            prompts, nouns = self.nouns.sample([item["nouns"] for item in items], self.epoch)
        return {
            "pixel_values": torch.stack([item["image"] for item in items]),
            **self.processor(text=[item["caption"] for item in items] + prompts),
            **nouns,
        }


class TrainingStream(TrainingPairs, IterableDataset):
    """Pairs of a [`PairStream`] as tensors."""

    def __iter__(self) -> Iterator[dict]:
        return (self.prepare(pair, pair["key"]) for pair in self.pairs)


# -------------------------------------------------------------------------------------------- pairs as cached features


# Cached poolings of an image: all of Table 2, masked max with both normalisations of the attention. The recognition branch uses the
# first or the first two, and a branch that pools before the projection uses any of them.
POOLINGS = ("class_token", "average", "max", "masked_max/minmax", "masked_max/quantile")


# Raise it with a change of the code between releases that gives other features, such as of `representative_tokens`.
_VERSION = 1


def image_rows(model: ICLIPModel, pixel_values: torch.Tensor, map_tokens: int) -> torch.Tensor:
    """
    Computes the cached features of images (B, 3, H, W): all `POOLINGS` (B, 5, D), which are the same for all models with this
    tower; with `max_over="similarity"` the first two of them and the model's [`representative_tokens`], (B, 2 + K, D + 1), with the
    attention as the last column.
    """
    image = model.encode_image(pixel_values)

    def pooled(way: str) -> torch.Tensor:
        mode, _, norm = way.partition("/")
        attention = normalize_attention(image.attention, norm or "minmax", model.config.attention_quantile)
        return pool(image.patch_tokens, image.class_token, attention, mode)

    if model.config.max_over == "channels":
        return torch.stack([pooled(way) for way in POOLINGS], 1)
    tokens, attention = map_features(model, image, map_tokens)
    rows = torch.cat([torch.stack([pooled(way) for way in POOLINGS[:2]], 1), tokens], 1)
    return torch.cat([rows, F.pad(attention, (2, 0)).unsqueeze(-1)], -1)


def branch_features(rows: torch.Tensor, config: ICLIPConfig) -> tuple[torch.Tensor, ...]:
    """Converts the result of [`image_rows`] to that of [`~contrastive.image_features`]."""
    recognised = slice(2 if config.recognition_pooling == "class_and_average" else 1)
    if config.max_over == "similarity":
        return rows[:, recognised, :-1].flatten(1), rows[:, 2:, :-1], rows[:, 2:, -1]
    own = f"masked_max/{config.attention_norm}" if config.pooling == "masked_max" else config.pooling
    map_pooled = rows[:, POOLINGS.index(own)]
    return (rows[:, recognised].flatten(1), map_pooled) if config.dual_projection else (map_pooled,)


# Options of a model that [`image_rows`] does not depend on: of the towers, which have digests, of the projections and what they
# compute, and of the choice among the rows, which hold all. Other options count, also those that a later version adds.
_NOT_IN_ROWS = """
    vision_config text_config lock_vision text_pooling projection_dim dual_projection projection_bias logit_scale_init_value
    max_sharpness map_attention recognition_share image_hidden_size text_hidden_size logit_bias_init_value presence_bias pooling recognition_pooling
""".split()
# With `max_over="channels"` the rows hold both norms, and the patch tokens as they are.
_NOT_IN_POOLED_ROWS = ("attention_norm", "center_tokens", "map_affinity")


def image_settings(config: ICLIPConfig, map_tokens: int) -> dict:
    """Returns the options of a model that [`image_rows`] depends on, besides its image tower."""
    channels = config.max_over == "channels"
    names = {*type(config).__annotations__}.difference(_NOT_IN_ROWS, _NOT_IN_POOLED_ROWS if channels else ())
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


class CachedPairs(Dataset):
    """
    Pairs as cached features, from [`FeatureCache`]: `rows` (N,) of `features` with the captions and labels of each. The captions of an epoch
    depend only on (seed, epoch). With a locked text tower, `texts` and `prompts` are the features of captions and of noun prompts.
    """

    def __init__(
        self,
        features: FeatureShards,
        rows: Sequence[int],
        written: Sequence[PairTexts],
        config: ICLIPConfig,
        processor: ICLIPProcessor,
        seed: int = 0,
        nouns: NounPrompts | None = None,
        texts: CachedTexts | None = None,
        prompts: CachedTexts | None = None,
    ):
        self.features, self.config, self.processor, self.seed = features, config, processor, seed
        self.nouns, self.texts, self.prompts = nouns, texts, prompts
        self.rows = np.array(rows)
        self.sentences = [pair.captions if nouns is None else nouns.sentences(pair.captions) for pair in written]
        self.nouns_of = [] if nouns is None else [nouns.of_image(*pair) for pair in written]
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Samples the caption of each pair."""
        self.epoch = epoch
        self.random = np.random.default_rng([self.seed, epoch]).random(len(self))

    def sampled_captions(self, indices: Sequence[int] | None = None) -> list[str]:
        """Returns the captions of these pairs, by default of all, in this epoch."""
        indices = range(len(self)) if indices is None else indices
        return [self.sentences[i][int(self.random[i] * len(self.sentences[i]))] for i in indices]

    def __getitems__(self, indices: Sequence[int]) -> dict:
        """Returns a batch: `image_features` of the branches, and for each pair the sampled caption and the nouns."""
        return {
            "image_features": branch_features(
                torch.from_numpy(self.features[self.rows[indices]]).float(), self.config
            ),
            "caption": self.sampled_captions(indices),
            "nouns": [self.nouns_of[i] for i in indices] if self.nouns else [],
        }

    def collate(self, batch: dict) -> dict:
        """Converts captions, followed by noun prompts, to `text_features` (M, Dt) or the tokenizer's tensors (M, L)."""
        captions = batch["caption"]
        prompts, nouns = self.nouns.sample(batch["nouns"], self.epoch) if self.nouns else ([], {})
        if self.texts is None:
            texts = self.processor(text=captions + prompts)
        else:
            features = [self.texts[captions], *([self.prompts[prompts]] if prompts else [])]
            texts = {"text_features": torch.cat(features)}
        return {"image_features": batch["image_features"], **texts, **nouns}


class _PairReader(Dataset):
    """Images as tensors, and whether they could be read. A broken one is black."""

    def __init__(self, pairs: PairDataset, processor: ICLIPProcessor):
        self.pairs, self.processor = pairs, processor

    def __getitem__(self, index: int) -> tuple[torch.Tensor, bool]:
        try:
            _, image = self.pairs.image(index)
            usable = True
        except BadPairError as error:
            logger.warning("Left out: %s", error)
            image, usable = Image.new("RGB", (64, 64)), False
        return self.processor(images=image)["pixel_values"][0], usable


def _texts_of(pairs: PairDataset, row: int) -> PairTexts:
    try:
        return pairs.raw(row).texts
    except BadPairError as error:
        logger.warning("Left out: %s", error)
        return PairTexts([])


@dataclass(eq=False, repr=False)
class FeatureCache:
    """The features of locked towers in a folder, computed unless they are there already. Parts of it belong to other models or data."""

    folder: Path
    model: ICLIPModel
    processor: ICLIPProcessor
    accelerator: Accelerator

    def pairs(
        self,
        pairs: PairDataset,
        *,
        lock_text: bool = False,
        nouns: NounPrompts | None = None,
        seed: int = 0,
        max_bad_share: float = 0.05,
        **options,
    ) -> CachedPairs:
        """
        Returns pairs as features, with `lock_text` also of their texts. The features of a pair that repeats are computed once. Pairs with a
        broken image or no caption are left out. `options` and errors are those of [`FeatureCache.images`].

        Raises:
            `ValueError`: too many pairs are bad.
        """
        distinct, rows = pairs.distinct()
        images, texts = self.images(distinct, **options), {}
        written = {row: _texts_of(distinct, row) for row, usable in enumerate(images.usable()) if usable}
        written = {row: texts for row, texts in written.items() if texts.captions}
        bad = len(distinct) - len(written)
        if bad > max_bad_share * len(distinct):
            raise ValueError(
                f"max_bad_share: {bad} of {len(distinct)} pairs are bad, as the log says; fix the data or raise it."
            )
        if lock_text:
            texts["texts"] = self.texts(caption for pair in written.values() for caption in pair.captions)
            if nouns is not None:
                texts["prompts"] = self.texts(nouns.all_prompts(), "prompts")
        rows = [row for row in rows.tolist() if row in written]
        pairs_texts = [written[row] for row in rows]
        return CachedPairs(images, rows, pairs_texts, self.model.config, self.processor, seed, nouns, **texts)

    def images(
        self,
        pairs: PairDataset,
        *,
        map_tokens: int = 20,
        earlier_mean: list[float] | None = None,
        num_workers: int = 0,
    ) -> FeatureShards:
        """
        Computes [`image_rows`] of the image of each pair. The captions do not count. `earlier_mean` is the model's `token_mean` if it is not
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
            return image_rows(self.model, torch.stack(images).to(self.accelerator.device), map_tokens), usable

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


# ------------------------------------------------------------------------------------------------------------- batches


def seed_everything(*key) -> None:
    """Seeds Python's, numpy's and torch's random numbers, such that they depend only on the key."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def check_batch(rows: int, batch_size: int, world_size: int) -> None:
    """Raises `ValueError` if the processes cannot share a batch, or an epoch of so many pairs has none."""
    if batch_size % world_size:
        raise ValueError(f"batch_size: {batch_size} is no multiple of the {world_size} processes.")
    if rows < batch_size:
        raise ValueError(f"batch_size: an epoch has {rows} pairs, fewer than a batch of {batch_size}; lower it.")


class GlobalBatches(Sampler):
    """
    Yields this process's share of each batch of an epoch. The batches are the same for any number of processes and contain each
    of the `rows` pairs at most once. An incomplete last batch is left out. `batch_size` is that of all processes together, a multiple
    of their number.
    """

    def __init__(self, rows: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1):
        self.rows, self.batch_size, self.seed, self.rank, self.world_size = rows, batch_size, seed, rank, world_size
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.rows // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        share = self.batch_size // self.world_size
        for batch in range(self.first, len(self)):
            start = batch * self.batch_size + self.rank * share
            yield order[start : start + share].tolist()


class BatchLoader:
    """
    Loads the training batches of this process and moves them to its device.

    Args:
        dataset: `TrainingPairs`, `TrainingStream` or `CachedPairs`.
        batch_size: number of pairs in a batch of all processes together, which share it.
        num_workers: number of loading processes for each training process.
        pairs_per_epoch: number of pairs in an epoch of a stream, whose length is unknown.

    Raises:
        `ValueError`: the processes cannot share a batch, or an epoch has none. During iteration, `OSError`: a stream lost its connection.
    """

    def __init__(
        self,
        dataset: Dataset,
        accelerator: Accelerator,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        pairs_per_epoch: int = 0,
    ):
        self.dataset, self.device = dataset, accelerator.device
        self.streamed = isinstance(dataset, IterableDataset)
        rank, world_size = accelerator.process_index, accelerator.num_processes
        rows = pairs_per_epoch if self.streamed else len(dataset)
        self.steps_per_epoch = rows // batch_size
        check_batch(rows, batch_size, world_size)
        self.sampler = GlobalBatches(rows, batch_size, seed, rank, world_size)
        in_order = {"batch_size": batch_size // world_size, "drop_last": True}
        self.loader = DataLoader(
            dataset,
            **(in_order if self.streamed else {"batch_sampler": self.sampler}),
            num_workers=num_workers,
            collate_fn=dataset.collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_signals,
        )

    def steps(self, first: int, end: int) -> Iterator[dict]:
        """Yields the batches of the steps from `first` to before `end`, counted from the beginning of the first epoch."""
        while first < end:
            epoch, skipped = divmod(first, self.steps_per_epoch)
            for batch in itertools.islice(self.epoch(epoch, skipped), end - first):
                first += 1
                yield batch

    def epoch(self, epoch: int, first: int = 0) -> Iterator[dict]:
        """Yields the batches of one epoch, starting with batch `first`. A stream does not skip; it begins another pass."""
        for batch in self._stream(epoch, first) if self.streamed else self._rows(epoch, first):
            yield send_to_device(batch, self.device, non_blocking=True)

    def _rows(self, epoch: int, first: int) -> DataLoader:
        self.dataset.set_epoch(epoch)
        self.sampler.epoch, self.sampler.first = epoch, first
        return self.loader

    def _stream(self, epoch: int, first: int) -> Iterator[dict]:
        """Yields the batches of one epoch, from several passes if the process's part of the stream is short."""
        # The order of a pass depends on its first step: a resumed run would see the beginning of its epoch again, but never the end.
        step = first
        while step < self.steps_per_epoch:
            began = step
            self.dataset.set_epoch(epoch * self.steps_per_epoch + step)
            for batch in itertools.islice(self.loader, self.steps_per_epoch - step):
                yield batch
                step += 1
            if step == began:
                raise ValueError("batch_size: this process's part of the stream has no whole batch; lower batch_size.")
