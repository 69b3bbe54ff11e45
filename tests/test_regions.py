import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco
from scipy import ndimage

from iclip_hf.model.regions import find_regions, negative_points, positive_points, run_lengths
from iclip_hf.model.similarity import resize_and_normalize


def random_maps(seed, shape=(13, 21)):
    heatmap = np.random.default_rng(seed).random(shape).astype(np.float32)
    return heatmap, heatmap > 0.6


def flood_fill(mask):
    """The connected parts of a mask as sets of (y, x), one pixel at a time."""
    left, parts = set(zip(*np.nonzero(mask))), []
    while left:
        part, border = set(), [left.pop()]
        while border:
            y, x = border.pop()
            part.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            border.extend(near)
        parts.append(part)
    return parts


def test_two_objects_by_hand():
    heatmap = np.zeros((5, 8), np.float32)
    heatmap[1:3, 1:3] = [[0.6, 0.8], [0.6, 0.8]]
    heatmap[3, 3] = 0.7  # touches by a corner
    heatmap[0, 6:8] = 0.9, 1.0
    first, second = find_regions(heatmap, heatmap > 0.5)
    assert first.box == (6, 0, 8, 1) and first.mean == pytest.approx(0.95)
    assert second.box == (1, 1, 4, 4) and second.mean == pytest.approx(3.5 / 5)
    assert second.inside.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert first.mask.shape == second.mask.shape == heatmap.shape and not (first.mask & second.mask).any()
    assert (first.mask | second.mask == (heatmap > 0.5)).all()
    for least in (3 / 40, 5 / 40):  # a part of exactly the least area stays
        assert [region.box for region in find_regions(heatmap, heatmap > 0.5, min_area=least)] == [second.box]
    assert positive_points(heatmap, first).tolist() == [[7, 0]]


def test_the_first_region_is_that_with_the_most_above_the_threshold():
    """Not a small one with a higher mean; one far below the first is left out."""
    heatmap = np.zeros((4, 10), np.float32)
    heatmap[0:2, 0:5], heatmap[3, 0:2], heatmap[3, 8] = 0.75, 1.0, 0.75
    heatmap[0, 9] = 0.5
    weights = {(0, 0, 5, 2): 10 * 0.25, (0, 3, 2, 4): 2 * 0.5, (8, 3, 9, 4): 0.25, (9, 0, 10, 1): 0.0}
    for share, number in ((0.0, 4), (0.1, 3), (0.11, 2), (0.41, 1)):
        found = find_regions(heatmap, heatmap > 0.4, 0, share)
        assert [region.box for region in found] == [*weights][:number]
    assert [len(find_regions(heatmap, heatmap > least, 0, 0)) for least in (0.8, 1.0)] == [1, 0]


def test_parts_below_half_a_patch_are_left_out():
    """A patch of a 16 x 16 grid is 1/256 of the image; with 2000 pixels, 4 of them are the least that stay."""
    heatmap = np.zeros((40, 50), np.float32)
    heatmap[0:2, 0:2], heatmap[10, 10:13] = 0.9, 1.0
    assert [region.box for region in find_regions(heatmap, heatmap > 0.5)] == [(0, 0, 2, 2)]


@pytest.mark.parametrize(("height", "side"), [(26, 3), (34, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_negative_points_are_those_of_a_slow_search(seed, height, side):
    """
    Means over squares with repeated edges; the lowest, then the lowest of those at least a quarter of the height away,
    and so on.
    """
    heatmap, mask = random_maps(seed, (height, 37))
    padded = np.pad(heatmap.astype(np.float64), (side // 2, (side - 1) // 2), mode="edge")
    places = [(x, y) for y in range(height) for x in range(37) if not mask[y, x]]
    means = {(x, y): padded[y : y + side, x : x + side].mean() for x, y in places}
    expected = []
    for _ in range(3):
        far = [place for place in means if all(np.hypot(*np.subtract(place, one)) >= height / 4 for one in expected)]
        expected.append(min(far, key=means.get))
    assert negative_points(heatmap, mask, 3).tolist() == [list(place) for place in expected]


@pytest.mark.parametrize("seed", range(3))
def test_negative_points_of_a_large_map_are_nearly_those_of_a_slow_search(seed):
    """They lie on a grid, which smooth maps allow."""
    grid = torch.rand(1, 6, 8, generator=torch.Generator().manual_seed(seed))
    heatmap = resize_and_normalize(grid, (240, 320))[0].numpy()
    mask = heatmap > 0.5
    around = ndimage.uniform_filter(heatmap.astype(np.float64), 30, mode="nearest")
    points = negative_points(heatmap, mask)
    assert not mask[points[:, 1], points[:, 0]].any()
    assert around[points[0, 1], points[0, 0]] <= around[~mask].min() + 0.03
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)[np.triu_indices(3, 1)]
    assert distances.min() >= 60
    gap = np.ones_like(mask)
    gap[100:102, 52:54] = False  # between the points of the grid
    ((x, y),) = negative_points(heatmap, gap, 1)
    assert not gap[y, x]


def test_positive_points_are_half_the_shorter_side_apart():
    heatmap = 1 - 0.05 * np.arange(9)[None] - 0.01 * np.arange(3)[:, None]
    (region,) = find_regions(heatmap, heatmap > 0)
    assert positive_points(heatmap, region, 3).tolist() == [[0, 0], [0, 2], [2, 0]]


def test_a_region_and_an_image_too_small_repeat_their_points():
    heatmap = np.array([[0.0, 1.0]], np.float32)
    (region,) = find_regions(heatmap, heatmap > 0.5)
    assert positive_points(heatmap, region, 3).tolist() == [[1, 0]] * 3
    assert negative_points(heatmap, heatmap > 0.5, 3).tolist() == [[0, 0]] * 3
    assert negative_points(heatmap, np.ones((1, 2), bool), 1).tolist() == [[0, 0]]  # nothing is outside


@pytest.mark.parametrize("mask", [random_maps(0)[1], np.ones((3, 5), bool), np.zeros((3, 5), bool)])
def test_run_lengths_are_read_by_pycocotools(mask):
    lengths = json.loads(json.dumps(run_lengths(mask)))
    assert np.array_equal(coco.decode(coco.frPyObjects(lengths, *mask.shape)), mask)


@given(data=st.data(), height=st.integers(1, 13), width=st.integers(1, 21))
def test_regions_are_the_parts_of_a_flood_fill(data, height, width):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width)))
    mask = mask.reshape(height, width)
    heatmap = np.random.default_rng(height).random((height, width))
    expected = {}
    for part in flood_fill(mask):
        ys, xs = zip(*part)
        expected[min(xs), min(ys), max(xs) + 1, max(ys) + 1, len(part)] = np.mean([heatmap[place] for place in part])
    regions = find_regions(heatmap, mask, 0, 0)
    found = {(*region.box, int(region.inside.sum())): region.mean for region in regions}
    assert found == pytest.approx(expected)
    weights = [region.inside.sum() * (region.mean - heatmap[mask].min()) for region in regions]
    assert weights == pytest.approx(sorted(weights, reverse=True))
    together = np.zeros((height, width), int)
    for region in regions:
        together += region.mask
        x0, y0, x1, y1 = region.box
        points = positive_points(heatmap, region, 3)
        assert all(region.inside[y - y0, x - x0] for x, y in points)
        assert heatmap[points[0, 1], points[0, 0]] == heatmap[y0:y1, x0:x1][region.inside].max()
    assert np.array_equal(together, mask)
    assert all(mask.all() or not mask[y, x] for x, y in negative_points(heatmap, mask, 1))
