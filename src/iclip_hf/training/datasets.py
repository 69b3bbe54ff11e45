"""Training and validation data of a run: pairs with images, or cached features of locked towers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from ..data.pairs import PairDataset, PairStream, load_pairs
from ..modeling_iclip import ICLIPModel
from ..processing_iclip import ICLIPProcessor
from .data import AugmentedImage, TrainingPairs, TrainingStream, WholeImage
from .feature_cache import CachedPairs, cache_images, cache_texts
from .nouns import NounPrompts
from .pair_model import set_token_mean
from .settings import Settings


if TYPE_CHECKING:
    from accelerate import Accelerator


def open_pairs(settings: Settings, accelerator: Accelerator) -> tuple[PairDataset | PairStream, PairDataset | None]:
    """
    Opens the training pairs of a run, and those of its validation.

    Raises:
        `ValueError`: the data is not as described, or a share of a stream is to be held out. `FileNotFoundError`: data is missing.
    """
    shared = {"seed": settings.seed, "max_bad_share": settings.max_bad_share}
    shared |= {"image_column": settings.image_column or None, "caption_column": settings.caption_column or None}
    source = settings.data[0] if len(settings.data) == 1 else settings.data
    placed = {"rank": accelerator.process_index, "world_size": accelerator.num_processes, "split": settings.split}
    placed["streaming"] = settings.pairs_per_epoch > 0
    with accelerator.main_process_first():  # the first process caches the indexes of tar shards for the others
        pairs = load_pairs(source, **shared, **placed)
        held_out = load_pairs(settings.validation_data, **shared) if settings.validation_data else None
    if settings.validation_share:
        if isinstance(pairs, PairStream):
            raise ValueError("Expected validation_data for a stream, got validation_share: name local pairs.")
        pairs, held_out = pairs.split(settings.validation_share)
    return pairs, held_out


def load_datasets(
    settings: Settings,
    pairs: PairDataset | PairStream,
    held_out: PairDataset | None,
    nouns: NounPrompts | None,
    model: ICLIPModel,
    processor: ICLIPProcessor,
    accelerator: Accelerator,
) -> tuple[Dataset, Dataset | None]:
    """
    Prepares the pairs of [`open_pairs`] for training and validation, and computes the feature cache if the settings have one. The model is
    moved to the device; its `token_mean` is set if it centers tokens.

    Raises:
        `ValueError`: `cache_features` with an image tower that learns or with a stream, or too many pairs are bad.
    """
    whole = WholeImage(processor)

    def cached(pairs, part: str, nouns: NounPrompts | None = None) -> CachedPairs:
        if not model.config.lock_vision or isinstance(pairs, PairStream):
            given = "a stream" if model.config.lock_vision else "an image tower that learns"
            raise ValueError(
                f"Expected a locked image tower and local pairs for cache_features, got {given}: leave it out."
            )
        folder = Path(settings.cache_features, part)
        options = {"num_workers": settings.num_workers, "max_bad_share": settings.max_bad_share}
        options |= {"map_tokens": settings.map_tokens, "title": part.capitalize(), "earlier_mean": earlier_mean}
        images = cache_images(folder, pairs, model, processor, accelerator, **options)
        texts = {}
        if settings.lock_text:
            texts["texts"] = itertools.chain.from_iterable(images.captions())
            if nouns is not None:
                texts["prompts"] = nouns.all_prompts()
        texts = {
            name: cache_texts(folder / name, given, model, processor, accelerator, f"{part.capitalize()} {name}")
            for name, given in texts.items()
        }
        return CachedPairs(images, model.config, processor, settings.seed, nouns, **texts)

    model.to(accelerator.device).eval()
    if isinstance(pairs, PairStream):
        some = (pair["image"] for pair in itertools.islice(pairs, 256))
    else:
        some = (pairs[index]["image"] for index in range(0, len(pairs), max(1, len(pairs) // 256)))
    # Of an earlier training; otherwise it depends on the tower and the images, as the features do, and is rounded anew by each run.
    earlier_mean = model.token_mean.tolist() if model.config.center_tokens and model.token_mean.any() else None
    set_token_mean(model, map(whole, some))
    if settings.cache_features:
        return cached(pairs, "training", nouns), held_out and cached(held_out, "validation")
    prepared = TrainingStream if isinstance(pairs, PairStream) else TrainingPairs
    augmented = AugmentedImage(processor, settings.crop_scale, settings.auto_augment, settings.random_erasing)
    training = prepared(pairs, augmented, processor, settings.seed, nouns)
    return training, held_out and TrainingPairs(held_out, whole, processor, settings.seed)
