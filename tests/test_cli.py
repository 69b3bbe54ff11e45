import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QuietHandler, iclip, served
from PIL import Image

from iclip_hf import cli, explain
from iclip_hf.backends.loading import load
from iclip_hf.cli import explain as explain_command
from iclip_hf.cli.output import cut
from iclip_hf.cli.pictures import _printed, _Texts
from iclip_hf.data import load_pairs
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.model.regions import find_regions, run_lengths
from iclip_hf.model.similarity import resize_and_normalize
from iclip_hf.utils.tables import table


def run(workspace, *arguments):
    return iclip("explain", *arguments, "--model", workspace / "model")


@pytest.mark.parametrize("command", ["explain", "segment"])
def test_many_photographs_and_one_that_is_broken(workspace, tmp_path, capsys, command):
    images = [workspace / "0" / "a.jpg", workspace / "broken.jpg", workspace / "1" / "a.jpg"]
    more = ["--text", "dog", "--output", tmp_path / "maps", "--model", workspace / "model"]
    assert iclip(command, *images, *more) == 2
    out, err = capsys.readouterr()
    kind = "explanation" if command == "explain" else "segments"
    lines = tmp_path / "maps" / f"{kind.removesuffix('s')}s.jsonl"
    assert f"2 images -> {lines}" in out.splitlines() and sum("png" in line for line in out.splitlines()) == 2
    entries = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [entry["image"] for entry in entries] == [str(images[0]), str(images[2])]
    written = {entry[part] for entry in entries for part in ("picture", "labels") if part in entry}
    assert written == {str(path) for path in (tmp_path / "maps").glob("*.png")}
    assert {f"a-{kind}.png", f"a-{kind}-2.png"} <= {path.name for path in (tmp_path / "maps").iterdir()}
    (line,) = err.splitlines()
    assert line.startswith(f"iclip {command}: ") and "broken.jpg" in line


def test_pictures_of_the_commands_are_no_images_of_data(workspace, tmp_path, monkeypatch, caplog):
    """Beside images of a class, in a folder of their own, and beside images with masks."""
    for folder, source in (("classes/dog", "0"), ("masked/images", "1")):
        shutil.copytree(workspace / source, tmp_path / folder)
        monkeypatch.chdir(tmp_path / folder)
        more = ["a.jpg", "--text", "dog", "--model", workspace / "model"]
        assert [iclip(command, *more) for command in ("explain", "explain", "segment", "compare")] == [0] * 4
        assert len(list(Path().iterdir())) == 6
    monkeypatch.chdir(tmp_path / "classes")
    assert run(workspace, "dog", "--text", "dog") == 0
    assert [path.name for path in Path("explanations").glob("*.png")] == ["a-explanation.png"]
    assert "such as 'a-comparison.png': this is the name of an output" in caplog.text
    pairs = load_pairs(".")
    assert [pairs.raw(index).key for index in range(len(pairs))] == ["dog/a.jpg"]

    monkeypatch.chdir(tmp_path / "masked")
    Path("masks").mkdir()
    Image.new("L", (30, 90), 1).save("masks/a.png")
    Path("classes.txt").write_text("dog")
    assert [sample.name for sample in load_segmentation("folder", ".")] == ["a"]


def test_a_folder_names_its_images(workspace, tmp_path, capsys, monkeypatch):
    """Those of subfolders too, but none that is hidden; a name that is not UTF-8 is no obstacle."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workspace / "1", "images/sub")
    shutil.copy(workspace / "0" / "a.jpg", b"images/b\xff.jpg")
    shutil.copy(workspace / "0" / "a.jpg", "images/.hidden.jpg")
    assert run(workspace, "images", "--text", "dog", "--json", "--output", "maps") == 0
    printed = capsys.readouterr().out
    assert printed == Path("maps/explanations.jsonl").read_text()
    assert [json.loads(line)["image"] for line in printed.splitlines()] == ["images/b\udcff.jpg", "images/sub/a.jpg"]
    (tmp_path / "empty").mkdir()
    assert run(workspace, "images", "empty", "--text", "dog") == 2
    assert "empty: " in capsys.readouterr().err


def test_an_image_of_a_url_is_downloaded(workspace, tmp_path, capsys, monkeypatch):
    """One that cannot be had does not end the others."""
    monkeypatch.chdir(tmp_path)
    with served(partial(QuietHandler, directory=workspace)) as server:
        site = f"http://127.0.0.1:{server.server_port}"
        urls = [f"{site}/0/a.jpg?size=1.5", f"{site}/absent.jpg", f"{site}/1/a.jpg"]
        assert run(workspace, *urls, "--text", "dog", "--json", "--output", "maps") == 2
        out, err = capsys.readouterr()
        answers = [json.loads(line) for line in out.splitlines()]
        assert [answer["image"] for answer in answers] == [urls[0], urls[2]] and "absent.jpg" in err
        assert run(workspace, urls[0], "--text", "dog", "--report", "report") == 0
        published = Path("report/data.js").read_text()
        assert '"images":["a.jpg"]' in published and "1.5" not in published  # a query may hold a token
        assert iclip("compare", urls[0], "--text", "dog", "--model", workspace / "model") == 0
    assert sorted(path.name for path in tmp_path.glob("**/*.png")) == [
        "a-comparison.png", "a-explanation-2.png", "a-explanation.png"
    ]  # fmt: skip


def test_cells_of_tables_are_padded_cut_and_escaped():
    lines = table(["text", "score"], [[cut("a dog " * 500), "0.5"], ["a|b", "0.25"]])
    assert [len(line) for line in lines] == [2 + 60 + 2 + 5] * 3 and lines[2].split() == ["a|b", "0.25"]
    assert table(["method", "IoU"], [["a|b", "0.5"]], markdown=True) == [
        "| method | IoU |",
        "| ------ | --- |",
        r"| a\|b   | 0.5 |",
    ]


def test_without_texts_the_nouns_of_each_image_are_told(workspace, tmp_path, capsys):
    photo, arrays = workspace / "0" / "a.jpg", tmp_path / "a.npz"
    assert run(workspace, photo, "--output", tmp_path / "a.png", "--json", "--npz") == 0
    entry = json.loads(capsys.readouterr().out)
    expected = explain(load(str(workspace / "model")), photo)
    assert [row["text"] for row in entry["texts"]] == expected.labels == np.load(arrays)["texts"].tolist()
    assert run(workspace, photo, "--output", tmp_path / "a.png") == 0
    _, headings, *rows = capsys.readouterr().out.splitlines()
    assert re.match(r"  best of [\d,]+ nouns +(presence \(prior 0.07 or 0.02\))? +score +regions", headings)
    assert [row.strip().startswith(label) for row, label in zip(rows, expected.labels, strict=True)]


@pytest.mark.parametrize(("presence", "told"), [(None, False), (0.6, False), (0.4, True)])
def test_nouns_of_which_none_is_present_are_told(presence, told):
    row = {"text": "dog", "presence": presence, "score": 0.1, "area": 0.0, "regions": []}
    texts = _Texts({"dog": 0.07}, 8, None, ("best of 1 nouns", "presence (prior 0.07)"))
    lines = _printed({"image": "a.jpg", "picture": "b.png", "texts": [row]}, texts, 0.5)
    assert ("--text" in lines[-1]) == told


@pytest.mark.parametrize(("error", "code"), [(OSError("writing failed"), 2), (KeyboardInterrupt(), 130)])
def test_reports_before_an_error_or_an_interruption_stay(workspace, tmp_path, capsys, recorded, error, code):
    """What took an hour is not lost."""
    numbers = count(1)

    def fail(*_):
        if next(numbers) == 9:
            raise error

    recorded(explain_command, "save_picture", fail)
    images = [workspace / str(number % 3) / "a.jpg" for number in range(12)]
    assert run(workspace, *images, "--text", "dog", "--output", tmp_path) == code
    out, err = capsys.readouterr()
    assert sum("a.jpg" in line for line in out.splitlines()) == 8 and (str(error) or "interrupted") in err
    lines = (tmp_path / "explanations.jsonl").read_text().splitlines()
    assert len(lines) == 8 and all(Path(json.loads(line)["picture"]).is_file() for line in lines)


@pytest.mark.parametrize("command", ["explain", "segment"])
def test_json_alone_writes_no_files(workspace, tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    images = [workspace / "0" / "a.jpg", workspace / "1" / "a.jpg"]
    more = ["--text", "dog", "--min-presence", "0", "--model", workspace / "model", "--json"]
    assert iclip(command, *images, *more) == 0
    report = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["image"] for entry in report] == [str(image) for image in images]
    for entry, image in zip(report, images):
        (text,) = entry["texts" if command == "explain" else "segments"]
        size = [entry["height"], entry["width"]]
        assert size == list(Image.open(image).size[::-1]) == text["mask"]["size"] and "picture" not in entry
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["explain", "segment", "compare"])
def test_commas_separate_texts(workspace, tmp_path, capsys, command):
    """As in the pipelines; a backslash before a comma keeps it in the text."""
    typed = ["--text", "dog, red ball", "--text", r"a dog\, asleep"]
    more = ["--model", workspace / "model", "--json", "--output", tmp_path / "out.png"]
    assert iclip(command, workspace / "0" / "a.jpg", *typed, *more) == 0
    entry = json.loads(capsys.readouterr().out)
    assert [text["text"] for text in entry.get("texts") or entry["segments"]] == ["dog", "red ball", "a dog, asleep"]
    assert iclip(command, workspace / "0" / "a.jpg", "--text", " , ", *more) == 2
    assert "--text" in capsys.readouterr().err


def test_json_and_arrays_say_what_the_masks_are(workspace, tmp_path, capsys):
    image, output = workspace / "0" / "a.jpg", tmp_path / "out.png"
    arguments = [image, "--text", "red ball", "--text", "dog", "--threshold", "0.8", "--min-presence", "0"]
    assert run(workspace, *arguments, "--output", output, "--npz", "--json") == 0
    entry = json.loads(capsys.readouterr().out)
    assert (entry["method"], entry["refined"]) == ("itsm", True)
    arrays = np.load(tmp_path / "out.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "out.png"]
    assert arrays["texts"].tolist() == ["red ball", "dog"] and arrays["raw_maps"].shape == (2, 16, 16)
    assert arrays["masks"].shape == (2, 40, 60) and arrays["masks"].dtype == bool
    assert [text["prior"] for text in entry["texts"]] == arrays["prior"].tolist() == [0.5, 0.5]
    for text, mask, raw in zip(entry["texts"], arrays["masks"], arrays["raw_maps"]):
        heatmap = resize_and_normalize(torch.from_numpy(raw)[None], (40, 60))[0].numpy()
        assert np.array_equal(mask, heatmap > 0.8)
        assert text["mask"] == run_lengths(mask)
        boxes = [list(region.box) for region in find_regions(heatmap, mask)]
        assert [region["box"] for region in text["regions"]] == boxes
    assert [text["score"] for text in entry["texts"]] == pytest.approx(arrays["scores"].tolist(), abs=1e-4)


def test_help_says_what_every_option_is():
    for name in (None, *cli.COMMANDS):
        parser = cli.parser(name)
        assert parser.description and parser.format_help()
        assert all(action.help or name is None for action in parser._actions), name


def test_arguments_and_files_are_checked_before_torch_is_imported(workspace, tmp_path):
    """And a command loads its own options alone."""
    photo, model = str(workspace / "0" / "a.jpg"), str(workspace / "model")
    commands = [
        ["--help"],
        ["explain", photo, "--text", "dog", "--output", "a.txt"],
        ["explain", photo, "--text", "dog", "--threshold", "7"],
        ["explain", photo, "--text", "dog", "--model", "bert"],
        ["explain", "pairs.csv", "--text", "dog"],
        ["compare", "none.jpg", "--text", "dog"],
        ["evaluate", "--dataset", "folder", "--data-root", str(tmp_path)],
        ["export", "bert", "out"],
        ["export", model, "out", "--results", "none.json"],
        ["push", model, "a b"],
        ["init", "--config", "iclip-vit-b16", "--output", "."],
    ]
    (tmp_path / "pairs.csv").write_text("image,label\n")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    code = f"""
import sys
from iclip_hf import cli
assert cli.main(["explain", "none.jpg", "--text", "dog"]) == 2
assert [name for name in cli.COMMANDS if "iclip_hf.cli." + name.replace("-", "_") in sys.modules] == ["explain"]
assert "numpy" not in sys.modules
for command in {commands}:
    assert cli.main(command) == (0 if command == ["--help"] else 2), command
    assert not {{"torch", "transformers", "matplotlib"}} & set(sys.modules), command
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(commands)  # one sentence each, of the help none


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch, given):
    """The variable is read when torch is imported, which the commands do late."""
    monkeypatch.setenv("OMP_WAIT_POLICY", given) if given else monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert iclip("--version") == 0
    assert os.environ["OMP_WAIT_POLICY"] == (given or "PASSIVE")


def test_a_full_gpu_is_one_sentence(monkeypatch, capsys):
    def full(options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("iclip_hf.cli.train.run", full)
    assert iclip("train", "pairs.csv") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("iclip train: ") and "--per_device_train_batch_size" in line


# Each in a process that has what transformers imports, and nothing of it
IMPORT_ORDERS = """
import os, sys, accelerate, torchvision

model = sys.argv[1]
assert "transformers" not in sys.modules
for imports in (
    "import iclip_hf; from transformers import CLIPModel",  # which imports the Auto classes half-way
    "import transformers; import iclip_hf",
    "from iclip_hf.model.pipeline_iclip import ImageTextSimilarityMapPipeline",
    "from iclip_hf.model.outputs import ICLIPOutput",  # of which the model is made, and which imports Transformers
):
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    exec(imports)
    from transformers import AutoModel, AutoProcessor, pipeline
    parts = (AutoModel.from_pretrained(model), AutoProcessor.from_pretrained(model))
    print(*(type(part).__name__ for part in (*parts, pipeline("image-text-similarity-map", model=model))))
    sys.exit()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_transformers_knows_the_package_whatever_is_imported_first(workspace):
    command = [sys.executable, "-c", IMPORT_ORDERS, str(workspace / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["ICLIPModel ICLIPProcessor ImageTextSimilarityMapPipeline"] * 4, done.stderr


def test_the_package_lists_what_it_imports_late():
    import iclip_hf
    import iclip_hf.data

    for package in (iclip_hf, iclip_hf.data):
        assert set(package.__all__) <= set(dir(package))
        assert all(getattr(package, name).__name__ == name for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        iclip_hf.nothing  # noqa: B018


def test_options_of_the_command_are_parameters_of_metrics():
    from inspect import signature

    from iclip_hf.evaluation.metrics import METRICS, OPTIONS, make_metrics

    parameters = {name for metric in make_metrics([*METRICS]) for name in signature(type(metric)).parameters}
    assert OPTIONS.keys() == parameters - {"ignore_index", "stuff", "like"}  # which the data set says


def test_without_a_command_the_help_lists_them(capsys):
    assert iclip() == 0
    out, err = capsys.readouterr()
    assert all(name in out for name in cli.COMMANDS) and not err
