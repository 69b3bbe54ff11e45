"""Retrieval metrics on validation pairs."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..utils.extras import require_extra
from .interrupts import ignore_signals


with require_extra("train"):
    from accelerate import Accelerator
    from accelerate.utils import send_to_device


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
        outputs = pair_model(**send_to_device(batch, accelerator.device))
        images.append(outputs["image_embeds"])
        texts.append(outputs["text_embeds"])
        scale = outputs["logit_scales"][0]
    pair_model.train()
    images, texts = (accelerator.gather(torch.cat(parts))[: len(dataset)] for parts in (images, texts))
    logits = scale * images @ texts.T
    own = torch.arange(len(logits), device=logits.device)
    # Pairs with one caption have one number, because they cannot be told apart.
    captions = dataset.sampled_captions()
    numbers = {caption: number for number, caption in enumerate(captions)}
    same = torch.tensor([numbers[caption] for caption in captions], device=logits.device)
    return {
        "val_loss": sum(F.cross_entropy(rows, own, reduction="none") for rows in (logits, logits.T)) / 2,
        "image_to_text": 100 * (same[logits.argmax(1)] == same).float(),
        "text_to_image": 100 * (same[logits.argmax(0)] == same).float(),
    }
