"""What a run says at its end."""

from __future__ import annotations

import itertools
import shlex
from collections import Counter

from ..data.pairs import BadPairError, PairDataset
from ..data.sources import CLASS_CAPTION
from ..hub.configs import SHIPPED
from .checkpoints import RunState
from .nouns import NounPrompts
from .settings import Settings


_LABELS = 2
_CAPTIONS = 1000  # read for the labels


def report(settings: Settings, state: RunState, held_out: PairDataset | None) -> str:
    """
    Returns the end of a run as text: the scores before and after, whether the model got better, its folder, and what to do with it.

    Args:
        settings: settings of the run.
        state: its last state.
        held_out: validation pairs; texts and an image of the proposed commands come from them.
    """
    lines = [""]
    if state.metrics:
        measured_on = f"{len(held_out)} held-out pairs" if held_out is not None else settings.eval_dataset
        columns = {"before": state.before, "after": state.metrics} if state.before else {"": state.metrics}
        lines.append(f"{measured_on:<24}" + "".join(f"{name:>10}" for name in columns))
        lines += [
            f"  {name:<22}" + "".join(f"{_number(values.get(name)):>10}" for values in columns.values())
            for name in state.metrics
        ]
        lines.append("")
    if state.before:
        name = settings.best_metric
        before, after = state.before[name], state.metrics[name]
        if settings.is_better(after, before):
            moved = "rose" if after > before else "fell"
            lines.append(f"The model got better: {name} {moved} from {_number(before)} to {_number(after)}.")
        else:
            lines.append(
                f"The model did not get better: {name} was {_number(before)} and is {_number(after)} at best. Keep the model that you "
                f"started from ({settings.model}), or train on more pairs or with a lower --learning_rate."
            )
    elif not state.metrics:
        lines.append(
            "Nothing was measured: name pairs by --validation_data, or hold out a part by --validation_share."
        )
    lines.append(f"The trained model is in {settings.output_dir}. Next:")
    folder = shlex.quote(settings.output_dir)
    texts = " ".join(f"--text {shlex.quote(label)}" for label in own_labels(held_out))
    lines += [
        f"  iclip explain {shlex.quote(_image(held_out))} {texts} --model {folder}",
        f"  iclip push {folder} your-name/{settings.name} --dry-run",
    ]
    return "\n".join(lines)


def own_labels(pairs: PairDataset | None) -> list[str]:
    """
    Returns classes, or else general nouns, of a data set's captions, or else a caption. Those of the first caption, whose image the
    command shows, precede those that most captions have.
    """
    if pairs is None:
        return ["..."]
    captions = [" ".join(pairs.caption(row).split()) for row in range(min(len(pairs), _CAPTIONS))]
    captions = [caption for caption in captions if caption and caption.isprintable()]  # a terminal shows them
    start, end = CLASS_CAPTION.split("{}")
    labels = [[one.removeprefix(start).removesuffix(end)] for one in captions if one.startswith(start)]
    if len(labels) < len(captions) or len({label for [label] in labels}) == len(captions):
        nouns = NounPrompts.from_file(SHIPPED / "iclip-dinov2-s14-minilm" / "nouns.txt")
        labels = [[nouns.nouns[number] for number in nouns.find(caption)] for caption in captions]
    counts = Counter(itertools.chain(*labels))
    ordered = sorted(counts, key=lambda label: (label not in labels[0], -counts[label]))
    return ordered[:_LABELS] or captions[:1] or ["..."]


def _image(pairs: PairDataset | None) -> str:
    try:
        file = pairs.image_file(0) if pairs is not None else None
    except BadPairError:
        file = None
    return str(file or "photo.jpg")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
