"""The measures of a training on held-out pairs: retrieval, the interval of its change, and pictures of maps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..model.engine import Engine
from ..model.modeling_iclip import ICLIPModel
from ..model.processing_iclip import ICLIPProcessor
from ..plots.colors import overlay
from ..plots.sheets import picture_grid
from ..utils.files import atomic_write


MIN_PAIRS_FOR_INTERVAL = 10  # held-out pairs; on fewer, the interval of a change is too narrow
_BLOCK = 1024  # queries whose logits are in memory at once
_BOOTSTRAPS = 2000


def content_ids(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """
    Returns ids (B,) of B items, by their content in the tensors (B, ...). Items that are equal up to zeros at their
    end have the same id.
    """
    items = zip(*(tensor.flatten(1).cpu().numpy() for tensor in tensors))
    contents = (b"".join(part.tobytes() for part in item).rstrip(b"\0") for item in items)
    digests = (hashlib.sha256(content).digest()[:8] for content in contents)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])


def retrieval_metrics(images: torch.Tensor, texts: torch.Tensor, pair_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Returns metrics of each pair, (num_pairs,) each, from scaled vectors of images and vectors of their captions,
    (num_pairs, P) each. Another pair with the same image or caption also answers a query, by the ids (num_pairs, 2) of
    images and captions: some data sets have a row for each caption of an image. As in training, a pair with the same
    caption is no negative in the loss. The logits are computed in blocks, so that memory does not grow with the square
    of the number of pairs.
    """
    captions = pair_ids[:, 1]

    def search(queries: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses, hits = [], []
        for block in torch.arange(len(queries), device=queries.device).split(_BLOCK):
            logits = queries[block] @ candidates.T
            hits.append(100 * (pair_ids[logits.argmax(1)] == pair_ids[block]).any(1).float())
            is_equal = (captions[block].unsqueeze(1) == captions).scatter(1, block.unsqueeze(1), False)
            losses.append(F.cross_entropy(logits.masked_fill(is_equal, -torch.inf), block, reduction="none"))
        return torch.cat(losses), torch.cat(hits)

    (image_loss, image_to_text), (text_loss, text_to_image) = search(images, texts), search(texts, images)
    return {
        "loss": (image_loss + text_loss) / 2,
        "image_to_text": image_to_text,
        "text_to_image": text_to_image,
    }


def change_interval(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """
    Returns the 95 % interval of the mean change of a metric over pairs, by the paired bootstrap: pairs are resampled
    together with their values before and after. The seed is fixed.
    """
    changes, rng = np.subtract(after, before), np.random.default_rng(0)
    means = [changes[rng.integers(len(changes), size=len(changes))].mean() for _ in range(_BOOTSTRAPS)]
    return np.quantile(means, [0.025, 0.975]).tolist()


def regressed_metrics(intervals: Mapping[str, Sequence[float]], num_pairs: int) -> list[str]:
    """
    Returns the metrics that got worse: the interval of their change, from [`change_interval`], has changes for the
    worse and none for the better. Returns none for fewer than `MIN_PAIRS_FOR_INTERVAL` pairs.
    """
    if num_pairs < MIN_PAIRS_FOR_INTERVAL:
        return []
    gains = {name: [-high, -low] if name == "loss" else [low, high] for name, (low, high) in intervals.items()}
    return [name for name, (low, high) in gains.items() if low < 0 and high <= 0]


def plot_examples(
    model: ICLIPModel, processor: ICLIPProcessor, pairs: Sequence[Mapping], folder: Path, step: int
) -> None:
    """
    Writes a picture of pairs, `<step>.png`: each image beside the map of its caption by the model of step 0, and the
    map by this model. The folder keeps the maps of step 0.
    """
    images, captions = ([pair[name] for pair in pairs] for name in ("image", "caption"))
    explanations = Engine(model, processor, templates="{}").run(images, [[caption] for caption in captions])
    columns = {f"step {step}": [explanation.map(0).numpy() for explanation in explanations]}
    file = folder / "before.npz"
    if step == 0:
        with atomic_write(file) as partial, open(partial, "wb") as opened:  # numpy would add a suffix to a file name
            np.savez_compressed(opened, *(map_.astype(np.float16) for map_ in columns["step 0"]))
    elif file.is_file():
        with np.load(file) as before:
            columns = {"before": [before[name].astype(np.float32) for name in before.files], **columns}
    pictures = []
    for image, *maps in zip(images, *columns.values()):
        pictures += [image, *(overlay(image, map_) for map_ in maps)]
    titles = ["", *columns] + [""] * (len(pictures) - len(columns) - 1)
    sheet = picture_grid(pictures, titles, 1 + len(columns), captions)
    with atomic_write(folder / f"{step:07d}.png") as partial:
        sheet.save(partial, format="png")
