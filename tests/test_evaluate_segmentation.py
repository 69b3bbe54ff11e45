"""Segmentation, windows and typed segments against the same protocol in plain steps."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NAMES, evaluate_model, tiny_model, write_folder
from torch.nn import functional as F

from iclip_hf.data import load_segmentation
from iclip_hf.evaluation.metrics import LabelMaps
from iclip_hf.evaluation.metrics.metric import EvaluatedImage
from iclip_hf.evaluation.metrics.recognition import like_classes
from iclip_hf.evaluation.metrics.segmentation import Segmentation, SlidingWindows
from iclip_hf.explainers.explain import explain
from iclip_hf.model.engine import Engine
from iclip_hf.model.label_maps import label_map
from iclip_hf.model.presence import MIN_PRESENCE
from iclip_hf.model.refinement import refine_maps


def enlarged(model, processor, sample, texts):
    """Maps of all texts at the image's size."""
    with torch.no_grad():
        outputs = model(**processor(sample.image, labels=texts), output_similarity_maps=True)
    return F.interpolate(outputs.similarity_maps, sample.size, mode="bicubic", align_corners=False)[0].numpy()


def segment(model, dataset, methods=("itsm",), **options):
    return evaluate_model(model, dataset, methods, [Segmentation(**options)])


def miou(pairs):
    """mIoU and IoU by class of pairs of a predicted and a reference map, by boolean masks."""
    iou = {}
    for k in range(4):
        both = sum(((p == k) & (r == k)).sum() for p, r in pairs)
        either = sum((((p == k) | (r == k)) & (r != 255)).sum() for p, r in pairs)
        if either:
            iou[k] = 100 * both / either
    return np.mean(list(iou.values())), iou


def test_figures_equal_the_protocol_in_plain_steps(dataset, tiny_processor):
    model = tiny_model()
    result = evaluate_model((model, tiny_processor), dataset, metrics=["segmentation"], batch_size=3)
    found = []
    for sample in dataset:
        maps = enlarged(model, tiny_processor, sample, NAMES)
        best = maps.max(0)
        found.append((maps.argmax(0) + 1, (best - best.min()) / (best.max() - best.min()), sample.label_map))
    grid = np.arange(101, dtype=np.float32) / np.float32(100)

    def at(t, fold):
        return [(np.where(confidence > t, labels, 0), label_map) for labels, confidence, label_map in found[fold::2]]

    even, odd = (grid[np.argmax([miou(at(t, fold))[0] for t in grid])] for fold in (0, 1))
    expected, iou = miou(at(odd, 0) + at(even, 1))  # each half at the best threshold of the other
    figures = result.results["itsm"]["segmentation"]
    assert figures["thresholds"] == pytest.approx([odd, even], abs=0.011)
    assert figures["miou"] == pytest.approx(expected, abs=0.3)  # of few pixels, some of them at the threshold
    rows = result.per_class["itsm"]
    assert [row["name"] for row in rows] == ["background", *NAMES]
    by_class = {row["id"]: row["segmentation"]["IoU"] for row in rows}
    assert {k: by_class[k] for k in iou} == pytest.approx(iou, abs=0.6)
    shares = np.bincount(np.concatenate([r[r != 255] for *_, r in found]))
    assert figures["floor"] == pytest.approx(100 * shares.max() / shares.sum() / np.count_nonzero(shares))
    assert figures["floor_class"] == "background" and re.search(r"\| background +\|", result.table())


def test_synonyms_and_background_texts(labelled_folder, tiny_processor):
    model = tiny_model()
    overrides = {"names": {"car": ["car", "red car"]}, "background": ["sky", "grass"]}
    dataset = load_segmentation("folder", labelled_folder, overrides=overrides)
    texts = ["dog", "red ball", "car", "red car", "sky", "grass"]
    classes = np.array([1, 2, 3, 3, 0, 0])
    maps = [enlarged(model, tiny_processor, sample, texts) for sample in dataset]
    expected, iou = miou([(classes[of_image.argmax(0)], sample.label_map) for of_image, sample in zip(maps, dataset)])
    figures = segment((model, tiny_processor), dataset).results["itsm"]["segmentation"]
    assert figures["miou"] == pytest.approx(expected, abs=0.2)
    assert figures["thresholds"] is None and len(iou) == 4


def test_a_given_threshold_and_every_kind_of_method(dataset, tiny_processor):
    model = tiny_model()
    methods = ["itsm", "reversed_itsm", "attention", "grad_cam", "gem"]
    result = segment((model, tiny_processor), dataset, methods, threshold=0.25)
    pairs, turned = [], []
    for sample in dataset:
        maps = enlarged(model, tiny_processor, sample, NAMES)
        for sign, into in ((1, pairs), (-1, turned)):
            best = (sign * maps).max(0)
            confidence = (best - best.min()) / (best.max() - best.min())
            into.append((np.where(confidence > 0.25, (sign * maps).argmax(0) + 1, 0), sample.label_map))
    assert result.results["itsm"]["segmentation"]["miou"] == pytest.approx(miou(pairs)[0], abs=0.2)
    assert result.results["reversed_itsm"]["segmentation"]["miou"] == pytest.approx(miou(turned)[0], abs=0.2)
    assert len({figures["segmentation"]["miou"] for figures in result.results.values()}) == len(methods)
    rows = result.per_class["attention"]  # whose maps are equal, so that the first text is everywhere
    assert {row["segmentation"]["IoU"] for row in rows if row["id"] > 1} == {0}
    assert result.results["itsm"]["segmentation"]["thresholds"] == [0.25, 0.25]


# ---- label maps of typed texts ----


def test_label_maps_in_plain_steps(dataset, tiny_processor):
    """Each shown text and two absent ones compete; IoU, areas and hidden texts are counted pixel by pixel."""
    model, metric = tiny_model(seed=1, logit_bias_init_value=0.0), LabelMaps(seed=3)
    result = evaluate_model((model, tiny_processor), dataset, metrics=[metric], refine=True)
    result = result.results["itsm"]["label_maps"]
    ious, hidden, areas = [], [], []
    for sample in dataset:
        absent = [label for label in (1, 2, 3) if label not in sample.class_ids]
        if not sample.class_ids:
            continue
        labels = [*sample.class_ids, *absent]  # of three classes, at most two are absent
        pixels = tiny_processor(sample.image, labels=[NAMES[label - 1] for label in labels])
        with torch.no_grad():
            outputs = model(**pixels, output_similarity_maps=True)
        (maps,) = refine_maps(outputs.similarity_maps, pixels["pixel_values"])
        found = label_map(maps, sample.size, outputs.logits_per_image[0].sigmoid(), MIN_PRESENCE, 0.5).numpy()
        found = np.array([0, *labels])[found + 1]
        known = sample.label_map != 255
        for label in sample.class_ids:
            own, segment = (sample.label_map == label) & known, (found == label) & known
            ious.append((own & segment).sum() / (own | segment).sum())
            hidden.append(not segment.any())
        areas.append(np.isin(found, absent)[known].mean())
    assert (result["classes"], result["images"]) == (len(ious), len(areas)) and 0 < np.mean(hidden) < 1
    assert result["iou"] == pytest.approx(100 * np.mean(ious), abs=0.3)
    assert result["kept"] == pytest.approx(100 * (1 - np.mean(hidden)))
    assert result["absent"] == pytest.approx(100 * np.mean(areas), abs=0.3) and result["absent"] > 0


def test_label_maps_are_those_of_the_competing_texts_alone(tmp_path, made, monkeypatch):
    """CLIP Surgery subtracts the mean map of all texts that it is asked for, here three of six."""
    write_folder(tmp_path, [[0, 1, 2]] * 3, 60)
    (tmp_path / "classes.txt").write_text("\n".join([*NAMES, "cat", "a red dog", "two cars"]))
    dataset, competing = load_segmentation("folder", tmp_path), [0, 1, 4]
    monkeypatch.setattr(LabelMaps, "text_indices", lambda *_: competing)
    model, alone = made("clip")[:2], LabelMaps()
    found = evaluate_model(model, dataset, ["clip_surgery"], [LabelMaps()]).results["clip_surgery"]["label_maps"]
    for sample in dataset:
        texts, options = [dataset.class_names[index] for index in competing], {"templates": dataset.templates}
        explanation = explain(model, sample.image, texts, "clip_surgery", refine=False, **options)
        alone.update(explanation.label_map(), EvaluatedImage(0, sample, None).masks, sample.class_ids)
    assert found == pytest.approx(alone.compute(), abs=0.5)


def test_the_absent_texts_are_one_of_a_like_kind_and_one_at_random():
    labels = tuple(range(1, 9))
    metric = LabelMaps(seed=1)
    metric.run = SimpleNamespace(dataset=SimpleNamespace(class_ids=labels))
    metric.like = like_classes(["animal"] * 3 + ["food"] * 5, torch.eye(8))

    def typed(index, *shown):
        return metric.text_indices(SimpleNamespace(index=index, sample=SimpleNamespace(class_ids=shown)))

    drawn = [typed(index, 2) for index in range(60)]
    assert drawn == [typed(index, 2) for index in range(60)]  # by the seed and the position alone
    assert {row[0] for row in drawn} == {1} and {row[1] for row in drawn} == {0, 2}  # the other animals
    assert all(len(set(row)) == 3 for row in drawn) and {row[2] for row in drawn} == {0, 2, 3, 4, 5, 6, 7}
    assert {typed(index, 1, 2, 3)[3] for index in range(60)} == {3, 4, 5, 6, 7}  # no other animal
    assert typed(0, *labels) == list(range(8))


# ---- windows ----


def test_windows_are_cut_run_and_averaged(tiny_processor):
    engine = Engine(tiny_model(), tiny_processor)
    texts = engine.encode(NAMES)
    pixels = torch.randn(2, 3, 48, 56, generator=torch.Generator().manual_seed(0))
    found = engine.raw_maps(pixels, texts, tiling=SlidingWindows(32, 16, 8))[0]
    assert found.shape == (2, 3, 6, 7)
    total, count = torch.zeros_like(found), torch.zeros(6, 7)
    for top in (0, 16):
        for left in (0, 16, 24):  # the last of a row ends at the edge
            place = ..., slice(top // 8, top // 8 + 4), slice(left // 8, left // 8 + 4)
            total[place] += engine.raw_maps(pixels[..., top : top + 32, left : left + 32], texts)[0]
            count[place] += 1
    torch.testing.assert_close(found, total / count, atol=1e-5, rtol=0)
    whole, _ = engine.raw_maps(pixels, texts)
    assert torch.equal(engine.raw_maps(pixels, texts, tiling=SlidingWindows(64, 8, 8))[0], whole)


def test_images_keep_their_proportions_under_windows(dataset, tiny_processor):
    model, found = (tiny_model(), tiny_processor), []
    options = {"metrics": [Segmentation(window=32, threshold=0.5)], "image_size": {"shortest_edge": 48}}
    for size in (1, 4):
        result = evaluate_model(model, dataset, batch_size=size, **options)
        found.append(result.results["itsm"]["segmentation"]["miou"])
    assert found[0] == pytest.approx(found[1], abs=0.1)
    assert result.protocol["metrics"]["segmentation"]["stride"] == 16
    for window, stride in ((32, 12), (20, 8), (32, 40)):
        with pytest.raises(ValueError, match="multiples of the patch size of 8 pixels"):
            segment(model, dataset, window=window, stride=stride)


def test_a_metric_with_windows_changes_no_other(dataset, tiny_processor):
    """Its images keep their proportions, and those of the others are squares."""
    dataset, windows = dataset[:3], Segmentation(window=224, threshold=0.5)
    metrics = [["mMIoU", "presence"], [windows], ["mMIoU", windows, "presence"], [windows, "presence", "mMIoU"]]
    model = (tiny_model(logit_bias_init_value=0.0), tiny_processor)
    squares, windowed, *together = (evaluate_model(model, dataset, metrics=one) for one in metrics)
    expected = squares.results["itsm"] | windowed.results["itsm"]
    for result in together:
        assert result.results["itsm"] == expected and result.timing["images"] == len(dataset)
        usual, square = result.protocol["image_size"], {"height": 32, "width": 32}
        metrics = result.protocol["metrics"].items()
        sizes = {name: of_metric.get("image_size", usual) for name, of_metric in metrics}
        assert sizes == {"mMIoU": square, "segmentation": {"shortest_edge": 336}, "presence": square}
        assert result.per_class["itsm"][1].keys() >= {"mMIoU", "segmentation"}


@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"background": ["sky"]}])
def test_a_void_background_is_not_predicted(dataset, tiny_processor, options):
    dataset.background = False
    with pytest.raises(ValueError, match="Leave out .* of the background"):
        segment((tiny_model(), tiny_processor), dataset, **options)
    result = segment((tiny_model(), tiny_processor), dataset)
    assert [row["id"] for row in result.per_class["itsm"]] == [1, 2, 3]
