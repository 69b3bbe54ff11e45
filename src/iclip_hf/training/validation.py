"""Retrieval metrics on validation pairs, and pictures of their maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.pairs import PairDataset
from ..explainers.localizer import explain
from ..figures.colors import overlay
from ..figures.sheets import picture_grid
from ..modeling_iclip import ICLIPModel
from ..processing_iclip import ICLIPProcessor
from ..utils.extras import require_extra
from ..utils.files import atomic_write, writing_errors
from .interrupts import ignore_signals


with require_extra("train"):
    from accelerate import Accelerator
    from accelerate.utils import send_to_device


_DRAWS = 2000  # of the bootstrap


@torch.no_grad()
def validate(
    accelerator: Accelerator, pair_model: nn.Module, dataset: Dataset, batch_size: int, num_workers: int = 0
) -> dict[str, torch.Tensor]:
    """
    Measures retrieval with the recognition branch, and its loss over all pairs of a validation set at once.

    Returns:
        `dict` of `torch.Tensor` of shape `(N,)`, a value for each pair, whose mean is the metric: `val_loss`, and `image_to_text`
        and `text_to_image`, 100 if the nearest text (image) of the image (text) is its own, or has the same caption, and else 0.
    """
    dataset.set_epoch(0)
    # Contiguous parts, padded to equal length because each forward pass gathers.
    part = math.ceil(len(dataset) / accelerator.num_processes)
    rows = [(accelerator.process_index * part + i) % len(dataset) for i in range(part)]
    pair_model.eval()
    images, texts = [], []
    options = {"collate_fn": dataset.collate, "num_workers": num_workers, "worker_init_fn": ignore_signals}
    batches = DataLoader(dataset, min(batch_size, part), sampler=rows, **options)
    for batch in tqdm(batches, desc="Held-out pairs", leave=False, disable=not accelerator.is_main_process):
        batch.pop("skipped")
        outputs = pair_model(**send_to_device(batch, accelerator.device))
        images.append(outputs["image_embeds"])
        texts.append(outputs["text_embeds"])
        scale = outputs["logit_scales"][0]
    pair_model.train()
    images, texts = (accelerator.gather(torch.cat(parts))[: len(dataset)] for parts in (images, texts))
    logits = scale * images @ texts.T
    own = torch.arange(len(logits), device=logits.device)
    # Pairs with one caption have one number, because they cannot be told apart.
    captions = dataset.drawn_captions()
    numbers = {caption: number for number, caption in enumerate(captions)}
    same = torch.tensor([numbers[caption] for caption in captions], device=logits.device)
    return {
        "val_loss": sum(F.cross_entropy(rows, own, reduction="none") for rows in (logits, logits.T)) / 2,
        "image_to_text": 100 * (same[logits.argmax(1)] == same).float(),
        "text_to_image": 100 * (same[logits.argmax(0)] == same).float(),
    }


def change_interval(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """
    Returns the 95 % interval of the mean change of a score over pairs, by the paired bootstrap: pairs are drawn again, with their
    scores before and after. The draws are always the same.
    """
    changes, draws = np.subtract(after, before), np.random.default_rng(0)
    means = [changes[draws.integers(len(changes), size=len(changes))].mean() for _ in range(_DRAWS)]
    return np.quantile(means, [0.025, 0.975]).tolist()


def draw_examples(
    model: ICLIPModel, processor: ICLIPProcessor, pairs: PairDataset, count: int, folder: Path, step: int
) -> None:
    """
    Draws the first pairs of a data set as `<step>.png`: each image beside the map of its caption, after the map that the model of
    step 0 had. Its maps are kept in the folder.
    """
    shown = [pairs[index] for index in range(min(count, len(pairs)))]
    images, captions = ([pair[name] for pair in shown] for name in ("image", "caption"))
    explanations = explain((model, processor), images, [[caption] for caption in captions], templates=["{}"])
    columns = {f"step {step}": [explanation.map(0).numpy() for explanation in explanations]}
    kept = folder / "before.npz"
    with writing_errors(folder):
        folder.mkdir(exist_ok=True)
    if step == 0:
        with atomic_write(kept) as partial, open(partial, "wb") as opened:  # numpy would add a suffix to a file name
            np.savez_compressed(opened, *(map_.astype(np.float16) for map_ in columns["step 0"]))
    elif kept.is_file():
        with np.load(kept) as before:
            columns = {"before": [before[name].astype(np.float32) for name in before.files], **columns}
    pictures = []
    for image, *maps in zip(images, *columns.values()):
        pictures += [image, *(overlay(image, map_) for map_ in maps)]
    titles = ["", *columns] + [""] * (len(pictures) - len(columns) - 1)
    sheet = picture_grid(pictures, titles, 1 + len(columns), captions)
    with atomic_write(folder / f"{step:07d}.png") as partial:
        sheet.save(partial, format="png")
