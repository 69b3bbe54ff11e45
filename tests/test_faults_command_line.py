"""What is typed wrong ends with one line that names it, exit code 2, and no file."""

import contextlib
import io
import os
import shutil
from pathlib import Path

import fault_inputs as inputs
import numpy as np
import pytest
from conftest import iclip, save, save_towers


def refused(*line) -> str:
    """Runs a command that must fail in an empty folder, and returns its one line on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = iclip(*line)
    lines = [text for text in err.getvalue().splitlines() if text.startswith("iclip")]
    assert code == 2 and len(lines) == 1 and not out.getvalue(), (code, out.getvalue(), err.getvalue())
    assert "Traceback" not in err.getvalue() and len(lines[0]) < 20_000 and not os.listdir(".")
    return lines[0]


# By the likely mistake of the threat model and the beginning of a command: what else is typed. The line on stderr has
# one of these words.
ARGUMENTS = {
    "a mistyped path, Hub id, option, command, class name or method": {
        "explain {photo} --text dog --model {model}": """
            --sharpness 3
            --text {photo}
            --method magic
            --model {empty}/absent
            --model embeded
            --device abacus
        """,
        "explain {photo} --model {model}": "dog",
        "compare {photo} --model {model} --text dog": """
            --methods itsm,gem
            --dataset folder --data-root {masks}
        """,
        "evaluate --model {model} --dataset folder --data-root {masks}": """
            --overrides absent.json
            --dataset voc2012 --data-root {empty}/absent
            --dataset coco2017 --split ../../etc
            --metrics luck
        """,
        "init --output new": """
            --config no-such
            --config iclip-vit-b16 --vision {empty}/a --text {empty}/b
        """,
        "export": "{empty}/absent new",
        "train": "absent.csv",
        "train {table} --model {model}": """
            --config absent.yaml
            --nouns absent.txt
            --eval_dataset voc2012 --eval_root absent
            --validation_data absent.csv
            --image_column picture
        """,
    },
    "a folder that holds something else": {
        "explain --text dog --model {model}": "{empty}",
        "evaluate --model {model} --dataset folder --data-root {masks}": "--overrides {list}",
        "export": "{model} new --results {list}",
        "demo": "--web {empty}",
        "train": """
            {empty}
            {table} --model {empty}
        """,
    },
    "a value out of range or a combination without meaning": {
        "explain {photo} --text dog --model {model}": """
            --image-size 12
            --image-size 0.5
            --min-presence nan
            --threshold no.json
            --template photo
            --output a.exe
        """,
        "explain --text dog --model {model}": "{photo} {photo} --output a.png",
        "compare {photo} --model {model} --text dog": "--dataset folder",
        "evaluate --model {model} --dataset folder --data-root {masks}": """
            --steps 3
            --image-size 224 --short-side 224
            --window 16
            --output a.csv
            --metrics mAP --task segmentation
            --metrics label_maps --seed -1
            --task segmentation --threshold 0.5 --logit-scale nan
        """,
        "export": "{model} new --format web --results r.json",
        "push --dry-run": """
            {model} a/b/c
            {model} model
        """,
        "demo": "--host 256.1.1.1",
        "train": "--model {model}",
        "train {table} --model {model}": """
            --per_device_train_batch_size 0
            --gradient_accumulation_steps 0
            --num_train_epochs 0
            --max_steps 0
            --max_bad_share 5
            --random_erasing 25
        """,
    },
    "an output that is an input, or lies in a folder that is read": {
        "explain {photo} --text dog --model {model}": "--output /dev/null/a.png",
        "export": "{model} embedded",
    },
}
LINES = [
    pytest.param(start, rest.strip(), id=f"{mistake}-{start}-{rest.strip()}")
    for mistake, commands in ARGUMENTS.items()
    for start, rests in commands.items()
    for rest in rests.strip().splitlines()
]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Forty pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(40):
        (folder / f"{number}.png").write_bytes(inputs.BY_FORMAT["PNG"] + bytes([number]))  # copies would stay together
    rows = "".join(f"{number}.png,a dog number {number}\n" for number in range(40))
    return inputs.written(folder, f"image,caption\n{rows}", "table.csv")


@pytest.mark.parametrize(("start", "rest"), LINES)
def test_a_wrong_argument(world, table, sandbox, start, rest):
    folder = sandbox / "case"
    for name in ("masks", "empty"):
        (folder / name).mkdir()
    inputs.masks_folder(folder / "masks", mask=inputs.index_mask(np.ones((24, 30), np.uint8)))
    places = {
        "photo": world.photo,
        "model": world.folder / "model",
        "world": world.folder,
        "empty": folder / "empty",
        "masks": folder / "masks",
        "list": inputs.written(folder, "[]"),
        "table": table,
    }
    typed = [word.format(**places) for word in rest.split()]
    line = refused(*(word.format(**places) for word in start.split()), *typed)
    assert any(os.path.basename(word).lstrip("-") in line for word in typed), line


def explained(world, image, *more) -> str:
    return refused("explain", image, "--text", "dog", "--model", world.folder / "model", *more)


@pytest.mark.parametrize("name", ["absent.png", "http://127.0.0.1:9/a.png", "http://[a.png", ""])
def test_a_place_that_is_no_image(world, sandbox, name):
    assert repr(name) in explained(world, name)


@pytest.mark.parametrize("damage", inputs.FEW_MODEL_FOLDERS)
def test_a_folder_that_is_no_model(world, sandbox, damage):
    model = sandbox / "case" / "model"
    shutil.copytree(world.folder / "model", model)
    inputs.MODEL_FOLDERS[damage](model)
    assert "model" in refused("explain", world.photo, "--text", "dog", "--model", model)
    assert "model" in refused("export", model, "exported")


@pytest.mark.parametrize("side", ["vision", "text"])
@pytest.mark.parametrize("damage", ["missing", "symlinked code", "weights are truncated", "pickled weights only"])
def test_a_folder_that_is_no_tower(world, sandbox, side, damage):
    folder = sandbox / "case"
    vision, text = save_towers(folder, world.model, world.processor)
    save(folder / "config", world.model.config, world.processor)
    inputs.MODEL_FOLDERS[damage](folder / side)
    towers = ("--vision", vision, "--text", text)
    assert side in refused("init", "--config", folder / "config", *towers, "--output", "new")
