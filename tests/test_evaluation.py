import csv
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NAMES, evaluate_model, iclip, tiny_model, write_folder
from families import raw_maps
from processes import COMMAND, run_script
from sklearn.metrics import roc_auc_score

from iclip_hf.backends.loading import load
from iclip_hf.data import load_segmentation
from iclip_hf.evaluation.metrics import TASKS, MeanMaxIoU, make_metrics
from iclip_hf.evaluation.metrics.metric import EvaluatedImage
from iclip_hf.explainers import METHODS, make_explainer
from iclip_hf.model.presence import MIN_PRESENCE
from iclip_hf.model.similarity import resize_and_normalize


def test_figures_of_every_method_are_those_of_one_image_and_class_at_a_time(dataset, tiny_processor):
    """
    Maps are drawn for the shown classes alone where that saves time: they are those of a method that is asked for all.
    """
    model = tiny_model()
    result = evaluate_model((model, tiny_processor), dataset, list(METHODS), batch_size=3)
    assert list(result.results) == list(METHODS)
    tolerances = {"mAP": 1e-3, "mMIoU": 0.1, "mFMB": 1e-5, "text_contrast": 1e-2}  # of few pixels
    for method in METHODS:
        explainer, alone = make_explainer((model, tiny_processor), method), make_metrics([*tolerances])
        precision, miou, mfmb, contrast = alone
        texts = explainer.model.encode_texts(NAMES)
        for sample in dataset:
            maps, scores = raw_maps(explainer, tiny_processor(images=[sample.image])["pixel_values"], texts)
            heatmaps = resize_and_normalize(maps[0, [label - 1 for label in sample.class_ids]], sample.size)
            precision.update(scores, np.isin([1, 2, 3], sample.class_ids)[None])
            contrast.update(heatmaps, sample.label_map, sample.class_ids)
            for heatmap, label in zip(heatmaps, sample.class_ids):
                miou.update(heatmap, sample.mask(label), label)
                mfmb.update(heatmap, sample.mask(label), label)
        for metric in alone:
            name = metric.name.lower()
            expected = pytest.approx(metric.compute()[name], abs=tolerances[metric.name])
            assert result.results[method][metric.name][name] == expected, (method, name)
    forwards, reverse = result.results["itsm"], result.results["reversed_itsm"]
    assert reverse["mFMB"]["mfmb"] == pytest.approx(-forwards["mFMB"]["mfmb"], abs=1e-6)  # of 1 - M (Eq. 5)
    contrast = forwards["text_contrast"]["text_contrast"]
    assert reverse["text_contrast"]["text_contrast"] == pytest.approx(100 - contrast, abs=1e-3)
    assert reverse["mAP"] == forwards["mAP"]
    rows = result.per_class["itsm"]
    assert [row["name"] for row in rows] == NAMES
    for metric, score in (("mMIoU", "IoU"), ("mFMB", "FMB"), ("text_contrast", "contrast")):
        assert np.mean([row[metric][score] for row in rows]) == pytest.approx(forwards[metric][metric.lower()])


def test_stuff_contrast_by_hand_and_with_a_map_of_saliency(dataset, tiny_processor):
    """
    In plain loops over pixels; the map of the first class alone is that of all classes for a method without text.
    """
    model, dataset.stuff = load((tiny_model(), tiny_processor)), (2,)
    result = evaluate_model(model, dataset, ["itsm", "attention"])
    for method, figures in result.results.items():
        explainer, ranked = make_explainer(model, method), {}
        for sample in dataset:
            pixels = tiny_processor(images=[sample.image])["pixel_values"]
            maps, _ = raw_maps(explainer, pixels, model.encode_texts(NAMES))
            for i, j in itertools.permutations(sample.class_ids, 2):
                heatmap = resize_and_normalize(maps[0, i - 1 : i], sample.size)[0].numpy()
                own, other = (heatmap[sample.mask(label) == label] for label in (i, j))
                ranked.setdefault(i, []).append(np.mean(own[:, None] > other))
        means = {label: 100 * np.mean(values) for label, values in ranked.items()}
        found = figures["stuff_contrast"]
        assert found["stuff_contrast"] == pytest.approx(means[2], abs=0.05)
        assert found["thing_contrast"] == pytest.approx((means[1] + means[3]) / 2, abs=0.05)
        rows = {row["id"]: row["stuff_contrast"]["ranking"] for row in result.per_class[method]}
        assert rows == pytest.approx(means, abs=0.05)
    assert result.protocol["metrics"]["stuff_contrast"]["stuff"] == (2,) and "stuff contrast %" in result.table()


def test_images_are_encoded_once_for_maps_reversal_and_scores(dataset, tiny_processor, recorded):
    model = tiny_model()
    passes = recorded(type(model), "get_image_features", lambda self, pixels: len(pixels))
    backwards = recorded(torch.autograd, "grad")
    evaluate_model((model, tiny_processor), dataset, ["itsm", "reversed_itsm"], batch_size=4)
    assert (passes, backwards) == ([4, 3], [])
    evaluate_model((model, tiny_processor), dataset, ["grad_cam"], batch_size=4)
    assert passes[2:] == [4, 4, 3, 3]
    shown = [len(sample.class_ids) for sample in dataset]
    assert len(backwards) == max(shown[:4]) + max(shown[4:]) < 2 * len(NAMES)


@pytest.mark.parametrize("supercategories", [("animal", "toy", "animal"), None])
def test_presence_in_loops_over_pairs_and_with_scikit_learn(dataset, tiny_processor, supercategories):
    """In prompts of the caller's. Of three classes, the nearest tenth is one."""
    model = load((tiny_model(seed=1, logit_bias_init_value=0.0), tiny_processor))
    dataset.supercategories, templates = supercategories, ["the dog {}"]
    texts = model.encode_texts(NAMES, templates)
    cosines = (texts.text_embeds @ texts.text_embeds.T).tolist()
    pairs = []  # presence, whether the image shows the class, whether the class is like one that it shows, class
    for sample in dataset:
        image = model.get_image_features(tiny_processor(images=[sample.image])["pixel_values"])
        values = model.presence(image.image_embeds @ texts.text_embeds.T)[0].tolist()
        for label, value in enumerate(values, 1):
            like = False
            for other in set(sample.class_ids) - {label}:
                if supercategories is None:  # the nearest of the two others
                    near = max({1, 2, 3} - {other}, key=lambda k: cosines[other - 1][k - 1])
                    like |= near == label
                else:
                    like |= supercategories[other - 1] == supercategories[label - 1]
            pairs.append((value, label in sample.class_ids, like, label))
    result = evaluate_model(model, dataset, metrics=["presence"], templates=templates)
    measured = result.results["itsm"]["presence"]

    shown, absent = ([pair for pair in pairs if pair[1] == which] for which in (True, False))
    hard = [pair for pair in absent if pair[2]]
    for name, negatives in (("auc", absent), ("auc_hard", hard)):
        values, truth, *_ = zip(*shown, *negatives)
        assert measured[name] == pytest.approx(roc_auc_score(truth, values))
    groups = {"kept": shown, "passed": absent, "passed_hard": hard}
    for name, group in groups.items():
        assert 0 < len(group) < len(pairs)
        assert measured[name] == pytest.approx(100 * np.mean([value >= MIN_PRESENCE for value, *_ in group]))
    assert 0 < len(hard) < len(absent) and measured["kept"] != measured["passed"]
    counts = {"shown": shown, "absent": absent, "absent_hard": hard}
    assert measured["pairs"] == {name: len(group) for name, group in counts.items()}

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


def test_an_image_of_one_class_gives_valid_json_and_a_table_without_nan(tiny_processor, tmp_path):
    """It has no two classes, whose maps could be compared, and every class that it has is shown."""
    dataset = load_segmentation("folder", write_folder(tmp_path, [[0, 1]], 40))
    metrics = [*TASKS["interpretability"][:4], "presence", *TASKS["faithfulness"], "label_maps"]
    model = (tiny_model(logit_bias_init_value=0.0), tiny_processor)
    result = evaluate_model(model, dataset, ["grad_cam"], metrics)
    table, scores = result.table(), result.results["grad_cam"]
    assert scores["text_contrast"]["text_contrast"] is None and scores["mMIoU"]["pairs"] == 1
    json.loads(result.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert all(metric.legend in table for metric in make_metrics(metrics)) and not re.search(r"\bnan\b", table.lower())
    assert "mMIoU over 1 pair" in table and "text_contrast over 0 images" in table


def test_images_without_any_class_are_refused(dataset, tiny_processor):
    """As those with binary masks of 0 and 255, which is void."""
    model = (tiny_model(), tiny_processor)
    with pytest.raises(ValueError, match="None of the 1 images shows a class: .* ids of classes, and 255"):
        evaluate_model(model, dataset[4:5], metrics=["mMIoU"])
    evaluate_model(model, dataset[4:6], metrics=["mMIoU"])


def test_the_measure_of_the_guide_leaves_out_a_class_that_is_a_crowd_only():
    guide = (Path(__file__).parents[1] / "docs" / "guide" / "evaluate.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```py\n(import math.*?)\ndataset =", guide, re.DOTALL)[1], names)
    masks = np.array([[[1, 1]], [[0, 255]]])
    sample = SimpleNamespace(class_ids=(1, 2), size=(1, 2), void=255, mask=lambda k: masks[k - 1])
    metric = names["AreaRatio"]()
    metric.update_from(EvaluatedImage(0, sample, None), "itsm", torch.tensor([[[0.9, 0.1]]] * 2))
    assert metric.compute()["area_ratio"] == 0.5 and metric.compute()["left_out"] == {"no_value": 1}


def test_a_limit_and_what_the_protocol_says(dataset, tiny_processor):
    model, options = (tiny_model(), tiny_processor), {"image_size": 40, "templates": ["a {}"]}
    result = evaluate_model(model, dataset, **options, limit=2)
    protocol = result.protocol
    assert protocol["dataset"]["images"] == 2 and protocol["dataset"]["images_in_split"] == len(dataset)
    assert protocol["dataset"]["fingerprint"] == dataset[:2].fingerprint()
    assert protocol["image_size"] == {"height": 40, "width": 40} and protocol["templates"] == ["a {}"]
    alone = evaluate_model(model, dataset[:2], **options)
    assert result.results == alone.results and result.per_class == alone.per_class
    # A part of a split does not pass for the whole.
    assert alone.protocol["dataset"]["images_in_split"] == len(dataset)
    assert f"on 2 of {len(dataset)} images" in alone.table()


def test_command_writes_json_and_csv_alike_with_two_processes(labelled_folder, world, tmp_path, capsys):
    output, two = tmp_path / "results.json", tmp_path / "two.json"
    command = ["evaluate", "--model", world.folder / "model", "--dataset", "folder", "--data-root", labelled_folder]
    assert iclip(*command, "--output", output, "--json") == 0
    written = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == written
    with (tmp_path / "results.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == NAMES

    first, second = run_script(COMMAND, *command, "--output", two, processes=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "| itsm" in first.stdout and not second.stdout
    together = json.loads(two.read_text())
    assert together["timing"]["images"] == 4  # of 7: the images were shared out
    # Maps of other batches differ by rounding, so a few pixels may cross a threshold.
    one, two = (content["results"]["itsm"] for content in (written, together))
    for name, apart in (("mAP", 1e-3), ("mMIoU", 0.1), ("mFMB", 1e-4)):
        assert two[name][name.lower()] == pytest.approx(one[name][name.lower()], abs=apart)
    for name in ("auc", "auc_hard", "kept", "passed", "calibration_error"):
        assert two["presence"][name] == pytest.approx(one["presence"][name], abs=1e-3)


def test_average_precisions_that_no_score_changes_are_remarked(tmp_path, tiny_processor):
    dataset = load_segmentation("folder", write_folder(tmp_path, [[1, 3]] * 3 + [[1, 2]], 60))
    for images, number in ((dataset, 1), (dataset[:3], 2)):
        result = evaluate_model((tiny_model(), tiny_processor), images, metrics=["mAP"])
        assert result.results["itsm"]["mAP"]["always_shown"] == number
        assert f"Classes that every image shows: {number} of 3." in result.table()
    assert result.results["itsm"]["mAP"]["map"] == 100


# ---- what a metric gets, and where its scores stand ----


def test_scores_and_options_stand_by_metric(dataset, tiny_processor):
    """Two metrics have a floor, and two a seed."""
    model = (tiny_model(), tiny_processor)
    names = ["mMIoU", "segmentation", "max_sensitivity", "label_maps"]
    result = evaluate_model(model, dataset, metrics=make_metrics(names, seed=3))
    together = result.results["itsm"]
    alone = [evaluate_model(model, dataset, metrics=[name]).results["itsm"][name] for name in names[:2]]
    assert [together[name] for name in names[:2]] == alone and alone[0]["floor"] != alone[1]["floor"]
    for scores, heading in zip(alone, ("floor %", "floor of mIoU %")):
        headings, _, row = (line.split("|") for line in result.table().split("\n")[:3])
        assert row[[cell.strip() for cell in headings].index(heading)].strip() == f"{scores['floor']:.2f}"
    assert [result.protocol["metrics"][name]["seed"] for name in names[2:]] == [3, 3]
    assert result.protocol["metrics"]["mMIoU"]["aggregate"] == "image"
    with pytest.raises(ValueError, match="two metrics with the name 'mMIoU'"):
        evaluate_model(model, dataset, metrics=["mMIoU", MeanMaxIoU("pixel")])
    with pytest.raises(ValueError, match="steps is no option of mMIoU"):
        make_metrics(["mMIoU"], steps=3)


def test_presence_is_computed_when_it_is_asked_for_and_left_out_where_a_model_has_none(
    dataset, tiny_processor, recorded
):
    model = (tiny_model(), tiny_processor)
    assert "presence" not in evaluate_model(model, dataset, limit=1).results["itsm"]
    with pytest.raises(ValueError, match="no presence of its own"):
        evaluate_model(model, dataset, metrics=["presence"])
    model = load((tiny_model(seed=1, logit_bias_init_value=0.0), tiny_processor))
    assert "presence" in evaluate_model(model, dataset, limit=1).results["itsm"]
    encoded = recorded(type(model), "get_text_features")
    evaluate_model(model, dataset, metrics=["segmentation"])
    assert len(encoded) == 1  # the class names, which segmentation competes with, and nothing else


def test_settings_of_one_method_are_compared_by_titles(dataset, made):
    model, options = made("clip")[:2], {"sigma": 2.0}
    methods = {"NaCLIP": {}, "wide": ("naclip", options), "narrow": ("naclip", {"sigma": 9.0})}
    result = evaluate_model(model, dataset, methods, "mFMB", limit=2)
    assert [*result.results] == [*result.per_class] == ["naclip", "wide", "narrow"] and "| wide" in result.table()
    assert result.protocol["methods"] == {
        "naclip": {}, "wide": {"method": "naclip", **options}, "narrow": {"method": "naclip", "sigma": 9.0}
    }  # fmt: skip
    alone = evaluate_model(model, dataset, {"naclip": options}, "mFMB", limit=2)
    assert alone.results["naclip"] == result.results["wide"] != result.results["narrow"]


def test_without_a_name_the_method_is_that_of_the_model(dataset, made):
    """Of plain maps, unless refined ones are asked for."""
    usual, named = (evaluate_model(made("clip")[:2], dataset, methods, ["mFMB"]) for methods in (None, ["naclip"]))
    assert usual.results == named.results and usual.protocol["refine"] is False
