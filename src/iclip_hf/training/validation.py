"""
The measures of a training on held-out pairs: retrieval, pictures of maps, and the report of what the training changed.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.formats.folders import CLASS_CAPTION
from ..data.nouns import NounPrompts
from ..data.pairs import PairDataset
from ..hub.configs import EMBEDDED
from ..model.engine import Engine
from ..model.modeling_iclip import ICLIPModel
from ..model.processing_iclip import ICLIPProcessor
from ..plots.colors import overlay
from ..plots.sheets import picture_grid
from ..utils.extras import require_extra
from ..utils.files import atomic_write
from ..utils.interrupts import ignore_signals
from .checkpoints import RunState, kept_initial_model
from .data import PairBatches
from .settings import Settings


with require_extra("train"):
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

FEWEST = 10  # held-out pairs; on fewer, the interval of a change is too narrow
_BLOCK = 1024  # rows of logits that are in memory at once
_BOOTSTRAPS = 2000
_IN_PERCENT = ("text_to_image", "image_to_text", "mAP", "mMIoU", "text_contrast")
_LOOKED_AT = 1000  # pairs, for the labels


@torch.no_grad()
def validate(
    accelerator: Accelerator, pair_model: nn.Module, dataset: PairBatches, batch_size: int, num_workers: int = 0
) -> dict[str, torch.Tensor]:
    """
    Measures retrieval with the recognition branch, and its loss over all pairs of a validation set at once.

    Returns:
        `dict` of `torch.Tensor` of shape `(N,)`, a value for each pair, whose mean is the metric: `val_loss`, and
        `image_to_text` and `text_to_image`, 100 if the nearest text (image) of the image (text) is its own, or of a
        pair with the same image or caption, and else 0.
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
    return retrieval_scores(scale * images, texts, dataset.sampled_captions(), dataset.image_digests())


def retrieval_scores(
    images: torch.Tensor, texts: torch.Tensor, captions: Sequence[str], image_digests: Sequence[bytes]
) -> dict[str, torch.Tensor]:
    """
    Returns the result of [`validate`] for scaled vectors of images (N, P) and vectors of their captions (N, P). The
    logits are computed in blocks, so that memory does not grow with N squared.
    """

    def numbers(names: Sequence) -> list[int]:
        last = {name: number for number, name in enumerate(names)}
        return [last[name] for name in names]

    # Pairs with one caption have one number, and those with one image, because they cannot be told apart: some data
    # sets have a row for each of several captions.
    same = torch.tensor([numbers(captions), numbers(image_digests)], device=images.device)

    def of_each(queries: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses, hits = [], []
        for rows in torch.arange(len(queries), device=queries.device).split(_BLOCK):
            logits = queries[rows] @ candidates.T
            losses.append(F.cross_entropy(logits, rows, reduction="none"))
            hits.append(100 * (same[:, logits.argmax(1)] == same[:, rows]).any(0).float())
        return torch.cat(losses), torch.cat(hits)

    (image_loss, image_to_text), (text_loss, text_to_image) = of_each(images, texts), of_each(texts, images)
    return {
        "val_loss": (image_loss + text_loss) / 2,
        "image_to_text": image_to_text,
        "text_to_image": text_to_image,
    }


def change_interval(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """
    Returns the 95 % interval of the mean change of a score over pairs, by the paired bootstrap: pairs are resampled,
    with their scores before and after, by a fixed seed.
    """
    changes, rng = np.subtract(after, before), np.random.default_rng(0)
    means = [changes[rng.integers(len(changes), size=len(changes))].mean() for _ in range(_BOOTSTRAPS)]
    return np.quantile(means, [0.025, 0.975]).tolist()


def regressed_metrics(change: Mapping[str, Sequence[float]], pairs: int) -> list[str]:
    """
    Returns the metrics that got worse, by their intervals of [`change_interval`] over so many pairs: the interval
    holds a loss and no gain. None on fewer than `FEWEST` pairs.
    """
    if pairs < FEWEST:
        return []
    gains = {name: [-high, -low] if name == "val_loss" else [low, high] for name, (low, high) in change.items()}
    return [name for name, (low, high) in gains.items() if low < 0 and high <= 0]


def draw_examples(
    model: ICLIPModel, processor: ICLIPProcessor, pairs: PairDataset, count: int, folder: Path, step: int
) -> None:
    """
    Draws the first pairs of a data set as `<step>.png`: each image beside the map of its caption, after the map that
    the model of step 0 had. Its maps are kept in the folder.
    """
    shown = [pairs[index] for index in range(min(count, len(pairs)))]
    images, captions = ([pair[name] for pair in shown] for name in ("image", "caption"))
    model.eval()
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


def common_labels(pairs: PairDataset) -> list[str]:
    """
    Returns the two labels that most of the first captions have: classes, if all captions are made of them, else nouns.
    """
    captions = [caption for row in range(min(len(pairs), _LOOKED_AT)) for caption in pairs.captions(row)]
    start, end = CLASS_CAPTION.split("{}")
    if all(caption.startswith(start) for caption in captions) and len(set(captions)) < len(captions):
        labels = [caption.removeprefix(start).removesuffix(end) for caption in captions]
    else:
        nouns = NounPrompts.from_file(EMBEDDED / "nouns.txt")
        labels = [nouns.nouns[number] for caption in captions for number in sorted(nouns.nouns_in(caption))]
    return [label for label, _ in Counter(labels).most_common(2)]


def report(settings: Settings, state: RunState, held_out: PairDataset | None) -> list[str]:
    """
    Returns the last lines that a run prints: a table of the metrics before and after with the 95 % interval of their
    change, the folder of the model, and the command that explains an image with it.
    """
    lines = [""]
    if state.metrics:
        few = held_out is not None and len(held_out) < FEWEST
        change = {} if few else state.change
        rows = [["", "before", "after", "change (95 %)" if change else ""] if state.before else ["", "", "", ""]]
        for name, after in state.metrics.items():
            before = _number(state.before[name]) if state.before else ""
            heading = f"{name} %" if name in _IN_PERCENT else name
            rows.append([heading, before, _number(after), " to ".join(map(_number, change.get(name, [])))])
        lines += ["{:<16}{:>12}{:>12}   {}".format(*row).rstrip() for row in rows]
        if held_out is not None:
            too_few = ", too few for an interval" if few and state.change else ""
            lines.append(f"{len(held_out)} held-out pairs{too_few}")
    else:
        lines.append("Nothing was measured: name --validation_data, or hold out a part by --validation_share.")
    if state.bad_steps:
        lines.append(f"{state.bad_steps} of {state.step} steps had no finite loss and gradient, and changed nothing.")
    folder = shlex.quote(settings.output_dir)
    if kept_initial_model(settings, state):
        lines.append(
            f"No evaluation was better than the start: {folder} holds the model that you started from "
            f"({settings.model})."
        )
    else:
        lines.append(f"The trained model is in {folder}.")
    labels = common_labels(held_out) if held_out is not None else []
    lines.append(f"Next: iclip explain PHOTO --text {shlex.quote(', '.join(labels) or '...')} --model {folder}")
    return lines


def _number(value: float) -> str:
    return f"{value:.4g}"
