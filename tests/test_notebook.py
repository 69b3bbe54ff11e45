"""The tutorial runs top to bottom, as a reader would run it, and is committed with what it showed."""

from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat", reason="needs the extra [dev]")
pytest.importorskip("nbclient", reason="needs the extra [dev]")
from execute import NOTEBOOK, cleaned, executed  # noqa: E402


ROOT = Path(__file__).parents[1]


def check(notebook) -> None:
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]  # in one run
    outputs = [output for cell in cells for output in cell.outputs]
    shown = [output.data for output in outputs if "data" in output]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert sum("image/jpeg" in data for data in shown) == 5 and not any("image/png" in data for data in shown)
    assert any(data.get("text/markdown", "").startswith("| method ") for data in shown)
    accuracy = int(printed.split("recognises ")[1].split("%")[0])
    assert accuracy > 50  # by chance 12
    assert "3 held-out pairs" in printed
    # What travels with an exported model: an output of another version lacks a module.
    modules = {path.name for path in (ROOT / "src" / "iclip_hf" / "model").glob("*.py")} - {"__init__.py"}
    assert modules == {name for name in printed.split() if name.endswith(".py")}


def test_it_is_committed_with_its_outputs_and_without_paths_of_a_machine():
    check(nbformat.read(NOTEBOOK, as_version=4))
    assert NOTEBOOK.stat().st_size < 2e6 and "/home/" not in NOTEBOOK.read_text(encoding="utf-8")


def test_progress_bars_are_no_outputs():
    """On stderr, or as widgets where ipywidgets is installed."""
    text = {"output_type": "stream", "name": "stdout", "text": "a table"}
    bar = {"text/plain": "Loading: 0%", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    outputs = [
        {"output_type": "stream", "name": "stderr", "text": "0%"},
        {"output_type": "display_data", "data": bar, "metadata": {}},
        text,
    ]
    assert cleaned([nbformat.from_dict(output) for output in outputs]) == [text]


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_folder")
def test_it_runs_and_shows_what_it_says():
    check(executed())
