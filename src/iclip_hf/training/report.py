"""What a run says at its end."""

from __future__ import annotations

import itertools
import re
import shlex
from collections import Counter

from ..data.pairs import BadPairError, PairDataset
from ..data.sources import CLASS_CAPTION
from ..hub.configs import SHIPPED
from .checkpoints import RunState, holds_start
from .nouns import NounPrompts
from .settings import MAP_METRICS, Settings


_LABELS = 2
_LOOKED_AT = 1000  # pairs, for the labels
_FEWEST = 10  # held-out pairs; on fewer, the interval is too narrow


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
            f"  {name:<22}" + "".join(f"{_number(values.get(name)):>10}" for values in columns.values())
            for name in state.metrics
        ]
        lines.append("")
    if state.bad_steps:
        lines.append(f"{state.bad_steps} of {state.step} steps had no finite loss and gradient, and changed nothing.")
    if state.before:
        lines.append(_verdict(settings, state, held_out))
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
    lines += [
        f"  iclip explain {shlex.quote(image)} {texts} --model {folder}",
        f"  iclip push {folder} your-name/{repository} --dry-run",
    ]
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
    nouns = NounPrompts.from_file(SHIPPED / "iclip-dinov2-s14-minilm" / "nouns.txt")
    counts = {row: Counter(itertools.chain(*map(sorted, map(nouns.find, captions[row])))) for row in captions}
    return {row: [nouns.nouns[number] for number, _ in counts[row].most_common()] for row in captions}


def _captions(pairs: PairDataset, row: int) -> list[str]:
    """Returns the captions of a pair that a terminal shows; none of a bad pair."""
    try:
        captions = [" ".join(caption.split()) for caption in pairs.captions(row)]
    except BadPairError:
        return []
    return [caption for caption in captions if caption.isprintable()]


def _verdict(settings: Settings, state: RunState, held_out: PairDataset | None) -> str:
    """Returns whether the model got better, as far as the held-out pairs can tell: in each metric, with its interval."""

    def change(name: str) -> str:
        before, after = state.before[name], state.metrics[name]
        moved = "rose" if after > before else "fell"
        said = f"{name} {moved} from {_number(before)} to {_number(after)}" if after != before else f"{name} stayed"
        interval = state.change.get(name)
        return said + (
            f" (95 % interval of the change: {_number(interval[0])} to {_number(interval[1])})" if interval else ""
        )

    lines = []
    if state.change and len(held_out) < _FEWEST:
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
    return "\n".join(lines)


def expected_time(
    settings: Settings, step: int, total: int, step_seconds: float, evaluation_seconds: float | None
) -> str:
    """Returns how long the steps after `step` and their evaluations will take, as a sentence; without evaluations if none was timed."""
    evaluations = total // settings.eval_steps - step // settings.eval_steps + (total % settings.eval_steps > 0)
    minutes = ((total - step) * step_seconds + evaluations * (evaluation_seconds or 0)) / 60
    work = f"{total - step} steps" + (
        f" and {evaluations} evaluations" if evaluation_seconds else ", without evaluations"
    )
    took = (
        "less than a minute"
        if minutes < 1
        else f"about {minutes:.0f} min"
        if minutes < 90
        else f"about {minutes / 60:.0f} h"
    )
    return f"Expected time: {took} for {work}."


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
