"""A cache on disk of the features of locked towers."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..backends.identity import digest
from ..data.pairs import BadPairError, PairDataset
from ..model.modeling_iclip import ICLIPModel
from ..model.pooling import POOLINGS
from ..model.processing_iclip import ICLIPProcessor
from ..utils.cache import cache_folder
from ..utils.distributed import broadcast_from_main, partial_state
from ..utils.files import atomic_write


logger = logging.getLogger(__name__)


# A file is written after this number of bytes or seconds, so that files are few and a killed run loses little.
_BYTES_OF_FILE, _SECONDS_OF_FILE = 2**28, 60
# Raise this number if a release computes other features than the one before, or stores them otherwise.
_VERSION = 5


class FeatureStore:
    """
    A folder of named features by key. The name of the folder is a digest of what the features depend on. Files are
    added atomically and never changed, so that several processes and runs can share the folder, and an interrupted run
    can go on.

    A key is the digest of an image or a text, 32 bytes. The features of several keys are in two numpy files:
    `<name>.records.npy` has a record of named float16 arrays for each key, and `<name>.keys.npy` has the keys. Records
    are numbered over all files that this store has found.
    """

    def __init__(self, folder: Path):
        self.folder, self._keys, self._record_type = folder, np.empty(0, "S32"), None
        self._files: dict[Path, int] = {}  # the files of records, with the index of their first record
        self.reload()

    def reload(self) -> None:
        """
        Finds the files that other processes have added. The indices of known records stay the same. Raises `OSError`
        if a part of a file is missing, as after a loss of power or an interrupted copy.
        """
        keys = [self._keys]
        for keys_file in sorted(self.folder.glob("*.keys.npy")):
            file = keys_file.with_name(keys_file.name.replace(".keys.", ".records."))
            if file in self._files:
                continue
            try:
                new_keys, self._record_type = np.load(keys_file), _records_of(file).dtype
            except (EOFError, ValueError) as error:
                raise OSError(
                    f"{file}: the cached features in this file are not complete; delete it and {keys_file.name}, then "
                    "run again."
                ) from error
            self._files[file] = sum(map(len, keys))
            keys.append(new_keys)
        self._keys = np.concatenate(keys)
        self._order = np.argsort(self._keys, kind="stable")

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Returns the indices of the records of these keys, (num_keys,); -1 for a key without features."""
        keys = np.array(keys, "S32")
        if not len(self._keys):
            return np.full(len(keys), -1)
        order, found = np.argsort(keys), np.empty(len(keys), int)
        # Keys in order are found several times faster.
        found[order] = np.searchsorted(self._keys, keys[order], sorter=self._order)
        found = self._order[found.clip(max=len(self._keys) - 1)]
        return np.where(self._keys[found] == keys, found, -1)

    def add(self, keys: Sequence[bytes], features: Mapping[str, np.ndarray]) -> None:
        """Adds the features of keys: arrays (num_keys, ...) by name. `find` knows them after `reload`."""
        parts = sorted(features.items())
        records = np.empty(len(keys), [(name, "<f2", array.shape[1:]) for name, array in parts])
        for name, array in parts:
            records[name] = array
        stem = hashlib.sha256(b"".join(keys)).hexdigest()[:32]
        # The keys come last: records without keys are not found.
        for name, array in (("records", records), ("keys", np.array(keys, "S32"))):
            with atomic_write(self.folder / f"{stem}.{name}.npy") as partial, open(partial, "wb") as file:
                np.save(file, array)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Returns the records with these indices, (num_indices,). Raises `KeyError` if an index is -1."""
        if (indices < 0).any():
            raise KeyError(f"{self.folder} has no features of {(indices < 0).sum()} of {len(indices)} items.")
        records = np.empty(len(indices), self._record_type)
        files, starts = [*self._files], [*self._files.values()]
        file_numbers = np.searchsorted(starts, indices, side="right") - 1
        for number in np.unique(file_numbers):
            is_in_file = file_numbers == number
            records[is_in_file] = _records_of(files[number])[indices[is_in_file] - starts[number]]
        return records

    def fill(
        self, items: Dataset | Sequence, keys: Sequence[bytes], encode: Callable, batch_size: int, workers: int = 0
    ) -> np.ndarray:
        """
        Adds the features of items whose keys are missing. Each process encodes a part of them.

        Args:
            items: items by index. An item that is None, such as a broken image, gets no features.
            keys: the key of each item.
            encode: function from a list of items to their features by name, tensors (num_items, ...).
            batch_size (`int`): number of items in a call of `encode`.
            workers (`int`): number of processes that load items.

        Returns:
            `np.ndarray`: indices of the records of all items, (len(items),); -1 for an item without features.
        """
        state = partial_state("train")
        self.reload()
        # What the first process misses counts, because another run may add features before the others look.
        distinct, first = np.unique(np.array(keys, "S32"), return_index=True)
        missing = broadcast_from_main(np.sort(first[self.find(distinct) < 0]))  # items, in order
        part = missing[state.process_index :: state.num_processes]
        batches = [part[start : start + batch_size].tolist() for start in range(0, len(part), batch_size)]
        loader = DataLoader(items, batch_sampler=batches, num_workers=workers, collate_fn=list)
        title, is_quiet = f"Features of {self.folder.parent.name}", not state.is_main_process
        unsaved, began = [], time.monotonic()
        try:
            for batch, indices in zip(tqdm(loader, title, delay=2, unit="batch", disable=is_quiet), batches):
                usable = {keys[index]: item for index, item in zip(indices, batch) if item is not None}
                if usable:
                    features = encode([*usable.values()])
                    unsaved.append(([*usable], {name: array.half().cpu().numpy() for name, array in features.items()}))
                size = sum(array.nbytes for _, arrays in unsaved for array in arrays.values())
                if size >= _BYTES_OF_FILE or time.monotonic() > began + _SECONDS_OF_FILE:
                    self._add_batches(unsaved)
                    unsaved, began = [], time.monotonic()
        finally:  # also at Ctrl-C
            self._add_batches(unsaved)
        state.wait_for_everyone()
        self.reload()
        return self.find(keys)

    def _add_batches(self, batches: Sequence[tuple[list[bytes], dict[str, np.ndarray]]]) -> None:
        """Adds batches of keys and their features by name, in one file."""
        if batches:
            keys, features = zip(*batches)
            joined = {name: np.concatenate([arrays[name] for arrays in features]) for name in features[0]}
            self.add([*chain.from_iterable(keys)], joined)


@lru_cache(maxsize=100)  # a large cache has more files than a process may keep open
def _records_of(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r")


class _PixelValues(Dataset):
    """`pixel_values` (3, H, W) of images; None for one that cannot be read."""

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
    The features of a model's locked towers, on disk. An image or text is encoded once for all runs and data sets.

    Args:
        model, processor: the model on its device, with its `token_mean`, and its processor.
        folder (`str` or `Path`, *optional*): where the features are; `features` in the cache folder by default.
        mixed_precision (`"no"`, `"bf16"` or `"fp16"`): precision of the towers.
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
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
        self._autocast = torch.autocast(model.device.type, dtype, enabled=dtype is not None)
        folder = Path(folder or cache_folder() / "features")
        mean = model.token_mean.tolist() if model.config.center_tokens else None
        common = {"mixed_precision": mixed_precision, "version": _VERSION}
        towers = [tower for tower in (model.vision_model, model.feature_model, model.feature_reduction) if tower]
        images_digest = digest(
            {
                "towers": [[getattr(tower, "config", None), tower.state_dict()] for tower in towers],
                "options": model.config.cache_options,
                "token_mean": mean,
                "image_processor": json.loads(processor.image_processor.to_json_string()),
                **common,
            }
        )
        self._image_store = FeatureStore(folder / "images" / images_digest)
        # The token ids of the probe depend on the length and the padding that the processor adds.
        probe = processor(text=["A photo of Two Dogs, naïve.", "long " * 1000])["input_ids"].tolist()
        texts_digest = digest(
            {
                "tower": [model.text_model.config, model.text_model.state_dict()],
                "text_pooling": model.config.text_pooling,
                "tokenizer": [processor.tokenizer, probe],
                **common,
            }
        )
        self._text_store = FeatureStore(folder / "texts" / texts_digest)

    def fill_images(self, pairs: PairDataset) -> np.ndarray:
        """
        Computes the features of images that the cache lacks. Returns, for the image of each pair, the index of its
        record, (num_pairs,); -1 for an image that cannot be read.
        """
        with partial_state("train").main_process_first():  # which keeps the digests of large data for the others
            digests = pairs.image_digests()
        pixel_values = _PixelValues(pairs, self.processor)
        return self._image_store.fill(pixel_values, digests, self._encode_images, 64, self.num_workers)

    def features(self, record_indices: np.ndarray) -> np.ndarray:
        """Returns the records of images, named float16 arrays, by the indices that `fill_images` returned."""
        return self._image_store[record_indices]

    def fill_texts(self, texts: Iterable[str]) -> None:
        """Computes the features, by the text tower, of texts that the cache lacks."""
        texts = sorted(set(texts), key=lambda text: (len(text), text))  # batches of similar length need little padding
        self._text_store.fill(texts, [*map(_key, texts)], self._encode_texts, 256)

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Returns the features (M, Dt) that `fill_texts` has computed, float32."""
        records = self._text_store[self._text_store.find([*map(_key, texts)])]
        return torch.from_numpy(records["text"]).float()

    @torch.inference_mode()
    def _encode_images(self, images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        config = self.model.config
        # All poolings that models with these options can have, so that these models share the folder. With
        # `max_over="similarity"`, only class token and average are pooled: a maximum is taken over similarities.
        possible_poolings = POOLINGS if config.max_over == "channels" else POOLINGS[:2]
        with self._autocast:
            encoded = self.model.encode_image(torch.stack(images).to(self.model.device))
            return self.model.loss_features(encoded, [*config.recognition_poolings, *possible_poolings])

    @torch.inference_mode()
    def _encode_texts(self, texts: list[str]) -> dict[str, torch.Tensor]:
        tokens = self.processor(text=texts).to(self.model.device)
        with self._autocast:
            features, _ = self.model.encode_text(**tokens)
        return {"text": features}


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
