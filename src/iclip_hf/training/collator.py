"""From rows to batches: images and texts as tensors, or their cached features, with nouns."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy

import numpy as np
import torch
from PIL import Image

from ..data.columns import USUAL_COLUMNS, PairTexts, sample_caption
from ..data.nouns import ImageNouns, NounPrompts
from ..model.images import load_image
from ..model.processing_iclip import ICLIPProcessor


class PairCollator:
    """
    Makes batches of rows, as [`ICLIPModel`] takes them with `return_loss`, for [`ICLIPTrainer`] or any other loop.

    The `draw` of a row is the seed and the epoch of its data set, and the index of the row, or its name in a stream.
    The caption and the augmentation of a row depend only on its `draw`, and noun prompts on the epoch in it. Rows of
    [`~iclip_hf.data.load_pairs`] have a `draw`. [`ICLIPTrainer`] adds one to other rows, with its `data_seed`. Choices
    for rows without a `draw`, such as those of an `IterableDataset`, depend on torch's random numbers, and differ
    after a training is resumed.

    Example:

    ```python
    >>> collator = PairCollator(processor, NounPrompts(["dog", "sofa", "floor (background) (below)"]))
    >>> batch = collator([{"image": image, "caption": "A dog on a sofa.", "labels": ["dog", "sofa"]}])
    >>> model(**batch).loss
    ```

    Args:
        processor ([`ICLIPProcessor`]): processor of the model.
        nouns ([`NounPrompts`], *optional*): nouns whose prompts follow the captions of a batch.
        transform (`Callable`, *optional*): function from an image to `pixel_values` (3, H, W), such as
            [`augmentation`]; the processor by default.
        text_features (`Callable`, *optional*): function from M texts to their features (M, Dt) by the text tower, such
            as a [`~features.FeatureCache`]; a batch has these instead of token ids.
    """

    def __init__(
        self,
        processor: ICLIPProcessor,
        nouns: NounPrompts | None = None,
        transform: Callable[[Image.Image], torch.Tensor] | None = None,
        text_features: Callable[[list[str]], torch.Tensor] | None = None,
    ):
        self.processor, self.nouns, self.transform, self.text_features = processor, nouns, transform, text_features
        self._epoch: int | None = None  # if set, replaces the epoch of the rows

    def for_evaluation(self) -> PairCollator:
        """Returns a copy that takes the captions of epoch 0, without nouns and augmentation."""
        collator = copy(self)
        collator.nouns, collator.transform, collator._epoch = None, None, 0
        return collator

    def read(self, texts: PairTexts) -> dict[str, object]:
        """Returns what a batch needs of the texts of a row: the captions to sample from, and its nouns."""
        if self.nouns is None:
            return {"captions": texts.captions, "nouns": None}
        return {"captions": self.nouns.sentences(texts.captions), "nouns": self.nouns.known_nouns(*texts)}

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, object]:
        """
        Args:
            rows: B rows of [`~datasets.CachedPairs`], or B `dict`s with an `image` that the processor takes, with a
                `caption` or a list of `captions`, and optionally with `labels`, `complete` and `class_probabilities`,
                see [`~data.columns.PairTexts`].

        Returns:
            `dict` of `pixel_values` (B, 3, H, W) or `image_features`, a `dict` of tensors (B, ...) for
            [`ICLIPModel.loss_inputs`]; the tokenizer's tensors (M, L) of captions and noun prompts, or `text_inputs`
            (M, Dt); `nouns`, a `dict`, see [`~data.nouns.NounPrompts.sample`]; and `return_loss`.
        """
        draws = [self._draw(index, row) for index, row in enumerate(rows)]
        numbered = enumerate(rows, 1)
        texts = [row if "nouns" in row else self.read(_checked_texts(number, row)) for number, row in numbered]
        captions = [sample_caption(row_texts["captions"], *draw) for row_texts, draw in zip(texts, draws)]
        prompts, nouns = [], {}
        if self.nouns:
            image_nouns: list[ImageNouns] = [row_texts["nouns"] for row_texts in texts]
            _, epoch, _ = draws[0]
            prompts, arrays = self.nouns.sample(image_nouns, epoch)
            nouns = {"nouns": {name: torch.from_numpy(array) for name, array in arrays.items()}}
        return {**self._images(rows, draws), **self._texts(captions + prompts), **nouns, "return_loss": True}

    def _draw(self, index: int, row: Mapping) -> tuple[int, int, int | str]:
        """Returns the seed, the epoch and the index or name that the random choices for a row depend on."""
        seed, epoch, key = row.get("draw") or (0, None, index)
        if self._epoch is not None:
            epoch = self._epoch
        elif epoch is None:
            epoch = int(torch.randint(2**31, ()))
        return seed, epoch, key

    def _images(self, rows: Sequence[Mapping], draws: Sequence[tuple]) -> dict[str, object]:
        """Returns the images of rows as tensors: cached features, augmented or prepared by the processor."""
        if "features" in rows[0]:
            records = np.stack([row["features"] for row in rows])
            return {"image_features": {name: torch.from_numpy(records[name]) for name in records.dtype.names}}
        if self.transform is None:
            return dict(self.processor(images=[row["image"] for row in rows]))
        images = []
        with _restored_generators():
            for row, draw in zip(rows, draws):
                seed = seed_of(*draw)
                random.seed(seed)
                np.random.seed(seed)
                torch.default_generator.manual_seed(seed)  # of the CPU; `torch.manual_seed` also sets those of GPUs
                images.append(self.transform(load_image(row["image"])))
        return {"pixel_values": torch.stack(images)}

    def _texts(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Returns texts as tensors: their features or token ids, and both for an evaluation."""
        if self.text_features is None:
            return dict(self.processor(text=texts))
        # An evaluation tells captions apart by their tokens, because another machine may compute other features.
        tokens = {} if self._epoch is None else dict(self.processor(text=texts))
        return {**tokens, "text_inputs": self.text_features(texts)}


def _checked_texts(number: int, row: Mapping) -> PairTexts:
    """Returns the texts of a row, which must have a caption. Errors name the row by its number."""
    try:
        texts = USUAL_COLUMNS.texts(row)
    except ValueError as error:
        raise ValueError(f"Row {number} of the batch: {error}") from error
    if not texts.captions:
        raise ValueError(
            f"Row {number} of the batch: expected a caption, got {', '.join(row)} alone; leave the row out."
        )
    return texts


def augmentation(
    processor: ICLIPProcessor,
    crop_scale: float = 0.08,
    auto_augment: str = "rand-m9-mstd0.5-inc1",
    random_erasing: float = 0.25,
) -> Callable[[Image.Image], torch.Tensor] | None:
    """
    Returns a function from an image to `pixel_values` (3, H, W) of the processor's size, made by timm's
    `create_transform`. The defaults are DeiT's recipe. Returns None if all arguments turn their step off, because timm
    would still mirror images and crop wide ones. Raises `ValueError` for an unknown `auto_augment`.
    """
    if crop_scale == 1 and not (auto_augment or random_erasing):
        return None
    from timm.data import create_transform

    image_processor, size = processor.image_processor, processor.image_processor.size
    height, width = (size.get(side) or size["shortest_edge"] for side in ("height", "width"))
    normalizes = image_processor.do_normalize is not False
    try:
        return create_transform(
            is_training=True,
            input_size=(3, height, width),
            scale=(crop_scale, 1.0),
            auto_augment=auto_augment or None,
            color_jitter=None,  # DeiT's is off where its RandAugment is on
            interpolation=Image.Resampling(image_processor.resample).name.lower(),
            re_prob=random_erasing,
            re_mode="pixel",
            mean=tuple(image_processor.image_mean) if normalizes else (0.0, 0.0, 0.0),
            std=tuple(image_processor.image_std) if normalizes else (1.0, 1.0, 1.0),
        )
    except AssertionError as error:  # timm's parser raises it
        raise ValueError(f"auto_augment: {auto_augment!r} is no policy of timm.") from error


@contextmanager
def _restored_generators() -> Iterator[None]:
    """Restores the random numbers of Python, numpy and torch afterwards, which transforms of timm read."""
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def seed_of(*key) -> int:
    """Returns a seed in 0..2³² - 1 that depends only on the key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big")
