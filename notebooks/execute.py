"""Executes the notebook and saves it with its outputs: `python notebooks/execute.py`. Pictures are JPEG files, a tenth of the size."""

import base64
import io
from pathlib import Path

import nbclient
import nbformat
from PIL import Image


NOTEBOOK = Path(__file__).with_name("tutorial.ipynb")


def executed(timeout: int = 300):
    """Returns the notebook with the outputs of its cells."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=timeout, record_timing=False).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if picture := output.get("data", {}).pop("image/png", None):
                file = io.BytesIO()
                Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").save(file, "JPEG", quality=85)
                output["data"]["image/jpeg"] = base64.b64encode(file.getvalue()).decode()
    notebook.metadata["language_info"] = {"name": "python"}  # without its version
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
    print(NOTEBOOK)
