"""What a run reads: pairs, nouns and masks, and from them the data sets of training and validation."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from ..backends.identity import digest
from ..data.pairs import PairDataset, load_pairs
from ..data.segmentation import SegmentationDataset, load_segmentation
from ..data.streams import PairStream
from ..model.modeling_iclip import ICLIPModel
from ..model.processing_iclip import ICLIPProcessor
from ..utils.distributed import agreed
from ..utils.extras import require_extra
from .batches import check_batch, seed_everything
from .feature_cache import CachedPairs, FeatureCache
from .nouns import NounPrompts
from .pair_model import set_token_mean
from .settings import Settings


if TYPE_CHECKING:
    from accelerate import Accelerator


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
    run draws the same.
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


class Inputs(NamedTuple):
    """What a run reads, opened but not read."""

    pairs: PairDataset | PairStream
    held_out: PairDataset | None
    nouns: NounPrompts | None
    segmentation: SegmentationDataset | None  # for the evaluation of maps

    def content(self, accelerator: Accelerator) -> dict[str, object]:
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
        if settings.validation_share:
            if streamed:
                raise ValueError("validation_share: no part of a stream can be held out; name local validation_data.")
            pairs, held_out = pairs.split(settings.validation_share)  # which caches the digests of the images
    check_batch(settings.pairs_per_epoch if streamed else len(pairs), settings.batch_size, accelerator.num_processes)
    if held_out is not None:
        held_out = agreed(held_out.readable() if accelerator.is_main_process else None)
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
