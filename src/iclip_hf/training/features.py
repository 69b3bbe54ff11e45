"""
Features of images and texts, which the projections learn from: of a batch, and in a cache for towers that are locked.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..backends.identity import digest
from ..data.pairs import BadPairError, PairDataset
from ..model.configuration_iclip import ICLIPConfig
from ..model.modeling_iclip import ICLIPModel, ImageInputs, ImageTokens
from ..model.pooling import EVEN_PATCHES, POOLINGS, normalize_attention, pool
from ..model.processing_iclip import ICLIPProcessor
from ..utils.distributed import broadcast_from_main, partial_state
from ..utils.files import atomic_write, cache_folder


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
def set_token_mean(model: ICLIPModel, processor: ICLIPProcessor, pairs: Iterable[Mapping]) -> None:
    """
    Sets `token_mean` of a model with `center_tokens` to the mean patch token of some hundred images. Keeps that of an
    earlier training, which its branches learned with. All processes have the mean of the first.

    Args:
        model: model on its device.
        processor: of the model.
        pairs: rows with an `image`; of a data set with random access, at most 256 that are evenly spread.
    """
    if not model.config.center_tokens or model.token_mean.any():
        return
    if partial_state("train").is_main_process:
        if isinstance(pairs, PairDataset):
            distinct, _ = pairs.distinct()
            few = [distinct[index] for index in range(0, len(distinct), max(1, len(distinct) // _IMAGES_OF_MEAN))]
        else:
            few = [pair for pair, _ in zip(pairs, range(_IMAGES_OF_MEAN))]
        means = []
        for start in tqdm(range(0, len(few), 32), "Mean token", delay=3, leave=False):
            pixel_values = processor(images=[pair["image"] for pair in few[start : start + 32]])["pixel_values"]
            means.append(model.encode_image(pixel_values.to(model.device)).patch_tokens.float().mean(1))
        model.token_mean.copy_(torch.cat(means).mean(0))
    model.token_mean.copy_(broadcast_from_main(model.token_mean.cpu()))  # other devices round in another way


# ---------------------------------------------------------------------------------------------------------- on disk


_IMAGES_OF_MEAN = 256
_ROWS_OF_FILE = 1024
# Raise it with a change of the code between releases that gives other features, such as of `representative_patches`.
_VERSION = 2


class FeatureStore:
    """
    Features (D, ...) by key in a folder, whose name stands for what all of them depend on. Files are added and never
    changed, atomically, so that several processes and runs share the folder, and an interrupted run continues.

    A key is the digest of an image or a text, 32 bytes. `<name>.npy` holds features and `<name>.keys` their keys.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.reload()

    def reload(self) -> None:
        """Finds what other processes have added."""
        self._arrays, self._places = [], {}
        for file in sorted(self.folder.glob("*.keys")):
            keys = file.read_bytes()
            for row in range(len(keys) // 32):
                self._places.setdefault(keys[32 * row : 32 * row + 32], (len(self._arrays), row))
            self._arrays.append(np.load(file.with_suffix(".npy"), mmap_mode="r"))

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def add(self, keys: Sequence[bytes], features: np.ndarray) -> None:
        """Adds features (N, D, ...). They are there after `reload`."""
        file = self.folder / hashlib.sha256(b"".join(keys)).hexdigest()[:32]
        with atomic_write(file.with_suffix(".npy")) as partial, open(partial, "wb") as opened:
            np.save(opened, features)  # which would add a suffix to a name
        with atomic_write(file.with_suffix(".keys")) as partial:
            partial.write_bytes(b"".join(keys))

    def __getitem__(self, keys: Sequence[bytes]) -> torch.Tensor:
        """Returns the features of these keys, (N, D, ...), float16."""
        arrays, rows = np.array([self._places[key] for key in keys]).T
        features = np.empty((len(keys), *self._arrays[0].shape[1:]), self._arrays[0].dtype)
        for array in np.unique(arrays):
            here = arrays == array
            features[here] = self._arrays[array][rows[here]]
        return torch.from_numpy(features)

    def fill(
        self, items: Dataset | Sequence, keys: Sequence[bytes], encode: Callable, batch_size: int, workers: int = 0
    ) -> None:
        """
        Adds the features of items whose keys are missing, each process a part of them. `encode` returns those (N, ...)
        of a list of N items; an item that is None, such as a broken image, is left out.
        """
        state, places = partial_state("train"), {key: place for place, key in enumerate(keys) if key not in self}
        state.wait_for_everyone()  # until all have seen the same
        mine = [*places.values()][state.process_index :: state.num_processes]
        batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
        loader = DataLoader(items, batch_sampler=batches, num_workers=workers, collate_fn=list)
        title, found, encoded = f"Features of {self.folder.parent.name}", [], []
        with tqdm(total=len(mine), desc=title, delay=2, disable=not state.is_main_process) as bar:
            for batch, chosen in zip(loader, batches):
                usable = [(item, keys[place]) for item, place in zip(batch, chosen) if item is not None]
                if usable:
                    features = encode([item for item, _ in usable])
                    encoded.append(features.half().cpu().numpy())
                    found += [key for _, key in usable]
                bar.update(len(chosen))
                if len(found) >= _ROWS_OF_FILE:
                    self.add(found, np.concatenate(encoded))
                    found, encoded = [], []
        if encoded:
            self.add(found, np.concatenate(encoded))
        state.wait_for_everyone()
        self.reload()


class _Images(Dataset):
    """Images as tensors (3, H, W); None for one that cannot be read."""

    def __init__(self, pairs: PairDataset, processor: ICLIPProcessor):
        self.pairs, self.processor = pairs, processor

    def __getitem__(self, index: int) -> torch.Tensor | None:
        try:
            return self.processor(images=self.pairs.image(index))["pixel_values"][0]
        except BadPairError as error:
            logger.warning("Left out: %s", error)
            return None


class FeatureCache:
    """
    The features of locked towers of a model, on disk. An image or text that is there is not encoded again by any run,
    of any data set.

    Args:
        model, processor: the model on its device, with its `token_mean`, and its processor.
        folder (`str` or `Path`, *optional*): where the features are; `features` in the cache folder by default.
        mixed_precision (`"no"`, `"bf16"` or `"fp16"`): in which they are computed.
        num_workers (`int`, defaults to 0): number of processes that read images.
    """

    def __init__(
        self,
        model: ICLIPModel,
        processor: ICLIPProcessor,
        folder: str | Path | None = None,
        mixed_precision: str = "no",
        num_workers: int = 0,
    ):
        self.model, self.processor, self.num_workers = model, processor, num_workers
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
        folder = Path(folder or cache_folder() / "features")
        mean = model.token_mean.tolist() if model.config.center_tokens else None
        common = {"mixed_precision": mixed_precision, "version": _VERSION}
        images = digest(
            {
                "tower": [model.vision_model.config, model.vision_model.state_dict()],
                "options": model.config.feature_options,
                "token_mean": mean,
                "image_processor": json.loads(processor.image_processor.to_json_string()),
                **common,
            }
        )
        self._images = FeatureStore(folder / "images" / images)
        # The probe shows what the processor adds: length and padding.
        probe = processor(text=["A photo of Two Dogs, naïve.", "long " * 1000])["input_ids"].tolist()
        texts = digest(
            {
                "tower": [model.text_model.config, model.text_model.state_dict()],
                "text_pooling": model.config.text_pooling,
                "tokenizer": [processor.tokenizer, probe],
                **common,
            }
        )
        self._texts = FeatureStore(folder / "texts" / texts)

    def images(self, pairs: PairDataset) -> list[bytes | None]:
        """
        Computes [`pack_inputs`] of the image of each pair. Returns the keys of their features; None for an image that
        cannot be read.
        """
        keys = pairs.image_digests()
        self._images.fill(_Images(pairs, self.processor), keys, self._encode_images, 64, self.num_workers)
        return [key if key in self._images else None for key in keys]

    def features(self, keys: Sequence[bytes]) -> torch.Tensor:
        """Returns the features of images by their keys, (N, ...), float16."""
        return self._images[keys]

    def texts(self, texts: Iterable[str]) -> None:
        """Computes the text tower's features of texts."""
        texts = sorted(set(texts), key=lambda text: (len(text), text))  # batches of similar length need little padding
        self._texts.fill(texts, [*map(_key, texts)], self._encode_texts, 256)

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Returns the features of texts that were computed, (N, D), float32."""
        return self._texts[[*map(_key, texts)]].float()

    def _encode_images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        with self._inference():
            return pack_inputs(self.model, self.model.encode_image(torch.stack(images).to(self.model.device)))

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        with self._inference():
            return self.model.encode_text(**self.processor(text=texts).to(self.model.device))[0]

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with (
            torch.inference_mode(),
            torch.autocast(self.model.device.type, self._dtype, enabled=self._dtype is not None),
        ):
            yield


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
