"""A run goes on with what it began with, wherever that lies, and with nothing else."""

import json
import os
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from conftest import tiny_model
from test_identity import CONFIG, edit_json, edit_weights, swapped
from training_runs import write_table

from iclip_hf.training.inputs import STATE_FILE, checkpoints
from iclip_hf.training.settings import parse_settings
from iclip_hf.training.train import train


@pytest.fixture(scope="module")
def began(tmp_path_factory, tiny_processor) -> Path:
    """A folder with a run on joined towers, one on a model, and all that they use."""
    folder = tmp_path_factory.mktemp("began") / "here"
    model = tiny_model()
    model.save_pretrained(folder / "model")
    tiny_processor.save_pretrained(folder / "model")
    model.vision_model.save_pretrained(folder / "vision")
    model.text_model.save_pretrained(folder / "text")
    tiny_processor.tokenizer.save_pretrained(folder / "text")
    model.config.save_pretrained(folder / "settings")
    tiny_processor.save_pretrained(folder / "settings")
    (folder / "settings" / "train.yaml").write_text("{image_size: 32, batch_size: 4, max_steps: 1, warmup_epochs: 0}")
    write_table(folder / "pairs", 12, suffix="bmp")
    write_table(folder / "held_out", 4, suffix="bmp", seed=1)
    (folder / "nouns.txt").write_text("dog\ncat\n")
    for start in ("towers", "model"):
        run(folder, start)
    return folder


def run(folder: Path, start: str, *arguments: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    named = {"model": ["--model", "model"], "towers": ["--vision", "vision", "--text", "text"]}[start]
    named += ["--config", "settings/train.yaml", "--output_dir", f"run-{start}", "--nouns", "nouns.txt"]
    named += ["--validation_data", "held_out/pairs.csv"]
    if "--data" not in arguments:
        named += ["--data", "pairs/pairs.csv"]
    named = [one if one.startswith("--") else str(folder / one) for one in named]
    train(parse_settings([*named, "--report_to", "none", "--pictures", "0", "--num_workers", "0", *arguments]))


def edit(file: Path, old: bytes, new: bytes) -> None:
    """Changes the content of a file, but not its size and time."""
    content, stat = file.read_bytes(), file.stat()
    assert content.count(old) and len(old) == len(new)
    file.write_bytes(content.replace(old, new, 1))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def other_image(file: Path) -> None:
    edit(file, file.read_bytes()[-9:], bytes(9))


CHANGES = {
    "pooling": ("towers", "configuration", lambda f: edit_json(f / "settings", CONFIG, "pooling", to="max")),
    "the loss": ("towers", "unknown_weight", lambda f: edit_json(f / "settings", CONFIG, "unknown_weight", to=0.3)),
    "tower": (
        "towers",
        "weights",
        lambda f: edit((m := f / "vision" / "model.safetensors"), m.read_bytes()[-8:], b"\0" * 8),
    ),
    "words": ("towers", "processor", lambda f: edit_json(f / "text", "tokenizer.json", "model", "vocab", to=swapped)),
    "weights of the model": ("model", "weights", lambda f: edit_weights(f / "model", lambda weight: weight + 1)),
    "an image": ("model", "data", lambda f: other_image(f / "pairs" / "3.bmp")),
    "a caption": ("model", "data", lambda f: edit(f / "pairs" / "pairs.csv", b"ball", b"wall")),
    "a held-out image": ("model", "validation_data", lambda f: other_image(f / "held_out" / "0.bmp")),
    "nouns": ("model", "nouns", lambda f: edit(f / "nouns.txt", b"cat", b"car")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_other_content(began, tmp_path, change):
    start, part, edit_content = CHANGES[change]
    moved = shutil.copytree(began, tmp_path / "there")
    edit_content(moved)
    state = (moved / f"run-{start}" / STATE_FILE).read_bytes()
    with pytest.raises(ValueError, match=f"the run began with other {part};"):
        run(moved, start, "--resume")
    assert (moved / f"run-{start}" / STATE_FILE).read_bytes() == state


@pytest.mark.parametrize("start", ["towers", "model"])
def test_a_run_goes_on_elsewhere(began, tmp_path, start):
    """Also in folders of other names, and with an option that the earlier version did not have."""
    moved = shutil.copytree(began, tmp_path / "there")
    (last,) = checkpoints(moved / f"run-{start}")
    new = {"pictures", "chunk_size"}
    edit_json(last, "state.json", "settings", to=lambda then: {name: then[name] for name in then.keys() - new})
    named = ["--data", str((moved / "pairs").rename(moved / "other pairs") / "pairs.csv")]  # whose own name counts
    for option in ("nouns", "model") if start == "model" else ("nouns", "vision", "text"):
        (old,) = moved.glob(f"{option}*")
        named += [f"--{option}", str(old.rename(moved / f"other {old.name}"))]
    run(moved, start, "--resume", "--num_workers", "1", *named)
    assert json.loads((moved / f"run-{start}" / "results.json").read_text())["step"] == 1
