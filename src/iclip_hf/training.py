"""What `train.py` puts together: augmented pairs, the loss over all processes, schedule, validation, checkpoints, export."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from .cache import writing_errors
from .data.nouns import NounPrompts
from .data.pairs import PairDataset, PairStream
from .extras import extra
from .losses import contrastive_loss, multi_positive_loss
from .model_card import write_model_card
from .modeling_iclip import ICLIPModel, normalize
from .plots import overlay, picture_grid
from .processing_iclip import ICLIPProcessor


with extra("train"):
    from accelerate import Accelerator
    from accelerate.utils import send_to_device


# ---------------------------------------------------------------------------------------------------- random numbers


def derive_seed(*key) -> int:
    """A seed that depends on every part of the key, and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


@contextmanager
def seeded(*key) -> Iterator[None]:
    """Inside, random numbers on the CPU come from the key; outside, they go on as if nothing had been drawn."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


# --------------------------------------------------------------------------------------------------------------- data


class WholeImage:
    """PIL image -> `pixel_values` (3, H, W) as the processor prepares it for evaluation."""

    is_random = False

    def __init__(self, processor: ICLIPProcessor):
        self.processor = processor

    def __call__(self, image) -> torch.Tensor:
        return self.processor(images=image)["pixel_values"][0]

    def description(self) -> dict:
        """What the result depends on, beside the image."""
        return {"image_processor": json.loads(self.processor.image_processor.to_json_string())}


class AugmentedImage:
    """
    PIL image -> `pixel_values` (3, H, W), cropped and augmented by timm's transforms; its recipe for DeiT by default.

    Args:
        processor: gives size, mean and standard deviation.
        crop_scale: smallest share of the image's area that a crop may have.
        auto_augment: timm's name of a policy, "" for none.
        random_erasing: probability that a rectangle is erased.
    """

    is_random = True

    def __init__(
        self,
        processor: ICLIPProcessor,
        crop_scale: float = 0.08,
        auto_augment: str = "rand-m9-mstd0.5-inc1",
        random_erasing: float = 0.25,
    ):
        with extra("train"):
            from timm.data import create_transform

        image_processor = processor.image_processor
        self.options = {
            "input_size": (3, image_processor.size["height"], image_processor.size["width"]),
            "scale": (crop_scale, 1.0),
            "auto_augment": auto_augment or None,
            "color_jitter": None,  # DeiT's is off where its RandAugment is on
            "interpolation": "bicubic",
            "re_prob": random_erasing,
            "re_mode": "pixel",
            "mean": tuple(image_processor.image_mean),
            "std": tuple(image_processor.image_std),
        }
        self.transform = create_transform(is_training=True, **self.options)

    def __call__(self, image) -> torch.Tensor:
        return self.transform(image)

    def description(self) -> dict:
        """What the result depends on, beside the image and the random numbers."""
        return {"augmentation": self.options}


class _Preparation:
    """From a pair to tensors. What is drawn depends on (seed, epoch, the pair) alone, so any resume draws it again."""

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

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.pairs.set_epoch(epoch)

    def prepare(self, pair: dict, key: int | str) -> dict:
        with seeded(self.seed, self.epoch, key):
            return {**pair, "image": self.transform(pair["image"])}

    def collate(self, items: Sequence[dict]) -> dict:
        """
        B items -> `pixel_values` (B, 3, H, W), the tokenizer's tensors (B, L), the number of pairs skipped for them; with noun
        prompts, these follow the captions in the tokenizer's tensors.
        """
        captions = [item["caption"] for item in items]
        prompts, nouns = [], {}
        if self.nouns:
            prompts, nouns = self.nouns.draw([item["captions"] for item in items], self.epoch)
        return {
            "pixel_values": torch.stack([item["image"] for item in items]),
            **self.processor(text=captions + prompts),
            **nouns,
            "skipped": sum(item["skipped"] for item in items),
        }


class TrainingPairs(_Preparation, Dataset):
    """Pairs of a [`PairDataset`], ready for the model."""

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        return self.prepare(self.pairs[index], index)


class TrainingStream(_Preparation, IterableDataset):
    """Pairs of a [`PairStream`], ready for the model."""

    def __iter__(self) -> Iterator[dict]:
        return (self.prepare(pair, pair["key"]) for pair in self.pairs)


class GlobalBatches(Sampler):
    """
    This process's share of each batch of an epoch. The batches are the same for any number of processes, and hold each pair
    at most once; pairs that do not fill a last batch are left out.

    Args:
        rows: number of pairs.
        batch_size: pairs in a batch of all processes together, a multiple of their number.
        seed: of the order.
        rank, world_size: this process's number, and how many there are.
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
    The training batches of this process, on its device.

    Args:
        dataset: `TrainingPairs`, `TrainingStream` or `CachedPairs`.
        accelerator: its processes share each batch.
        batch_size: pairs in a batch of all processes together.
        seed: of the order.
        num_workers: processes that load pairs, for each of the accelerator's.
        pairs_per_epoch: of a stream, which does not know its length.

    Raises:
        `ValueError`: if the batches do not divide among the processes, or an epoch has none.
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
        if batch_size % world_size:
            raise ValueError(f"Expected batch_size to be a multiple of the {world_size} processes, got {batch_size}.")
        if not self.steps_per_epoch:
            way_out = "set pairs_per_epoch to the size of the stream" if self.streamed else "lower batch_size"
            raise ValueError(f"An epoch of {rows} pairs has no batch of {batch_size}: {way_out}.")
        self.sampler = GlobalBatches(rows, batch_size, seed, rank, world_size)
        by_index = {"batch_sampler": self.sampler}
        in_order = {"batch_size": batch_size // world_size, "drop_last": True}
        self.loader = DataLoader(
            dataset,
            **(in_order if self.streamed else by_index),
            num_workers=num_workers,
            collate_fn=dataset.collate,
            pin_memory=self.device.type == "cuda",
        )

    def epoch(self, epoch: int, first: int = 0) -> Iterator[dict]:
        """The batches of one epoch from the `first` on; a stream does not skip, it begins another pass."""
        for batch in (self._stream if self.streamed else self._rows)(epoch, first):
            yield send_to_device(batch, self.device, non_blocking=True)

    def _rows(self, epoch: int, first: int) -> DataLoader:
        self.dataset.set_epoch(epoch)
        self.sampler.epoch, self.sampler.first = epoch, first
        return self.loader

    def _stream(self, epoch: int, first: int) -> Iterator[dict]:
        """
        In as many passes as it takes: the stream's part may end earlier in one process than in another. Each has an order of its
        own, by the step it begins at, or a run that goes on would see the beginning of its epoch again and the end never.
        """
        step = first
        while step < self.steps_per_epoch:
            began = step
            self.dataset.set_epoch(epoch * self.steps_per_epoch + step)
            for batch in itertools.islice(self.loader, self.steps_per_epoch - step):
                yield batch
                step += 1
            if step == began:
                raise ValueError("A pass over this process's part of the stream has no whole batch: lower batch_size.")


# --------------------------------------------------------------------------------------------------------------- loss


class PairModel(nn.Module):
    """
    What Accelerate wraps: the pairs of this process in, the contrastive loss against the pairs of all processes out.

    Memory holds the towers' activations of `chunk_size` pairs only: those of the others are computed again in the backward
    pass (cached gradients). So a big batch costs time, and keeps all its negatives. Each process has the same number of
    pairs; the mean over the processes of their losses and gradients is that of one process with all pairs.

    Args:
        model: [`ICLIPModel`].
        chunk_size: images or texts in one forward of a tower that learns.
        lock_text: the text tower takes no gradients and stays in eval mode, as a locked image tower does.
    """

    def __init__(self, model: ICLIPModel, chunk_size: int = 256, lock_text: bool = False):
        super().__init__()
        self.model, self.chunk_size, self.lock_text = model, chunk_size, lock_text
        self.train()

    @property
    def branches(self) -> list[nn.Module]:
        """Those that the model has, recognition first."""
        one = self.model.recognition, self.model.interpretability
        return [branch for branch in one if branch is not None]

    def train(self, mode: bool = True) -> PairModel:
        super().train(mode)
        if self.lock_text:
            self.model.text_model.eval().requires_grad_(False)
        return self

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
        noun_ids: torch.Tensor | None = None,
        has_noun: torch.Tensor | None = None,
        **texts: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: images (B, 3, H, W), or else
            image_features: what each branch's projection sees of them, (B, branches, D).
            text_features: what the projections see of the texts, (M, Dt), or else
            texts: `input_ids` and what goes with it, (M, L). The first B are the images' captions, the others noun prompts.
            noun_ids, has_noun: of the prompts, see [`NounPrompts`]. They teach the recognition branch: maps of a branch that
                learns nouns lose what all objects share against the background.

        Returns:
            `dict` with `loss`, the mean of `losses` (branches,) (Eq. 13), and the unit vectors `image_embeds` and
            `text_embeds` (B, branches, P), all float32; the embeddings have no gradient.
        """
        if image_features is None:
            image_features = self._in_chunks(self._encode_images, pixel_values)
        if text_features is None:
            text_features = self._in_chunks(lambda *t: self._encode_texts(**dict(zip(texts, t))), *texts.values())
        image_embeds = torch.stack([b.visual_projection(image_features[:, i]) for i, b in enumerate(self.branches)], 1)
        pairs, scales = len(image_embeds), self.model.logit_scales()
        text_embeds = torch.stack([b.text_projection(text_features[:pairs]) for b in self.branches], 1)
        prompt_embeds = self.model.recognition.text_projection(text_features[pairs:])

        # float16 would round the scaled cosines to a sixteenth.
        with torch.autocast(image_features.device.type, enabled=False):
            image_embeds, text_embeds, prompt_embeds = (
                normalize(one.float()) for one in (image_embeds, text_embeds, prompt_embeds)
            )
            all_images, all_texts = gather_with_gradient(torch.stack([image_embeds, text_embeds], 1)).unbind(1)
            losses = [
                contrastive_loss(
                    scale * image_embeds[:, i] @ all_texts[:, i].T,
                    scale * text_embeds[:, i] @ all_images[:, i].T if len(all_images) > pairs else None,
                    offset=_rank() * pairs,
                )
                for i, scale in zip(range(len(self.branches)), scales)
            ]
            if noun_ids is not None:
                all_ids, all_have = gather_with_gradient(noun_ids), gather_with_gradient(has_noun)
                per_image = scales[0] * image_embeds[:, 0] @ gather_with_gradient(prompt_embeds).T
                per_prompt = scales[0] * prompt_embeds @ all_images[:, 0].T
                noun_loss = multi_positive_loss(per_image, has_noun[:, all_ids] > 0)
                noun_loss = (noun_loss + multi_positive_loss(per_prompt, all_have[:, noun_ids].T > 0)) / 2
                losses[0] = (losses[0] + noun_loss) / 2
            losses = torch.stack(losses)
        return {
            "loss": losses.mean(),
            "losses": losses.detach(),
            "image_embeds": image_embeds.detach(),
            "text_embeds": text_embeds.detach(),
        }

    def _encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        image = self.model.encode_image(pixel_values)
        pooled = self.model.pool_image(image, self.model.normalized_attention(image))
        return torch.stack(pooled[: len(self.branches)], 1)

    def _encode_texts(self, **texts: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(**texts)[0]

    def _in_chunks(self, encode: Callable, *inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs[0]) <= self.chunk_size:
            return encode(*inputs)
        chunks = zip(*(one.split(self.chunk_size) for one in inputs))
        return torch.cat([checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks])

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        """Keeps the scales a hair below 100: the clamp in the model has no gradient above, so none would come back."""
        for branch in self.branches:
            if branch.logit_scale is not None:
                branch.logit_scale.clamp_(max=math.log(100) - 1e-6)


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """(B, ...) of each process -> (processes * B, ...) on all. Each row's gradient is the sum over all who used it."""

    @staticmethod
    def forward(ctx, local: torch.Tensor) -> torch.Tensor:
        gathered = local.new_empty(distributed.get_world_size() * len(local), *local.shape[1:])
        distributed.all_gather_into_tensor(gathered, local.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def gather_with_gradient(local: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks, equally many each; with gradient, unlike `gather`."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return local
    return _Gather.apply(local)


# ------------------------------------------------------------------------------------------------------- optimisation


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """What learns, in two groups: matrices decay; one-dimensional tensors, biases and the 0-d logit scales do not."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = [p for name, p in learning if p.ndim > 1 and not name.endswith("bias")]
    others = [p for name, p in learning if p.ndim <= 1 or name.endswith("bias")]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def cosine_schedule(step: int, total: int, warmup: int, peak: float, start: float, end: float) -> float:
    """Learning rate of a step: linear from `start` to `peak` over the warm-up, then half a cosine to `end`."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


# --------------------------------------------------------------------------------------------------------- validation


@torch.no_grad()
def validate(
    accelerator: Accelerator, pair_model: nn.Module, dataset: Dataset, batch_size: int, num_workers: int = 0
) -> dict[str, float]:
    """
    Retrieval among the pairs of a validation set by the recognition branch, and the loss over all of them at once.

    Returns:
        `dict`: `val_loss`, and `image_to_text` and `text_to_image`, the percentage of images (texts) whose own text (image)
        is the nearest.
    """
    dataset.set_epoch(0)
    # Contiguous parts, filled up to equal length because each forward gathers.
    part = math.ceil(len(dataset) / accelerator.num_processes)
    rows = [(accelerator.process_index * part + i) % len(dataset) for i in range(part)]
    pair_model.eval()
    images, texts = [], []
    options = {"sampler": rows, "collate_fn": dataset.collate, "num_workers": num_workers}
    for batch in DataLoader(dataset, min(batch_size, part), **options):
        batch.pop("skipped")
        outputs = pair_model(**send_to_device(batch, accelerator.device))
        images.append(outputs["image_embeds"])
        texts.append(outputs["text_embeds"])
    pair_model.train()
    images, texts = (accelerator.gather(torch.cat(one))[: len(dataset)] for one in (images, texts))
    cosines = [images[:, i] @ texts[:, i].T for i in range(images.shape[1])]
    scales = accelerator.unwrap_model(pair_model).model.logit_scales()
    own = torch.arange(len(dataset), device=images.device)
    return {
        "val_loss": torch.stack([contrastive_loss(scale * one) for scale, one in zip(scales, cosines)]).mean().item(),
        "image_to_text": 100 * (cosines[0].argmax(1) == own).float().mean().item(),
        "text_to_image": 100 * (cosines[0].argmax(0) == own).float().mean().item(),
    }


@torch.no_grad()
def draw_examples(model: ICLIPModel, processor: ICLIPProcessor, pairs: PairDataset, count: int) -> Figure:
    """The first pairs of a data set: each image beside the map of its own text."""
    pictures, titles = [], []
    for index in range(min(count, len(pairs))):
        pair = pairs[index]
        inputs = processor(images=[pair["image"]], text=[pair["caption"]]).to(model.device)
        maps = model(**inputs, output_similarity_maps=True).similarity_maps
        size = (pair["image"].height, pair["image"].width)
        heatmap = processor.post_process_similarity_maps(maps, [size])[0][0]
        pictures += [pair["image"], overlay(pair["image"], heatmap.cpu().numpy())]
        titles += ["", pair["caption"]]
    return picture_grid(pictures, titles, columns=4)


# -------------------------------------------------------------------------------------------- checkpoints and export


def keep_learning_weights_only(accelerator: Accelerator) -> None:
    """
    Leaves what does not learn out of Accelerate's checkpoints, and the wrapper's prefix, so that a run may go on with another
    number of processes.
    """

    def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
        if weights:
            weights.clear()
            if accelerator.is_main_process:
                learning = {n: p for n, p in accelerator.unwrap_model(models[0]).named_parameters() if p.requires_grad}
                save_file(
                    {name: p.detach().contiguous() for name, p in learning.items()},
                    Path(folder, "learning.safetensors"),
                )

    def load(models: list[nn.Module], folder: str) -> None:
        file = Path(folder, "learning.safetensors")
        if file.exists():
            learning = {n: p for n, p in accelerator.unwrap_model(models[0]).named_parameters() if p.requires_grad}
            kept = load_file(file)
            with torch.no_grad():
                for name, parameter in learning.items():
                    parameter.copy_(kept[name])
            models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))


def save_checkpoint(accelerator: Accelerator, output_dir: Path, state: Mapping, keep: int) -> None:
    """
    Saves everything a run needs to go on, as `checkpoint-<state["step"]>`, and removes all but the last `keep`. It appears whole
    or not at all.
    """
    target = output_dir / f"checkpoint-{state['step']:07d}"
    partial = Path(f"{target}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    with writing_errors(target):
        accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with writing_errors(target):
            (partial / "state.json").write_text(json.dumps(state, indent=2))
        os.replace(partial, target)
        for old in checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)


def load_checkpoint(accelerator: Accelerator, folder: Path) -> dict:
    """Brings a run back to a checkpoint, and returns the state it was saved with."""
    accelerator.load_state(str(folder))
    return json.loads((folder / "state.json").read_text())


def export(
    accelerator: Accelerator, pair_model: nn.Module, processor: ICLIPProcessor, folder: Path, **card: object
) -> None:
    """
    Writes the model, its processor and its card, for which see [`write_model_card`], as a folder for `from_pretrained`, beside
    and then in place of an earlier one.
    """
    weights = accelerator.get_state_dict(pair_model)
    if accelerator.is_main_process:
        partial, old = Path(f"{folder}.partial"), Path(f"{folder}.old")
        for left_behind in (partial, old):  # by a run that was killed here
            shutil.rmtree(left_behind, ignore_errors=True)
        model = accelerator.unwrap_model(pair_model).model
        with writing_errors(folder):
            model.save_pretrained(partial, state_dict={name.removeprefix("model."): w for name, w in weights.items()})
            processor.save_pretrained(partial)
            write_model_card(model, processor, partial, **card)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
