import io

import numpy as np
import pytest
from PIL import Image

from iclip_hf.plots import explanation_grid, overlay, picture_grid


def rendered(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50)
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


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


def test_empty_places_and_long_titles_fit():
    image = Image.new("RGB", (400, 20), "red")
    figure = picture_grid([image, None, image], ["word " * 20, "", "b"], columns=3)
    pixels = rendered(figure)
    assert (np.abs(pixels - [255, 0, 0]).max(-1) < 3).mean() > 0.01
    assert figure.axes[0].get_title().count("\n") >= 3
    assert not figure.axes[1].images
