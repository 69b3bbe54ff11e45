"""Faithfulness against hand-made models, plain loops and torchmetrics, on tiny models."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from conftest import NAMES, evaluate_model, iclip, tiny_model, write_folder
from families import raw_maps
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional import spearman_corrcoef

from iclip_hf.backends.loading import load
from iclip_hf.data import load_segmentation
from iclip_hf.evaluation.functional import pointing_shares
from iclip_hf.evaluation.metrics import ClassMeans, PointingGame, faithfulness
from iclip_hf.evaluation.metrics.faithfulness import (
    DeletionInsertion,
    LayerRandomization,
    MaxSensitivity,
    Randomization,
    area_under,
    deletion_insertion,
    max_sensitivity,
    rank_correlation,
    scorer,
)
from iclip_hf.explainers import make_explainer
from iclip_hf.model.refinement import refine_maps
from iclip_hf.model.similarity import min_max_normalize, resize_and_normalize


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four images: of one class, of two, of none, and of all three."""
    values = [[0, 255, *shown] for shown in ([1], [1, 2], [], [1, 2, 3])]
    return write_folder(tmp_path_factory.mktemp("folder"), values, 40)


# Deletion and insertion


def test_a_linear_model_has_the_areas_computed_by_hand():
    image = torch.tensor([[[4.0, 3.0, 2.0, 1.0]]])  # its score is the sum of its pixels
    maps = torch.stack([image[0], -image[0]])
    deletion, insertion = deletion_insertion(lambda images: images.sum((1, 2, 3)), image, maps, steps=2, seed=3)
    assert insertion.tolist() == [[0, 4, 7], [0, 1, 3]]
    assert area_under(insertion).tolist() == [3.75, 1.25]
    one, two, three, four = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(3)).flatten().tolist()
    expected = [[10, 6 + one, 3 + one + two], [10, 9 + four, 7 + four + three]]
    torch.testing.assert_close(deletion, torch.tensor(expected))


def test_curves_equal_those_of_plain_loops(tiny_processor):
    model = tiny_model(peak_share=0.3)  # the score reads the map too
    explainer = make_explainer((model, tiny_processor))
    texts = explainer.model.encode_texts(NAMES)
    image = torch.randn(3, 32, 24, generator=torch.Generator().manual_seed(1))
    maps = raw_maps(explainer, image[None], texts)[0][0]
    maps[2] = (maps[2] > maps[2].median()).float()  # with ties
    deletion, insertion = deletion_insertion(
        scorer(explainer.model, texts), image, maps, steps=3, seed=5, batch_size=4
    )
    assert deletion.shape == insertion.shape == (3, 4, 3, 2)

    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(image.shape, generator=generator)
    turn = torch.randperm(32 * 24, generator=generator).argsort().tolist()  # when each pixel comes among its equals
    for number, raw in enumerate(maps):
        big = F.interpolate(raw[None, None], size=(32, 24), mode="bicubic", align_corners=False)[0, 0].flatten()
        if number == 2:
            big = resize_and_normalize(raw[None], (32, 24))[0].flatten()  # whose ties are those of the same rounding
        places = sorted(range(32 * 24), key=lambda place: (-big[place].item(), turn[place]))
        for fill, curve in ((noise, deletion[number]), (image, insertion[number])):
            changed = image.clone() if fill is noise else torch.zeros_like(image)
            for step in range(4):
                for place in places[: 128 * step]:
                    changed[:, place // 24, place % 24] = fill[:, place // 24, place % 24]
                with torch.no_grad():
                    outputs = model(pixel_values=changed[None], text_features=texts)
                logits = outputs.logits_per_image[0]
                expected = torch.stack([logits / model.recognition.logit_scale.exp(), logits.softmax(-1)], -1)
                torch.testing.assert_close(curve[step], expected, atol=1e-5, rtol=1e-4)


# Max-sensitivity


def test_max_sensitivity_is_the_largest_change_in_a_plain_loop():
    generator = torch.Generator().manual_seed(2)
    image, weights = torch.randn(3, 4, 6, generator=generator), torch.randn(2, 3, 1, 1, generator=generator)

    def explain(images):
        return torch.cat([(images[:, None] * weights).sum(2).tanh(), torch.zeros(len(images), 1, 4, 6)], 1)

    found = max_sensitivity(explain, image, radius=0.5, samples=4, seed=7)
    noise = torch.rand(4, 3, 4, 6, generator=torch.Generator().manual_seed(7))
    own, changes = min_max_normalize(explain(image[None]))[0], []
    for one in noise:
        other = min_max_normalize(explain((image + one - 0.5)[None]))[0]
        changes.append([((other[m] - own[m]) ** 2).sum().sqrt() / (own[m] ** 2).sum().sqrt() for m in (0, 1)])
    torch.testing.assert_close(found[:2], torch.tensor(changes).amax(0))
    assert found[2].isnan()  # a constant map


# Randomised layers


def test_rank_correlation_is_spearmans():
    generator = torch.Generator().manual_seed(4)
    maps = torch.randint(0, 6, (5, 4, 6), generator=generator).float()  # with ties
    others = torch.randint(0, 6, (5, 4, 6), generator=generator).float()
    expected = spearman_corrcoef(maps.flatten(1).T, others.flatten(1).T)
    torch.testing.assert_close(rank_correlation(maps, others).float(), expected)
    assert rank_correlation(maps, torch.zeros(5, 4, 6)).isnan().all()


@pytest.mark.parametrize(("method", "locked"), [("itsm", True), ("grad_cam", False), ("legrad", True)])
def test_randomised_layers_are_the_last_ones_and_the_model_stays_bit_for_bit(tiny_processor, method, locked):
    model = tiny_model(lock_vision=locked)
    loaded = load((model, tiny_processor))
    explainers = [make_explainer(loaded, name) for name in (method, "attention")]
    texts = loaded.encode_texts(NAMES)
    images = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    before = copy.deepcopy(model.state_dict())

    def unchanged():
        return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def explain(images):
        assert unchanged()
        return torch.cat([raw_maps(explainer, images, texts)[0] for explainer in explainers], 1)

    own = explain(images)
    check = LayerRandomization(loaded, seed=9)
    found = check.correlations(explain, images)
    assert found.shape == (len(check), 2, 6) and len(check) == 2
    assert torch.equal(explain(images), own)

    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(9)
    with torch.no_grad():
        layers = next(one for one in twin.vision_model.modules() if isinstance(one, nn.ModuleList))
        for depth, layer in enumerate(reversed(layers)):
            for weight in layer.parameters():
                std = weight.std(correction=0)
                weight.copy_(torch.randn(weight.shape, generator=generator) * std + weight.mean())
            remade = [make_explainer((twin, tiny_processor), name) for name in (method, "attention")]
            maps = [raw_maps(explainer, images, texts)[0] for explainer in remade]
            torch.testing.assert_close(found[depth], rank_correlation(own, torch.cat(maps, 1)), atol=1e-3, rtol=0)
    assert found[-1].abs().mean() < 0.9 and unchanged()


def test_an_exception_restores_the_layers_too(tiny_processor):
    explainer = make_explainer((tiny_model(), tiny_processor))
    texts, images = explainer.model.encode_texts(NAMES), torch.randn(1, 3, 32, 32)
    own, calls = raw_maps(explainer, images, texts)[0], []

    def explain(images):
        calls.append(raw_maps(explainer, images, texts)[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return calls[-1]

    with pytest.raises(KeyboardInterrupt):
        LayerRandomization(explainer.model).correlations(explain, images)
    assert not torch.equal(calls[-1], own)  # it was under way
    assert torch.equal(raw_maps(explainer, images, texts)[0], own)


# The pointing game, and means


def test_the_pointing_game_by_hand():
    heatmap, mask = np.array([[0.9, 0.2], [0.6, 0.1]]), np.array([[7, 0], [0, 255]])
    np.testing.assert_allclose(pointing_shares(heatmap, mask, 7), [1, 0.9 / 1.7, 1 / 3])
    np.testing.assert_allclose(pointing_shares(1 - heatmap, mask, 7), [0, 0.1 / 1.3, 1 / 3])  # its peak is void
    ties = np.array([[0.5, 0.5], [0.5, 0.2]])
    np.testing.assert_allclose(pointing_shares(ties, mask, 7), [1 / 3, 1 / 3, 1 / 3])
    np.testing.assert_allclose(pointing_shares(0 * heatmap, mask, 7), [1 / 3, 1 / 3, 1 / 3])
    assert np.isnan(pointing_shares(heatmap, mask, 3)).all()
    wide, inside = np.zeros((300, 400)), np.zeros((300, 400), np.uint8)  # more than one block
    wide[290, 390], wide[5, 5], inside[280:] = 1, 0.5, 7
    np.testing.assert_allclose(pointing_shares(wide, inside, 7), [1, 2 / 3, 1 / 15])


def test_means_over_images_then_classes_merge():
    class Two(ClassMeans):
        columns = {"a": ("a", 1), "b": ("b", 1)}

        def update_from(self, image, method, maps):
            self.update([maps.mean(), math.nan], 7)

    values = [([1.0, math.nan], 7), ([0.0, 4.0], 7), ([1.0, math.nan], 8)]
    whole, parts = Two(), [Two(), Two()]
    for number, (scores, label) in enumerate(values):
        whole.update(scores, label)
        parts[number % 2].update(scores, label)
    parts[0].merge(parts[1])
    for one in (whole.compute(), parts[0].compute()):
        assert (one["a"], one["b"], one["pairs"], one["left_out"]) == (0.75, 4.0, 3, {"no_value": 2})
        assert one["per_class"] == {7: {"a": 0.5, "b": 4.0}, 8: {"a": 1.0, "b": None}}


# A data set


def slowly(model, processor, dataset, method, refine):
    """The same with the functions above, one image, class and figure at a time."""
    explainer, scores = make_explainer((model, processor), method), {}
    texts = explainer.model.encode_texts(NAMES)
    score = scorer(explainer.model, texts)
    for index, sample in enumerate(dataset):
        pixels = processor(images=[sample.image])["pixel_values"]
        for label in sample.class_ids:

            def explain(images, label=label):
                maps = raw_maps(explainer, images, texts)[0][:, label - 1 : label]
                return refine_maps(maps, images) if refine else maps

            one = explain(pixels)[0]
            curves = deletion_insertion(score, pixels[0], one, steps=2, seed=3 + index)
            areas = [area_under(curve)[0, label - 1].tolist() for curve in curves]
            heatmap = resize_and_normalize(one, sample.size)[0]
            pointing, energy, floor = 100 * pointing_shares(heatmap, sample.mask(label), label)
            correlations = LayerRandomization(explainer.model, 3).correlations(explain, pixels)[:, 0, 0].tolist()
            (changed,) = max_sensitivity(explain, pixels[0], seed=3 + index).tolist()
            figures = [*areas[0], *areas[1], changed, pointing, energy, floor, *correlations]
            scores.setdefault(label, []).append(figures)
    return np.mean([np.mean(of_class, 0) for of_class in scores.values()], 0)


COLUMNS = ["deletion_cosine", "deletion_probability", "insertion_cosine", "insertion_probability", "max_sensitivity"]
COLUMNS += ["pointing_game", "energy_pointing_game", "foreground"]
METHODS = ["itsm", "reversed_itsm", "attention", "clip_surgery", "grad_cam", "random"]


@pytest.mark.parametrize(("methods", "refine"), [(METHODS, False), (METHODS[:2], True)])
def test_figures_equal_the_protocol_in_plain_steps_for_the_cost_that_is_told(
    root, tiny_processor, recorded, methods, refine
):
    model, dataset = tiny_model(), load_segmentation("folder", root)
    seen = recorded(type(model), "get_image_features", lambda self, pixels: len(pixels))
    metrics = [DeletionInsertion(steps=2, seed=3), MaxSensitivity(seed=3), Randomization(seed=3), PointingGame()]
    options = {"refine": refine, "batch_size": 5}
    result = evaluate_model((model, tiny_processor), dataset, methods, metrics, **options)
    if methods == METHODS:
        # The four images are encoded once, and by each of the three methods that run the tower; three of them show
        # classes, six in all.
        assert sum(seen) == 4 * 4 + 3 * 6 * (1 + 11 + 3) + 3 * 2 + 4 * (6 * 4 + 3 * 2)
        random = result.results["random"]["randomization"]
        assert random["randomization"] == [pytest.approx(1)] * 2  # it does not know the model
    for method in methods:
        by_metric = result.results[method]
        found = {name: score for scores in by_metric.values() for name, score in scores.items()}
        expected = slowly(model, tiny_processor, dataset, method, refine)
        np.testing.assert_allclose([found[name] for name in COLUMNS], expected[:8], atol=2e-4, rtol=1e-3)
        np.testing.assert_allclose(found["randomization"], expected[8:], atol=2e-3)
        assert found["difference_cosine"] == found["insertion_cosine"] - found["deletion_cosine"]
        assert all(scores["pairs"] == 6 and scores["left_out"] == {"no_value": 0} for scores in by_metric.values())
        rows = [row["pointing_game"]["foreground"] for row in result.per_class[method]]
        assert np.mean(rows) == pytest.approx(found["foreground"])


def test_pixels_are_ordered_by_the_same_maps_in_every_batch(root, tiny_processor, recorded):
    """To the last bit, which orders pixels that are mathematically equal."""
    seen = recorded(faithfulness, "deletion_insertion", lambda score, pixels, maps, **options: maps)
    model, dataset = (tiny_model(), tiny_processor), load_segmentation("folder", root)
    for size in (1, 4):
        evaluate_model(model, dataset, METHODS, [DeletionInsertion(steps=2)], batch_size=size)
    assert len(seen) == 6 and all(map(torch.equal, seen[:3], seen[3:]))


def test_the_command_takes_options_of_metrics_and_the_first_images(root, world, tmp_path, capsys):
    output = tmp_path / "results.json"
    data = ("--dataset", "folder", "--data-root", root, "--limit", 3, "--output", output)
    more = ("--metrics", "deletion_insertion", "randomization", "--methods", "itsm", "attention", "--steps", 2)
    assert iclip("evaluate", "--model", world.folder / "model", *data, *more) == 0
    written = json.loads(output.read_text())
    protocol, itsm = written["protocol"], written["results"]["itsm"]
    assert protocol["metrics"]["deletion_insertion"]["steps"] == 2 and protocol["dataset"]["images"] == 3
    headings, _, row, _ = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert headings.startswith("| method, on 3 of 4 images | ")
    assert f"{itsm['deletion_insertion']['difference_probability']:.4f}" in row
    assert f"{itsm['randomization']['randomization'][-1]:.2f}" in row
    first, *rows = (tmp_path / "results.csv").read_text().splitlines()
    assert first.startswith("method,id,name,deletion_insertion.deletion_cosine")
    assert rows[2].startswith("itsm,3,car,,") and len(rows) == 6
