import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import NAMES, iclip, noise, save, tiny_model
from PIL import Image

from iclip_hf import explain
from iclip_hf.model.presence import presence_text, presence_word
from iclip_hf.plots import sheets


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_processor):
    """Two models and a data set of two photographs: the first shows a dog and a car, the second nothing."""
    folder = tmp_path_factory.mktemp("compare")
    for seed in range(2):
        save(folder / f"model{seed}", tiny_model(seed=seed, logit_bias_init_value=0.0), tiny_processor)
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    (folder / "classes.txt").write_text("\n".join(NAMES))
    mask = np.zeros((40, 60), np.uint8)
    mask[:20, :30], mask[20:, 30:], mask[:20, 30:] = 1, 3, 255
    for seed, (name, values) in enumerate({"a": mask, "b": 0 * mask}.items()):
        noise((60, 40), seed=seed).save(folder / "images" / f"{name}.png")
        Image.fromarray(values).save(folder / "masks" / f"{name}.png")
    return folder


@pytest.fixture
def sheet(recorded):
    """What the command gives the plot."""
    seen, names = {}, ("image", "heatmaps", "row_titles", "words")
    recorded(sheets, "comparison_sheet", lambda *args, **options: seen.update(zip(names, args)))
    return seen


def run(folder, image, *arguments, models=(0,)):
    models = [argument for seed in models for argument in ("--model", folder / f"model{seed}")]
    return iclip("compare", image, *models, *arguments)


def test_a_row_a_text_and_a_column_a_method(folder, tmp_path, sheet, capsys, tiny_processor):
    path, output = folder / "images" / "a.png", tmp_path / "sub" / "out.png"
    texts = ["--text", "cat", "--text", "tail of the dog", "--template", "{}"]
    assert run(folder, path, *texts, "--methods", "itsm", "grad_cam", "--output", output, "--json") == 0
    assert list(sheet["heatmaps"]) == ["itsm, refined", "grad_cam, refined"]
    report = json.loads(capsys.readouterr().out)
    assert report["maps"] == [*sheet["heatmaps"]]
    scores = report["texts"]
    assert [row["text"] for row in scores] == ["cat", "tail of the dog"]
    for method, maps in sheet["heatmaps"].items():
        explained = explain(
            (tiny_model(logit_bias_init_value=0.0), tiny_processor),
            [path],
            ["cat", "tail of the dog"],
            method.partition(",")[0],
            templates=["{}"],
        )[0]
        np.testing.assert_allclose(maps, explained.maps, atol=1e-5)
        for row, score, presence in zip(scores, explained.scores, explained.presence):
            assert list(row["scores"].values()) == [pytest.approx(float(score), abs=1e-4)]
            assert list(row["presence"].values()) == [pytest.approx(float(presence), abs=1e-3)]
    assert [title.split("\n")[0] for title in sheet["row_titles"]] == ["cat", "tail of the dog"]
    with Image.open(output) as picture:
        assert picture.width > picture.height
    assert [path.name for path in output.parent.iterdir()] == ["out.png"]


def test_the_data_set_gives_texts_and_their_pixels(folder, tmp_path, sheet, capsys):
    data = ["--dataset", "folder", "--data-root", folder, "--output", tmp_path / "out.png"]
    assert run(folder, "a", *data) == 0
    assert list(sheet["heatmaps"]) == ["ground truth", "itsm, refined"]
    dog, car = sheet["heatmaps"]["ground truth"]
    assert dog[:20, :30].min() == 1 and dog.sum() == 600 and car[20:, 30:].min() == 1 and car.sum() == 600
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["dog", "car"]

    assert run(folder, folder / "images" / "a.png", *data, "--text", "red ball", "--text", "blue car") == 0
    absent, unknown = sheet["heatmaps"]["ground truth"]
    assert absent.max() == 0 and unknown is None


def test_images_of_one_name_are_told_apart_by_their_paths(folder, tmp_path, sheet, capsys):
    """In two folders of a COCO data set, the first of which shows a dog and the second a car."""
    images = [
        {"id": number, "file_name": f"{sub}/a.png", "height": 40, "width": 60} for number, sub in enumerate("xy")
    ]
    square = {"segmentation": [[0, 0, 30, 0, 30, 20, 0, 20]], "bbox": [0, 0, 30, 20], "area": 600, "iscrowd": 0}
    annotations = [{"id": number + 1, "image_id": number, "category_id": number + 1, **square} for number in (0, 1)]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "car"}]
    for seed, image in enumerate(images):
        path = tmp_path / "mine" / image["file_name"]
        path.parent.mkdir(parents=True)
        noise((60, 40), seed=seed).save(path)
    (tmp_path / "annotations").mkdir()
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations" / "instances_mine.json").write_text(json.dumps(content))
    data = ["--dataset", "coco2017", "--data-root", tmp_path, "--split", "mine", "--output", tmp_path / "out.png"]
    for name, shown in (("x/a.png", "dog"), ("y/a.png", "car"), (tmp_path / "mine" / "y" / "a.png", "car")):
        assert run(folder, name, *data) == 0
        assert [title.split("\n")[0] for title in sheet["row_titles"]] == [shown]
    capsys.readouterr()
    other = tmp_path / "a.png"
    noise((60, 40), seed=5).save(other)
    refused = {"a": "2 images", "a.png": "2 images", **dict.fromkeys(["z/a.png", "a" * 300, other], "none of the")}
    for name, sentence in refused.items():
        assert run(folder, name, *data) == 2
        assert sentence in capsys.readouterr().err


def test_presence_of_each_text_and_model_in_words(folder, tmp_path, sheet, capsys):
    """In the titles of the rows, in the table, and for the pictures, which fade by it."""
    image, texts = folder / "images" / "b.png", ["dog", "cat", "red ball", "car", "tree", "sky"]
    asked = [argument for text in texts for argument in ("--text", text)]
    command = [*asked, "--methods", "itsm", "attention", "--output", tmp_path / "out.png"]
    assert run(folder, image, *command, "--json", models=(0, 1)) == 0
    rows = json.loads(capsys.readouterr().out)["texts"]
    first, second = (str(folder / f"model{seed}") for seed in range(2))
    words = {model: [presence_word(row["presence"][model]) for row in rows] for model in (first, second)}
    assert len(set(words[first] + words[second])) > 1 and words[first] != words[second]
    one, other = (sheet["heatmaps"][f"{Path(model).name}\nitsm, refined"][0] for model in (first, second))
    assert np.abs(one - other).max() > 0.05
    columns = {
        f"{Path(model).name}\n{method}, refined": words[model] for model in words for method in ("itsm", "attention")
    }
    assert sheet["words"] == columns and list(sheet["heatmaps"]) == list(columns)
    for row, title in zip(rows, sheet["row_titles"]):
        found = zip(row["presence"].values(), row["scores"].values())
        notes = [f"{presence_text(presence)} · score {score:.2f}" for presence, score in found]
        assert title == f"{row['text']}\n{', '.join(notes)}"
    twice = ["--model", f"{folder}/./model0"]  # is compared once
    assert run(folder, image, *command, *twice, models=(0, 1, 0)) == 0
    _, headings, *lines = capsys.readouterr().out.splitlines()
    assert headings.split() == ["text", "presence", "score", "model"]
    shown = [re.search("present|unsure|absent", line)[0] for line in lines]
    assert shown == [word for of_text in zip(*words.values()) for word in of_text]


def test_a_picture_names_no_folder_of_two_models_of_one_name(folder, tmp_path, sheet):
    shutil.copytree(folder / "model1", tmp_path / "model0")
    options = ["--text", "dog", "--output", tmp_path / "out.png", "--model", tmp_path / "model0"]
    assert run(folder, folder / "images" / "b.png", *options) == 0
    assert [title.splitlines()[0] for title in sheet["heatmaps"]] == ["model0 (1)", "model0 (2)"]


def test_prompts_are_those_of_the_data_set(folder, tmp_path, capsys):
    """As in its evaluation: renamed classes in its own templates, unless others are given."""
    overrides = tmp_path / "overrides.json"
    overrides.write_text(json.dumps({"names": {"dog": "cat"}, "templates": ["a red {}"]}))
    data = ["--dataset", "folder", "--data-root", folder, "--output", tmp_path / "out.png", "--json"]

    def scores(*arguments):
        assert run(folder, *arguments) == 0
        return [(row["text"], *row["scores"].values()) for row in json.loads(capsys.readouterr().out)["texts"]]

    overridden = scores("a", *data, "--overrides", overrides)
    plain = ["--text", "cat", "--text", "car", *data[4:]]
    assert overridden == scores(folder / "images" / "a.png", *plain, "--template", "a red {}")
    assert overridden != scores(folder / "images" / "a.png", *plain)
