"""refinement.py against a loop over cells, and its doors."""

import json
import math

import pytest
import torch
from conftest import evaluate_model, iclip, tiny_model
from test_engine import IMAGES, TEXTS
from torch.nn import functional as F

from iclip_hf import ImageTextSimilarityMapPipeline, ZeroShotImageSegmentationPipeline, explain
from iclip_hf.evaluation.argmax import argmax_label_map
from iclip_hf.evaluation.metrics import MeanForegroundMinusBackground
from iclip_hf.evaluation.metrics.segmentation import Segmentation, SlidingWindows
from iclip_hf.model.engine import Engine
from iclip_hf.model.refinement import refine_maps


def slowly(raw, image):
    """One image, cell by cell, in double precision: `(T, h, w)` and `(3, H, W)` to `(T, H // 2, W // 2)`."""
    cells = F.avg_pool2d(image.double(), 2)
    height, width = cells.shape[1:]
    maps = F.interpolate(raw[None].double(), (height, width), mode="bicubic", align_corners=False)[0]

    def near(y, x):
        for step in (1, 2, 4):
            for dy in (-step, 0, step):
                for dx in (-step, 0, step):
                    if (dy, dx) != (0, 0):
                        yield min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)

    weights = {}
    for y in range(height):
        for x in range(width):
            affinities = [0.0] * 24
            for channel in cells.tolist():
                own, others = channel[y][x], [channel[j][i] for j, i in near(y, x)]
                mean = (own + sum(others)) / 25
                spread = math.sqrt(sum((value - mean) ** 2 for value in [own, *others]) / 24)
                for number, value in enumerate(others):
                    affinities[number] -= abs(own - value) / (0.3 * spread) / 3
            powers = [math.exp(one) for one in affinities]
            weights[y, x] = [one / sum(powers) for one in powers]
    for _ in range(10):
        refined = torch.zeros_like(maps)
        for (y, x), shares in weights.items():
            refined[:, y, x] = sum(share * maps[:, j, i] for share, (j, i) in zip(shares, near(y, x)))
        maps = refined
    return maps


def test_refined_maps_equal_a_loop_over_cells():
    generator = torch.Generator().manual_seed(0)
    raw, images = torch.rand(2, 3, 3, 5, generator=generator), torch.rand(2, 3, 17, 24, generator=generator)
    found = refine_maps(raw, images)
    assert found.shape == (2, 3, 8, 12) and found.dtype == torch.float32
    for one, maps, image in zip(found, raw, images):
        torch.testing.assert_close(one, slowly(maps, image).float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(refine_maps(raw, 3 * images - 1), found, atol=1e-4, rtol=0)


def test_an_edge_of_the_map_moves_to_the_edge_of_the_image():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 22:] = 1.0  # cell 11, between two patches of 16 pixels
    raw = torch.tensor([0.0, 0.6, 1.0, 1.0]).expand(1, 1, 4, 4)
    refined = refine_maps(raw, image)[0, 0]
    steps = refined.diff(dim=1)
    assert (steps.argmax(1) == 10).all()
    plain = F.interpolate(raw, (32, 32), mode="bicubic")[0, 0].diff(dim=1)
    assert (steps.amax(1) > 3 * plain.amax(1)).all()


@pytest.mark.parametrize("image", [torch.zeros(1, 3, 16, 16), torch.rand(1, 3, 16, 16)])
def test_a_constant_map_stays_constant_and_one_colour_is_finite(image):
    refined = refine_maps(torch.full((1, 2, 2, 2), 0.3), image)
    assert torch.equal(refined, torch.full((1, 2, 8, 8), 0.3))
    assert refine_maps(torch.rand(1, 1, 2, 2), image).isfinite().all()


# ---- doors ----


def test_what_people_see_is_refined_and_says_so(tiny_processor):
    given = tiny_model(), tiny_processor
    options = {}, {"refine": True}, {"refine": False}
    usual, refined, plain = (explain(given, IMAGES[0], TEXTS, **option) for option in options)
    assert torch.equal(usual.raw_maps, refined.raw_maps) and usual.raw_maps.shape != plain.raw_maps.shape
    assert torch.equal(usual[1].unrefined_maps, plain.raw_maps[[1]]) and plain.unrefined_maps is None
    assert [one.to_dict()["refined"] for one in (usual, plain)] == [True, False]
    assert [one.made_by for one in (usual, plain["dog"])] == ["itsm, refined", "itsm, unrefined"]


def test_explanations_are_refined_in_batches_and_from_features(tiny_processor):
    model = tiny_model()
    plain, refined = (Engine(model, tiny_processor, refine=refine) for refine in (False, True))
    for image, one, two in zip(IMAGES, plain.run(IMAGES, TEXTS), refined.run(IMAGES, TEXTS)):
        expected = refine_maps(one.raw_maps[None], refined.prepare(image).pixel_values)[0]
        torch.testing.assert_close(two.raw_maps, expected, atol=1e-5, rtol=0)
        (again,) = refined.run(refined.encode_images([refined.prepare(image)]), TEXTS)
        torch.testing.assert_close(again.raw_maps, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(two.scores, one.scores)


def test_measures_take_the_refined_maps_of_the_shown_classes(dataset, tiny_processor):
    model, seen = (tiny_model(), tiny_processor), {}

    class Spy(MeanForegroundMinusBackground):
        def update_from(self, image, method, maps):
            seen.setdefault(image.index, []).append((image, image.explanations[method].raw_maps))
            super().update_from(image, method, maps)

    for refine in (False, True):
        evaluate_model(model, dataset, ["itsm", "gem"], [Spy()], refine=refine)
    assert len(seen) == len(dataset)
    for of_image in seen.values():
        for (image, plain), (_, refined) in zip(of_image[:2], of_image[2:]):
            if len(plain):  # one image shows no class
                expected = refine_maps(plain[None], image.prepared.pixel_values)[0]
                torch.testing.assert_close(refined, expected, atol=1e-5, rtol=0)


def test_label_maps_are_those_of_refined_maps_of_the_whole_image(dataset, tiny_processor):
    model, dataset.background = tiny_model(), False
    options = {"metrics": [Segmentation(window=32, stride=16)], "image_size": {"shortest_edge": 40}}
    result = evaluate_model((model, tiny_processor), dataset, **options, refine=True)
    engine = Engine(model, tiny_processor, templates=dataset.templates)
    texts = engine.encode(dataset.class_names)
    right = total = 0
    for sample in dataset:
        pixels = tiny_processor(images=[sample.image], size={"shortest_edge": 40})["pixel_values"]
        maps = refine_maps(engine.raw_maps(pixels, texts, tiling=SlidingWindows(32, 16, 8))[0], pixels)[0]
        labels = argmax_label_map(maps, sample.size, range(len(maps)))[0].numpy() + 1
        known = (sample.label_map > 0) & (sample.label_map < 255)
        right, total = right + (labels == sample.label_map)[known].sum(), total + known.sum()
    assert result.results["itsm"]["segmentation"]["pixel_accuracy"] == pytest.approx(100 * right / total, abs=0.1)
    assert result.protocol["refine"] is True


def test_commands_refine_and_compute_maps_at_two_scales(labelled_folder, world, tmp_path, capsys):
    """Refined by default if people see it, on request if it is measured."""
    photo, model = next((labelled_folder / "images").iterdir()), ["--model", world.folder / "model"]
    asked = [photo, "--text", "dog", *model]

    def answer(*command):
        assert iclip(*command) == 0
        return capsys.readouterr().out, [path.read_bytes() for path in tmp_path.iterdir()]

    for command in (
        ["segment", *asked, "--min-presence", 0, "--json"],
        ["explain", *asked, "--min-presence", 0, "--json"],
        ["compare", *asked, "--output", tmp_path / "a.png"],
    ):
        usual, plain, two_scales = (answer(*command, *option) for option in ([], ["--no-refine"], ["--multi-scale"]))
        assert plain != usual != two_scales
    data = ["evaluate", "--dataset", "folder", "--data-root", labelled_folder, "--limit", 2, "--json", *model]
    scores = set()
    for option, made_by in ([], (False, False)), (["--refine"], (True, False)), (["--multi-scale"], (False, True)):
        found = json.loads(answer(*data, *option)[0])
        assert (found["protocol"]["refine"], found["protocol"]["multi_scale"]) == made_by
        scores.add(found["results"]["itsm"]["mFMB"]["mfmb"])
    assert len(scores) == 3


def test_pipelines_refine(tiny_processor):
    """By default, as `explain` does."""
    for pipeline in (ImageTextSimilarityMapPipeline, ZeroShotImageSegmentationPipeline):
        pipe = pipeline(model=tiny_model(), processor=tiny_processor, device="cpu")
        plain, refined, usual = (
            pipe(IMAGES[0], TEXTS, min_presence=0, **option)[0]["mask"]
            for option in ({"refine": False}, {"refine": True}, {})
        )
        assert plain != refined == usual
