import io

import numpy as np
import pytest
import torch
from PIL import Image

from iclip_hf.evaluation.analysis import ChannelMatch, relation
from iclip_hf.evaluation.analysis_plots import channel_scatter, class_bars, relation_plot
from iclip_hf.utils.plots import comparison_sheet, explanation_grid, overlay, picture_grid


def rendered(figure, dpi=50):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


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
    assert blended.shape == (2, 4, 3) and blended.min() >= 0 and blended.max() <= 1
    red, blue = blended[0, 3], blended[0, 0]
    assert red[0] > red[2] + 0.2 and blue[2] > blue[0] + 0.2
    np.testing.assert_allclose(overlay(image, heatmap, opacity=0), np.asarray(image) / 255, atol=1e-6)


def test_bad_overlays_are_named():
    image = Image.new("RGB", (4, 2))
    with pytest.raises(ValueError, match=r"size \(2, 4\).*got \(4, 2\)"):
        overlay(image, np.zeros((4, 2)))
    with pytest.raises(ValueError, match="cividis"):
        overlay(image, np.zeros((2, 4)), colormap="rainbows")


def test_grid_shows_every_picture_under_its_title():
    image = Image.new("RGB", (60, 40), "white")
    maps = [np.full((40, 60), value) for value in (0.0, 0.5, 1.0)]
    figure = explanation_grid(image, maps, ["one", "two $a$ and $b", "three"], columns=2)
    assert [axis.get_title() for axis in figure.axes] == ["original", "one", "two $a$ and $b", "three"]
    pixels = rendered(figure)
    for red, green, blue in (overlay(image, m)[0, 0] * 255 for m in maps):
        close = np.abs(pixels - np.array([red, green, blue])).max(-1) < 3
        assert close.mean() > 0.05  # each map fills its part of the sheet


def test_an_absent_text_is_dimmed_and_named():
    image = Image.new("RGB", (60, 40), "white")
    maps = [np.full((40, 60), 1.0)] * 2
    figure = explanation_grid(image, maps, ["dog", "cat"], absent=[1])
    assert [axis.get_title() for axis in figure.axes] == ["original", "dog", "cat  absent"]
    pixels = rendered(figure)
    for opacity in (0.5, 0.125):
        color = overlay(image, maps[0], opacity)[0, 0] * 255
        assert (np.abs(pixels - color).max(-1) < 3).mean() > 0.05


def test_empty_places_and_long_titles_fit():
    image = Image.new("RGB", (400, 20), "red")
    figure = picture_grid([image, None, image], ["word " * 20, "", "b"], columns=3)
    pixels = rendered(figure)
    assert (np.abs(pixels - [255, 0, 0]).max(-1) < 3).mean() > 0.01
    assert figure.axes[0].get_title().count("\n") >= 3
    assert not figure.axes[1].images


def test_a_comparison_has_a_row_a_text_and_a_column_a_method():
    image = Image.new("RGB", (60, 40), "white")
    low, high = np.zeros((40, 60)), np.ones((40, 60))
    sheet = comparison_sheet(image, {"ground truth": [high, None], "itsm": [low, high]}, ["dog\n+0.31", "a cat " * 20])
    assert [axis.get_title() for axis in sheet.axes] == ["original", "ground truth", "itsm", "", "", ""]
    shown = [axis.images[0].get_array() if axis.images else None for axis in sheet.axes]
    assert shown[4] is None and (shown[0] == 255).all() and (shown[3] == 255).all()
    for picture, heatmap in ((shown[1], high), (shown[2], low), (shown[5], high)):
        np.testing.assert_allclose(picture, overlay(image, heatmap))
    first, second = (axis.texts[0].get_text() for axis in (sheet.axes[0], sheet.axes[3]))
    assert first == "dog\n+0.31" and second.count("\n") >= 4
    rendered(sheet)
    boxes = [axis.texts[0].get_window_extent() for axis in (sheet.axes[0], sheet.axes[3])]
    assert all(box.x0 >= 0 for box in boxes) and not boxes[0].overlaps(boxes[1])


@pytest.mark.filterwarnings("ignore:Glyph")  # of older versions of matplotlib
@pytest.mark.parametrize(
    "text",
    ["傘を持った女性が海のそばの庭に立っている" * 3, "امرأة تحمل مظلة في الحديقة", "cost $5 and $6 {x}^\\frac", "🦒"],
)
def test_any_script_is_drawn_within_its_cell(text):
    figure = picture_grid([Image.new("RGB", (60, 40))] * 2, [text, "b"], 2, ["a", text][:1])
    rendered(figure)
    left, right = (axis.title.get_window_extent() for axis in figure.axes)
    assert not left.overlaps(right) and left.x0 >= -2 and left.y1 <= figure.bbox.height + 2


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
