"""The result of an evaluation, and its files."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..utils.files import atomic_write, check_outputs, write_new


@dataclass
class EvaluationResult:
    """
    The result of [`evaluate_model`]. A score that the data cannot measure is None.

    Attributes:
        protocol (`dict`): model, data set with its fingerprint, resolution, prompts, software versions; and `metrics`,
            for each metric its options and definition.
        results (`dict`): `results[method][metric]` are the scores that `compute` of the metric returns, without the
            scores of single classes.
        per_class (`dict`): for each method, a list with one `dict` for each class: `id`, `name`, and a `dict` of
            scores for each metric that has scores of single classes.
        timing (`dict`): seconds in total, seconds in the model, number of images of this process.
        tables (`list[str]`): tables of `results` in Markdown, and what their columns mean.
    """

    protocol: dict
    results: dict[str, dict[str, dict]]
    per_class: dict[str, list[dict]]
    timing: dict[str, float]
    tables: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Returns the scores as Markdown tables, with what their columns mean."""
        return "\n\n".join(self.tables)

    def to_json(self) -> str:
        """Returns all attributes except the tables as JSON text."""
        values = asdict(self)
        del values["tables"]
        # Options may be numbers of numpy, as from a loop over np.arange.
        return json.dumps(values, indent=2, allow_nan=False, default=lambda value: value.tolist()) + "\n"

    def per_class_csv(self) -> str:
        """Returns `per_class` as CSV text: a row for each method and class, and columns named `metric.score`."""
        rows = []
        for method, classes in self.per_class.items():
            for row in classes:
                cells = {"method": method, "id": row["id"], "name": row["name"]}
                for metric, scores in scores_by_metric(row).items():
                    cells |= {f"{metric}.{name}": score for name, score in scores.items()}
                rows.append(cells)
        text = io.StringIO()
        writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def save(self, path: str | Path) -> tuple[Path, Path]:
        """
        Writes the result to `path`, a `.json` file, and the scores of the classes to a `.csv` file beside it, each
        atomically. Returns both paths. If the `.csv` file exists, the new one has a number in its name.
        """
        path = Path(path)
        check_outputs([path])
        with atomic_write(path) as temporary:  # both files are whole before either is renamed
            temporary.write_text(self.to_json(), encoding="utf-8")
            rows = self.per_class_csv()
            table = write_new(path.with_suffix(".csv"), lambda unnamed: unnamed.write_text(rows, encoding="utf-8"))
        return path, table


def read_results(path: str | Path, *parts: str) -> dict:
    """Reads the JSON file of [`EvaluationResult.save`]. Raises `ValueError` unless each of `parts` is a mapping."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or not all(isinstance(content.get(part), dict) for part in parts):
        raise ValueError(f"{path} is no JSON file of `iclip evaluate --output`.")
    return content


def scores_by_metric(row: dict) -> dict[str, dict]:
    """Returns the scores in a row of `per_class`, a `dict` for each metric."""
    return {metric: scores for metric, scores in row.items() if isinstance(scores, dict)}


def map_settings(engine) -> dict:
    """Returns the settings of an [`Engine`] that change its maps, as in the protocol of a result."""
    return {
        "image_size": engine.image_size or dict(engine.processor.image_processor.size),
        "templates": list(engine.templates),
        "refine": engine.refine,
        "multi_scale": engine.multi_scale,
    }
