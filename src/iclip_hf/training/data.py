"""
From pairs to batches: images and texts as tensors, or their cached features, in an order that any number of processes
share. A batch is what [`~contrastive.PairModel.forward`] takes.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from tqdm import tqdm

from ..data.columns import USUAL_COLUMNS, PairTexts, sample_caption
from ..data.nouns import ImageNouns, NounPrompts
from ..data.pairs import BadPairError, PairDataset
from ..data.streams import PairStream
from ..model.modeling_iclip import ICLIPModel
from ..model.processing_iclip import ICLIPProcessor
from ..utils.distributed import broadcast_from_main
from ..utils.extras import require_extra
from ..utils.interrupts import ignore_signals
from .features import FeatureCache, set_token_mean, unpack_inputs
from .inputs import Inputs, check_batch
from .settings import Settings


with require_extra("train"):
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

logger = logging.getLogger(__name__)


def load_datasets(
    settings: Settings, inputs: Inputs, model: ICLIPModel, processor: ICLIPProcessor, accelerator: Accelerator
) -> tuple[PairBatches, PairBatches | None]:
    """
    Prepares the pairs for training and validation, and computes the feature cache if the settings have one. The model
    is moved to the device; its `token_mean` is set if it centers tokens, on all processes that of the first.

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
    # Of an earlier training; otherwise it depends on the tower and the images, as the features do, and is rounded anew
    # by each run.
    earlier_mean = model.token_mean.tolist() if model.config.center_tokens and model.token_mean.any() else None
    images = (whole_image(processor, pair["image"]) for pair in few)
    if accelerator.is_main_process:
        set_token_mean(model, tqdm(images, "Mean token", delay=3, unit="image", leave=False))
    if model.config.center_tokens:  # other devices would round it in another way, and caches are keyed by it
        model.token_mean.copy_(broadcast_from_main(model.token_mean.cpu()))
    seed = settings.seed
    if settings.cache_features:

        def cached(part: str, pairs: PairDataset, mean: list[float] | None, nouns: NounPrompts | None) -> CachedPairs:
            cache = FeatureCache(Path(settings.cache_features, part), model, processor, accelerator)
            options = {"num_workers": settings.num_workers, "earlier_mean": mean}
            return CachedPairs(pairs, cache, seed, nouns, settings.lock_text, **options)

        mean = model.token_mean.tolist() if model.config.center_tokens else None
        training = cached("training", pairs, earlier_mean, nouns)
        return training, held_out and cached("validation", held_out, mean, None)
    transform = augmentation(processor, settings.crop_scale, settings.auto_augment, settings.random_erasing)
    prepared = TrainingStream if streamed else TrainingPairs
    training = prepared(pairs, transform, processor, seed, nouns)
    return training, held_out and TrainingPairs(held_out, partial(whole_image, processor), processor, seed)


# --------------------------------------------------------------------------------------------------- texts of a batch


class TextSampler:
    """
    Samples the texts of pairs, a caption and noun prompts of each. Random choices depend only on (seed, epoch, pair).

    Args:
        processor: of the model.
        seed: of all random choices.
        nouns: of which prompts follow the captions of a batch.
    """

    def __init__(self, processor: ICLIPProcessor, seed: int = 0, nouns: NounPrompts | None = None):
        self.processor, self.seed, self.nouns, self.epoch = processor, seed, nouns, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def captions_of(self, texts: PairTexts) -> Sequence[str]:
        """Returns the captions of a pair that one is sampled from."""
        return texts.captions if self.nouns is None else self.nouns.sentences(texts.captions)

    def caption(self, captions: Sequence[str], key: int | str) -> str:
        """Samples the caption of a pair in this epoch."""
        return sample_caption(captions, self.seed, self.epoch, key)

    def nouns_of(self, texts: PairTexts) -> ImageNouns | None:
        """Returns what is known of the nouns of a pair."""
        return None if self.nouns is None else self.nouns.known_nouns(*texts)

    def collate_texts(self, captions: list[str], image_nouns: Sequence[ImageNouns | None]) -> dict:
        """
        Returns the texts of B pairs: tensors of the captions (B, L), or, with noun prompts behind them, (M, L), and
        the nouns.
        """
        prompts, nouns = [], {}
        if self.nouns:
            prompts, nouns = self.nouns.sample(image_nouns, self.epoch)
        return self.encode_texts(captions, prompts) | {name: torch.from_numpy(array) for name, array in nouns.items()}

    def encode_texts(self, captions: list[str], prompts: list[str]) -> dict:
        return dict(self.processor(text=captions + prompts))


class PairCollator(TextSampler):
    """
    Makes batches of rows for a `Trainer`, with the loss of `iclip train`: what [`ICLIPModel`] takes with
    `return_loss`. Each batch samples its captions and noun prompts by torch's random numbers, which `Trainer` seeds.

    The arguments of the `Trainer` have `remove_unused_columns=False`, because the collator reads the columns of rows,
    and `label_names=[]`, because a `Trainer` takes `noun_labels` for labels of its own: its evaluations would have no
    loss without nouns, and gather them with nouns.

    Example:

    ```python
    >>> collator = PairCollator(processor, NounPrompts(["dog", "sofa", "floor (background) (below)"]))
    >>> batch = collator([{"image": image, "caption": "A dog on a sofa.", "labels": ["dog", "sofa"]}])
    >>> model(**batch).loss
    ```

    Args:
        processor ([`ICLIPProcessor`]): of the model.
        nouns ([`NounPrompts`], *optional*): of which prompts follow the captions of a batch.
    """

    def __init__(self, processor: ICLIPProcessor, nouns: NounPrompts | None = None):
        super().__init__(processor, nouns=nouns)

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor | bool]:
        """
        Args:
            rows: B `dict`s with an `image`, for the processor, a `caption` or a list of `captions`, and *optional*
                `labels` and `complete`, see [`~data.columns.PairTexts`].

        Returns:
            `dict` of `pixel_values` (B, 3, H, W), the tokenizer's tensors (M, L) of captions and noun prompts, the
            nouns, see [`~data.nouns.NounPrompts.sample`], and `return_loss`.

        Raises:
            `ValueError`: a row has no caption, or its labels are not as described.
        """
        self.set_epoch(int(torch.randint(2**31, ())))
        texts = [_texts_of_row(number, row) for number, row in enumerate(rows, 1)]
        captions = [self.caption(self.captions_of(of_row), row) for row, of_row in enumerate(texts)]
        images = self.processor(images=[row["image"] for row in rows])
        return {**images, **self.collate_texts(captions, [*map(self.nouns_of, texts)]), "return_loss": True}


def _texts_of_row(number: int, row: Mapping) -> PairTexts:
    try:
        texts = USUAL_COLUMNS.texts(row)
    except ValueError as error:
        raise ValueError(f"Row {number} of the batch: {error}") from error
    if not texts.captions:
        raise ValueError(
            f"Row {number} of the batch: expected a caption, got {', '.join(row)} alone; leave the row out."
        )
    return texts


# --------------------------------------------------------------------------------------------------- pairs of an epoch


class PairBatches(TextSampler, Dataset):
    """
    Pairs in the batches of an epoch. A resumed run repeats them, and the captions of cached features are those of the
    pairs themselves.
    """

    def sampled_captions(self) -> list[str]:
        """Returns the caption of each pair in this epoch."""
        raise NotImplementedError

    def image_digests(self) -> list[bytes]:
        """Returns a digest of the image of each pair, which pairs of one image share, see [`PairDataset`]."""
        raise NotImplementedError


class TrainingPairs(PairBatches):
    """Pairs of a [`PairDataset`] as tensors; the images by `transform`."""

    def __init__(
        self,
        pairs: PairDataset | PairStream,
        transform: Callable,
        processor: ICLIPProcessor,
        seed: int = 0,
        nouns: NounPrompts | None = None,
    ):
        super().__init__(processor, seed, nouns)
        self.pairs, self.transform = pairs, transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        pair = self.pairs[index]
        return {**self.prepare(pair, index), "read": (index, 1, pair["skipped"])}

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.pairs.set_epoch(epoch)

    def sampled_captions(self) -> list[str]:
        return [self.caption(self.pairs.captions(index), index) for index in range(len(self))]

    def image_digests(self) -> list[bytes]:
        return self.pairs.image_digests()

    def prepare(self, pair: dict, key: int | str) -> dict:
        texts = PairTexts(*map(pair.get, PairTexts._fields))
        seed_everything(self.seed, self.epoch, key)
        return {
            "image": self.transform(pair["image"]),
            "caption": self.caption(self.captions_of(texts), key),
            "nouns": self.nouns_of(texts),
        }

    def collate(self, items: Sequence[dict]) -> dict:
        images, captions, nouns = ([item[name] for item in items] for name in ("image", "caption", "nouns"))
        return {"pixel_values": torch.stack(images), **self.collate_texts(captions, nouns)}


class TrainingStream(TrainingPairs, IterableDataset):
    """Pairs of a [`PairStream`] as tensors."""

    def __iter__(self) -> Iterator[dict]:
        for pair in self.pairs:
            yield {**self.prepare(pair, pair["key"]), "read": (None, 1 + pair["skipped"], pair["skipped"])}


class CachedPairs(PairBatches):
    """
    Pairs of a [`PairDataset`] as cached features. Those of a pair that repeats are computed once. Pairs with a broken
    image or no caption are left out.

    Args:
        pairs: the pairs.
        cache: where the features are, or are put now.
        lock_text: whether the features of captions and prompts are cached too.
        options: of [`FeatureCache.images`].

    Raises:
        `ValueError`: too many pairs are bad.
    """

    def __init__(
        self,
        pairs: PairDataset,
        cache: FeatureCache,
        seed: int = 0,
        nouns: NounPrompts | None = None,
        lock_text: bool = False,
        **options,
    ):
        super().__init__(cache.processor, seed, nouns)
        self.pairs, self.config = pairs, cache.model.config
        distinct, rows = pairs.distinct()
        self.features = cache.images(distinct, **options)
        texts = {row: _texts_of(distinct, row) for row, usable in enumerate(self.features.usable()) if usable}
        texts = {row: of_row for row, of_row in texts.items() if of_row.captions}
        bad, filled = len(distinct) - len(texts), self.features.folder
        if bad:
            logger.warning(
                "%d of %d pairs are left out, as logged here or by the run that filled %s", bad, len(distinct), filled
            )
        if bad > pairs.max_bad_share * len(distinct):
            raise ValueError(
                f"max_bad_share: {bad} of {len(distinct)} pairs are bad; fix the data or raise it, or delete {filled} "
                "if images were out of reach as it was filled."
            )
        self.keys = np.flatnonzero(np.isin(rows, [*texts]))  # places among all pairs
        self.rows = rows[self.keys]
        of_pairs = [texts[row] for row in self.rows.tolist()]
        # Once, because finding nouns takes longer than a step.
        self.captions, self.image_nouns = [*map(self.captions_of, of_pairs)], [*map(self.nouns_of, of_pairs)]
        self.text_features = self.prompt_features = None
        if lock_text:
            self.text_features = cache.texts(caption for of_row in texts.values() for caption in of_row.captions)
            self.prompt_features = nouns and cache.texts(nouns.all_prompts(), "prompts")

    def __len__(self) -> int:
        return len(self.rows)

    def sampled_captions(self) -> list[str]:
        return [*map(self.caption, self.captions, self.keys.tolist())]

    def image_digests(self) -> list[bytes]:
        digests = self.pairs.image_digests()
        return [digests[key] for key in self.keys.tolist()]

    def __getitems__(self, indices: Sequence[int]) -> dict:
        """Returns the features (B, ...) of these pairs, the sampled captions and the nouns."""
        return {
            "image_inputs": unpack_inputs(torch.from_numpy(self.features[self.rows[indices]]).float(), self.config),
            "caption": [self.caption(self.captions[i], int(self.keys[i])) for i in indices],
            "nouns": [self.image_nouns[i] for i in indices],
        }

    def collate(self, batch: dict) -> dict:
        return {"image_inputs": batch["image_inputs"], **self.collate_texts(batch["caption"], batch["nouns"])}

    def encode_texts(self, captions: list[str], prompts: list[str]) -> dict:
        if self.text_features is None:
            return super().encode_texts(captions, prompts)
        features = [self.text_features[captions], *([self.prompt_features[prompts]] if prompts else [])]
        return {"text_inputs": torch.cat(features)}


def _texts_of(pairs: PairDataset, row: int) -> PairTexts:
    try:
        return pairs.raw(row).texts
    except BadPairError as error:
        logger.warning("Left out: %s", error)
        return PairTexts([])


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
    Returns the conversion of an image to `pixel_values` (3, H, W) of the processor's size, cropped and augmented by
    timm's transforms. The options are those of [`~settings.Settings`]; their defaults are DeiT's recipe. With all of
    them off, it is that of [`whole_image`], because timm would still mirror images and crop wide ones. Raises
    `ValueError` for an unknown policy.
    """
    if crop_scale == 1 and not (auto_augment or random_erasing):
        return partial(whole_image, processor)
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


# ------------------------------------------------------------------------------------------------------------- batches


def seed_everything(*key) -> None:
    """Seeds Python's, numpy's and torch's random numbers, such that they depend only on the key."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class GlobalBatches(Sampler):
    """
    Yields this process's share of each batch of an epoch. The batches are the same for any number of processes and
    contain each of the `rows` pairs at most once. An incomplete last batch is left out. `batch_size` is that of all
    processes together, a multiple of their number.
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
        `ValueError`: the processes cannot share a batch, or an epoch has none. During iteration, `OSError`: a stream
            lost its connection.
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
            collate_fn=partial(_with_counts, dataset.collate),
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_signals,
        )

    def steps(self, first: int, end: int) -> Iterator[dict]:
        """
        Yields the batches of the steps from `first` to before `end`, counted from the beginning of the first epoch.
        """
        while first < end:
            epoch, skipped = divmod(first, self.steps_per_epoch)
            for batch in itertools.islice(self.epoch(epoch, skipped), end - first):
                first += 1
                yield batch

    def epoch(self, epoch: int, first: int = 0) -> Iterator[dict]:
        """
        Yields the batches of one epoch, starting with batch `first`. A stream does not skip; it begins another pass.
        """
        for batch, read in self._stream(epoch, first) if self.streamed else self._rows(epoch, first):
            if self.loader.num_workers:  # each has seen too few, and ends with the epoch
                for counts in read:
                    self.dataset.pairs.tally.count(*counts)
            yield send_to_device(batch, self.device, non_blocking=True)

    def _rows(self, epoch: int, first: int) -> DataLoader:
        self.dataset.set_epoch(epoch)
        self.sampler.epoch, self.sampler.first = epoch, first
        return self.loader

    def _stream(self, epoch: int, first: int) -> Iterator[dict]:
        """Yields the batches of one epoch, from several passes if the process's part of the stream is short."""
        # The order of a pass depends on its first step: a resumed run would see the beginning of its epoch again, but
        # never the end.
        step = first
        while step < self.steps_per_epoch:
            began = step
            self.dataset.set_epoch(epoch * self.steps_per_epoch + step)
            for batch in itertools.islice(self.loader, self.steps_per_epoch - step):
                yield batch
                step += 1
            if step == began:
                raise ValueError("batch_size: this process's part of the stream has no whole batch; lower batch_size.")


def _with_counts(collate: Callable, items: Sequence[dict] | dict) -> tuple[dict, list[tuple[int | None, int, int]]]:
    """Returns the batch of these items, and what `BadPairTally.count` takes for each that was read now."""
    return collate(items), [] if isinstance(items, dict) else [item["read"] for item in items]
