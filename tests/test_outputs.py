"""No command replaces an input, nor without --overwrite a file whose name it chose; a file that the user named, it replaces."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import PHOTO, iclip
from fault_inputs import index_mask, masks_folder

from iclip_hf.evaluation.results import EvaluationResult


# All names that a command chooses below are there already.
TAKEN = """
    explanation.png explanation.npz labels/segmentation.png labels/photo.png comparison.png
    explanations/explanations-00000-of-00001.parquet scores.json pairs.csv README.md app.py requirements.txt mmiou.py
    config.json results.json model.safetensors .lock run/notes.txt run/checkpoint-500/state.txt clip/checkpoint-500/trainer_state.json
    photos/dog.png photos/dog.npz photos/DOG.PNG runs/table/notes.txt
""".split()


@pytest.fixture
def mine(world, tmp_path, monkeypatch) -> Path:
    """The user's folder, which is the current one."""
    folder = tmp_path / "mine"
    for name in TAKEN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PHOTO.save(folder / name) if name.lower().endswith(".png") else (folder / name).write_text(f"my own {name}")
    for name in ("photo.jpg", "photos/dog.jpg", "photos/cat.jpg"):
        PHOTO.save(folder / name)
    rows = [
        {"name": name, "AP": 50.0 + len(name), "MIoU": 20.0, "FMB": 0.1, "threshold": 0.4} for name in ("dog", "mouse")
    ]
    (folder / "measured.json").write_text(json.dumps({"per_class": {"itsm": rows}}))
    (folder / "table.csv").write_text("image,caption\nphoto.jpg,a dog\nphotos/cat.jpg,a cat\n")
    masks_folder(folder, mask=index_mask(np.tri(24, 30, dtype=np.uint8)))
    (folder / "link.png").symlink_to("photos/dog.png")
    os.link(folder / "photos" / "dog.png", folder / "twin.png")
    (folder / "clip" / "config.json").write_text('{"model_type": "iclip"}')
    (folder / "config.png").symlink_to("clip/config.json")
    (folder / "image.json").symlink_to("images/image.png")
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def typed(world, line: str) -> int:
    """Runs a command line in this process; `EXPLAIN` etc. stand for what is the same in many."""
    short = {"DATA": "--dataset folder --data-root . --model MODEL", "SEE": "--text dog --model MODEL"}
    for name, words in short.items():
        line = line.replace(name, words)
    return iclip(*(word.replace("MODEL", str(world.folder / "model")) for word in line.split()))


INPUTS = [
    "explain photos/dog.png SEE --output photos/dog.png",
    "explain photos/dog.png SEE --output photos/../link.png",
    "explain photos/dog.jpg photos/dog.png SEE --output photos",
    "segment labels/photo.png SEE --output photo.png",
    "compare comparison.png SEE",
    "compare image --output images/image.png --text dog DATA",
    "compare image --output masks/image.png --text dog DATA",
    "segment photo.jpg --text dog --output config.png --model clip",
    "compare photo.jpg --text dog --output config.png --model clip",
    "evaluate DATA --output MODEL/config.json",
    "evaluate DATA --output image.json",
]
CHOSEN = [
    "explain photo.jpg SEE",
    "explain photo.jpg SEE --output explanation.jpg --npz",  # of which only the arrays are there
    "explain photos/dog.jpg photos/cat.jpg SEE --output photos",
    "segment photo.jpg SEE",
    "segment photo.jpg SEE --output photo.png",
    "compare photo.jpg SEE",
    "evaluate DATA --output pairs.json",
    "demo --export-space .",
]
FOLDERS = [
    "explain photos SEE",
    "train table.csv --output_dir run",
    "train table.csv --output_dir run --resume",
    "train table.csv --output_dir clip --resume",
    "train table.csv --output_dir explanations",
    "train table.csv --model MODEL --output_dir MODEL",
    "train table.csv --model MODEL",  # into runs/table
    "train --model MODEL",
    "init --config iclip-dinov2-s14-minilm --output .",
    "export MODEL MODEL",
    "export MODEL . --format onnx",
    "export MODEL . --format web",
]


@pytest.mark.parametrize("line", [*(f"{line} --overwrite" for line in INPUTS), *CHOSEN, *FOLDERS])
def test_an_input_a_chosen_name_and_a_folder_of_others_are_refused(world, mine, capsys, line):
    before, model = contents(mine), contents(world.folder)
    assert typed(world, line) == 2
    assert contents(mine) == before and contents(world.folder) == model
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("line", CHOSEN)
def test_overwrite_replaces_chosen_names(world, mine, line):
    before = contents(mine)
    assert typed(world, f"{line} --overwrite") == 0
    after = contents(mine)
    assert before.keys() <= after.keys() and before != {name: after[name] for name in before}


@pytest.mark.parametrize(
    ("line", "new", "chosen"),
    [
        ("explain photo.jpg SEE --output a.PNG --npz", ["a.PNG", "a.npz"], True),
        ("explain photo.jpg SEE --output new/a.jpg", ["new/a.jpg"], False),
        ("explain photo.jpg SEE --output a.pdf", ["a.pdf"], False),
        (
            "explain photos/cat.jpg photo.jpg SEE --output photos --npz",
            "photos/cat.png photos/cat.npz photos/photo.png photos/photo.npz".split(),
            True,
        ),
        ("explain photos/dog.png photos/DOG.PNG SEE --output maps", ["maps/dog.png", "maps/DOG-2.png"], True),
        (
            "explain photos SEE --output maps",
            ["maps/.iclip-explain.json", "maps/.iclip-hf.lock", "maps/explanations-00000-of-00001.parquet"],
            False,  # it goes on, where nothing is left to do
        ),
        ("segment photo.jpg SEE --output a.png", ["a.png", "labels/a.png"], True),
        ("compare photo.jpg SEE --output a.png", ["a.png"], False),
        ("evaluate DATA --output a.json", ["a.json", "a.csv"], True),
        ("demo --export-space out.d", ["out.d/README.md", "out.d/app.py", "out.d/requirements.txt"], True),
    ],
)
def test_a_command_writes_what_it_says_and_may_be_repeated(world, mine, capsys, line, new, chosen):
    (mine / "out.d").mkdir()
    before = contents(mine)
    assert typed(world, line) == 0, capsys.readouterr().err
    assert typed(world, line) == (2 if chosen else 0)
    assert typed(world, f"{line} --overwrite" if chosen else line) == 0, capsys.readouterr().err
    after = contents(mine)
    assert sorted(after.keys() - before.keys()) == sorted(new)
    assert {name: after[name] for name in before} == before
    said = f"{line}{''.join(capsys.readouterr())}"
    shown = [name for name in new if Path(name).suffix != ".npz"]
    assert all(name in said or (Path(name).parent.name or name) in said for name in shown)


def test_a_named_file_is_replaced_whoever_wrote_it_and_a_link_stays_one(world, mine):
    twin = (mine / "twin.png").read_bytes()
    assert typed(world, "explain photo.jpg SEE --output link.png") == 0
    assert (mine / "link.png").is_symlink() and (mine / "photos" / "dog.png").read_bytes() != twin
    assert (mine / "twin.png").read_bytes() == twin
    assert typed(world, "evaluate DATA --output scores.json") == 0
    assert json.loads((mine / "scores.json").read_text())["protocol"]


def test_a_result_and_its_table_are_replaced_together(tmp_path, monkeypatch):
    first, second = (EvaluationResult({}, {}, {"itsm": [{"id": id_}]}, {}) for id_ in (1, 2))
    first.save(tmp_path / "a.json")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"a\.csv"):
        second.save(tmp_path / "a.json")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="writing failed"):
        patch.setattr(second, "per_class_csv", lambda: (_ for _ in ()).throw(OSError("disk full")))
        second.save(tmp_path / "a.json", overwrite=True)
    assert contents(tmp_path) == before
    second.save(tmp_path / "a.json", overwrite=True)
    assert {*before} == {*contents(tmp_path)} and contents(tmp_path) != before
