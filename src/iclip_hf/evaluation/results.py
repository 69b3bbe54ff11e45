"""The result of an evaluation, and its files."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ..utils.files import atomic_write


@dataclass
class EvaluationResult:
    """
    The result of [`evaluate`]. A figure that the data cannot measure is None.

    Attributes:
        protocol (`dict`): model, data set with its fingerprint, resolution, prompts, options, software versions.
        results (`dict`): for each method, the figures of all measures, and `left_out`, for each measure the number of items that
            have no figure, by reason.
        presence (`dict`): figures of the measure `presence`; empty if it was not measured.
        per_class (`dict`): for each method, a list with one `dict` for each class: id, name and the rows of all measures.
        timing (`dict`): seconds in total, seconds in the model, number of images of this process.
        columns (`dict`): for each method, the cells of the table by heading.
    """

    protocol: dict
    results: dict[str, dict]
    presence: dict[str, float | None]
    per_class: dict[str, list[dict]]
    timing: dict[str, float]
    columns: dict[str, dict[str, str]]

    def table(self) -> str:
        """Returns the scores as a Markdown table, and a line on presence."""
        headings = list(next(iter(self.columns.values())))
        lines = [markdown(["method", *headings], [[method, *row.values()] for method, row in self.columns.items()])]
        if self.presence:
            kept, passed, ap = (rounded(self.presence[name], 1) for name in ("kept", "passed", "mAP"))
            gate = f"presence of at least {self.presence['min_presence']}"
            shares = f"{kept} % of the classes that an image shows, {passed} % of the others"
            lines += ["", f"{gate}: {shares}; mAP by presence {ap} %"]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Returns all attributes but the table as JSON text."""
        values = asdict(self)
        del values["columns"]
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    def per_class_csv(self) -> str:
        """Returns `per_class` as CSV text, with a row for each method and class."""
        text = io.StringIO()
        rows = [{"method": method, **row} for method, rows in self.per_class.items() for row in rows]
        writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def save(self, path: str | Path) -> None:
        """Writes `path` (JSON) and, beside it, the scores of the classes as `.csv`, each atomically."""
        for target, text in ((Path(path), self.to_json()), (Path(path).with_suffix(".csv"), self.per_class_csv())):
            with atomic_write(target) as partial:
                partial.write_text(text, encoding="utf-8")


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *rows])


def measured(value: float) -> float | None:
    """Converts NaN, which JSON does not have, to None."""
    return None if math.isnan(value) else float(value)


def rounded(value: float | None, digits: int) -> str:
    """Formats a figure for a table."""
    return "-" if value is None else f"{value:.{digits}f}"
