"""What a run shows: pictures of held-out images at each evaluation, and its report at the end."""

from __future__ import annotations

import itertools
import re
import shlex
from collections import Counter
from pathlib import Path

import numpy as np

from ..data.pairs import BadPairError, PairDataset
from ..data.sources import CLASS_CAPTION
from ..hub.configs import EMBEDDED
from ..model.engine import Engine
from ..model.modeling_iclip import ICLIPModel
from ..model.processing_iclip import ICLIPProcessor
from ..plots.colors import overlay
from ..plots.sheets import picture_grid
from ..utils.files import atomic_write
from .checkpoints import RunState, holds_start
from .nouns import NounPrompts
from .settings import MAP_METRICS, Settings


_LABELS = 2
_LOOKED_AT = 1000  # pairs, for the labels
FEWEST = 10  # held-out pairs; on fewer, the interval of a change is too narrow


def draw_examples(
    model: ICLIPModel, processor: ICLIPProcessor, pairs: PairDataset, count: int, folder: Path, step: int
) -> None:
    """
    Draws the first pairs of a data set as `<step>.png`: each image beside the map of its caption, after the map that the model of
    step 0 had. Its maps are kept in the folder.
    """
    shown = [pairs[index] for index in range(min(count, len(pairs)))]
    images, captions = ([pair[name] for pair in shown] for name in ("image", "caption"))
    model.eval()
    explanations = Engine(model, processor, templates="{}").run(images, [[caption] for caption in captions])
    columns = {f"step {step}": [explanation.map(0).numpy() for explanation in explanations]}
    kept = folder / "before.npz"
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


def report(settings: Settings, state: RunState, held_out: PairDataset | None) -> str:
    """
    Returns the end of a run as text: the scores before and after, whether the model got better, its folder, and commands to use it, with
    texts and an image of the validation pairs `held_out`.
    """
    lines = [""]
    if state.metrics:
        measured_on = [f"{len(held_out)} held-out pairs"] if held_out is not None else []
        measured_on += [settings.eval_dataset] if settings.eval_dataset != "none" else []
        columns = {"before": state.before, "after": state.metrics} if state.before else {"": state.metrics}
        lines.append(f"Measured on {' and '.join(measured_on)}:")
        lines.append(f"{'':<24}" + "".join(f"{name:>10}" for name in columns))
        lines += [
            f"  {name:<22}" + "".join(f"{_number(values[name]):>10}" for values in columns.values())
            for name in state.metrics
        ]
        lines.append("")
    if state.bad_steps:
        lines.append(f"{state.bad_steps} of {state.step} steps had no finite loss and gradient, and changed nothing.")
    if state.before:
        lines += _verdict(settings, state, held_out)
    elif not state.metrics:
        lines.append("Nothing was measured: name --validation_data, or hold out a part by --validation_share.")
    if holds_start(settings, state):
        lines.append(
            f"No evaluation was better than the start, so {settings.output_dir} holds the model that you started from "
            f"({settings.model}). Train on more pairs, or with another --learning_rate. Next:"
        )
    else:
        lines.append(f"The trained model is in {settings.output_dir}. Next:")
    folder = shlex.quote(settings.output_dir)
    repository = re.sub(r"[^\w.-]+", "-", settings.name, flags=re.ASCII)  # what the Hub allows
    image, labels = example(held_out)
    texts = " ".join(f"--text {shlex.quote(label)}" for label in labels)
    lines.append(f"  iclip explain {shlex.quote(image)} {texts} --model {folder}")
    if not holds_start(settings, state):
        lines.append(f"  iclip push {folder} your-name/{repository} --dry-run")
    return "\n".join(lines)


def own_labels(pairs: PairDataset) -> list[str]:
    """Returns the labels that most captions of a data set have, see [`example`]."""
    counts = Counter(itertools.chain(*_labels(pairs).values()))
    return [label for label, _ in counts.most_common(_LABELS)]


def example(pairs: PairDataset | None) -> tuple[str, list[str]]:
    """
    Returns an image of a data set, as a file if it is one, and texts that it shows: its class, or else nouns of its captions, or else a
    caption. The image is the first with such texts.
    """
    labels = _labels(pairs) if pairs is not None else {}
    for row in sorted(labels, key=lambda row: not labels[row]):
        if texts := labels[row][:_LABELS] or _captions(pairs, row)[:1]:
            return str(pairs.image_file(row) or "photo.jpg"), texts
    return "photo.jpg", ["..."]


def _labels(pairs: PairDataset) -> dict[int, list[str]]:
    """Returns the labels of the first pairs by row: classes if the captions are made of them, else nouns, first those of most captions."""
    captions = {row: _captions(pairs, row) for row in range(min(len(pairs), _LOOKED_AT))}
    start, end = CLASS_CAPTION.split("{}")
    every = [caption for several in captions.values() for caption in several]
    if all(caption.startswith(start) for caption in every) and len(set(every)) < len(every):
        return {row: [caption.removeprefix(start).removesuffix(end) for caption in captions[row]] for row in captions}
    nouns = NounPrompts.from_file(EMBEDDED / "nouns.txt")
    counts = {row: Counter(itertools.chain(*map(sorted, map(nouns.find, captions[row])))) for row in captions}
    return {row: [nouns.nouns[number] for number, _ in counts[row].most_common()] for row in captions}


def _captions(pairs: PairDataset, row: int) -> list[str]:
    """Returns the captions of a pair that a terminal shows; none of a bad pair."""
    try:
        captions = [" ".join(caption.split()) for caption in pairs.captions(row)]
    except BadPairError:
        return []
    return [caption for caption in captions if caption.isprintable()]


def _verdict(settings: Settings, state: RunState, held_out: PairDataset | None) -> list[str]:
    """Returns whether the model got better, as far as the held-out pairs can tell: in each metric, with its interval."""

    def change(name: str) -> str:
        before, after = state.before[name], state.metrics[name]
        moved = "rose" if after > before else "fell"
        said = f"{name} {moved} from {_number(before)} to {_number(after)}" if after != before else f"{name} stayed"
        if interval := state.change.get(name):
            said += f" (95 % interval of the change: {' to '.join(map(_number, interval))})"
        return said

    lines = []
    if state.change and len(held_out) < FEWEST:
        lines.append(
            f"No measurable change: {len(held_out)} held-out pairs are too few to tell. Hold out more by --validation_share, or name "
            "some by --validation_data."
        )
    elif state.change:
        better = [name for name, (low, high) in state.change.items() if (high < 0 if name == "val_loss" else low > 0)]
        for kind, names in (("better", better), ("worse", state.lost)):
            if names:
                lines.append(f"The model got {kind}: {', '.join(map(change, names))}.")
        if not lines:
            lines.append(f"No measurable change: {change(settings.best_metric)}.")
    if maps := [name for name in MAP_METRICS if name in state.before]:
        lines.append(f"On {settings.eval_dataset}, {', '.join(map(change, maps))}.")
    return lines


def _number(value: float) -> str:
    return f"{value:.4g}"
