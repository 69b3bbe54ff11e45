"""Base class of the results of evaluations, and their files."""

from __future__ import annotations

import csv
import io
import json
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path

from ..utils.files import atomic_write


@dataclass
class Result(ABC):
    """
    The results of an evaluation and its protocol. A figure that the data cannot measure is None.

    Attributes:
        protocol (`dict`): model, data set with its fingerprint, resolution, prompts, options, software versions.
        results (`dict`): the scores of each method.
        per_class (`dict`): for each method, a list with one `dict` for each class.
        timing (`dict`): seconds in total, seconds in the model, number of images of this process.
    """

    protocol: dict
    results: dict[str, dict]
    per_class: dict[str, list[dict]]
    timing: dict[str, float]

    @abstractmethod
    def table(self) -> str:
        """Returns the scores as a Markdown table."""

    def to_json(self) -> str:
        """Returns all attributes as JSON text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def per_class_csv(self) -> str:
        """Returns `per_class` as CSV text, with a row for each method and class."""
        text = io.StringIO()
        rows = [{"method": method, **row} for method, rows in self.per_class.items() for row in rows]
        writer = csv.DictWriter(text, rows[0])
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
