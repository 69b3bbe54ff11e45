import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from torch.nn import functional as F

from iclip_hf import cli
from iclip_hf.data import load_segmentation
from iclip_hf.evaluation import evaluate


NAMES = ["dog", "red ball", "car"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Seven images of different shapes with index masks: some classes absent, void pixels, one image without a class."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "masks").mkdir()
    (root / "classes.txt").write_text("\n".join(NAMES))
    for number in range(7):
        height, width = rng.integers(20, 60, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        classes = [0, 0, 255, 1 + number % 3, 1 + number % 2] if number != 4 else [0, 0, 255]
        mask = rng.choice(classes, (height // 5 + 1, width // 5 + 1)).astype(np.uint8)
        Image.fromarray(mask.repeat(5, 0).repeat(5, 1)[:height, :width]).save(root / "masks" / f"{number}.png")
    return root


def slowly(model, processor, dataset):
    """The same protocol in plain steps: one image and class at a time, 101 comparisons, no counts."""
    iou, fmb, scores, presence = {}, {}, [], []
    for sample in dataset:
        with torch.no_grad():
            outputs = model(**processor(sample.image, labels=NAMES), output_similarity_maps=True)
        scores.append((outputs.logits_per_image[0] / model.logit_scales()[0]).tolist())
        presence.append([label in sample.labels for label in (1, 2, 3)])
        for label in sample.labels:
            raw = outputs.similarity_maps[:, label - 1 : label]
            big = F.interpolate(raw, size=sample.size, mode="bicubic", align_corners=False)[0, 0].numpy()
            heatmap = (big - big.min()) / (big.max() - big.min())
            mask = sample.mask(label)
            inside, outside = mask == label, (mask != label) & (mask != 255)
            curve = [
                (inside & (heatmap > t)).sum() / (inside | (outside & (heatmap > t))).sum()
                for t in np.arange(101) / 100
            ]
            iou.setdefault(label, []).append(curve)
            fmb.setdefault(label, []).append(heatmap[inside].mean() - heatmap[outside].mean())
    precisions = []
    for label in range(3):
        order = sorted(range(len(scores)), key=lambda i: -scores[i][label])
        hits = [presence[i][label] for i in order]
        precisions.append(np.mean([np.mean(hits[: k + 1]) for k, hit in enumerate(hits) if hit]))
    return {
        "mAP": 100 * np.mean(precisions),
        "mMIoU": 100 * np.mean([np.mean(curves, axis=0).max() for curves in iou.values()]),
        "mFMB": np.mean([np.mean(values) for values in fmb.values()]),
    }


def test_figures_equal_the_protocol_in_plain_steps(root, tiny_processor):
    model, dataset = tiny_model(), load_segmentation("folder", root)
    result = evaluate(model, tiny_processor, dataset, ["itsm", "reversed_itsm"], batch_size=3, progress=False)
    expected = slowly(model, tiny_processor, dataset)
    assert {name: result.results["itsm"][name] for name in expected} == pytest.approx(expected, abs=1e-3)
    # the reversal: mFMB is the negative, within the rounding of min-max
    assert result.results["reversed_itsm"]["mFMB"] == pytest.approx(-result.results["itsm"]["mFMB"], abs=1e-6)
    assert result.results["reversed_itsm"]["mAP"] == result.results["itsm"]["mAP"]
    rows = result.per_class["itsm"]
    assert [row["name"] for row in rows] == NAMES
    assert np.mean([row["MIoU"] for row in rows]) == pytest.approx(result.results["itsm"]["mMIoU"])


def test_batches_workers_and_order_change_nothing(root, tiny_processor):
    model, dataset = tiny_model(), load_segmentation("folder", root)
    one = evaluate(model, tiny_processor, dataset, batch_size=1, num_workers=1, progress=False)
    many = evaluate(model, tiny_processor, dataset, batch_size=4, num_workers=3, progress=False)
    for name in ("mAP", "mMIoU", "mFMB", "floor"):
        assert one.results["itsm"][name] == pytest.approx(many.results["itsm"][name], abs=1e-4)


def test_protocol_says_what_was_done(root, tiny_processor):
    dataset = load_segmentation("folder", root)
    result = evaluate(
        tiny_model(), tiny_processor, dataset, image_size=40, limit=2, templates=["a {}"], progress=False
    )
    protocol = result.protocol
    assert protocol["dataset"]["images"] == 2 and protocol["dataset"]["fingerprint"] == dataset.fingerprint()
    assert protocol["image_size"] == {"height": 40, "width": 40} and protocol["templates"] == ["a {}"]


def arguments(root, tmp_path, *more):
    return ["evaluate", "--model", str(tmp_path / "model"), "--dataset", "folder", "--data-root", str(root), *more]


def test_command_writes_json_and_csv_alike_with_two_processes(root, tiny_processor, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    output = tmp_path / "results.json"
    assert cli.main(arguments(root, tmp_path, "--output", str(output), "--json")) == 0
    written = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == written
    with (tmp_path / "results.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == NAMES

    two = tmp_path / "two.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29651"]
    command = [*launch, "-m", "iclip_hf.cli", *arguments(root, tmp_path, "--output", str(two))]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| itsm |") == 1
    together = json.loads(two.read_text())
    assert together["timing"]["images"] == 4  # of 7: the images were shared out
    for name in ("mAP", "mMIoU", "mFMB", "floor"):
        assert together["results"]["itsm"][name] == pytest.approx(written["results"]["itsm"][name], abs=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "a.txt"], "ends in .json"),
        (["--limit", "0"], "at least 1, got 0"),
        (["--overrides", "none.json"], "none.json"),
        (["--image-size", "30"], "multiples of the patch size"),
    ],
)
def test_bad_options_are_one_line(root, tiny_processor, tmp_path, capsys, more, message):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    assert cli.main(arguments(root, tmp_path, *more)) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1] and err[-1].startswith("iclip evaluate: ")


def test_a_mask_of_another_size_is_named(root, tiny_processor, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    Image.new("L", (5, 5)).save(copy / "masks" / "3.png")
    with pytest.raises(ValueError, match=r"3\.png"):
        evaluate(tiny_model(), tiny_processor, load_segmentation("folder", copy), progress=False)
