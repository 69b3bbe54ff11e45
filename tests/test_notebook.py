"""The tutorial runs top to bottom, as a reader would run it."""

from pathlib import Path

import pytest

from iclip_hf.backends.embedded import embedded_model


nbformat = pytest.importorskip("nbformat", reason="needs the extra [dev]")
nbclient = pytest.importorskip("nbclient", reason="needs the extra [dev]")

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "tutorial.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(notebook):
    try:
        embedded_model()
    except OSError as error:
        pytest.skip(f"the embedded towers cannot be had here: {error}")
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=300).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output.data for output in outputs if "data" in output]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert sum("image/png" in data for data in shown) == 5
    assert any(data.get("text/markdown", "").startswith("| method |") for data in shown)
    accuracy = int(printed.split("recognises ")[1].split("%")[0])
    assert accuracy > 50  # by chance 12
    assert "3 held-out pairs" in printed and "No measurable change" in printed
