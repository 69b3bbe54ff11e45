import itertools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import iclip_hf
from iclip_hf.model.explanation import Explanation
from iclip_hf.plots import COLORMAPS, sheets
from iclip_hf.plots.colors import color_table, overlay
from iclip_hf.plots.lettering import fitted, text_mask, text_width
from iclip_hf.plots.sheets import comparison_sheet, draw, picture_grid


@pytest.mark.parametrize("colormap", COLORMAPS)
def test_the_image_stays_visible_where_a_map_is_low(colormap):
    """
    Half of the contrast is left at 0. It falls with the value, except with jet, which is equally opaque everywhere.
    """
    ramp = np.linspace(0, 1, 256)[None].repeat(2, 0)
    dark, light = (
        np.asarray(overlay(Image.new("RGB", (256, 2), color), ramp, colormap=colormap))[0].astype(int)
        for color in ("black", "white")
    )
    left = (light - dark).mean(1) / 255
    assert left[0] > 0.48 and (np.diff(left) < 0.01).all()
    assert (left[-1] < 0.2) == (colormap != "jet")
    gray = Image.new("RGB", (256, 2), "gray")
    assert overlay(gray, ramp, 0) == gray
    coarse = torch.from_numpy(ramp).bfloat16()  # which numpy lacks
    assert overlay(gray, coarse) == overlay(gray, coarse.float().numpy())
    for array in (np.asarray(gray), np.asarray(gray, np.float32) / 255):  # the latter as pytorch-grad-cam takes it
        assert overlay(array, ramp) == overlay(gray, ramp)


@pytest.mark.parametrize("colormap", ["heat", "cividis"])
def test_high_values_are_lighter_also_in_grey_and_for_colour_blind_readers(colormap):
    table = color_table(colormap).astype(float)
    lightness = table[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) > -0.6).all() and lightness[-1] - lightness[0] > 150


def test_jet_is_the_one_of_the_papers_figures():
    """Each channel is a trapezoid around its own centre."""
    expected = 255 * (1.5 - abs(4 * np.linspace(0, 1, 256)[:, None] - [3, 2, 1])).clip(0, 1)
    assert np.abs(color_table("jet")[:, :3] - expected).max() < 40


def explained(presence, size=(40, 60)):
    """Of texts whose maps are 1 in the right half."""
    raw_maps = torch.zeros(len(presence), 8, 12)
    raw_maps[..., 6:] = 1
    labels = [f"text {index}" for index in range(len(presence))]
    return Explanation(
        labels, torch.full((len(presence),), 0.3), torch.tensor(presence), raw_maps, size, method="itsm"
    )


@pytest.fixture
def written(recorded):
    """What is written on sheets, in order."""
    return recorded(sheets, "text_mask", lambda text, *args, **options: text)


def test_an_explanation_is_drawn_in_the_order_of_its_texts_with_words_for_presence(written):
    image = Image.new("RGB", (60, 40), "gray")
    sheet = iclip_hf.draw(explained([0.75, 0.99, 0.2]), image)
    titles = [
        "image",
        "60 x 40 pixels · itsm, unrefined",
        "text 0",
        "unsure 0.75 · score 0.30",
        "text 1",
        "present 0.99 · score 0.30",
    ]
    assert written[:8] == [*titles, "text 2", "absent 0.20 · score 0.30"]
    pixels = np.asarray(sheet).astype(int)
    overlaid = overlay(Image.new("RGB", (2, 1), "gray"), np.array([[0.0, 1.0]]))
    faded = Image.blend(Image.new("RGB", (2, 1), "white"), overlaid, 0.35)
    middles = []
    for color in (overlaid.getpixel((1, 0)), faded.getpixel((1, 0))):
        at = np.argwhere(np.abs(pixels - color).max(-1) < 4)
        middles.append(at[:, 1])
        assert len(at) > 2000
    assert middles[0].max() < middles[1].min()  # the absent one is the last, and the only faded one
    assert (pixels[:10] == 255).all() and (pixels[:, :10] == 255).all()


def test_a_drawing_takes_what_explain_takes_and_is_as_large_as_asked(tmp_path):
    Image.new("RGB", (600, 400), "gray").save(tmp_path / "a.png")
    small, large = (draw(explained([0.9] * 4), str(tmp_path / "a.png"), columns=3, dpi=dpi) for dpi in (60, 120))
    assert abs(large.width - 2 * small.width) < 9 and abs(large.height - 2 * small.height) < 9
    assert large.height > 2 * 224  # two rows
    assert large.mode == "RGB" and np.asarray(large)[:, 0].min() == 255
    # The maps are as large as the picture, whatever size they had.
    assert draw(explained([0.9] * 4, (400, 600)), tmp_path / "a.png", columns=3, dpi=120) == large
    image = np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8)
    expected = draw(explained([0.9]), Image.fromarray(image.transpose(1, 2, 0)))
    for array in (image, torch.from_numpy(image), image.transpose(1, 2, 0)):
        assert draw(explained([0.9]), array) == expected


def test_many_texts_are_cut_and_absent_ones_are_last(written):
    """The image is that of the explanation."""
    found = replace(explained([0.1, 0.9] * 20), image=Image.new("RGB", (60, 40), "gray"))
    sheet = draw(replace(found, method="naclip", refined=True))
    assert written[1] == "60 x 40 pixels · naclip, refined · 24 of 40 texts"
    shown = [text for text in written if text.startswith("text ")]
    assert shown == [f"text {index}" for index in (*range(1, 40, 2), 0, 2, 4, 6)]
    assert sheet.height < 6 * 336


def test_an_unknown_colour_map_is_refused():
    with pytest.raises(ValueError, match="no colour map 'viridis'.*heat, cividis, jet"):
        draw(explained([0.9]), Image.new("RGB", (60, 40)), colormap="viridis")


@pytest.mark.parametrize("number, columns, rows", [(3, 3, 1), (5, 5, 1), (6, 3, 2), (7, 4, 2), (9, 5, 2), (11, 4, 3)])
def test_rows_are_filled_evenly(number, columns, rows):
    sheet = picture_grid([Image.new("RGB", (60, 60))] * number, [""] * number, 5)
    assert sheet.size == (2 * 18 + columns * 350 - 14, 2 * 18 + rows * 364 - 28)


def test_empty_places_and_long_titles_fit(written):
    image = Image.new("RGB", (400, 20), "red")
    pixels = np.asarray(picture_grid([image, None, image], ["word " * 30, "", "b"], 3)).astype(int)
    red = np.abs(pixels - [255, 0, 0]).max(-1) < 3
    assert red.mean() > 0.01 and not red[:, pixels.shape[1] // 3 : -pixels.shape[1] // 3].any()
    assert written[0].count("\n") == 2 and written[0].endswith("…")
    assert not (pixels[:, pixels.shape[1] // 3 : pixels.shape[1] // 2] < 128).any()  # the title stays over its picture


def test_a_comparison_has_a_row_a_text_and_a_column_a_method(written):
    image = Image.new("RGB", (60, 40), "gray")
    low, high = np.zeros((40, 60)), np.ones((40, 60))
    columns = {"ground truth": [high, None], "itsm": [low, high]}
    pixels = np.asarray(comparison_sheet(image, columns, ["dog\nscore 0.31", "a cat " * 40])).astype(int)
    assert written[:4] == ["ground truth", "itsm", "dog", "score 0.31"] and written[4].count("\n") == 1

    def shown(heatmap):
        color = overlay(image, heatmap).getpixel((0, 0))
        return (np.abs(pixels - color).max(-1) < 3)[50:-50]

    for heatmap, rows, columns in ((high, {0, 1}, {1, 2}), (low, {0}, {2})):
        at = np.argwhere(shown(heatmap))
        assert set(at[:, 0] // (len(pixels[50:-50]) // 2)) >= rows and set(at[:, 1] * 3 // pixels.shape[1]) == columns


def test_a_comparison_of_one_text_wraps_its_methods(recorded):
    grids = recorded(
        sheets, "picture_grid", lambda pictures, titles, columns, *rows, **options: (titles, columns, rows)
    )
    image, methods = Image.new("RGB", (60, 40), "gray"), [f"method {number}" for number in range(9)]
    comparison_sheet(image, {method: [np.ones((40, 60))] for method in methods}, ["dog\nscore 0.31"])
    assert grids == [(["dog\nscore 0.31", *methods], 5, ())]


def test_a_comparison_fades_the_maps_of_absent_texts():
    """By the words of a column; the truth has none."""
    image, full = Image.new("RGB", (60, 40), "gray"), np.ones((40, 60))
    columns = {"ground truth": [full, full], "itsm": [full, full], "gem": [full, full]}
    words = {"itsm": ["absent", "unsure"], "gem": ["present", "absent"]}
    sheet = np.asarray(comparison_sheet(image, columns, ["dog", "cat"], words)).astype(int)
    height, width = len(sheet) // 2, sheet.shape[1] // 4
    color = np.array(overlay(image, full).getpixel((0, 0)))
    for row, column in itertools.product(range(2), range(1, 4)):
        place = sheet[row * height : (row + 1) * height, column * width : (column + 1) * width]
        is_faded = (row, column) in {(0, 2), (1, 3)}
        expected = 0.65 * 255 + 0.35 * color if is_faded else color
        assert (np.abs(place - expected).max(-1) < 3).mean() > 0.3


@pytest.mark.parametrize(
    "text",
    [
        "傘を持った女性が海のそばの庭に立っている" * 3,
        "امرأة تحمل مظلة في الحديقة",
        "cost $5 {x}^\\frac",
        "🦒",
        "a" * 400,
    ],
)
def test_any_script_is_drawn_within_its_width(text):
    mask = text_mask(fitted(text, 15, 336, 3, bold=True), 15, bold=True)
    assert 8 < mask.width <= 336 and mask.height <= 3 * 19
    assert np.asarray(mask).max() > 200


def test_lines_are_filled_and_end_with_an_ellipsis():
    text = "a woman in a red dress under an umbrella by the sea"
    lines = fitted(text, 12, 120, 9).split("\n")
    assert " ".join(lines) == text and len(lines) > 2
    assert all(text_width(line, 12) <= 120 for line in lines)
    assert all(text_width(f"{line} {after.split()[0]}", 12) > 120 for line, after in pairwise(lines))
    cut = fitted(text, 12, 120, 2).split("\n")
    assert cut[0] == lines[0] and cut[1].endswith("…") and text_width(cut[1], 12) <= 120
    assert fitted("", 12, 120, 2) == ""


def test_letters_with_accents_are_drawn_as_what_they_are():
    """Each differs from its neighbours and from the box of a character that no font has."""
    letters = "eéèêëßñžŁğωж"
    boxes = [text_mask(letter, 30).tobytes() for letter in (*letters, "\U0010ffff")]
    assert len(set(boxes)) == len(boxes)
