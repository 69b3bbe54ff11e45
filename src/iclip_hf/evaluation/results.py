"""The result of an evaluation, and its files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..utils.files import atomic_write, check_outputs, new_file


# The scores of the measure `presence` in its table: for each its heading and number of digits.
PRESENCE = {
    "auc": ("AUC of presence", 3),
    "auc_hard": ("against like classes", 3),
    "kept": ("kept % at presence {min_presence}", 1),
    "kept_things": ("things %", 1),
    "kept_stuff": ("stuff %", 1),
    "passed": ("passed %", 1),
    "passed_hard": ("like classes passed %", 1),
    "mAP": ("mAP by presence %", 1),
    "calibration_error": ("calibration error", 3),
}


@dataclass
class EvaluationResult:
    """
    The result of [`evaluate`]. A score that the data cannot measure is None.

    Attributes:
        protocol (`dict`): model, data set with its fingerprint, resolution, prompts, options, software versions.
        results (`dict`): for each method, the scores of all measures, and `left_out`, for each measure the number of items that
            have no score, by reason.
        presence (`dict`): scores of the measure `presence`; empty if it was not measured.
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
        """Returns the scores as a Markdown table, which says if they are of some images only, and two tables on presence."""
        headings = list(next(iter(self.columns.values())))
        seen, whole = (self.protocol["dataset"][name] for name in ("images", "images_in_split"))
        first = "method" if seen == whole else f"method, on {seen} of {whole} images"
        lines = [markdown([first, *headings], [[method, *row.values()] for method, row in self.columns.items()])]
        if self.presence:
            columns = {name: heading.format(**self.presence) for name, (heading, _) in PRESENCE.items()}
            shown = {name: rounded(self.presence[name], digits) for name, (_, digits) in PRESENCE.items()}
            bins = self.presence["reliability"]
            edges = [f"{index / len(bins):.1f} to {(index + 1) / len(bins):.1f}" for index in range(len(bins))]
            names = {"mean": ("mean", 2), "shown": ("share that is shown", 2), "pairs": ("pairs", 0)}
            rows = [[name, *(rounded(one[row], digits) for one in bins)] for row, (name, digits) in names.items()]
            lines.append(markdown([*columns.values()], [[*shown.values()]]))
            lines.append(markdown([f"presence at the prior {self.presence['prior']:.2f}", *edges], rows))
        return "\n\n".join(lines)

    def to_json(self) -> str:
        """Returns all attributes but the table as JSON text."""
        values = asdict(self)
        del values["columns"]
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    def per_class_csv(self) -> str:
        """Returns `per_class` as CSV text, with a row for each method and class."""
        rows = [{"method": method, **row} for method, rows in self.per_class.items() for row in rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def save(self, path: str | Path) -> tuple[Path, Path]:
        """
        Writes `path` (JSON) and, beside it, the scores of the classes as `.csv`, each atomically, and returns both paths. The second has
        a number if such a file exists.
        """
        path, table = Path(path), new_file(Path(path).with_suffix(".csv"))
        check_outputs([path])
        with atomic_write(table) as rows, atomic_write(path) as result:  # both are whole before one is renamed
            result.write_text(self.to_json(), encoding="utf-8")
            rows.write_text(self.per_class_csv(), encoding="utf-8")
        return path, table


def read_results(path: str | Path, *parts: str) -> dict:
    """
    Reads the JSON file of [`EvaluationResult.save`]. Raises `FileNotFoundError` if there is none, and `ValueError` unless each of `parts`
    is a mapping.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not all(isinstance(content.get(part), dict) for part in parts):
        raise ValueError(f"{path} is no JSON file of `iclip evaluate --output`.")
    return content


def class_thresholds(path: str | Path, labels: Sequence[str], method: str = "itsm") -> list[float]:
    """
    Reads the best threshold of each class, by mMIoU, from the file of [`read_results`]. Raises also `ValueError` if the method is not
    there, or a class has no threshold in [0, 1].
    """
    per_class = read_results(path, "per_class")["per_class"]
    if method not in per_class:
        raise ValueError(f"{path} has the methods {list(per_class)}, not {method!r}.")
    try:
        found = {row["name"]: row["threshold"] for row in per_class[method] if row["threshold"] is not None}
        lacking = [label for label in labels if not 0 <= found.get(label, -1) <= 1]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no JSON file of `iclip evaluate --output`: no thresholds of classes.") from error
    if lacking:
        raise ValueError(f"{path} has no threshold in [0, 1] for {lacking}, only {found}.")
    return [found[label] for label in labels]


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *rows])


def measured(value: float) -> float | None:
    """Converts NaN, which JSON does not have, to None."""
    return None if math.isnan(value) else float(value)


def rounded(value: float | None, digits: int) -> str:
    """Formats a score for a table."""
    return "-" if value is None else f"{value:.{digits}f}"
