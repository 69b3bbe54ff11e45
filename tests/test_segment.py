"""`iclip segment`, and the pictures it draws."""

import json

import numpy as np
import pytest
from conftest import iclip
from PIL import Image, ImageColor

from iclip_hf import explain
from iclip_hf.backends.loading import load_pretrained
from iclip_hf.cli.segment import _save_label_map
from iclip_hf.model.regions import run_lengths
from iclip_hf.plots import sheets
from iclip_hf.plots.colors import SEGMENTS, label_colors
from iclip_hf.plots.sheets import label_sheet


def run(workspace, *arguments):
    return iclip("segment", *arguments, "--model", workspace / "model")


def test_one_photograph_becomes_a_picture_a_label_map_and_json(workspace, tmp_path, capsys):
    output, photo = tmp_path / "sub" / "out.png", workspace / "0" / "a.jpg"
    texts = ("--text", "dog", "--text", "red ball", "--background", "sky", "--min-presence", "0")
    assert run(workspace, photo, *texts, "--output", output, "--json") == 0
    entry = json.loads(capsys.readouterr().out)
    assert (entry["picture"], entry["labels"]) == (str(output), str(tmp_path / "sub" / "out-labels.png"))
    assert sorted(path.name for path in output.parent.iterdir()) == ["out-labels.png", "out.png"]

    image = Image.open(photo)
    explanation = explain(load_pretrained(workspace / "model"), image, ["dog", "red ball", "sky"], refine=True)
    expected, competing = (explanation.label_map(background=texts).numpy() + 1 for texts in ([2], []))
    with Image.open(entry["labels"]) as labels:
        assert labels.mode == "P" and labels.size == image.size
        np.testing.assert_array_equal(np.asarray(labels), expected)
        colors = np.asarray(labels.convert("RGB"))
    np.testing.assert_array_equal(colors, label_colors(4)[expected])
    ids = [(segment["text"], segment["id"]) for segment in entry["segments"]]
    assert ids == [("dog", 1), ("red ball", 2), ("sky", 0)]
    for index, segment in enumerate(entry["segments"]):
        assert segment["area"] == pytest.approx((competing == index + 1).mean(), abs=1e-4) and segment["area"] > 0
        assert segment["score"] == pytest.approx(explanation.scores[index].item(), abs=1e-4)
        assert segment["mask"] == run_lengths(competing == index + 1)
    assert run(workspace, photo, *texts, "--output", output) == 0
    assert "sky (background)" in capsys.readouterr().out


def test_a_present_text_without_a_pixel_is_named(workspace, capsys):
    texts = [word for text in ("dog", "grass", "dog") for word in ("--text", text)]  # the first of equals
    texts += ["--json", "--min-presence", "0"]
    assert run(workspace, workspace / "0" / "a.jpg", *texts) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["segments"][2]["area"] == 0 and "often wrong" not in out
    assert "other texts cover dog" in err and "grass" not in err
    assert run(workspace, workspace / "0" / "a.jpg", *texts[:-1], "1") == 0
    assert not capsys.readouterr().err  # absent, not covered


def test_thresholds_and_presence_leave_pixels_to_the_background(workspace, capsys):
    arguments = [workspace / "0" / "a.jpg", "--text", "dog", "--json"]
    areas = {}
    for name, options in {
        "default": ("--min-presence", "0"),
        "low": ("--min-presence", "0", "--threshold", "0.2"),
        "none": ("--min-presence", "0", "--threshold", "1"),
        "absent": ("--min-presence", "1"),
    }.items():
        assert run(workspace, *arguments, *options) == 0
        areas[name] = json.loads(capsys.readouterr().out)["segments"][0]["area"]
    assert 0 == areas["none"] == areas["absent"] < areas["default"] < areas["low"] < 1


@pytest.mark.parametrize("texts, mode, void", [(254, "P", 255), (255, "I;16", 65535)])
def test_no_id_is_that_of_void_pixels(tmp_path, texts, mode, void):
    """Whichever texts the image shows: files of one call have one form."""
    for shown in (np.arange(-1, texts), np.array([-1, 0])):
        with Image.open(_save_label_map(shown[None], texts, tmp_path / "a.png")) as labels:
            assert labels.mode == mode and np.asarray(labels).max() < void
            np.testing.assert_array_equal(np.asarray(labels)[0], shown + 1)


def test_colors_are_those_of_voc():
    assert label_colors(22)[[0, 1, 2, 3, 4, 8, 15, 20, 21]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [64, 0, 0], [192, 128, 128], [0, 64, 128],
        [128, 64, 128],
    ]  # fmt: skip
    assert len({tuple(color) for color in label_colors(256).tolist()}) == 256


@pytest.fixture
def shown(recorded):
    """The pictures of sheets."""
    return recorded(sheets, "picture_grid", lambda pictures, *args, **options: [*map(np.asarray, pictures)])


def test_a_legend_names_presence_and_shares_of_the_whole_image_and_fades_absent_texts(recorded):
    """First the texts with pixels, in their order, and the pixels without a text."""
    legends, labels = recorded(sheets, "_legend", lambda entries, *size: entries), np.full((500, 1000), -1)
    labels[:, ::4] = 1
    labels[:, 1::1000] = 0  # one column of a thousand, of a picture of 336
    labels[labels == 1], labels[labels == 0] = 3, 1
    texts, words = ["tree", "dog", "sky", "cat"], ["absent", "unsure", "present", "present"]
    sheet = label_sheet(Image.new("RGB", (1000, 500)), labels, texts, words)
    (entries,) = legends
    shares = [("dog", "unsure · 0.1 %"), ("cat", "present · 25.0 %"), ("no text", "74.9 %")]
    assert [entry[1:] for entry in entries] == [*shares, ("tree", "absent"), ("sky", "present")]
    assert entries[1][0] == SEGMENTS[3] and entries[3][0] == entries[4][0] == "white"
    lines = np.asarray(sheet.crop((sheet.width - 354, sheet.height - 186, sheet.width - 100, sheet.height - 66)))
    darkest = lines.reshape(5, 24, *lines.shape[1:])[:, :, 40:].min((1, 2, 3))
    assert darkest[3] > darkest[[0, 1, 2, 4]].max() + 20


def test_the_sheet_shows_what_counted_as_background(shown, recorded):
    legends = recorded(sheets, "_legend", lambda entries, *size: entries)
    labels = np.full((200, 400), -1)
    labels[:, 200:300], labels[:, 300:] = 1, 2
    image = Image.new("RGB", (400, 200), "white")
    label_sheet(image, labels, ["dog"], ["absent", "present", "unsure"], ["sky", "sea"], opacity=1)
    ((original, painted, legend),), (entries,) = shown, legends
    names = [("sky (background)", "present · 25.0 %"), ("sea (background)", "unsure · 25.0 %"), ("no text", "50.0 %")]
    assert [entry[1:] for entry in entries] == [*names, ("dog", "absent")]
    middle = painted.shape[1] // 2
    ink = ImageColor.getrgb(entries[0][0])
    assert (original == 255).all() and (painted[:, middle:] == ink).all() and entries[0][0] == entries[1][0]
    assert (painted[:, :middle] == painted[0, 0]).all() and 100 < painted[0, 0, 0] < 200  # the rest is dimmed
    assert (legend == ink).all(-1).sum() > 200


@pytest.mark.parametrize("texts", [0, 1, 200])
def test_a_legend_holds_what_fits(shown, texts):
    labels = np.arange(200).repeat(100).reshape(200, 100) % max(texts, 1) - (not texts)
    names = [f"{k} " * 40 for k in range(max(texts, 1))]
    label_sheet(Image.new("RGB", (100, 200), "white"), labels, names, ["present"] * len(names))
    ((*_, legend),) = shown
    drawn = (legend < 128).any((1, 2))
    assert drawn.any() and not drawn[:2].any() and not drawn[-2:].any()  # nothing is cut
    assert len({tuple(ink) for ink in legend[:, 10].tolist()}) <= 1 + len(SEGMENTS)
