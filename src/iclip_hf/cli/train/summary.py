"""The summary of a training: what it changed, and what to do with its model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...data.pairs import PairDataset
from ...training.arguments import MAP_METRICS, RETRIEVAL_METRICS
from ...training.evaluation import MIN_PAIRS_FOR_INTERVAL
from ...utils.tables import table


_IN_PERCENT = ("text_to_image", "image_to_text", "mAP", "mMIoU", "text_contrast")


def summary(
    log_history: Sequence[Mapping],
    best_step: int | None,
    metric: str,
    folder: Path,
    held_out: PairDataset | None,
    kept_source: str,
) -> list[str]:
    """
    Returns the last lines of a training: a table of the metrics before and after with the 95 % interval of their
    change, the folder of the model, and the command that explains an image with it.

    Args:
        log_history: as in `TrainerState`.
        best_step (`int`, *optional*): step of the best evaluation, if its model was loaded at the end. Otherwise the
            last evaluation counts as "after".
        metric: the metric by which it is the best.
        kept_source: name of the model that was trained further, if no evaluation was better and the folder holds it
            again; otherwise empty.
    """
    lines = ["", *_metric_lines(log_history, best_step, held_out)]
    quoted = shlex.quote(str(folder))
    if kept_source:
        lines.append(
            f"No evaluation was better than the start: {quoted} holds the model that you started from ({kept_source})."
        )
    else:
        chosen = f", the best by {metric}," if best_step is not None else ""
        lines.append(f"The trained model{chosen} is in {quoted}.")
    lines.append(f"Next: iclip explain PHOTO --text ... --model {quoted}")
    return lines


def _metric_lines(log_history: Sequence[Mapping], best_step: int | None, held_out: PairDataset | None) -> list[str]:
    """Returns the table of the metrics and the number of held-out pairs, or that nothing was measured."""
    evaluations = {entry["step"]: entry for entry in log_history if any(map(_is_metric, entry))}
    before = evaluations.get(0, {})
    after = evaluations.get(best_step or max(evaluations, default=0), {})
    if not after:
        return ["Nothing was measured: name --validation_data, or hold out a part by --validation_share."]
    too_few = held_out is not None and len(held_out) < MIN_PAIRS_FOR_INTERVAL
    rows = []
    for name in filter(_is_metric, after):
        metric = name.removeprefix("eval_")
        metric += " %" if metric in _IN_PERCENT else ""
        low_and_high = [after.get(f"{name}_change_{end}") for end in ("low", "high")]
        is_known = before and not too_few and None not in low_and_high
        change = " to ".join(map(_number, low_and_high)) if is_known else ""
        rows.append([metric, _number(before[name]) if before else "", _number(after[name]), change])
    lines = table(["", "before", "after", "change (95 %)"], rows)
    if held_out is not None:
        lines.append(f"{len(held_out)} held-out pairs{', too few to tell a change' if too_few else ''}")
    return lines


def _is_metric(name: str) -> bool:
    return name.startswith("eval_") and name.removeprefix("eval_") in (*RETRIEVAL_METRICS, *MAP_METRICS)


def _number(value: float) -> str:
    return f"{value:.4g}"
