"""No command replaces an input, nor a file that it did not write; what it wrote itself, it replaces."""

import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import PHOTO, iclip
from faults import index_mask, masks_folder

from iclip_hf.evaluation.results import EvaluationResult


# Everything that a command writes by default or below is there already, of the user's.
FOREIGN = """
    explanation.png explanation.npz labels/segmentation.png labels/photo.png comparison.png channels.png relation.png
    explanations/explanations-00000-of-00001.parquet shift.json scores.json pairs.csv README.md app.py requirements.txt mmiou.py
    config.json results.json model.safetensors .lock run/notes.txt run/checkpoint-500/state.txt clip/checkpoint-500/trainer_state.json
    cache/training/00000.npy maps/holiday.2024.mkv.partial maps/x.1.partial maps/.lock photos/dog.png photos/dog.npz photos/DOG.PNG runs/table/notes.txt
""".split()


@pytest.fixture
def mine(world, tmp_path, monkeypatch) -> Path:
    """The user's folder, which is the current one."""
    folder = tmp_path / "mine"
    for name in FOREIGN:
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


@pytest.mark.parametrize(
    "line",
    [
        "explain photo.jpg SEE",
        "explain photo.jpg SEE --output explanation.jpg --npz",  # of which only the arrays are there
        "explain photos/dog.jpg photos/dog.png SEE --output photos",
        "explain photos/dog.jpg SEE --output photos/../photos/dog.png",
        "explain photos/dog.jpg SEE --output photos/DOG.PNG",
        "explain photo.jpg SEE --output link.png",
        "explain photos/dog.png SEE --output link.png --overwrite",
        "explain photos/dog.png SEE --output photos/../link.png --overwrite",
        "explain photos/dog.png SEE --overwrite --output ./photos/dog.png",
        "explain photos/dog.png SEE --output twin.png --overwrite",
        "explain photos SEE",
        "segment photo.jpg SEE",
        "segment photo.jpg SEE --output photo.png",
        "segment labels/photo.png SEE --output photo.png --overwrite",
        "segment labels/photo.png photo.jpg SEE --output . --overwrite",
        "compare photo.jpg SEE",
        "compare comparison.png SEE --overwrite",
        "compare images/image.png --output images/image.png --text dog DATA --overwrite",
        "evaluate DATA --output scores.json",
        "evaluate DATA --output pairs.json",
        "evaluate DATA --output MODEL/config.json --overwrite",
        "train table.csv --output_dir .",
        "train table.csv --output_dir run",
        "train table.csv --output_dir run --resume",
        "train table.csv --output_dir clip --resume",
        "train table.csv --output_dir photos/../photos",
        "train table.csv --model MODEL --output_dir MODEL",
        "train table.csv --model MODEL",  # into runs/table
        "train --model MODEL",
        "init --config iclip-dinov2-s14-minilm --output .",
        "export MODEL .",
        "export MODEL MODEL",
        "export MODEL . --format onnx",
        "export MODEL . --format web",
        "export-metric mmiou .",
        "demo --export-space .",
    ],
)
def test_what_is_not_its_own_is_refused(world, mine, capsys, line):
    before, model = contents(mine), contents(world.folder)
    assert typed(world, line) == 2
    after = contents(mine)
    after.pop("explanations/.iclip-hf.lock", None)  # a folder of others may be locked
    assert after == before and contents(world.folder) == model
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "new"),
    [
        ("explain photo.jpg SEE --output a.PNG --npz", ["a.PNG", "a.npz"]),
        ("explain photo.jpg SEE --output new/a.jpg", ["new/a.jpg"]),
        ("explain photo.jpg SEE --output a.webp", ["a.webp"]),
        ("explain photo.jpg SEE --output a.pdf", ["a.pdf"]),
        ("explain photo.jpg SEE --output a.webp", ["a.webp"]),
        (
            "explain photos/cat.jpg photo.jpg SEE --output photos --npz",
            "photos/cat.png photos/cat.npz photos/photo.png photos/photo.npz".split(),
        ),
        ("explain photos/dog.png photos/DOG.PNG SEE --output maps", ["maps/dog.png", "maps/DOG-2.png"]),
        ("explain photos SEE --output maps", ["maps/.iclip-hf.lock", "maps/explanations-00000-of-00001.parquet"]),
        ("segment photo.jpg SEE --output a.png", ["a.png", "labels/a.png"]),
        ("compare photo.jpg SEE --output a.png", ["a.png"]),
        ("evaluate DATA --output a.json", ["a.json", "a.csv"]),
        ("export-metric mmiou new", ["new/README.md", "new/app.py", "new/mmiou.py", "new/requirements.txt"]),
        ("demo --export-space out.d", ["out.d/README.md", "out.d/app.py", "out.d/requirements.txt"]),
    ],
)
def test_a_command_may_be_repeated_and_writes_what_it_says(world, mine, capsys, line, new):
    (mine / "out.d").mkdir()
    before = contents(mine)
    for _ in range(2):
        assert typed(world, line) == 0, capsys.readouterr().err
    after = contents(mine)
    assert sorted(after.keys() - before.keys()) == sorted(new)
    assert {name: after[name] for name in before} == before
    said = f"{line}{''.join(capsys.readouterr())}"
    shown = [name for name in new if Path(name).suffix != ".npz"]
    assert all(name in said or (Path(name).parent.name or name) in said for name in shown)


@pytest.mark.parametrize("line", ["export-metric mmiou clone", "demo --export-space clone"])
def test_a_readme_that_names_the_program_is_the_users(world, mine, line):
    """No file of a Space says who wrote it, so none is known as this program's."""
    (mine / "clone").mkdir()
    (mine / "clone" / "README.md").write_text("I use iclip-hf, ICLIP for Hugging Face, for my work.")
    before = contents(mine)
    assert typed(world, line) == 2 and contents(mine) == before
    assert typed(world, f"{line} --overwrite") == 0
    assert "I use" not in (mine / "clone" / "README.md").read_text()


def test_overwrite_replaces_a_file_of_another_program_and_a_link_stays_one(world, mine):
    picture = (mine / "photos" / "dog.png").read_bytes()
    assert typed(world, "explain photo.jpg SEE --output link.png --overwrite") == 0
    assert (mine / "link.png").is_symlink() and (mine / "photos" / "dog.png").read_bytes() != picture
    assert (mine / "twin.png").read_bytes() == picture
    assert typed(world, "explain photo.jpg SEE --output link.png") == 0


def test_a_table_that_was_edited_is_the_users(world, mine):
    assert typed(world, "evaluate DATA --output a.json") == 0
    (mine / "a.csv").write_text((mine / "a.csv").read_text() + "my notes\n")
    before = contents(mine)
    assert typed(world, "evaluate DATA --output a.json") == 2 and contents(mine) == before
    assert typed(world, "evaluate DATA --output a.json --overwrite") == 0


def test_a_file_that_contains_its_own_is_the_users(world, mine):
    assert typed(world, "evaluate DATA --output a.json") == 0
    assert typed(world, "explain photo.jpg SEE --output a.jpg") == 0
    (mine / "all.json").write_text(json.dumps({"runs": [json.loads((mine / "a.json").read_text())]}))
    (mine / "paper.pdf").write_bytes(b"%PDF-1.5" + (mine / "a.jpg").read_bytes())
    before = contents(mine)
    for line in ("evaluate DATA --output all.json", "explain photo.jpg SEE --output paper.pdf"):
        assert typed(world, line) == 2 and contents(mine) == before


def test_names_that_are_as_long_as_file_systems_allow(world, mine):
    for folder in ("a", "b"):
        (mine / folder).mkdir()
        for name in ("n" * 251, "é" * 125):
            PHOTO.save(mine / folder / f"{name}.png")
    images = " ".join(f"{folder}/{name}.png" for folder in "ab" for name in ("n" * 251, "é" * 125))
    assert typed(world, f"explain {images} SEE --output out --npz") == 0
    written = sorted(path.stem for path in (mine / "out").glob("*.png"))
    assert written == ["n" * 249 + "-2", "n" * 251, "é" * 124 + "-2", "é" * 125]
    assert sorted(path.stem for path in (mine / "out").glob("*.npz")) == written


@pytest.mark.skipif(os.name != "posix" or os.fsencode("\udce9") != b"\xe9", reason="names are text here")
@pytest.mark.parametrize(
    "line",
    [
        "explain photos SEE --output BAD",
        "train table.csv --model MODEL --output_dir BAD",
        "train table.csv --model MODEL --output_dir BAD/new",
        "init --config iclip-dinov2-s14-minilm --output BAD",
        "export MODEL BAD",
        "export MODEL BAD --format onnx",
        "export MODEL BAD --format web",
    ],
)
def test_a_folder_with_a_name_that_is_not_utf8_is_refused_before_the_work(world, mine, capsys, line):
    before = contents(mine)
    assert typed(world, line.replace("BAD", "caf\udce9")) == 2 and contents(mine) == before
    said = capsys.readouterr().err
    assert "caf\\udce9" in said and "expected a folder whose path is UTF-8" in said and len(said.splitlines()) == 1


def test_a_result_and_its_table_are_replaced_together(tmp_path, monkeypatch):
    """Else the next run would not know the table again. The name of the result may have any suffix."""
    first, second = (EvaluationResult({}, {}, {}, {"itsm": [{"id": id_}]}, {}, {}) for id_ in (1, 2))
    first.save(tmp_path / "a.txt")
    before = contents(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="writing failed"):
        patch.setattr(second, "per_class_csv", lambda: (_ for _ in ()).throw(OSError("disk full")))
        second.save(tmp_path / "a.txt")
    assert contents(tmp_path) == before
    second.save(tmp_path / "a.txt")
    assert {*before} == {*contents(tmp_path)} and contents(tmp_path) != before


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_result_is_saved_again_after_a_run_that_stopped_between_its_files(tmp_path, monkeypatch, earlier, renames):
    first, second = (EvaluationResult({}, {}, {}, {"itsm": [{"id": id_}]}, {}, {}) for id_ in (1, 2))
    if earlier:
        first.save(tmp_path / "a.json")
    allowed = [os.replace] * renames

    def stop(*paths):
        if not allowed:
            raise KeyboardInterrupt
        allowed.pop()(*paths)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        second.save(tmp_path / "a.json")
    first.save(tmp_path / "a.json")
    assert sorted(contents(tmp_path)) == ["a.csv", "a.json"] and "1" in (tmp_path / "a.csv").read_text()
