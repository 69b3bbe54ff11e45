"""Pictures of held-out images with the maps of their captions, before and during a training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..data.pairs import PairDataset
from ..explainers.localizer import explain
from ..modeling_iclip import ICLIPModel
from ..plots.colors import overlay
from ..plots.sheets import picture_grid
from ..processing_iclip import ICLIPProcessor
from ..utils.files import atomic_write, writing_errors


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
