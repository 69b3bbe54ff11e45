"""What is typed wrong ends with one line that names it, exit code 2, and no file."""

import contextlib
import io
import os

import numpy as np
import pytest
from conftest import iclip, save, save_towers
from fault_inputs import index_mask, masks_folder, written


# For the beginning of a command, what else is typed: a value of each kind. The line on stderr has one of its words.
ARGUMENTS = {
    "explain {photo} --text dog --model {model}": """
        --method magic
        --model {empty}/absent
        --model embeded
        --device abacus
        --min-presence nan
        --threshold no.json
        --template photo
        --output a.exe
    """,
    "explain --text dog --model {model}": """
        absent.png
        http://127.0.0.1:9/a.png
        {photo} {photo} --output a.png
    """,
    "explain {photo} --model {model}": "dog",
    "compare {photo} --model {model} --text dog": "--methods itsm,gem",
    "evaluate --model {model} --dataset folder --data-root {masks}": """
        --dataset voc2012 --data-root {empty}/absent
        --dataset coco2017 --split ../../etc
        --metrics luck
        --metrics mAP --task segmentation
        --image-size 224 --short-side 224
        --steps 3
    """,
    "init --output new": "--config no-such",
    "export": "{model} new --results {list}",
    "push --dry-run": "{model} a/b/c",
    "train": "absent.csv",
    "train {table} --model {model}": """
        --config absent.yaml
        --image_column picture
        --num_train_epochs 0
        --max_bad_share 5
    """,
}


def refused(*line) -> str:
    """Runs a command that must fail in an empty folder, and returns its one line on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = iclip(*line)
    lines = [text for text in err.getvalue().splitlines() if text.startswith("iclip")]
    assert code == 2 and len(lines) == 1 and not out.getvalue(), (code, out.getvalue(), err.getvalue())
    assert "Traceback" not in err.getvalue() and len(lines[0]) < 20_000 and not os.listdir(".")
    return lines[0]


@pytest.mark.parametrize(
    ("start", "rest"), [(start, rest) for start, lines in ARGUMENTS.items() for rest in lines.strip().splitlines()]
)
def test_a_wrong_argument(world, sandbox, start, rest):
    folder = sandbox / "case"
    for name in ("masks", "empty"):
        (folder / name).mkdir()
    masks_folder(folder / "masks", mask=index_mask(np.ones((24, 30), np.uint8)))
    places = {
        "photo": world.photo,
        "model": world.folder / "model",
        "empty": folder / "empty",
        "masks": folder / "masks",
        "list": written(folder, "[]"),
        "table": written(folder, "image,caption\n" + "".join(f"{n}.png,dog {n}\n" for n in range(40)), "table.csv"),
    }
    typed = [word.format(**places) for word in rest.split()]
    line = refused(*(word.format(**places) for word in start.split()), *typed)
    assert any(os.path.basename(word).lstrip("-") in line for word in typed), line


@pytest.mark.parametrize("side", ["vision", "text"])
def test_a_folder_that_is_no_tower(world, sandbox, side):
    folder = sandbox / "case"
    vision, text = save_towers(folder, world.model, world.processor)
    save(folder / "config", world.model.config, world.processor)
    os.truncate(folder / side / "model.safetensors", 9999)
    towers = ("--vision", vision, "--text", text)
    assert side in refused("init", "--config", folder / "config", *towers, "--output", "new")
