import json
from functools import partial

import numpy as np
import pytest
from conftest import iclip, noise, tiny_model
from PIL import Image

from iclip_hf.data import load_segmentation
from iclip_hf.evaluation.analysis import semantic_shift
from iclip_hf.utils.digests import weights_digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_processor):
    """A model, and four photographs: a quarter, half, all and nothing of them is a dog."""
    folder = tmp_path_factory.mktemp("analyze")
    tiny_model().save_pretrained(folder / "model")
    tiny_processor.save_pretrained(folder / "model")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    (folder / "classes.txt").write_text("dog")
    for name, columns in enumerate((10, 20, 40, 0)):
        mask = np.zeros((30, 40), np.uint8)
        mask[:, :columns] = 1
        noise((40, 30), seed=name).save(folder / "images" / f"{name}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    return folder


run = partial(iclip, "analyze")


def test_shift_prints_and_writes_what_the_function_counts(folder, tmp_path, capsys, tiny_processor):
    data = ["shift", "--dataset", "folder", "--data-root", folder, "--model", folder / "model"]
    dataset = load_segmentation("folder", folder)
    expected = semantic_shift((tiny_model(), tiny_processor), dataset)
    assert run(*data, "--output", tmp_path / "shift.json") == 0
    assert capsys.readouterr().out.strip() == expected.table().strip()
    written = json.loads((tmp_path / "shift.json").read_text())
    assert [row["images"] for row in written["rows"]] == [1, 1, 1, 3] and written["left_out"] == 1
    assert written["foreground_channels"] == expected.foreground_channels
    protocol = written["protocol"]
    assert protocol["dataset"]["fingerprint"] == dataset.fingerprint() and protocol["dataset"]["images"] == 4
    assert protocol["weights"] == weights_digest(tiny_model())

    assert run(*data, "--limit", "1", "--before", "own", "--after", "max", "--json") == 0
    one = json.loads(capsys.readouterr().out)
    back = semantic_shift((tiny_model(), tiny_processor), [dataset[0]], "own", "max").rows
    assert [row["b2f"] for row in one["rows"]] == [back[0].b2f, None, None, back[0].b2f]


def test_shift_is_printed_though_it_cannot_be_written(folder, tmp_path, capsys, monkeypatch):
    def full_disk(*arguments):
        raise OSError("writing failed")

    monkeypatch.setattr("iclip_hf.utils.files.atomic_write", full_disk)
    data = ["--dataset", "folder", "--data-root", folder, "--model", folder / "model"]
    assert run("shift", *data, "--output", tmp_path / "shift.json", "--json") == 2
    out, err = capsys.readouterr()
    assert len(json.loads(out)["rows"]) == 4 and "writing failed" in err


def test_channels_of_several_images(folder, tmp_path):
    images = [folder / "images" / "0.png", folder / "images" / "1.png"]
    assert run("channels", *images, "--model", folder / "model", "--output", tmp_path / "a.png", "--dpi", "50") == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height  # four poolings, two images
        high = picture.width
    assert run("channels", images[0], "--model", folder / "model", "--output", tmp_path / "b.png", "--dpi", "100") == 0
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.width == pytest.approx(2 * high, abs=2)


def row(name, ap, iou):
    return {"id": 1, "name": name, "AP": ap, "MIoU": iou, "threshold": 0.5}


@pytest.fixture
def evaluation(tmp_path):
    rows = [row("dog", 90.0, 10.0), row("cat", 50.0, 20.0), row("car", 10.0, 30.0)]
    gem = [row("dog", 90.0, 30.0), row("cat", 50.0, 20.0), row("car", 10.0, None)]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"per_class": {"itsm": [*rows, row("sky", None, None)], "gem": gem}}))
    return path


def test_relation_of_an_evaluation(evaluation, tmp_path, capsys):
    output = tmp_path / "relation.svg"
    assert run("relation", evaluation, "--output", output, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("picture") == str(output)
    assert found == {"method": "itsm", "classes": 3, "correlation": pytest.approx(-1)}
    assert "<svg" in output.read_text()
    assert run("relation", evaluation, "--method", "gem", "--output", output) == 0
    assert capsys.readouterr().out.startswith("gem: 2 classes, correlation 1.0")
