"""The result of an evaluation, and its files."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..utils.files import atomic_write, check_outputs


# The scores of the measure `presence` in its table: for each its heading and number of digits.
PRESENCE = {
    "auc": ("AUC of presence", 3),
    "auc_hard": ("against like classes", 3),
    "kept": ("kept at presence {min_presence}, %", 1),
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
        """Returns the scores as a Markdown table, which says if they are of the first images only, and two tables on presence."""
        headings = list(next(iter(self.columns.values())))
        seen, whole = (self.protocol["dataset"][name] for name in ("images", "images_in_split"))
        first = "method" if seen == whole else f"method, on the first {seen} of {whole} images"
        lines = [markdown([first, *headings], [[method, *row.values()] for method, row in self.columns.items()])]
        if self.presence:
            columns = {name: heading.format(**self.presence) for name, (heading, _) in PRESENCE.items()}
            shown = {name: rounded(self.presence[name], digits) for name, (_, digits) in PRESENCE.items()}
            bins = self.presence["reliability"]
            edges = [f"{index / len(bins):.1f} to {(index + 1) / len(bins):.1f}" for index in range(len(bins))]
            rows = [
                ["mean", *(rounded(row["mean"], 2) for row in bins)],
                ["share that is shown", *(rounded(row["shown"], 2) for row in bins)],
                ["pairs", *(str(row["pairs"]) for row in bins)],
            ]
            lines += [
                "",
                markdown([*columns.values()], [[*shown.values()]]),
                "",
                markdown([f"presence at the prior {self.presence['prior']:.2f}", *edges], rows),
            ]
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

    def save(self, path: str | Path, overwrite: bool = False) -> tuple[Path, Path]:
        """
        Writes `path` (JSON) and, beside it, the scores of the classes as `.csv`, each atomically, and returns both paths. Raises
        `FileExistsError` if the `.csv` file exists, unless `overwrite`.
        """
        path, table = Path(path), Path(path).with_suffix(".csv")
        check_files(path, overwrite=overwrite)
        with atomic_write(table) as rows, atomic_write(path) as result:  # both are whole before one is replaced
            result.write_text(self.to_json(), encoding="utf-8")
            rows.write_text(self.per_class_csv(), encoding="utf-8")
        return path, table


def check_files(path: str | Path, inputs: Iterable[str | os.PathLike | None] = (), overwrite: bool = False) -> None:
    """Checks the files of [`EvaluationResult.save`] as [`iclip_hf.utils.files.check_outputs`] does."""
    check_outputs([path], inputs, overwrite, [Path(path).with_suffix(".csv")])


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
        raise ValueError(
            f"{path}: expected the JSON file that `iclip evaluate --output` writes, but got other content; evaluate again."
        )
    return content


def class_scores(path: str | Path, column: str, method: str | None = None) -> tuple[str, dict[str, float]]:
    """
    Reads a column of the rows of classes, such as `"AP"`, from the file of [`read_results`]. Returns the method, by default the first,
    and the scores by class name, without those that were not measured. Raises also `ValueError` if there is no such method.
    """
    per_class = read_results(path, "per_class")["per_class"]
    method = method or next(iter(per_class), None)
    if method not in per_class:
        raise ValueError(
            f"{path}: expected the method to be one of {list(per_class)}, got {method!r}; choose one of them."
        )
    try:
        scores = {row["name"]: row[column] for row in per_class[method]}
        return method, {name: float(score) for name, score in scores.items() if score is not None}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected classes with a name and a number as {column}, but got others; evaluate again."
        ) from error


def class_thresholds(path: str | Path, labels: Sequence[str], method: str = "itsm") -> list[float]:
    """
    Reads the best threshold of each class, by mMIoU, from the file of [`read_results`]. Raises what [`class_scores`] raises, and
    `ValueError` if a class has no threshold or one outside [0, 1].
    """
    _, thresholds = class_scores(path, "threshold", method)
    if missing := [label for label in labels if label not in thresholds]:
        raise ValueError(
            f"{path}: expected thresholds of {missing}, but got those of {sorted(thresholds)}; evaluate with these."
        )
    if outside := {label: found for label in labels if not 0 <= (found := thresholds[label]) <= 1}:
        raise ValueError(f"{path}: expected thresholds in [0, 1], but got {outside}; evaluate again.")
    return [thresholds[label] for label in labels]


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *rows])


def measured(value: float) -> float | None:
    """Converts NaN, which JSON does not have, to None."""
    return None if math.isnan(value) else float(value)


def rounded(value: float | None, digits: int) -> str:
    """Formats a score for a table."""
    return "-" if value is None else f"{value:.{digits}f}"
