"""Retrieval metrics on validation pairs, and pictures of their maps."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..data.pairs import PairDataset
from ..localization.localizer import explain
from ..losses import contrastive_loss
from ..modeling_iclip import ICLIPModel
from ..processing_iclip import ICLIPProcessor
from ..utils.extras import require_extra
from ..utils.plots import Sheet, overlay, picture_grid


with require_extra("train"):
    from accelerate import Accelerator
    from accelerate.utils import send_to_device


@torch.no_grad()
def validate(
    accelerator: Accelerator, pair_model: nn.Module, dataset: Dataset, batch_size: int, num_workers: int = 0
) -> dict[str, float]:
    """
    Measures retrieval with the recognition branch, and its loss over all pairs of a validation set at once.

    Returns:
        `dict`: `val_loss`, and `image_to_text` and `text_to_image`, the percentage of images (texts) whose nearest text (image)
        is their own.
    """
    dataset.set_epoch(0)
    # Contiguous parts, padded to equal length because each forward pass gathers.
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
        scale = outputs["logit_scales"][0]
    pair_model.train()
    images, texts = (accelerator.gather(torch.cat(one))[: len(dataset)] for one in (images, texts))
    cosines = images @ texts.T
    own = torch.arange(len(dataset), device=images.device)
    return {
        "val_loss": contrastive_loss(scale * cosines).item(),
        "image_to_text": 100 * (cosines.argmax(1) == own).float().mean().item(),
        "text_to_image": 100 * (cosines.argmax(0) == own).float().mean().item(),
    }


def draw_examples(model: ICLIPModel, processor: ICLIPProcessor, pairs: PairDataset, count: int) -> Sheet:
    """Draws the first pairs of a data set: each image beside the map of its caption."""
    shown = [pairs[index] for index in range(min(count, len(pairs)))]
    images, captions = ([pair[name] for pair in shown] for name in ("image", "caption"))
    explanations = explain(model, processor, images, [[caption] for caption in captions], templates=["{}"])
    pictures, titles = [], []
    for image, caption, explanation in zip(images, captions, explanations):
        pictures += [image, overlay(image, explanation.map(0).numpy())]
        titles += ["", caption]
    return picture_grid(pictures, titles, columns=4)
