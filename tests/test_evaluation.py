import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import NAMES, presence_among, tiny_model
from PIL import Image
from torch.nn import functional as F

from iclip_hf import cli
from iclip_hf.data import load_segmentation
from iclip_hf.evaluation.evaluate import evaluate
from iclip_hf.evaluation.measures.measure import MeansMeasure, Measure
from iclip_hf.evaluation.metrics import MeanForegroundMinusBackground as MFMB
from iclip_hf.evaluation.metrics import MeanMaxIoU, MultiLabelAveragePrecision
from iclip_hf.evaluation.results import class_thresholds
from iclip_hf.explainers import METHODS, make_explainer
from iclip_hf.models.loading import load
from iclip_hf.presence import MIN_PRESENCE
from iclip_hf.reference_nouns import REFERENCE_NOUNS
from iclip_hf.similarity import resize_and_normalize


def slowly(model, processor, dataset):
    """The same protocol in plain steps: one image and class at a time, 101 comparisons, no counts."""
    iou, fmb, contrast, scores, presence = {}, {}, {}, [], []
    for sample in dataset:
        with torch.no_grad():
            outputs = model(**processor(sample.image, labels=NAMES), output_similarity_maps=True)
        scores.append((outputs.logits_per_image[0] / model.logit_scales()[0]).tolist())
        presence.append([label in sample.labels for label in (1, 2, 3)])
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
        hits = [presence[i][label] for i in order]
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
            maps, _ = explainer.raw_maps(pixels, model.encode_texts(NAMES))
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


def test_measures_of_all_tasks_run_together_and_alone_give_the_same(labelled_folder, tiny_processor):
    model, dataset = load((tiny_model(), tiny_processor)), load_segmentation("folder", labelled_folder)
    names = ["mFMB", "segmentation", "pointing_game"]
    together = evaluate(model, dataset, ["itsm", "gem"], names, progress=False)
    for method, figures in together.results.items():
        for name, figure in zip(names, ("mFMB", "mIoU", "pointing_game")):
            alone = evaluate(model, dataset, [method], [name], progress=False).results[method]
            assert figures[figure] == pytest.approx(alone[figure], abs=1e-4)
    assert [row["name"] for row in together.per_class["gem"]] == ["background", *NAMES]
    assert together.per_class["gem"][0]["FMB"] is None  # a row for label maps only


def test_every_method_scores_its_maps_of_all_classes(labelled_folder, tiny_processor):
    """Drawn for the shown classes alone where that saves time, they are those that a method gives when asked for all."""
    model, dataset = tiny_model(), load_segmentation("folder", labelled_folder)
    result = evaluate((model, tiny_processor), dataset, list(METHODS), batch_size=3, progress=False)
    assert list(result.results) == list(METHODS)
    for method in METHODS:
        explainer = make_explainer((model, tiny_processor), method)
        texts, miou, mfmb, ap = explainer.model.encode_texts(NAMES), MeanMaxIoU(), MFMB(), MultiLabelAveragePrecision()
        for sample in dataset:
            maps, scores = explainer.raw_maps(tiny_processor(images=[sample.image])["pixel_values"], texts)
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


def test_images_are_encoded_once_for_maps_reversal_and_scores(labelled_folder, tiny_processor, monkeypatch):
    model, dataset = tiny_model(), load_segmentation("folder", labelled_folder)
    passes, backwards = [], []
    encode, grad = type(model).get_image_features, torch.autograd.grad
    monkeypatch.setattr(
        type(model), "get_image_features", lambda self, pixels: passes.append(len(pixels)) or encode(self, pixels)
    )
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: backwards.append(1) or grad(*args, **kwargs))
    evaluate((model, tiny_processor), dataset, ["itsm", "reversed_itsm"], batch_size=4, progress=False)
    assert (passes, backwards) == ([4, 3], [])
    evaluate((model, tiny_processor), dataset, ["grad_cam"], batch_size=4, progress=False)
    assert passes[2:] == [4, 4, 3, 3]
    shown = [len(sample.labels) for sample in dataset]
    assert len(backwards) == max(shown[:4]) + max(shown[4:]) < 2 * len(NAMES)
    backwards.clear()
    evaluate((model, tiny_processor), dataset, ["legrad"], batch_size=4, progress=False)
    assert len(backwards) == 2 * (max(shown[:4]) + max(shown[4:]))  # of two blocks


def test_the_gate_of_presence_by_hand(labelled_folder, tiny_processor):
    """In prompts of the caller's, which the unrelated texts take too."""
    model, dataset = tiny_model(), load_segmentation("folder", labelled_folder)
    templates = ["the dog {}"]
    explainer = make_explainer((model, tiny_processor))
    texts = explainer.model.encode_texts(NAMES, templates)

    def shares(background):
        counts = {True: [0, 0], False: [0, 0]}
        for sample in dataset:
            pixels = tiny_processor(images=[sample.image])["pixel_values"]
            present = presence_among(*(explainer.raw_maps(pixels, some)[1] for some in (texts, background)))
            for label, value in zip((1, 2, 3), present[0].tolist()):
                counts[label in sample.labels][0] += 1
                counts[label in sample.labels][1] += value >= MIN_PRESENCE
        return {name: 100 * counts[shown][1] / counts[shown][0] for name, shown in (("kept", True), ("passed", False))}

    expected = shares(explainer.model.encode_texts(REFERENCE_NOUNS, templates))
    assert expected["kept"] != expected["passed"] and expected != shares(explainer.model.encode_texts(REFERENCE_NOUNS))
    gate = evaluate((model, tiny_processor), dataset, templates=templates, progress=False).presence
    assert {name: gate[name] for name in expected} == pytest.approx(expected)


def test_a_limit_takes_the_first_images(labelled_folder, tiny_processor):
    model, dataset = (tiny_model(), tiny_processor), load_segmentation("folder", labelled_folder)
    limited, alone = evaluate(model, dataset, limit=2, progress=False), evaluate(model, dataset[:2], progress=False)
    assert limited.results == alone.results and limited.per_class == alone.per_class


def test_images_without_any_class_are_only_ranked(labelled_folder, tiny_processor):
    dataset = load_segmentation("folder", labelled_folder)[4:5]
    scores = evaluate((tiny_model(), tiny_processor), dataset, ["grad_cam"], progress=False).results["grad_cam"]
    figures = ("mAP", "mMIoU", "mFMB", "text_contrast", "floor")
    assert scores["pairs"] == 0 and [scores[name] for name in figures] == [None] * 5


def test_a_folder_of_one_class_is_valid_json_and_a_table_without_nan(labelled_folder, world, tmp_path, capsys):
    """No image lacks the class, so that there is nothing that presence could pass, and none shows two."""
    shutil.copytree(labelled_folder, tmp_path / "data")
    (tmp_path / "data" / "classes.txt").write_text("dog")
    for path in (tmp_path / "data" / "masks").iterdir():
        with Image.open(path) as image:
            mask = np.asarray(image)
        Image.fromarray(np.where(np.arange(mask.shape[1]) < 5, 1, 0 * mask).astype(np.uint8)).save(path)
    output = tmp_path / "results.json"
    assert cli.main(arguments(tmp_path / "data", world, "--output", str(output))) == 0
    table = capsys.readouterr().out
    gate = table.rstrip().splitlines()[-1]
    assert "- % of the others" in gate and re.search(r"\bnan\b", table.lower()) is None
    written = json.loads(output.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert written["presence"]["passed"] is None and written["presence"]["kept"] is not None
    scores = written["results"]["itsm"]
    assert scores["text_contrast"] is None and scores["left_out"]["text_contrast"] == {"fewer_than_two_classes": 7}
    assert scores["mMIoU"] > 0


def test_batches_workers_and_order_change_nothing(labelled_folder, tiny_processor):
    model, dataset = tiny_model(), load_segmentation("folder", labelled_folder)
    one = evaluate((model, tiny_processor), dataset, batch_size=1, num_workers=1, progress=False)
    many = evaluate((model, tiny_processor), dataset, batch_size=4, num_workers=3, progress=False)
    for name in ("mAP", "mMIoU", "mFMB", "floor"):
        assert one.results["itsm"][name] == pytest.approx(many.results["itsm"][name], abs=1e-4)


class NoRow(Measure):
    name, figures, metric = "no_row", {}, MFMB

    def count(self, image, method, heatmaps):
        return []


class NoFigures(NoRow):
    figures, row = property(), "FMB"  # a property without a getter: hasattr is False


class NoMetric(NoRow):
    metric, row = property(), "FMB"


class NoMeasure(MeansMeasure):
    name, figures = "no_measure", {}


@pytest.mark.parametrize(
    ("measure", "lacks"),
    [(NoRow, "row"), (NoFigures, "figures"), (NoMetric, "metric"), (NoMeasure, "measure or count")],
)
def test_an_unfinished_measure_is_refused_before_the_images(labelled_folder, tiny_processor, measure, lacks):
    dataset = load_segmentation("folder", labelled_folder)
    with pytest.raises(NotImplementedError, match=f"Expected {measure.__name__} to define {lacks}, got n"):
        evaluate((tiny_model(), tiny_processor), dataset, measures=[measure()], progress=False)


def test_protocol_says_what_was_done(labelled_folder, tiny_processor):
    dataset = load_segmentation("folder", labelled_folder)
    result = evaluate(
        (tiny_model(), tiny_processor), dataset, image_size=40, limit=2, templates=["a {}"], progress=False
    )
    protocol = result.protocol
    assert protocol["dataset"]["images"] == 2 and protocol["dataset"]["images_in_split"] == len(dataset)
    assert protocol["dataset"]["fingerprint"] == dataset.fingerprint()
    assert protocol["image_size"] == {"height": 40, "width": 40} and protocol["templates"] == ["a {}"]
    assert protocol["dtype"] == "float32"


def arguments(labelled_folder, world, *more):
    return [
        "evaluate",
        "--model",
        str(world.folder / "model"),
        "--dataset",
        "folder",
        "--data-root",
        str(labelled_folder),
        *more,
    ]


def test_command_writes_json_and_csv_alike_with_two_processes(labelled_folder, world, tmp_path, capsys):
    output = tmp_path / "results.json"
    assert cli.main(arguments(labelled_folder, world, "--output", str(output), "--json")) == 0
    written = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == written
    with (tmp_path / "results.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == NAMES

    two = tmp_path / "two.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "iclip_hf.cli", *arguments(labelled_folder, world, "--output", str(two))]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| itsm |") == 1
    together = json.loads(two.read_text())
    assert together["timing"]["images"] == 4  # of 7: the images were shared out
    # Maps of other batches differ by rounding, so a few pixels may cross a threshold.
    for name, apart in (("mAP", 1e-3), ("mMIoU", 0.1), ("mFMB", 1e-4), ("floor", 1e-6)):
        assert together["results"]["itsm"][name] == pytest.approx(written["results"]["itsm"][name], abs=apart)


def test_thresholds_of_classes(tmp_path):
    path = tmp_path / "results.json"
    rows = [{"name": "dog", "threshold": 0.31}, {"name": "red ball", "threshold": 0.55}]
    rows.append({"name": "cat", "threshold": None})
    path.write_text(json.dumps({"per_class": {"itsm": rows, "gem": rows[:1]}}))
    assert class_thresholds(path, ["red ball", "dog", "dog"]) == [0.55, 0.31, 0.31]
    assert class_thresholds(path, ["dog"], "gem") == [0.31]
    with pytest.raises(ValueError, match=r"thresholds of \['cat'\], but got those of \['dog', 'red ball'\]"):
        class_thresholds(path, ["dog", "cat"])
    with pytest.raises(ValueError, match=r"one of \['itsm', 'gem'\], got 'attention'"):
        class_thresholds(path, ["dog"], "attention")
    path.write_text(json.dumps({"per_class": {"itsm": [*rows, {"name": "fish", "threshold": 31}]}}))
    with pytest.raises(ValueError, match=r"expected thresholds in \[0, 1\], but got {'fish': 31.0}; evaluate again"):
        class_thresholds(path, ["dog", "fish"])
    assert class_thresholds(path, ["dog"]) == [0.31]
