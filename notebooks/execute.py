"""
Executes the notebook and saves it with its outputs: `python notebooks/execute.py`. Pictures are JPEG files, a tenth of
the size.
"""

import base64
import io
import re
import tempfile
from pathlib import Path

import nbclient
import nbformat
from PIL import Image


NOTEBOOK = Path(__file__).with_name("tutorial.ipynb")
TEMPORARY_FOLDER = re.compile(rf"{re.escape(tempfile.gettempdir())}/\w+")


def executed(timeout: int = 300):
    """Returns the notebook with the outputs of its cells."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=timeout, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = cleaned(cell.outputs)
    notebook.metadata["language_info"] = {"name": "python"}  # without its version
    notebook.metadata.pop("widgets", None)  # the progress bars of ipywidgets
    return notebook


def cleaned(outputs: list) -> list:
    """
    Returns the outputs of a cell without stderr, which has progress bars and warnings with paths of the machine, and
    without the progress bars of ipywidgets, with one text in place of consecutive ones, `/tmp/notebook` in place of
    temporary folders, and JPEG in place of PNG pictures.
    """
    result = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            output.text = TEMPORARY_FOLDER.sub("/tmp/notebook", output.text).replace(str(Path.home()), "~")
            if result and result[-1].output_type == "stream":
                result[-1].text += output.text
                continue
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        if picture := output.get("data", {}).pop("image/png", None):
            file = io.BytesIO()
            Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").save(file, "JPEG", quality=85)
            output.data["image/jpeg"] = base64.b64encode(file.getvalue()).decode()
        result.append(output)
    return result


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
    print(NOTEBOOK)
