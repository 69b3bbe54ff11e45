"""The page of an evaluation and of explained images, its data and what a browser shows of them."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, evaluate_model, iclip, opened
from PIL import Image

from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.evaluation.metrics import MeanForegroundMinusBackground
from iclip_hf.model.explanation import Explanation
from iclip_hf.model.presence import MIN_PRESENCE
from iclip_hf.utils.tables import table


METHODS = ["itsm", "random"]


def data_of(folder: Path) -> dict:
    text = (folder / "data.js").read_text()
    return json.loads(text.removeprefix("const REPORT = ").removesuffix(";\n"))


@pytest.fixture(scope="module")
def evaluated(world, labelled_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    dataset = load_segmentation("folder", labelled_folder)
    model = (world.model, world.processor)
    result = evaluate_model(model, dataset, METHODS, batch_size=2, report=folder)
    plain = evaluate_model(model, dataset, METHODS, batch_size=2)
    return folder, dataset, result, plain


def test_a_report_changes_no_result(evaluated):
    _, _, result, plain = evaluated
    assert (result.results, result.per_class, result.tables) == (plain.results, plain.per_class, plain.tables)
    assert result.protocol == plain.protocol


def test_the_rows_are_the_pairs_of_the_evaluation(evaluated):
    folder, dataset, result, _ = evaluated
    data = data_of(folder)
    assert data["texts"] == NAMES and data["methods"] == METHODS and data["images"] == [one.name for one in dataset]
    assert [*data["scores"]][0] == "IoU (mMIoU)" and data["title"].endswith(" on folder")
    pairs = [(image, label - 1) for image, sample in enumerate(dataset) for label in sample.class_ids]
    assert [tuple(row[:2]) for row in data["rows"]] == pairs
    for place, method in enumerate(METHODS):
        for text, row in enumerate(result.per_class[method]):
            overlaps = [values[place] for _, one, _, _, values in data["rows"] if one == text]
            assert 100 * np.mean(overlaps) == pytest.approx(row["mMIoU"]["IoU"], abs=0.01)
            assert data["scores"]["IoU (mMIoU)"][method][text] == row["mMIoU"]["IoU"]
    areas = [(dataset[image].mask(text + 1) == text + 1).mean() for image, text in pairs]
    assert [row[2] for row in data["rows"]] == pytest.approx(areas, abs=1e-4)
    alarms = {(image, text) for image, text, presence in data["alarms"] if presence >= MIN_PRESENCE}
    assert len(alarms) == len(data["alarms"]) > 0 and not alarms & {*pairs}
    # Every picture is there and small, and shows the outline of the mask.
    names = {f"{image}.jpg" for image in range(len(dataset))}
    names |= {f"{image}-{text}-{place}.jpg" for image, text in pairs for place in range(2)}
    assert names == {path.name for path in (folder / "images").iterdir()}
    assert all(path.stat().st_size < 30_000 for path in (folder / "images").iterdir())
    image, text = pairs[0]
    sample = dataset[image]
    with Image.open(folder / "images" / f"{image}-{text}-0.jpg") as picture:
        red, _, blue = np.moveaxis(np.asarray(picture, int), -1, 0)
        inside = sample.mask(text + 1) == text + 1
        assert picture.size == sample.image.size and inside[blue - red > 120].mean() > 0.8


def test_a_presence_just_below_the_threshold_is_a_miss(world, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(type(world.model), "presence", lambda self, scores: torch.full_like(scores, 0.49999))
    evaluate_model((world.model, world.processor), dataset, limit=2, report=tmp_path / "report")
    data = data_of(tmp_path / "report")
    assert data["alarms"] == [] and all(row[3] < MIN_PRESENCE for row in data["rows"])


def test_a_class_without_a_value_has_none(world, dataset, tmp_path, monkeypatch):
    scores = {"mfmb": 0.5, "per_class": {1: math.nan, 2: 0.5}}
    monkeypatch.setattr(MeanForegroundMinusBackground, "compute", lambda self: dict(scores))
    model = (world.model, world.processor)
    result = evaluate_model(model, dataset, ["itsm"], ["mFMB"], limit=2, report=tmp_path / "report")
    assert data_of(tmp_path / "report")["scores"] == {"FMB (mFMB)": {"itsm": [None, 0.5, None]}}
    assert [row["mFMB"]["FMB"] for row in json.loads(result.to_json())["per_class"]["itsm"]] == [None, 0.5, None]


def texts_of(page):
    return page.locator("article strong").all_inner_texts()


def numbers(page, pattern):
    found = (re.search(pattern, text) for text in page.locator("article").all_inner_texts())
    return [float(match[1]) for match in found]


def test_a_reader_finds_the_worst_images_of_a_class(browser, evaluated):
    """From disk, without a server."""
    folder, _, result, _ = evaluated
    data = data_of(folder)
    with opened(browser, (folder / "index.html").as_uri(), "article") as page:
        assert page.locator("h1").inner_text() == data["title"]
        cells = page.locator("#tables td").all_inner_texts()
        assert {"itsm", f"{result.results['itsm']['mMIoU']['mmiou']:.2f}"} <= {*cells}
        assert len(texts_of(page)) == len(data["rows"])
        # One click on a bar shows the worst images of a class by the method of the plot, whatever was chosen before.
        page.select_option("#kind", "alarms")
        page.select_option("#order", "presence -1")
        page.select_option("#plotted", "random")
        page.locator("#bars button", has_text="red ball").click()
        assert set(texts_of(page)) == {"red ball"} and page.locator("#method").input_value() == "random"
        worst = numbers(page, r"random · IoU ([\d.]+) %")
        assert worst == sorted(worst) and len(worst) == sum(row[1] == 1 for row in data["rows"])
        page.select_option("#order", "value -1")
        assert numbers(page, r"random · IoU ([\d.]+) %") == worst[::-1]
        page.select_option("#size", "large, from 10 %")
        assert len(texts_of(page)) == sum(row[1] == 1 and row[2] >= 0.1 for row in data["rows"])
        page.select_option("#kind", "alarms")
        page.select_option("#text", "")
        presences = numbers(page, r"presence ([\d.]+)")
        assert len(presences) == len(data["alarms"]) and presences == sorted(presences, reverse=True)
        page.select_option("#kind", "pairs")
        page.select_option("#size", "any")
        page.locator("article img").last.scroll_into_view_if_needed()
        page.wait_for_function("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")
        assert all(address.startswith("file:") for address in page.requested)


def test_thousands_of_images_are_shown_page_by_page_and_a_pipe_in_its_cell(browser, evaluated, tmp_path):
    folder, *_ = evaluated
    data = data_of(folder)
    data["rows"] = [[0, 0, 0.2, 0.5, [number / 20_000, 0.5]] for number in range(20_000)]
    data["tables"] = ["\n".join(table(["class", "IoU"], [["a|b", "0.5"]], markdown=True))]
    (tmp_path / "data.js").write_text(f"const REPORT = {json.dumps(data)};")
    (tmp_path / "index.html").write_text((folder / "index.html").read_text())
    with opened(browser, (tmp_path / "index.html").as_uri(), "article") as page:
        assert page.locator("#tables td").all_inner_texts() == ["a|b", "0.5"]
        assert len(texts_of(page)) == 24 and page.locator("#back").is_disabled()
        page.click("#next")
        assert page.locator("#page").inner_text() == "25 to 48" and not page.locator("#back").is_disabled()


def test_explained_images_have_the_same_page(browser, workspace, tmp_path, capsys, monkeypatch):
    images = [workspace / str(number) / "a.jpg" for number in range(3)]
    command = ["explain", *images, "--text", "dog, red ball", "--model", workspace / "model"]
    assert iclip(*command, "--report", tmp_path / "report") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    printed = capsys.readouterr()
    assert str(tmp_path / "report" / "index.html") in printed.err
    assert str(images[0]) in printed.out.splitlines() and "->" not in printed.out  # there are no files to name
    data = data_of(tmp_path / "report")
    assert data["title"] == "Maps of 3 images" and data["images"] == ["a.jpg"] * 3
    assert data["texts"] == ["dog", "red ball"] and len(data["rows"]) == 6
    with opened(browser, (tmp_path / "report" / "index.html").as_uri(), "article") as page:
        assert sorted(texts_of(page)) == 3 * ["dog"] + 3 * ["red ball"]
        assert not any(page.locator(name).is_visible() for name in ("#plot", "#method"))  # nothing to choose from
        assert page.locator("article figure").count() == 18  # the image, its map, and the map before the refinement
        page.locator("article img").last.scroll_into_view_if_needed()
        page.wait_for_function("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Explanation, "to_dict", interrupted)
    assert iclip(*command, "--report", tmp_path / "part") == 130
    assert len(data_of(tmp_path / "part")["images"]) >= 1
    for taken, command_line in ((tmp_path / "report", command), (workspace / "0" / "report", ["explain", workspace])):
        assert iclip(*command_line, "--report", taken) == 2
        assert f"{taken}: " in capsys.readouterr().err
