import io

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from iclip_hf.evaluation.analysis import ChannelMatch, relation
from iclip_hf.evaluation.analysis_plots import channel_scatter, class_bars, relation_plot
from iclip_hf.utils.lettering import text_mask
from iclip_hf.utils.plots import (
    CELL,
    DPI,
    Sheet,
    cell_sized,
    comparison_sheet,
    explanation_grid,
    overlay,
    picture_grid,
)


def rendered(figure, dpi=50):
    if isinstance(figure, Sheet):
        return np.asarray(figure.image(dpi)).astype(int)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def titles(sheet):
    return [cell.title for cell in sheet.cells]


def marked(pixels):
    """Shares of a figure that are orange and blue, also where points let their ground through."""
    warmth = pixels[..., 0] - pixels[..., 2]
    return (warmth > 60).mean(), (warmth < -60).mean()


def test_a_map_in_bfloat16_is_drawn():
    image, heatmap = Image.new("RGB", (6, 4)), torch.linspace(0, 1, 24).view(4, 6).bfloat16()
    np.testing.assert_array_equal(overlay(image, heatmap), overlay(image, heatmap.float().numpy()))


def test_target_is_red_and_background_blue():
    image = Image.new("RGB", (4, 2), "gray")
    heatmap = np.zeros((2, 4))
    heatmap[:, 2:] = 1
    blended = overlay(image, heatmap)
    assert blended.size == image.size and blended.mode == "RGB"
    red, blue = blended.getpixel((3, 0)), blended.getpixel((0, 0))
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50
    np.testing.assert_array_equal(overlay(image, heatmap, opacity=0), image)


@pytest.mark.parametrize("colormap", ["jet", "cividis", "tab10"])
def test_colors_are_those_of_matplotlib(colormap):
    """Within two of 255 levels: both the colors and their mean are whole numbers."""
    heatmap = np.random.default_rng(0).random((30, 40), np.float32)
    heatmap[0, :2] = 0, 1
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    expected = 255 * (0.3 * colormaps[colormap](heatmap)[..., :3] + 0.7 * np.asarray(image) / 255)
    assert np.abs(np.asarray(overlay(image, heatmap, 0.3, colormap)) - expected).max() < 2


def test_bad_overlays_are_named():
    image = Image.new("RGB", (4, 2))
    with pytest.raises(ValueError, match=r"size \(2, 4\).*got \(4, 2\)"):
        overlay(image, np.zeros((4, 2)))
    with pytest.raises(ValueError, match="cividis"):
        overlay(image, np.zeros((2, 4)), colormap="rainbows")


def test_grid_shows_every_picture_under_its_title():
    image = Image.new("RGB", (60, 40), "white")
    maps = [np.full((40, 60), value) for value in (0.0, 0.5, 1.0)]
    sheet = explanation_grid(image, maps, ["one", "two $a$ and $b", "three"], columns=2)
    assert titles(sheet) == ["original", "one", "two $a$ and $b", "three"]
    for drawn in (sheet, sheet.figure()):
        pixels = rendered(drawn)
        places = []
        for heatmap in maps:
            close = np.abs(pixels - overlay(image, heatmap).getpixel((0, 0))).max(-1) < 3
            assert close.mean() > 0.05  # each map fills its part of the sheet
            places.append(np.argwhere(close).mean(0) / pixels.shape[:2] > 0.5)
        assert np.array_equal(places, [[False, True], [True, False], [True, True]])


def test_pillow_and_matplotlib_draw_a_sheet_alike():
    image = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    tall = Image.new("RGB", (20, 40), "orange")
    sheet = picture_grid([image, None, tall], ["a long title " * 4, "", "b"], 2, ["two\nlines", "c"], "a caption")
    ours, theirs = (rendered(drawn, dpi=100) for drawn in (sheet, sheet.figure()))
    assert ours.shape == theirs.shape
    both = [Image.fromarray(pixels.astype(np.uint8)).reduce(16) for pixels in (ours, theirs)]
    difference = np.abs(np.subtract(*(np.asarray(one, int) for one in both)))
    assert difference.max() < 60 and difference.mean() < 2  # letters and edges lie a pixel or two apart


def test_a_sheet_is_written_in_every_format(tmp_path):
    sheet = picture_grid([Image.new("RGB", (60, 40), "red")], ["a"], 1)
    begins = {"png": b"\x89PNG", "jpg": b"\xff\xd8", "webp": b"RIFF", "pdf": b"%PDF", "svg": b"<?xml"}
    for form, magic in begins.items():
        sheet.savefig(tmp_path / f"sheet.{form}", format=form, dpi=60)
        assert (tmp_path / f"sheet.{form}").read_bytes().startswith(magic)
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == tuple(round(side * 60) for side in sheet.size)


def test_a_picture_of_a_cell_is_not_resized_again():
    drawn = cell_sized(Image.effect_noise((640, 480), 80).convert("RGB"))
    sheet = picture_grid([drawn, drawn], ["a", "b"], 2)
    left, top, *_ = (round(side * DPI) for side in sheet.cells[1].box)
    shown = sheet.image()
    places = [(left + x, top + y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    boxes = [(x, y, x + drawn.width, y + drawn.height) for x, y in places]
    assert drawn.width == round((CELL - 0.08) * DPI)
    assert any(np.array_equal(shown.crop(box), drawn) for box in boxes)


def test_an_absent_text_is_dimmed_and_named():
    image = Image.new("RGB", (60, 40), "white")
    maps = [np.full((40, 60), 1.0)] * 2
    sheet = explanation_grid(image, maps, ["dog", "cat"], absent=[1])
    assert titles(sheet) == ["original", "dog", "cat  absent"]
    pixels = rendered(sheet)
    for opacity in (0.5, 0.125):
        color = overlay(image, maps[0], opacity).getpixel((0, 0))
        assert (np.abs(pixels - color).max(-1) < 3).mean() > 0.05


def test_empty_places_and_long_titles_fit():
    image = Image.new("RGB", (400, 20), "red")
    sheet = picture_grid([image, None, image], ["word " * 20, "", "b"], columns=3)
    pixels = rendered(sheet)
    red = np.abs(pixels - [255, 0, 0]).max(-1) < 3
    assert red.mean() > 0.01 and not red[:, red.shape[1] // 3 : -red.shape[1] // 3].any()
    assert titles(sheet)[0].count("\n") >= 3
    assert not sheet.figure().axes[1].images


def test_a_comparison_has_a_row_a_text_and_a_column_a_method():
    image = Image.new("RGB", (60, 40), "white")
    low, high = np.zeros((40, 60)), np.ones((40, 60))
    sheet = comparison_sheet(image, {"ground truth": [high, None], "itsm": [low, high]}, ["dog\n+0.31", "a cat " * 20])
    assert titles(sheet) == ["original", "ground truth", "itsm", "", "", ""]
    shown = [cell.picture for cell in sheet.cells]
    assert shown[4] is None and shown[0] is image and shown[3] is image
    for picture, heatmap in ((shown[1], high), (shown[2], low), (shown[5], high)):
        np.testing.assert_array_equal(picture, overlay(image, heatmap))
    first, *between, second = (cell.row_title for cell in (*sheet.cells[:3], sheet.cells[3]))
    assert first == "dog\n+0.31" and between == ["", ""] and second.count("\n") >= 4
    margin = rendered(sheet, dpi=60)[:, : round(60 * sheet.cells[0].box[0]) - 1]
    assert (margin < 100).any() and (margin[:, 0] == 255).all()  # the titles are within the margin
    rows = (margin < 200).any((1, 2))
    assert np.diff(np.flatnonzero(rows)).max() > 5  # and do not meet


@pytest.mark.parametrize(
    "text",
    ["傘を持った女性が海のそばの庭に立っている" * 3, "امرأة تحمل مظلة في الحديقة", "cost $5 and $6 {x}^\\frac", "🦒"],
)
def test_any_script_is_drawn_within_its_cell(text):
    sheet = picture_grid([Image.new("RGB", (60, 40))] * 2, [text, "b"], 2)
    mask = text_mask(titles(sheet)[0], size=11 / 72 * 120)
    assert 20 < mask.width <= CELL * 120 and mask.height <= sheet.cells[0].box[1] * 120
    assert np.asarray(mask).max() > 200


def test_letters_stand_in_lines():
    one, two = text_mask("Ill", 20), text_mask("Ill\nIllIll", 20)
    assert one.mode == "L" and (one.height, two.height) == (24, 48)
    assert two.width == pytest.approx(2 * one.width, abs=2)
    first, second = np.asarray(two)[:24] > 128, np.asarray(two)[24:] > 128
    assert first.any(1).sum() == pytest.approx(0.73 * 20, abs=2)  # the height of a capital letter
    left, right = np.flatnonzero(first.any(0))[[0, -1]]
    assert left + right == pytest.approx(two.width, abs=3)  # centred
    assert second.any(0).sum() > 1.5 * first.any(0).sum()


def test_a_high_title_beside_a_low_one_is_not_cut_off():
    pictures = [Image.new("RGB", (640, 480), "gray")] * 4
    pixels = rendered(picture_grid(pictures, ["low", "a folder with/a/long/name " * 4, "low", "low"], 4), dpi=100)
    assert (pixels[0] == 255).all()


def test_channels_are_points_in_their_patches():
    """Patches of 30x20 pixels; three channels, two of them in the last patch, of a value three times as large."""
    image = Image.new("RGB", (90, 40), "white")
    match = ChannelMatch(np.array([5, 1, 5]), np.array([3.0, -1.0, 3.0]), (2, 3))
    figure = channel_scatter([image, image], [{"class_token": match, "max": match}] * 2)
    assert [axis.get_title() for axis in figure.axes] == ["class token", "max", "", ""]
    for axis in figure.axes:
        (points,) = axis.collections
        patches = (points.get_offsets() + 0.5) // [30, 20]
        assert patches.tolist() == [[2, 1], [1, 0], [2, 1]]
        large, small, also_large = points.get_sizes()
        assert large == also_large == pytest.approx(3 * small)
        assert len({tuple(offset) for offset in points.get_offsets().tolist()}) == 3
        assert axis.get_xlim() == (-0.5, 89.5)  # the image, not the points, sets the frame
    assert marked(rendered(figure))[0] > 0.0005


@pytest.fixture
def scores():
    names = ["dog", "cat", "car", "sky"]
    return relation(dict(zip(names, [90.0, 50.0, 10.0, 30.0])), dict(zip(names, [60.0, 40.0, 20.0, 0.0])))


def test_a_relation_shows_points_line_and_names(scores):
    figure = relation_plot(scores, "precision", "IoU")
    pixels = rendered(figure)
    (axis,) = figure.axes
    assert axis.collections[0].get_offsets().tolist() == [[90, 60], [50, 40], [10, 20], [30, 0]]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("precision", "IoU")
    assert f"correlation {scores.correlation:.2f}" in axis.get_title()
    assert {text.get_text() for text in axis.texts} == {"dog", "cat", "car", "sky"}
    slope, offset = np.polyfit(scores.recognition, scores.interpretability, 1)
    np.testing.assert_allclose(axis.lines[0].get_ydata(), offset + slope * np.array([10, 90]))
    assert min(marked(pixels)) > 0.0003  # points and line are within the frame


def test_names_of_a_crowd_do_not_cover_each_other_or_a_point():
    generator = np.random.default_rng(0)
    names = [f"class {number}" for number in range(80)]
    crowd = relation(*(dict(zip(names, generator.uniform(0, 100, 80).tolist())) for _ in range(2)))
    figure = relation_plot(crowd, "x", "y")
    rendered(figure)
    (axis,) = figure.axes
    boxes = [text.get_window_extent() for text in axis.texts]
    assert 10 < len(boxes) < 80
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    points = axis.transData.transform(axis.collections[0].get_offsets())
    assert not any(box.padded(-1).count_contains(points) for box in boxes)


def test_one_class_has_no_line(scores):
    figure = relation_plot(relation({"dog": 1.0}, {"dog": 2.0}), "x", "y")
    assert "1 classes" in figure.axes[0].get_title() and not figure.axes[0].lines
    rendered(figure)


def test_bars_of_every_class_by_falling_interpretability(scores):
    figure = class_bars(scores, "precision", "IoU")
    pixels = rendered(figure)
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["sky", "car", "cat", "dog"]  # upwards
    assert [bar.get_width() for bar in left.patches] == [30, 10, 50, 90]
    assert [bar.get_width() for bar in right.patches] == [0, 20, 40, 60]
    assert left.get_title() == "precision\nmean 45" and right.lines[0].get_xdata()[0] == 30
    assert min(marked(pixels)) > 0.05
