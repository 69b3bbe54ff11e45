"""Label maps by the protocols of papers, against the same steps written out for one image."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import bilinear, evaluate_model, iclip, save, tiny_image_processor, tiny_model
from golden_segmentation import CLASSES, clip, photograph, text_features
from PIL import Image
from transformers import CLIPImageProcessor

from iclip_hf.data import load_segmentation
from iclip_hf.data.layouts import DATASETS
from iclip_hf.data.overrides import read_overrides
from iclip_hf.evaluation.argmax import protocol_label_map
from iclip_hf.evaluation.metrics import Segmentation
from iclip_hf.evaluation.protocols import PROTOCOLS, protocol_settings
from iclip_hf.evaluation.window_maps import WindowMaps, resized
from iclip_hf.explainers import make_explainer
from iclip_hf.model.engine import Engine
from iclip_hf.model.outputs import ICLIPTextFeatures


GOLDEN_SEED = 8
SMALL = {"window": 40, "stride": 24}
OVERRIDES = {
    "names": {"car": ["car", "red car"]},
    "background": ["sky", "grass", "red ball"],  # the last is a class, too
    "templates": ["a {}.", "the {}."],
}


def expected_label_map(engine, image, classes, settings):
    """
    The class of each pixel, 0 for the background, without PAMR; `classes` lists the texts of each, the background's
    first.
    """
    texts = [text for of_class in classes for text in of_class]
    encoded, patch = engine.encode(texts), engine.processor.patch_size
    original = np.array(image).transpose(2, 0, 1).astype(float)
    factor = settings.short_side / min(original.shape[1:])
    height, width = (math.floor(side * factor + 0.5) for side in original.shape[1:])
    resized = bilinear(original, (height, width)).round()
    rows, columns = (settings.window or height), (settings.window or width)
    total, count = np.zeros((len(texts), height, width)), np.zeros((height, width))
    step = settings.stride or 1
    for i in range(max(height - rows + step - 1, 0) // step + 1):
        for j in range(max(width - columns + step - 1, 0) // step + 1):
            bottom, right = min(i * step + rows, height), min(j * step + columns, width)
            top, left = max(bottom - rows, 0), max(right - columns, 0)
            window = torch.tensor(resized[:, top:bottom, left:right]).byte()
            window = window[:, : (bottom - top) // patch * patch, : (right - left) // patch * patch]
            pixels = engine.processor(images=[window], do_resize=False)["pixel_values"]
            logits = engine.raw_maps(pixels, encoded)[0][0].double().numpy()
            total[:, top:bottom, left:right] += bilinear(logits, (bottom - top, right - left))
            count[top:bottom, left:right] += 1
    logits = bilinear(total / count, original.shape[1:])
    powers = np.exp(settings.logit_scale * (logits - logits.max(0)))
    of_text = iter(powers / powers.sum(0))
    scores = np.array([np.max([next(of_text) for _ in of_class], axis=0) for of_class in classes])
    if settings.min_area:
        areas = np.bincount(scores.argmax(0).ravel(), minlength=len(classes))[1:]
        scores[1:] *= (areas > settings.min_area * areas.sum())[:, None, None]
    labels = scores.argmax(0)
    labels[scores.max(0) < (settings.threshold or 0)] = 0
    return labels


@pytest.mark.parametrize(
    ("paper", "changes"),
    [
        ("sclip", {"logit_scale": 20.0, "threshold": 0.3, "min_area": 0.2, **SMALL}),
        ("clearclip", {"threshold": 0.4, **SMALL}),
        ("sclip", {"logit_scale": 20.0, "threshold": 0.3, "window": None, "stride": None}),
    ],
)
def test_label_maps_are_those_of_the_steps(labelled_folder, tiny_processor, monkeypatch, paper, changes):
    model, dataset = tiny_model(), load_segmentation("folder", labelled_folder, overrides=OVERRIDES)
    settings = replace(protocol_settings(paper, "folder"), short_side=51, **changes)
    monkeypatch.setattr("iclip_hf.evaluation.metrics.segmentation.protocol_settings", lambda *_: settings)
    found, update = {}, Segmentation.update

    def recording(self, prediction, reference, confidence, index):
        found[index] = prediction.numpy()
        update(self, prediction, reference, confidence, index)

    monkeypatch.setattr(Segmentation, "update", recording)
    model = (model, tiny_processor)
    evaluate_model(model, dataset, settings.methods, [Segmentation(protocol=paper)], batch_size=3)
    explainer = make_explainer(model, paper)
    engine = Engine(explainer.model, explainer.model.processor, explainer, dataset.templates)
    classes = [dataset.background_texts, *dataset.synonyms]
    differ = shown = 0
    for index, sample in enumerate(dataset):
        expected = expected_label_map(engine, sample.image, classes, settings)
        differ, shown = differ + (found[index] != expected).mean() / len(dataset), max(shown, len(np.unique(expected)))
    assert differ < 0.001 and shown > 2 and len(found) == len(dataset)


def test_the_label_map_of_the_code_of_naclip(tiny_processor):
    """
    As its `NACLIP.predict` (sinahmr/NACLIP, commit 0cac3a65) computes it from these weights, texts and pixels: with
    windows of 64 pixels at distances of 32, PAMR, and a threshold of 0.3. Its label 0 is the background.
    """
    expected = np.load(Path(__file__).with_name("golden_segmentation.npz"))["naclip"]
    given = (
        clip(GOLDEN_SEED),
        SimpleNamespace(image_processor=CLIPImageProcessor(), tokenizer=tiny_processor.tokenizer),
    )
    explainer, image = make_explainer(given, "naclip"), photograph()
    engine, texts = Engine(explainer.model, explainer.model.processor, explainer), text_features(GOLDEN_SEED)
    size = (image.height, image.width)
    cut = WindowMaps.cut(resized(image, 100), 64, 32, size=size, dilations=(8, 16))
    pixels = engine.processor(images=cut.crops(8), do_resize=False)["pixel_values"]
    maps, _ = engine.raw_maps(pixels, ICLIPTextFeatures(text_embeds=texts, map_text_embeds=texts))
    labels, _ = protocol_label_map(replace(cut, maps=maps), CLASSES, 0.3, 40.0)
    assert (labels.numpy() + 1 != expected).mean() < 0.001 and len(np.unique(expected)) == 3


@pytest.mark.parametrize(("min_area", "expected"), [(0.24, [0, 0, 0, 1]), (0.25, [0, 0, 0, 0]), (0.75, [-1] * 4)])
def test_a_class_needs_more_than_the_smallest_area(min_area, expected):
    maps = torch.tensor([[[0.6, 0.6, 0.6, 0.2]], [[0.1, 0.1, 0.1, 0.5]]])
    window = WindowMaps(torch.zeros(3, 1, 4), [(slice(0, 1), slice(0, 4))], (1, 4), maps=maps[None])
    assert protocol_label_map(window, [0, 1], None, 10.0, min_area)[0].flatten().tolist() == expected


def test_a_probability_of_the_threshold_is_no_background():
    window = WindowMaps(torch.zeros(3, 1, 1), [(slice(0, 1), slice(0, 1))], (1, 1), maps=torch.ones(1, 2, 1, 1))
    labels = [protocol_label_map(window, [0, 1], threshold, 10.0)[0].item() for threshold in (0.5, 0.51)]
    assert labels == [0, -1]


# As the released configurations state them: short side, window, stride, scale and, with a background, the threshold.
RELEASED = """
             sclip                naclip               clearclip             proxyclip
voc21        336 224 112 65 0.1   336  -   -  40 0.1   448 448 224 50 0.5    336 336 112 40 0.2
context60    336 224 112 50 0.1   336 224 112 40 0.1   448 448 224 50 0.15   336 336 112 40 0.15
coco_object  336 224 112 50 0.1   336 224 112 40 0.1   448 448 224 50 0.4    336 336 112 40 0.25
voc20        336 224 112 40  -    336  -   -  40  -    448 448 224 50  -     336 336 112 40  -
context59    336 224 112 40  -    336 224 112 40  -    448 448 224 50  -     336 336 112 40  -
coco_stuff   448 224 112 40  -    336 224 112 40  -    448 448 224 50  -     336 336 112 40  -
cityscapes   560 224 112 40  -    560 224 112 40  -    448 224 224 50  -     448 224 112 40  -
ade20k       336 224 112 40  -    336 224 112 40  -    448 448 224 50  -     448 336 112 40  -
"""


def test_settings_are_the_released_ones_and_class_names_are_found():
    papers, *rows = (line.split() for line in RELEASED.strip().splitlines())
    assert papers == [*PROTOCOLS]
    differ = {"context59": 2, "context60": 2, "coco_stuff": 46, "cityscapes": 2, "ade20k": 17}
    backgrounds = {"voc21": (26, 26, 1, 26), "context60": (1, 1, 1, 1), "coco_object": (26, 26, 1, 17)}
    for name, *cells in rows:
        for number, paper in enumerate(papers):
            found = protocol_settings(paper, name)
            values = (found.short_side, found.window, found.stride, found.logit_scale, found.threshold)
            expected = tuple(None if cell == "-" else float(cell) for cell in cells[5 * number : 5 * number + 5])
            assert values == expected, (paper, name)
            assert found.min_area == (0.1 if (paper, name) == ("sclip", "voc21") else 0)
            assert found.pamr_dilations == ((8, 16) if paper == "naclip" else ()) and [*found.methods] == [paper]
            own = DATASETS[name].classes
            texts = read_overrides(found.overrides, name, own)
            changed = sum(texts != (class_name,) for class_name, texts in zip(own, texts.synonyms))
            synonyms = paper in ("sclip", "naclip")
            others = {"voc21": 4 + synonyms, "voc20": 4 + synonyms, "coco_object": int(synonyms)}
            assert changed == (differ | others)[name], (paper, name)
            assert len(texts.background_texts) == (backgrounds[name][number] if name in backgrounds else 0)
            assert len(texts.templates) == 80
    with pytest.raises(ValueError, match="'naclp'; did you mean 'naclip'"):
        protocol_settings("naclp", "voc21")


@pytest.fixture
def voc(labelled_folder, tmp_path):
    """The images of `labelled_folder` in the layout of VOC."""
    images = sorted((labelled_folder / "images").iterdir())
    for folder in ("JPEGImages", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for path in images:
        Image.open(path).convert("RGB").save(tmp_path / "JPEGImages" / f"{path.stem}.jpg")
    (tmp_path / "SegmentationClass").symlink_to(labelled_folder / "masks")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("\n".join(path.stem for path in images))
    return tmp_path


def test_the_command_states_what_it_used_and_options_replace_it(voc, world, capsys):
    command = ["evaluate", "--task", "segmentation", "--dataset", "voc21", "--data-root", voc, "--limit", 1, "--json"]
    command += ["--model", world.folder / "model", "--template", "a {}.", "--protocol", "sclip"]

    def result(*options):
        assert iclip(*command, *options) == 0
        found = json.loads(capsys.readouterr().out)
        return found["protocol"], found["protocol"]["metrics"]["segmentation"], [*found["results"]]

    whole, used, methods = result()
    assert methods == ["sclip"] and whole["methods"] == {"sclip": {}} and whole["class_names"][3] == "ship"
    assert (used["protocol"], used["short_side"], used["window"], used["stride"]) == ("sclip", 336, 224, 112)
    assert (used["logit_scale"], used["threshold"], used["min_area"]) == (65, 0.1, 0.1)
    assert used["pamr_dilations"] == [] and len(used["background"]) == 26 and "bilinear" in used["definition"]
    (voc / "names.yaml").write_text("names: {boat: canoe}")
    options = ["--short-side", 40, "--window", 32, "--threshold", 0.2, "--logit-scale", 7, "--methods", "naclip"]
    whole, used, methods = result(*options, "--overrides", voc / "names.yaml", "--background", "sky")
    assert methods == ["naclip"] and whole["class_names"][3] == "canoe" and used["background"] == ["sky"]
    assert (used["short_side"], used["window"], used["stride"], used["logit_scale"]) == (40, 32, 16, 7)
    assert (used["threshold"], used["min_area"], used["protocol"]) == (0.2, 0.1, "sclip")


@pytest.mark.parametrize("option", [{"refine": True}, {"multi_scale": True}, {"image_size": 32}])
def test_a_protocol_excludes_options_of_maps(dataset, tiny_processor, option):
    with pytest.raises(ValueError, match="Leave out protocol, or else refine, multi_scale and image_size"):
        evaluate_model((tiny_model(), tiny_processor), dataset, metrics=[Segmentation(protocol="naclip")], **option)


def test_a_protocol_takes_options_of_the_method_and_chooses_a_threshold(dataset, tiny_processor, tmp_path):
    """That of ProxyCLIP has a proxy, and none of them a threshold for other data than the paper's."""
    options = {"proxy": str(save(tmp_path, tiny_model("dinov2").vision_model, tiny_image_processor()))}
    model, metrics = (tiny_model(), tiny_processor), [Segmentation(window=32, protocol="proxyclip")]
    result = evaluate_model(model, dataset, {"proxyclip": options}, metrics, image_size={"shortest_edge": 40})
    assert result.protocol["methods"] == {"proxyclip": {"proxy": tmp_path.name}}
    scores = result.results["proxyclip"]["segmentation"]
    assert scores["miou"] > 0 and all(0 <= threshold <= 1 for threshold in scores["thresholds"])


def test_published_tables_are_measured_resumed_and_in_the_page(voc, world, tmp_path, capsys, monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root / "benchmarks")
    import published

    page = (root / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"<!-- published -->\n\n{published.results_table()}\n\n<!-- end -->" in page
    output = tmp_path / "runs"
    command = [
        "published.py",
        f"voc20:{voc}",
        f"voc21:{tmp_path / 'absent'}",
        "--protocols",
        "sclip",
        "--output",
        output,
    ]
    command += ["--model", world.folder / "model", "--limit", 1, "--template", "a {}.", "--short-side", 40]
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    started, run = [], published.cli.main
    monkeypatch.setattr(published.cli, "main", lambda words: started.append(words[6]) or run(words))
    for number in range(2):
        with pytest.raises(SystemExit, match=r"failed: sclip-voc21\."):
            published.main()
        assert started == ["voc20", "voc21", "voc21"][: 2 + number]
    miou = json.loads((output / "sclip-voc20.json").read_text())["results"]["sclip"]["segmentation"]["miou"]
    report = (output / "published.md").read_text()
    assert f"| `sclip` | 59.63 / - | 31.74 / - | 33.52 / - | 81.54 / {miou:.2f} | 34.46 / - |" in report
    assert "absent" in capsys.readouterr().err
