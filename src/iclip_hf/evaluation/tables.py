"""The scores of an evaluation as Markdown tables."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..utils.tables import table


if TYPE_CHECKING:
    from .metrics.metric import Metric


def result_tables(
    metrics: Sequence[Metric], results: Mapping[str, Mapping[str, Mapping]], images: int, images_in_split: int
) -> list[str]:
    """
    Returns a table of all methods, an explanation of its columns, and the further tables of the metrics.

    Args:
        metrics, results: the metrics, and the scores of each by method and name of the metric.
        images, images_in_split: number of images that were evaluated, and of all images of the split.
    """
    table_metrics = [metric for metric in metrics if metric.columns]
    first_heading = "method" if images == images_in_split else f"method, on {images} of {images_in_split} images"
    columns = [column for metric in table_metrics for column in metric.columns.values()]
    rows = []
    for method, scores in results.items():
        row_scores = itertools.chain(*(metric.table_scores(scores[metric.name]) for metric in table_metrics))
        cells = [cell(score, decimals) for score, (_, decimals) in zip(row_scores, columns, strict=True)]
        rows.append([method, *cells])
    # Numbers of items, and metrics with further tables, do not depend on the method.
    scores = next(iter(results.values()))
    notes = [metric.legend for metric in table_metrics if metric.legend]
    counts = [
        f"{metric.name} over {scores[metric.name][unit]} {unit}"
        for metric in table_metrics
        for unit in ("pairs", "images")
        if unit in scores[metric.name]
    ]
    if counts:  # so that a reader sees how many items a mean has
        notes.append(f"means: {', '.join(counts)}")
    main = markdown([first_heading, *(heading for heading, _ in columns)], rows) if table_metrics else ""
    legends = "\n".join(f"- {note}" for note in notes)
    further = itertools.chain(*(metric.tables(scores[metric.name]) for metric in metrics))
    return list(filter(None, [main, legends, *further]))


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(table(headings, rows, markdown=True))


def cell(score: float | str | Sequence[float] | None, decimals: int | None) -> str:
    """
    Formats a score with this number of decimals, or as it is if `decimals` is None. Of a list of numbers, equal ones
    are shown once.
    """
    if score is None:
        return "-"
    if isinstance(score, list):
        return " / ".join(dict.fromkeys(cell(number, decimals) for number in score))
    return str(score) if decimals is None else f"{score:.{decimals}f}"
