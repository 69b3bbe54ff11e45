"""Maps and scores at two scales against loops over windows and patches, and their doors."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import evaluate_model, tiny_model
from test_engine import IMAGES, TEXTS, engine_of, sigmoid_model
from torch.nn import functional as F
from transformers.image_utils import SizeDict

from iclip_hf.evaluation.metrics.segmentation import Segmentation, SlidingWindows
from iclip_hf.model.engine import Engine
from iclip_hf.model.similarity import cosines
from iclip_hf.model.windows import TwoScales, mean_of_windows, sliding_windows


def by_hand(engine, image, size, own, texts):
    """
    Raw maps of one image at twice the `size` (height, width): patch by patch, the mean over the windows that contain
    it, weighted by the distances to the edges of the window, and its mean with the map of the whole. And scores: the
    mean of that of the whole at the model's `own` size and the logarithm of the mean odds of the windows.
    """
    side = engine.processor.patch_size
    larger = [2 * length for length in size]
    pixels = engine.processor(images=[image], size=dict(zip(("height", "width"), larger)))["pixel_values"]
    starts = [(0, -(-2 * length // side // 4) * side, length) for length in size]
    rows, columns = (length // side for length in larger)
    cells, exponentials = [[[] for _ in range(columns)] for _ in range(rows)], []
    for top in starts[0]:
        for left in starts[1]:
            maps, (seen,) = engine.raw_maps(pixels[..., top : top + size[0], left : left + size[1]], texts)
            exponentials.append((20 * cosines(seen.image_embeds, texts.text_embeds[None])[0]).exp())
            for y in range(size[0] // side):
                for x in range(size[1] // side):
                    weight = min(y + 1, size[0] // side - y) * min(x + 1, size[1] // side - x)
                    cells[top // side + y][left // side + x].append((weight, maps[0, :, y, x]))

    def mean(cell):
        return sum(weight * value for weight, value in cell) / sum(weight for weight, _ in cell)

    of_windows = torch.stack([torch.stack([mean(cell) for cell in row], -1) for row in cells], -2)
    whole, (seen,) = engine.raw_maps(F.interpolate(pixels, size, mode="bicubic", antialias=True), texts)
    of_whole = cosines(seen.image_embeds, texts.text_embeds[None])[0]
    if tuple(size) != tuple(own):
        (usual,) = engine.run([image], TEXTS)
        of_whole = usual.scores
    scores = (of_whole + torch.stack(exponentials).mean(0).log() / 20) / 2
    return (F.interpolate(whole, (rows, columns), mode="bicubic")[0] + of_windows) / 2, scores


# A method that takes encoded images and one that runs the tower itself, at each size; others at one.
@pytest.mark.parametrize(
    ("method", "size"),
    [
        *itertools.product(["itsm", "grad_cam"], [None, 16, 40, {"height": 24, "width": 40}]),
        *itertools.product(["reversed_itsm", "gem", "clip_surgery"], [{"height": 24, "width": 40}]),
    ],
)
def test_maps_and_scores_are_those_of_the_whole_and_its_windows(tiny_processor, method, size):
    model = sigmoid_model()
    plain = engine_of(model, tiny_processor, method)
    engine = engine_of(model, tiny_processor, method, image_size=size, multi_scale=True)
    texts, own = engine.encode(TEXTS), tuple(dict(tiny_processor.image_processor.size).values())
    height_and_width = own if size is None else (size, size) if isinstance(size, int) else (24, 40)
    assert own == (32, 32)  # the larger image of 16 pixels has the model's own size, the whole one has not
    encoded = engine.encode_images([engine.prepare(image) for image in IMAGES])
    runs = (each.run(images, TEXTS) for each, images in ((engine, IMAGES), (engine, encoded), (plain, IMAGES)))
    for image, found, again, usual in zip(IMAGES, *runs, strict=True):
        expected, scores = by_hand(plain, image, height_and_width, own, texts)
        assert expected.std() > 0 and (scores - usual.scores).abs().max() > 1e-3
        torch.testing.assert_close(found.raw_maps, expected, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(found.scores, scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.presence, model.presence(scores), atol=1e-5, rtol=0)
        torch.testing.assert_close(again.raw_maps, found.raw_maps, atol=1e-5, rtol=0)
        torch.testing.assert_close(again.scores, found.scores, atol=1e-5, rtol=0)


def test_scores_do_not_depend_on_what_else_is_asked(tiny_processor):
    """Of a method that encodes the images itself as it computes the maps, and before them."""
    engine = engine_of(sigmoid_model(), tiny_processor, "grad_cam", multi_scale=True)
    prepared = [engine.prepare(image) for image in IMAGES]
    assert engine.encode_images(prepared) == prepared  # ten passes would be in vain
    expected = list(engine.run(prepared, TEXTS))
    without_maps = engine.run([engine.prepare(image, text_indices=()) for image in IMAGES], TEXTS)
    for usual, *others in zip(expected, without_maps, engine.run(IMAGES, TEXTS, best=1), strict=True):
        for other in others:
            torch.testing.assert_close(other.all_scores, usual.scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("patches", [*range(1, 20), 28, 32, 37])
def test_windows_put_each_patch_at_its_place(patches):
    """Those of two scales have the usual size, and share half with the next."""
    scales = TwoScales(8)
    size = tuple(scales.prepared_size({"height": 8 * patches, "width": 8}).values())
    rows = torch.arange(size[0])[None, None, :, None].expand(1, 3, -1, size[1]).float()
    whole, *seen = scales.views(rows)
    assert {of.shape for of in (whole, *seen)} == {(1, 3, 8 * patches, 8)}
    assert len(seen) == 2 * 3 or patches == 1
    values = rows[:, :, ::8, ::8]
    large, small = ([of[:, :, ::8, ::8] for of in views] for views in (seen, SlidingWindows(8, 8, 8).views(rows)))
    torch.testing.assert_close(SlidingWindows(8, 8, 8).join_maps(small, size), values)
    joined = scales.join_maps([torch.zeros(1, 3, patches, 1), *large], size)
    torch.testing.assert_close(2 * joined, values)


@pytest.mark.parametrize("tapered", [False, True])
@pytest.mark.parametrize("patches", [7, 20, 37])
def test_a_constant_map_stays_constant(patches, tapered):
    """Rounding errors would be stretched to a map."""
    values, size, window = torch.linspace(0.1, 0.9, 50)[None, :, None, None], (8 * patches, 8 * patches), 8 * 5
    windows = sliding_windows(size, (window, window), (16, 24))
    maps = [values.expand(1, -1, 5, 5)] * len(windows)
    assert torch.equal(mean_of_windows(maps, windows, size, 8, tapered), values.expand(1, -1, patches, patches))


def test_some_texts_and_refined_maps(tiny_processor):
    model = sigmoid_model()
    engine = engine_of(model, tiny_processor, multi_scale=True)
    everything = list(engine.run(IMAGES, TEXTS))
    some = list(engine.run([engine.prepare(image, text_indices=[2]) for image in IMAGES], TEXTS))
    best = list(engine.run(IMAGES, TEXTS, best=2))
    for whole, part, top in zip(everything, some, best, strict=True):
        torch.testing.assert_close(part.raw_maps, whole.raw_maps[2:], atol=1e-5, rtol=0)
        places = [TEXTS.index(label) for label in top.labels]
        torch.testing.assert_close(top.raw_maps, whole.raw_maps[places], atol=1e-5, rtol=0)
    refined = next(engine_of(model, tiny_processor, multi_scale=True, refine=True).run(IMAGES, TEXTS))
    pixels = engine.prepare(IMAGES[0]).pixel_values
    assert refined.raw_maps.shape[1:] == tuple(side // 2 for side in pixels.shape[2:])


@pytest.mark.parametrize(
    ("size", "plain"), [(SizeDict(height=24, width=40), {"height": 24, "width": 40}), (np.int64(40), 40)]
)
def test_a_size_as_transformers_or_numpy_keep_it(tiny_processor, size, plain):
    engines = [Engine(tiny_model(), tiny_processor, image_size=of, multi_scale=True) for of in (size, plain)]
    assert json.dumps(engines[0].image_size) == json.dumps(engines[1].image_size)  # as results have it
    assert torch.equal(*(engine.prepare(IMAGES[0]).pixel_values for engine in engines))
    pixels = (tiny_processor(images=IMAGES[0], size=of)["pixel_values"] for of in (size, plain))
    assert torch.equal(*pixels)


def test_windows_are_not_measured_at_two_scales(dataset, tiny_processor):
    with pytest.raises(ValueError, match="window or multi_scale"):
        evaluate_model((tiny_model(), tiny_processor), dataset, metrics=[Segmentation(window=32)], multi_scale=True)
