"""Label maps by the protocols of papers, against the same steps written out for one image."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import golden
import numpy as np
import published
import pytest
import torch
from conftest import bilinear, evaluate_model, iclip, save, tiny_image_processor, tiny_model
from golden_segmentation import CLASSES, photograph, text_features
from PIL import Image
from transformers import CLIPImageProcessor, ViTConfig, ViTImageProcessor, ViTModel

from iclip_hf.data import load_segmentation
from iclip_hf.data.layouts import DATASETS
from iclip_hf.data.overrides import read_overrides
from iclip_hf.evaluation.argmax import protocol_label_map
from iclip_hf.evaluation.metrics import Segmentation
from iclip_hf.evaluation.protocols import PROTOCOLS, protocol_settings
from iclip_hf.evaluation.window_maps import AuthorsPositions, WindowMaps, resized
from iclip_hf.explainers import make_explainer
from iclip_hf.model.engine import Engine
from iclip_hf.model.outputs import ICLIPTextFeatures


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
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
    small = resized(image, settings.short_side).numpy()
    assert np.abs(bilinear(original, (height, width)) - small).max() < 1  # rounded as by OpenCV
    rows, columns = (settings.window or height), (settings.window or width)
    total, count = np.zeros((len(texts), height, width)), np.zeros((height, width))
    step = settings.stride or 1
    for i in range(max(height - rows + step - 1, 0) // step + 1):
        for j in range(max(width - columns + step - 1, 0) // step + 1):
            bottom, right = min(i * step + rows, height), min(j * step + columns, width)
            top, left = max(bottom - rows, 0), max(right - columns, 0)
            window = torch.tensor(small[:, top:bottom, left:right])
            window = window[:, : (bottom - top) // patch * patch, : (right - left) // patch * patch]
            pixels = engine.processor(images=[window], do_resize=False)["pixel_values"]
            with AuthorsPositions():
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
        ("clearclip", {"threshold": 0.4, "padding": 0, **SMALL}),
        ("sclip", {"logit_scale": 20.0, "threshold": 0.3, "window": None, "stride": None}),
    ],
)
def test_label_maps_are_those_of_the_steps(labelled_folder, tiny_processor, recorded, monkeypatch, paper, changes):
    model, dataset = tiny_model(), load_segmentation("folder", labelled_folder, overrides=OVERRIDES)
    settings = replace(protocol_settings(paper, "folder"), short_side=51, **changes)
    monkeypatch.setattr("iclip_hf.evaluation.metrics.segmentation.protocol_settings", lambda *_: settings)
    updates = recorded(Segmentation, "update", lambda self, labels, reference, confidence, index: (index, labels))
    model = (model, tiny_processor)
    evaluate_model(model, dataset, settings.methods, [Segmentation(protocol=paper)], batch_size=3)
    explainer = make_explainer(model, paper)
    engine = Engine(explainer.model, explainer.model.processor, explainer, dataset.templates)
    classes = [dataset.background_texts, *dataset.synonyms]
    differ, shown, found = 0, 0, dict(updates)
    for index, sample in enumerate(dataset):
        expected = expected_label_map(engine, sample.image, classes, settings)
        differ += (found[index].numpy() != expected).mean() / len(dataset)
        shown = max(shown, len(np.unique(expected)))
    assert differ < 0.001 and shown > 2 and len(found) == len(dataset)


def proxy():
    """A ViT with generated weights, which stands for DINO."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(**sizes, image_size=128, patch_size=8)
    model, draw = ViTModel(config, add_pooling_layer=False).eval(), np.random.RandomState(5).standard_normal
    for name, parameter in sorted(model.named_parameters()):
        values = draw(parameter.shape)
        norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = torch.tensor(norm + (0.2 if parameter.ndim == 1 else 0.3) * values, dtype=torch.float32)
    return model


def deep_clip(processor):
    """A CLIP of transformers with generated weights, and its processor."""
    parts = SimpleNamespace(image_processor=CLIPImageProcessor(), tokenizer=processor.tokenizer)
    return golden.transformers_model(**golden.DEEP), parts


@pytest.mark.parametrize("paper", PROTOCOLS)
def test_label_maps_are_those_of_the_authors_code(tiny_processor, tmp_path, paper):
    """
    As `predict` of the segmentors computes them from these weights and texts, with OpenCV's resize: settings for VOC21
    with a smaller image, smaller windows and a threshold of 0.25. Commits are those of `test_golden_maps.py`.
    """
    expected = np.load(Path(__file__).with_name("golden_segmentation.npz"))[paper]
    given = deep_clip(tiny_processor)
    settings, image = protocol_settings(paper, "voc21"), photograph()
    options = dict(settings.methods[paper])
    if "proxy" in options:
        options["proxy"] = str(save(tmp_path, proxy(), ViTImageProcessor(**IMAGENET)))
    explainer, texts = make_explainer(given, paper, **options), text_features(10 if paper == "sc_clip" else 9)
    engine = Engine(explainer.model, explainer.model.processor, explainer)
    window, stride = (128, 64) if settings.window else (None, None)
    size, dilations = (image.height, image.width), settings.pamr_dilations
    cut = WindowMaps.cut(resized(image, 200), window, stride, size=size, dilations=dilations, padding=settings.padding)
    pixels = cut.pad(engine.processor(images=cut.crops(16), do_resize=False)["pixel_values"])
    with AuthorsPositions():
        maps, _ = engine.raw_maps(pixels, ICLIPTextFeatures(text_embeds=texts, map_text_embeds=texts))
    labels, _ = protocol_label_map(replace(cut, maps=maps), CLASSES, 0.25, settings.logit_scale, settings.min_area)
    assert (labels.numpy() + 1 != expected).mean() < 0.0005 and len(np.unique(expected)) > 1


def test_patches_without_a_proxy_value_are_the_first_class(tiny_processor, tmp_path):
    """Like NaN in the code of ProxyCLIP, which has no value if all similarities are below `beta` times their mean."""
    folder = save(tmp_path, proxy(), ViTImageProcessor(**IMAGENET))
    given, options = deep_clip(tiny_processor), {"proxy": str(folder), "beta": 100.0}
    pixels, texts = torch.zeros(1, 3, 128, 128), text_features(9)
    texts = ICLIPTextFeatures(text_embeds=texts, map_text_embeds=texts)
    for holes in (False, True):
        explainer = make_explainer(given, "proxyclip", holes=holes, **options)
        maps = Engine(explainer.model, explainer.model.processor, explainer).raw_maps(pixels, texts)[0]
        assert maps.isnan().all() if holes else maps.isfinite().all()
    windows = WindowMaps.cut(torch.zeros(3, 128, 128).byte(), None, None, size=(50, 60))
    labels, _ = protocol_label_map(replace(windows, maps=maps), CLASSES, 0.25, 40.0)
    assert (labels == CLASSES[0]).all()


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
# In the same order; with the share of RCS, and scale, share and threshold of SFR.
RELEASED_LATER = """
sc_clip               resclip
336 224 112 50 0.15   336  -   -  40 0.1   0.3 2.2 0.7 0.5
336 224 112 40 0.15   336 224 112 40 0.1   0.3 1.8 0.7 0.3
336 224 112 55 0.35   336 224 112 40 0.1   0.4 1.8 0.7 0.11
336 224 112 40  -     336  -   -  40  -    0.6 2.1 0.6 0.1
336 224 112 40  -     336 224 112 40  -    0.4 1.8 0.7 0.25
336 224 112 40  -     336 224 112 40  -    0.4 1.8 0.7 0.11
560 224 112 40  -     560 224 112 40  -    0.2 2.1 0.6 0.1
336 224 112 40  -     336 224 112 40  -    0.3 2.1 0.7 0.25
"""


def test_settings_are_the_released_ones_and_class_names_are_found():
    first, later = (table.strip().splitlines() for table in (RELEASED, RELEASED_LATER))
    papers, *rows = (f"{line} {more}".split() for line, more in zip(first, later, strict=True))
    assert papers == [*PROTOCOLS]
    differ = {"context59": 2, "context60": 2, "coco_stuff": 46, "cityscapes": 2, "ade20k": 17}
    backgrounds = {"voc21": (26, 26, 1, 26, 26, 26), "context60": (1,) * 6, "coco_object": (26, 26, 1, 17, 26, 26)}
    for name, *cells in rows:
        for number, paper in enumerate(papers):
            found = protocol_settings(paper, name)
            values = (found.short_side, found.window, found.stride, found.logit_scale, found.threshold)
            expected = tuple(None if cell == "-" else float(cell) for cell in cells[5 * number : 5 * number + 5])
            assert values == expected, (paper, name)
            assert found.min_area == (0.1 if paper in ("sclip", "sc_clip") and name == "voc21" else 0)
            assert found.pamr_dilations == ((8, 16) if paper == "naclip" else ()) and [*found.methods] == [paper]
            if paper == "resclip":
                rcs, *sfr = map(float, cells[-4:])
                assert found.methods == {"resclip": {"rcs": rcs, "sfr": sfr}}
            own = DATASETS[name].classes
            synonyms, background_texts, templates = read_overrides(found.overrides, name, own)
            changed = sum(texts != (class_name,) for class_name, texts in zip(own, synonyms))
            is_sclips = paper not in ("clearclip", "proxyclip")
            others = {"voc21": 4 + is_sclips, "voc20": 4 + is_sclips, "coco_object": int(is_sclips)}
            assert changed == (differ | others)[name], (paper, name)
            assert len(background_texts) == (backgrounds[name][number] if name in backgrounds else 0)
            assert len(templates) == 80
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
    assert len(used["background"]) == 26
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


def test_published_tables_are_measured_resumed_and_in_the_page(voc, world, tmp_path, recorded, monkeypatch):
    root = Path(__file__).parents[1]
    page = (root / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"<!-- published -->\n\n{published.results_table()}\n\n<!-- end -->" in page
    output = tmp_path / "runs"
    command = ["published.py", f"voc20:{voc}", f"voc21:{tmp_path / 'absent'}", "--protocols", "sclip"]
    command += ["--output", output, "--model", world.folder / "model"]
    command += ["--limit", 1, "--template", "a {}.", "--short-side", 40]
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    started = recorded(published.cli, "main", lambda words: words[6])
    for number in range(2):
        with pytest.raises(SystemExit, match=r"failed: sclip-voc21\."):
            published.main()
        assert started == ["voc20", "voc21", "voc21"][: 2 + number]
    miou = json.loads((output / "sclip-voc20.json").read_text())["results"]["sclip"]["segmentation"]["miou"]
    # The run is of one image, with other settings than the paper's. Then it is made to look like a whole run.
    row = "| `sclip` | 59.63 / - | 31.74 / - | 33.52 / - | 81.54 / {} | 34.46 / - |"
    assert row.format("-") in (output / "published.md").read_text()
    file, model = output / "sclip-voc20.json", str(world.folder / "model")
    content = json.loads(file.read_text())
    run = content["protocol"]
    run["metrics"]["segmentation"]["short_side"], run["templates"] = 336, ["a {}."] * 80
    run["dataset"]["images"] = run["dataset"]["images_in_split"]
    file.write_text(json.dumps(content))
    report = published.results_table(output, model)
    assert row.format(f"{miou:.2f}") in report and run["weights"] in report
    assert row.format("-") in published.results_table(output, "another/model")
    run["metrics"]["segmentation"]["threshold"] = 0.3
    file.write_text(json.dumps(content))
    assert row.format("-") in published.results_table(output, model)
