"""
A file that the user names is written, an input never, and a name that a command chooses gets a number if it exists.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import PHOTO, iclip
from fault_inputs import index_mask, masks_folder

from iclip_hf.cli import pictures
from iclip_hf.cli.output import model_folders, name_for
from iclip_hf.cli.train import check_output_dir
from iclip_hf.cli.train.arguments import resolve_arguments
from iclip_hf.evaluation.results import EvaluationResult


# Files of the user: among them all names that a command would choose below.
TAKEN = """
    photo-explanation.png photo-explanation.npz named.npz photo-segments.png photo-labels.png named-labels.png
    photo-comparison.png photos/dog-explanation.png photos/explanations.jsonl scores.json pairs.csv README.md app.py
    requirements.txt config.json results.json model.safetensors .lock run/notes.txt run/checkpoint-500/state.txt
    clip/checkpoint-500/trainer_state.json photos/dog.png photos/dog.npz photos/DOG.PNG runs/table/notes.txt
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
    (folder / "clip" / "config.json").write_text('{"model_type": "iclip"}')
    (folder / "config.png").symlink_to("clip/config.json")
    (folder / "image.json").symlink_to("images/image.png")
    (folder / "inside").symlink_to(world.folder / "model")
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
    "segment photo-labels.png SEE --output photo-labels.png",
    "compare image --output images/image.png --text dog DATA",
    "compare image --output masks/image.png --text dog DATA",
    "segment photo.jpg --text dog --output config.png --model clip",
    "compare photo.jpg --text dog --output config.png --model clip",
    "evaluate DATA --output MODEL/config.json",
    "evaluate DATA --output image.json",
    # In a folder of a model, also what does not exist
    "explain photo.jpg SEE --output MODEL/sub/a.png",
    "explain photos SEE --output MODEL/maps",
    "compare photo.jpg SEE --output inside/new.png",
    "evaluate DATA --output MODEL/sub/new.json",
]
FOLDERS = [
    "explain photos SEE --report photos/report",
    "explain photos SEE --report MODEL/report",
    "explain photo.jpg SEE --report photos",
    "evaluate DATA --report MODEL/report",
    "evaluate DATA --report photos",
    "train table.csv --output_dir run",
    "train table.csv --output_dir run --resume",
    "train table.csv --output_dir clip --resume",
    "train table.csv --output_dir photos",
    "train table.csv --model MODEL --output_dir MODEL",
    "train table.csv --model MODEL --output_dir inside/run",
    "export MODEL MODEL/new",
    "train table.csv --model MODEL",  # into runs/table
    "train --model MODEL",
    "init --config iclip-dinov2-s14-minilm --output .",
    "export MODEL MODEL",
    "export MODEL . --format onnx",
    "export MODEL . --format web",
]


@pytest.mark.parametrize("line", [*INPUTS, *FOLDERS])
def test_an_input_and_a_folder_of_others_are_refused(world, mine, capsys, line):
    before, model = contents(mine), contents(world.folder)
    assert typed(world, line) == 2
    assert contents(mine) == before and contents(world.folder) == model
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_new_model_is_not_written_into_a_tower_that_the_configuration_names(world, mine, capsys):
    (mine / "run" / "train.yaml").write_text(f"vision: {world.folder / 'model'}\ntext: text\n")
    assert typed(world, "init --config run --output MODEL/new") == 2
    assert "this output would change the input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("read", "written"),
    [
        ({"model": "model"}, {"cache_features": "model/cache"}),
        ({"vision": "model", "text": "embedded", "config": "c"}, {"output_dir": "model/run"}),
        ({"vision": "embedded", "text": "model", "config": "c"}, {"cache_features": "model"}),
    ],
)
def test_a_training_writes_nothing_into_a_model_or_a_tower(world, monkeypatch, read, written):
    monkeypatch.chdir(world.folder)
    with pytest.raises(FileExistsError, match="model"):
        check_output_dir(resolve_arguments({"data": ["d"], "output_dir": "new", **read, **written}))


def test_a_long_name_of_an_image_is_cut_in_the_names_of_outputs():
    name = name_for("Ж" + "字" * 83 + ".jpg", "explanation.png")
    assert name.startswith("Ж字") and name.endswith("字-explanation.png") and len(os.fsencode(name)) < 250
    assert name_for("字.photo.jpg", "explanation.png") == "字.photo-explanation.png"


@pytest.mark.parametrize(
    ("line", "new", "again"),
    [
        ("explain photo.jpg SEE --npz", "photo-explanation-2.png photo-explanation-2.npz", "-explanation-3"),
        ("explain photo.jpg SEE --output named.jpg --npz", "named.jpg named-2.npz", "named-3.npz"),
        ("explain photo.jpg SEE --output new/a.jpg", "new/a.jpg", ""),
        ("explain photo.jpg SEE --output a.pdf", "a.pdf", ""),
        ("explain photo.jpg SEE --output new", "new/photo-explanation.png", "new/photo-explanation-2"),
        ("explain photos/dog.jpg SEE --output photos", "photos/dog-explanation-2.png", "dog-explanation-3"),
        (
            "explain photos/cat.jpg photo.jpg SEE --output photos",
            "photos/cat-explanation.png photos/photo-explanation.png photos/explanations-2.jsonl",
            "explanations-3.jsonl",
        ),
        (
            "explain photos/dog.png photos/DOG.PNG SEE",
            "explanations/dog-explanation.png explanations/DOG-explanation.png explanations/explanations.jsonl",
            "explanations/explanations-2.jsonl",
        ),
        ("segment photo.jpg SEE", "photo-segments-2.png photo-labels-2.png", "photo-labels-3"),
        ("segment photo.jpg SEE --output named.png", "named.png named-labels-2.png", "named-labels-3"),
        ("compare photo.jpg SEE", "photo-comparison-2.png", "comparison-3"),
        ("compare photo.jpg SEE --output a.png", "a.png", ""),
        ("evaluate DATA --output pairs.json", "pairs.json pairs-2.csv", "pairs-3.csv"),
    ],
)
def test_a_command_may_be_repeated_and_replaces_only_what_the_user_named(world, mine, capsys, line, new, again):
    before = contents(mine)
    assert typed(world, line) == 0, capsys.readouterr().err
    first = contents(mine)
    assert sorted(first.keys() - before.keys()) == sorted(new.split())
    said = f"{line}{''.join(capsys.readouterr())}"
    assert all(name in said for name in new.split())
    assert typed(world, line) == 0, capsys.readouterr().err
    second = contents(mine)
    assert {name: second[name] for name in before} == before
    added = second.keys() - first.keys()
    assert any(again in name for name in added) if again else not added


def test_reports_at_once_do_not_share_a_folder(world, mine, capsys, monkeypatch):
    """While a model is loaded, another command begins to write into the folder."""
    load_model = pictures.load_model

    def load_late(name, args):
        (mine / "report" / "images").mkdir(parents=True)
        return load_model(name, args)

    monkeypatch.setattr(pictures, "load_model", load_late)
    assert typed(world, "explain photo.jpg SEE --report report") == 2
    assert "this folder holds other files, such as images" in capsys.readouterr().err
    assert not any((mine / "report" / "images").iterdir())


def test_a_result_and_its_table_appear_together(tmp_path, monkeypatch):
    result = EvaluationResult({}, {}, {"itsm": [{"id": 1, "name": "dog"}]}, {})
    (tmp_path / "a.json").write_text("{}")
    before = contents(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(result, "per_class_csv", lambda: (_ for _ in ()).throw(OSError("disk full")))
        result.save(tmp_path / "a.json")
    assert contents(tmp_path) == before
    assert result.save(tmp_path / "a.json") == (tmp_path / "a.json", tmp_path / "a.csv")
    assert result.save(tmp_path / "a.json") == (tmp_path / "a.json", tmp_path / "a-2.csv")


def test_scores_that_cannot_be_written_are_printed(world, mine, capsys, monkeypatch):
    """An evaluation of hours ends with a full disk."""

    def save(result, path):
        raise OSError("disk full")

    monkeypatch.setattr(EvaluationResult, "save", save)
    assert typed(world, "evaluate DATA --output new.json") == 2
    out, err = capsys.readouterr()
    assert "mMIoU" in out and "disk full" in err


def test_only_folders_of_models_are_inputs(tmp_path, monkeypatch):
    """By the name "embedded", the model is the package's, and a folder of the user may hold earlier pictures."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "embedded"):
        Path(name).mkdir()
        Path(name, "config.json").touch()
    assert model_folders("model") == [Path("model")]
    assert model_folders("embedded") == model_folders("org/clip") == []
