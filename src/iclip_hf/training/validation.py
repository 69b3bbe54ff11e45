"""Retrieval metrics on validation pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


_BLOCK = 1024  # rows of logits that are in memory at once


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
    return retrieval_scores(scale * images, texts, dataset.sampled_captions())


def retrieval_scores(images: torch.Tensor, texts: torch.Tensor, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    """
    Returns the result of [`validate`] for scaled vectors of images (N, P) and vectors of their captions (N, P). The logits are computed in
    blocks, so that memory does not grow with N squared.
    """
    # Pairs with one caption have one number, because they cannot be told apart.
    numbers = {caption: number for number, caption in enumerate(captions)}
    same = torch.tensor([numbers[caption] for caption in captions], device=images.device)

    def of_each(queries: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses, hits = [], []
        for own in torch.arange(len(queries), device=queries.device).split(_BLOCK):
            logits = queries[own] @ candidates.T
            losses.append(F.cross_entropy(logits, own, reduction="none"))
            hits.append(100 * (same[logits.argmax(1)] == same[own]).float())
        return torch.cat(losses), torch.cat(hits)

    (image_loss, image_to_text), (text_loss, text_to_image) = of_each(images, texts), of_each(texts, images)
    return {
        "val_loss": (image_loss + text_loss) / 2,
        "image_to_text": image_to_text,
        "text_to_image": text_to_image,
    }
