import csv
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NAMES, tiny_model
from families import raw_maps
from processes import COMMAND, run_script
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from iclip_hf import cli
from iclip_hf.backends.loading import load
from iclip_hf.data import load_segmentation
from iclip_hf.evaluation.evaluate import evaluate
from iclip_hf.evaluation.measures import TASKS
from iclip_hf.evaluation.metrics import MeanForegroundMinusBackground as MFMB
from iclip_hf.evaluation.metrics import MeanMaxIoU, MultiLabelAveragePrecision
from iclip_hf.evaluation.results import class_thresholds
from iclip_hf.explainers import METHODS, make_explainer
from iclip_hf.model.presence import MIN_PRESENCE
from iclip_hf.model.similarity import resize_and_normalize


def slowly(model, processor, dataset):
    """The same protocol in plain steps: one image and class at a time, 101 comparisons, no counts."""
    iou, fmb, contrast, scores, presences = {}, {}, {}, [], []
    for sample in dataset:
        with torch.no_grad():
            outputs = model(**processor(sample.image, labels=NAMES), output_similarity_maps=True)
        scores.append((outputs.logits_per_image[0] / model.recognition()[0]).tolist())
        presences.append([label in sample.labels for label in (1, 2, 3)])
        heatmaps = {}
        for label in sample.labels:
            raw = outputs.similarity_maps[:, label - 1 : label]
            big = F.interpolate(raw, size=sample.size, mode="bicubic", align_corners=False)[0, 0].numpy()
            heatmap = heatmaps[label] = (big - big.min()) / (big.max() - big.min())
            mask = sample.mask(label)
            inside, outside = mask == label, (mask != label) & (mask != 255)
            curve = [
                (inside & (heatmap > t)).sum() / (inside | (outside & (heatmap > t))).sum()
                for t in np.arange(101) / 100
            ]
            iou.setdefault(label, []).append(curve)
            fmb.setdefault(label, []).append(heatmap[inside].mean() - heatmap[outside].mean())
        for i, j in itertools.combinations(sample.labels, 2):
            own = [sample.mask(i) == i, sample.mask(j) == j]  # an index mask: no pixel is of both
            above = [
                np.mean(heatmaps[k][one][:, None] > heatmaps[k][other])
                for k, one, other in ((i, *own), (j, *own[::-1]))
            ]
            for label in (i, j):
                contrast.setdefault(label, []).append(np.mean(above))
    precisions = []
    for label in range(3):
        order = sorted(range(len(scores)), key=lambda i: -scores[i][label])
        hits = [presences[i][label] for i in order]
        precisions.append(np.mean([np.mean(hits[: k + 1]) for k, hit in enumerate(hits) if hit]))
    return {
        "mAP": 100 * np.mean(precisions),
        "mMIoU": 100 * np.mean([np.mean(curves, axis=0).max() for curves in iou.values()]),
        "mFMB": np.mean([np.mean(values) for values in fmb.values()]),
        "text_contrast": 100 * np.mean([np.mean(values) for values in contrast.values()]),
    }


def test_figures_equal_the_protocol_in_plain_steps(labelled_folder, tiny_processor):
    model, dataset = tiny_model(), load_segmentation("folder", labelled_folder)
    result = evaluate((model, tiny_processor), dataset, ["itsm", "reversed_itsm"], batch_size=3, progress=False)
    expected = slowly(model, tiny_processor, dataset)
    found = {name: result.results["itsm"][name] for name in expected}
    assert found.pop("text_contrast") == pytest.approx(expected.pop("text_contrast"), abs=1e-2)  # of few pixels
    assert found.pop("mMIoU") == pytest.approx(expected.pop("mMIoU"), abs=0.1)  # likewise
    assert found == pytest.approx(expected, abs=1e-3)
    forwards, reverse = result.results["itsm"], result.results["reversed_itsm"]
    assert reverse["mFMB"] == pytest.approx(-forwards["mFMB"], abs=1e-6)  # of 1 - M (Eq. 5)
    assert reverse["text_contrast"] == pytest.approx(100 - forwards["text_contrast"], abs=1e-3)
    assert result.results["reversed_itsm"]["mAP"] == result.results["itsm"]["mAP"]
    rows = result.per_class["itsm"]
    assert [row["name"] for row in rows] == NAMES
    for column, figure in (("MIoU", "mMIoU"), ("FMB", "mFMB"), ("text_contrast", "text_contrast")):
        assert np.mean([row[column] for row in rows]) == pytest.approx(result.results["itsm"][figure])
    assert f"| {forwards['mMIoU']:.2f} | {forwards['floor']:.2f} |" in result.table()
    assert "text_contrast" in result.per_class_csv().splitlines()[0].split(",")


def test_stuff_contrast_by_hand_and_with_a_map_of_saliency(labelled_folder, tiny_processor):
    """In plain loops over pixels; the map of the first class alone is that of all classes for a method without text."""
    model, dataset = load((tiny_model(), tiny_processor)), load_segmentation("folder", labelled_folder)
    dataset.stuff = (2,)
    result = evaluate(model, dataset, ["itsm", "attention"], progress=False)
    for method, figures in result.results.items():
        explainer, ranked = make_explainer(model, method), {}
        for sample in dataset:
            pixels = tiny_processor(images=[sample.image])["pixel_values"]
            maps, _ = raw_maps(explainer, pixels, model.encode_texts(NAMES))
            for i, j in itertools.permutations(sample.labels, 2):
                heatmap = resize_and_normalize(maps[0, i - 1 : i], sample.size)[0].numpy()
                own, other = (heatmap[sample.mask(label) == label] for label in (i, j))
                ranked.setdefault(i, []).append(np.mean(own[:, None] > other))
        means = {label: 100 * np.mean(values) for label, values in ranked.items()}
        assert figures["stuff_contrast"] == pytest.approx(means[2], abs=0.05)
        assert figures["thing_contrast"] == pytest.approx((means[1] + means[3]) / 2, abs=0.05)
        rows = {row["id"]: row["ranking"] for row in result.per_class[method]}
        assert rows == pytest.approx(means, abs=0.05)
    assert result.protocol["stuff_contrast"] and "stuff contrast %" in result.table()


def test_every_method_scores_its_maps_of_all_classes(labelled_folder, tiny_processor):
    """Drawn for the shown classes alone where that saves time, they are those that a method gives when asked for all."""
    model, dataset = tiny_model(), load_segmentation("folder", labelled_folder)
    result = evaluate((model, tiny_processor), dataset, list(METHODS), batch_size=3, progress=False)
    assert list(result.results) == list(METHODS)
    for method in METHODS:
        explainer = make_explainer((model, tiny_processor), method)
        texts, miou, mfmb, ap = explainer.model.encode_texts(NAMES), MeanMaxIoU(), MFMB(), MultiLabelAveragePrecision()
        for sample in dataset:
            maps, scores = raw_maps(explainer, tiny_processor(images=[sample.image])["pixel_values"], texts)
            ap.update(scores, np.isin([1, 2, 3], sample.labels)[None])
            for label in sample.labels:
                heatmap = resize_and_normalize(maps[0, label - 1 : label], sample.size)[0]
                heatmap = 1 - heatmap if explainer.reversed else heatmap
                miou.update(heatmap, sample.mask(label), label)
                mfmb.update(heatmap, sample.mask(label), label)
        scores = result.results[method]
        assert scores["mAP"] == pytest.approx(ap.compute()["map"])
        assert scores["mMIoU"] == pytest.approx(miou.compute()["mmiou"], abs=0.1)
        assert scores["mFMB"] == pytest.approx(mfmb.compute()["mfmb"], abs=1e-5)


def test_images_are_encoded_once_for_maps_reversal_and_scores(labelled_folder, tiny_processor, recorded):
    model, dataset = tiny_model(), load_segmentation("folder", labelled_folder)
    passes = recorded(type(model), "get_image_features", lambda self, pixels: len(pixels))
    backwards = recorded(torch.autograd, "grad")
    evaluate((model, tiny_processor), dataset, ["itsm", "reversed_itsm"], batch_size=4, progress=False)
    assert (passes, backwards) == ([4, 3], [])
    evaluate((model, tiny_processor), dataset, ["grad_cam"], batch_size=4, progress=False)
    assert passes[2:] == [4, 4, 3, 3]
    shown = [len(sample.labels) for sample in dataset]
    assert len(backwards) == max(shown[:4]) + max(shown[4:]) < 2 * len(NAMES)


@pytest.mark.parametrize("supercategories", [("animal", "toy", "animal"), None])
def test_presence_in_loops_over_pairs_and_with_scikit_learn(labelled_folder, tiny_processor, supercategories):
    """In prompts of the caller's. Of three classes, the nearest tenth is one."""
    model = load((tiny_model(logit_bias_init_value=0.0), tiny_processor))
    dataset = load_segmentation("folder", labelled_folder)
    dataset.supercategories, dataset.stuff, templates = supercategories, (2,), ["the dog {}"]
    texts = model.encode_texts(NAMES, templates)
    cosines = (texts.text_embeds @ texts.text_embeds.T).tolist()
    pairs = []  # presence, whether the image shows the class, whether the class is like one that it shows, class
    for sample in dataset:
        image = model.get_image_features(tiny_processor(images=[sample.image])["pixel_values"])
        values = model.presence(image.image_embeds @ texts.text_embeds.T)[0].tolist()
        for label, value in enumerate(values, 1):
            like = False
            for other in set(sample.labels) - {label}:
                if supercategories is None:  # the nearest of the two others
                    near = max({1, 2, 3} - {other}, key=lambda k: cosines[other - 1][k - 1])
                    like |= near == label
                else:
                    like |= supercategories[other - 1] == supercategories[label - 1]
            pairs.append((value, label in sample.labels, like, label))
    measured = evaluate(model, dataset, measures=["presence"], templates=templates, progress=False).presence

    shown, absent = ([pair for pair in pairs if pair[1] == which] for which in (True, False))
    hard = [pair for pair in absent if pair[2]]
    for name, negatives in (("auc", absent), ("auc_hard", hard)):
        values, truth, *_ = zip(*shown, *negatives)
        assert measured[name] == pytest.approx(roc_auc_score(truth, values))
    groups = {"kept": shown, "passed": absent, "passed_hard": hard}
    groups |= {"kept_stuff": [pair for pair in shown if pair[3] == 2], "kept_things": [p for p in shown if p[3] != 2]}
    for name, group in groups.items():
        assert 0 < len(group) < len(pairs)
        assert measured[name] == pytest.approx(100 * np.mean([value >= MIN_PRESENCE for value, *_ in group]))
    assert 0 < len(hard) < len(absent) and measured["kept"] != measured["passed"]

    error = 0
    assert measured["prior"] == pytest.approx(len(shown) / len(pairs))
    odds = len(shown) / len(absent)
    calibrated = [(1 / (1 + (1 - value) / value / odds), *rest) for value, *rest in pairs]
    for lower, row in zip(np.arange(10) / 10, measured["reliability"], strict=True):
        inside = [pair for pair in calibrated if lower <= pair[0] < lower + 0.1]
        assert row["pairs"] == len(inside)
        if inside:
            assert row["mean"] == pytest.approx(np.mean([value for value, *_ in inside]), abs=1e-4)
            assert row["shown"] == pytest.approx(np.mean([shown for _, shown, *_ in inside]))
            error += len(inside) / len(pairs) * abs(row["mean"] - row["shown"])
        else:
            assert row["mean"] is row["shown"] is None
    assert measured["calibration_error"] == pytest.approx(error, abs=1e-4)


def test_an_image_without_any_class_gives_valid_json_and_a_table_without_nan(labelled_folder, tiny_processor):
    dataset = load_segmentation("folder", labelled_folder)[4:5]
    measures = [*TASKS["interpretability"][:4], "presence", *TASKS["faithfulness"], "typed_segments"]
    model = tiny_model(logit_bias_init_value=0.0), tiny_processor
    result = evaluate(model, dataset, ["grad_cam"], measures, progress=False)
    scores = result.results["grad_cam"]
    figures = ("mAP", "mMIoU", "mFMB", "text_contrast", "floor", "pointing_game", "max_sensitivity", "typed_iou")
    assert scores["pairs"] == 0 and [scores[name] for name in figures] == [None] * 8
    assert result.presence["kept"] is None and result.presence["passed"] is not None
    json.loads(result.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "AUC of presence" in result.table() and re.search(r"\bnan\b", result.table().lower()) is None


def test_the_measure_of_the_guide_leaves_out_a_class_that_is_a_crowd_only():
    guide = (Path(__file__).parents[1] / "docs" / "guide" / "evaluate.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```py\n(import math.*?)\nprint", guide, re.DOTALL)[1], names)
    image = SimpleNamespace(masks=np.array([[[1, 1]], [[0, 255]]]), sample=SimpleNamespace(labels=(1, 2)))
    (one, label), ((nothing,), _) = names["AreaRatio"]().count(image, "itsm", torch.tensor([[[0.9, 0.1]]] * 2))
    assert (one, label) == ([0.5], 1) and math.isnan(nothing)


def test_a_limit_and_what_the_protocol_says(labelled_folder, tiny_processor):
    dataset = load_segmentation("folder", labelled_folder)
    result = evaluate(
        (tiny_model(), tiny_processor), dataset, image_size=40, limit=2, templates=["a {}"], progress=False
    )
    protocol = result.protocol
    assert protocol["dataset"]["images"] == 2 and protocol["dataset"]["images_in_split"] == len(dataset)
    assert protocol["dataset"]["fingerprint"] == dataset.fingerprint()
    assert protocol["image_size"] == {"height": 40, "width": 40} and protocol["templates"] == ["a {}"]
    assert protocol["dtype"] == "float32"
    alone = evaluate((tiny_model(), tiny_processor), dataset[:2], image_size=40, templates=["a {}"], progress=False)
    assert result.results == alone.results and result.per_class == alone.per_class
    # A part of a split does not pass for the whole.
    assert len(dataset) > 2 and alone.protocol["dataset"]["images_in_split"] == len(dataset)
    assert f"on 2 of {len(dataset)} images" in alone.table()


def arguments(labelled_folder, world, *more):
    data = ["--dataset", "folder", "--data-root", str(labelled_folder)]
    return ["evaluate", "--model", str(world.folder / "model"), *data, *more]


def test_command_writes_json_and_csv_alike_with_two_processes(labelled_folder, world, tmp_path, capsys):
    output = tmp_path / "results.json"
    assert cli.main(arguments(labelled_folder, world, "--output", str(output), "--json")) == 0
    written = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == written
    with (tmp_path / "results.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == NAMES

    two = tmp_path / "two.json"
    command = arguments(labelled_folder, world, "--output", str(two))
    first, second = run_script(COMMAND, *command, processes=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "| itsm |" in first.stdout and not second.stdout
    together = json.loads(two.read_text())
    assert together["timing"]["images"] == 4  # of 7: the images were shared out
    # Maps of other batches differ by rounding, so a few pixels may cross a threshold.
    for name, apart in (("mAP", 1e-3), ("mMIoU", 0.1), ("mFMB", 1e-4), ("floor", 1e-6)):
        assert together["results"]["itsm"][name] == pytest.approx(written["results"]["itsm"][name], abs=apart)
    for name in ("auc", "auc_hard", "kept", "passed", "calibration_error"):
        assert together["presence"][name] == pytest.approx(written["presence"][name], abs=1e-3)


def test_thresholds_of_classes(tmp_path):
    path = tmp_path / "results.json"
    rows = [{"name": "dog", "threshold": 0.31}, {"name": "red ball", "threshold": 0.55}]
    rows += [{"name": "cat", "threshold": None}, {"name": "fish", "threshold": 31}]
    path.write_text(json.dumps({"per_class": {"itsm": rows, "gem": rows[:1]}}))
    assert class_thresholds(path, ["red ball", "dog", "dog"]) == [0.55, 0.31, 0.31]
    assert class_thresholds(path, ["dog"], "gem") == [0.31]
    for labels, method in ((["dog", "cat"], "itsm"), (["dog", "fish"], "itsm"), (["dog"], "attention")):
        with pytest.raises(ValueError, match="results.json"):
            class_thresholds(path, labels, method)
