"""The one road from a model, images and texts to maps, scores and presence: its contract, and who owns what is kept."""

import copy
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, tiny_model
from families import LABELS, pixels
from PIL import Image
from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

from iclip_hf import ImageTextSimilarityMapPipeline, explain
from iclip_hf.backends import references
from iclip_hf.backends.loading import load
from iclip_hf.explainers import Explainer, explainer_class, make_explainer, register_explainer
from iclip_hf.explainers.localizer import Localizer
from iclip_hf.model.explanation_core import encode_texts, forward, join, prepare, reference_features


TEXTS = ["dog", "red ball"]


def test_a_bare_model_and_a_loaded_one_take_the_same_road(tiny_processor):
    """The pipeline has nothing but the first."""
    model, images = tiny_model(max_over="similarity"), [noise((40, 30)), noise((20, 50))]
    loaded, found = load((model, tiny_processor)), []
    for one in (model, loaded):
        texts = encode_texts(one, tiny_processor, TEXTS, None, "cpu")
        encode = partial(encode_texts, one, tiny_processor, templates=None, device="cpu")
        nouns = reference_features(model, tiny_processor.tokenizer, tiny_processor.templates, encode, one)
        prepared = join([prepare(tiny_processor, image) for image in images])
        found.append(forward(one, prepared, texts, nouns))
    assert found[0].raw_maps.shape == (2, 2, 4, 4) and found[0].presence.shape == (2, 2)
    for index, (one, of_loaded) in enumerate(
        zip(explain(loaded, images, TEXTS), explain((model, tiny_processor), images, TEXTS))
    ):
        for result in found:
            torch.testing.assert_close(result.raw_maps[index], one.raw_maps, atol=1e-5, rtol=0)
            torch.testing.assert_close(result.scores[index], one.scores, atol=1e-5, rtol=0)
            torch.testing.assert_close(result.presence[index], one.presence, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.presence, of_loaded.presence)


class OneMap(Explainer):
    """Forgets that there are several texts."""

    needs_layers = False

    def forward(self, pixel_values, texts):
        image = self.model.get_image_features(pixel_values)
        return torch.ones(len(pixel_values), 1, *image.grid), image


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("iclip_hf.explainers._registered", {})


def test_a_method_with_another_number_of_maps_is_named_with_both_shapes(tiny_processor, registry):
    register_explainer("one_map")(OneMap)
    model = load((tiny_model(), tiny_processor))
    explainer = make_explainer(model, "one_map")
    for ask in (
        lambda: explain(model, noise((30, 20)), TEXTS, "one_map"),
        lambda: explainer.raw_maps(pixels(), model.encode_texts(TEXTS)),
    ):
        with pytest.raises(ValueError, match=r"OneMap .*\(\d, 1, \d, \d\).*2 texts"):
            ask()
    assert explain(model, noise((30, 20)), ["dog"], "one_map").raw_maps.shape == (1, 4, 4)


def test_the_example_of_a_registered_method_gives_a_map_for_each_text(tiny_processor, registry):
    code = re.search(r"```python\n(.*?)```", register_explainer.__doc__, re.DOTALL)[1]
    code = re.sub(r"^ *(>>>|\.\.\.) ?", "", code, flags=re.MULTILINE)
    exec(code, {"register_explainer": register_explainer, "Explainer": Explainer, "math": math})
    for texts in (["dog"], TEXTS, [*TEXTS, "car"]):
        found = explain((tiny_model(), tiny_processor), [noise((30, 20))] * 2, texts, "norm")
        assert [len(one.maps) for one in found] == [len(texts)] * 2
    assert explainer_class("norm").__name__ == "TokenNorm"


@pytest.mark.parametrize("family", ["iclip", "clip", "open_clip"])
def test_a_deep_copy_of_a_loaded_model_is_independent(made, family):
    """Its methods read its own layers, and the original stays as it is."""
    model, processor, size = made(family)
    methods, other = ("gem", "sclip", "clip_surgery", "legrad", "grad_cam", "itsm"), copy.deepcopy(model)
    original = load((model, processor))
    changed = copy.deepcopy(original)

    def maps(loaded):
        texts = loaded.encode_texts(LABELS)
        return {method: make_explainer(loaded, method).raw_maps(pixels(size), texts)[0] for method in methods}

    before = maps(original)
    with torch.no_grad():
        for weight in (*changed.network.parameters(), *other.parameters()):
            if weight.ndim >= 2:
                weight.mul_(-1.1)
    after, expected, untouched = maps(changed), maps(load((other, processor))), maps(original)
    for method in methods:
        torch.testing.assert_close(after[method], expected[method], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(untouched[method], before[method], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(after[method], before[method], atol=1e-3), method


@pytest.mark.parametrize("change", ["in place", "data", "part", "assigned"])
def test_the_pipeline_compares_with_nouns_of_the_weights_that_it_has(tiny_processor, change):
    model, image = tiny_model(), noise((40, 30))
    pipe = ImageTextSimilarityMapPipeline(model=model, processor=tiny_processor, device="cpu")
    before = pipe(image, TEXTS)
    weight = model.text_model.get_input_embeddings().weight
    with torch.no_grad():
        if change == "in place":
            weight.mul_(-2)
        elif change == "data":
            weight.data.mul_(-2)
        elif change == "part":
            weight.data[10:].mul_(-2)
        else:
            state = {name: -2 * value for name, value in model.text_model.state_dict().items() if value.ndim == 2}
            model.text_model.load_state_dict(state, strict=False, assign=True)
    fresh = ImageTextSimilarityMapPipeline(model=copy.deepcopy(model), processor=tiny_processor, device="cpu")
    found, expected = ({one["label"]: one["presence"] for one in some(image, TEXTS)} for some in (pipe, fresh))
    assert found == pytest.approx(expected, abs=1e-4)
    assert found != pytest.approx({one["label"]: one["presence"] for one in before}, abs=1e-2)


def test_weights_are_digested_once_for_many_calls(tiny_processor, tmp_path, monkeypatch, recorded):
    monkeypatch.setenv("ICLIP_CACHE", str(tmp_path))
    digested, model = recorded(references, "weights_digest"), tiny_model()
    pair, loaded = (model, tiny_processor), load((model, tiny_processor))
    for one in (pair, pair, loaded, loaded):
        explain(one, noise((30, 20)), TEXTS)
    assert len(digested) == 1
    Localizer(loaded, TEXTS, templates=["a {}"])
    assert len(digested) == 2


def test_the_example_with_sam_runs_as_the_guide_shows_it(tiny_processor, tmp_path, monkeypatch):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "global_attn_indexes": [0]}
    config = SamConfig(vision_config={**small, "image_size": 64}, prompt_encoder_config={"image_size": 64})
    shapes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    monkeypatch.setattr(SamModel, "from_pretrained", lambda name: SamModel(config).eval())
    monkeypatch.setattr(SamProcessor, "from_pretrained", lambda name: SamProcessor(SamImageProcessor(**shapes)))
    monkeypatch.setitem(Localizer.__init__.__kwdefaults__, "min_presence", 0.0)
    monkeypatch.chdir(tmp_path)
    noise((90, 60)).save("dog.png")
    guide = (Path(__file__).parents[1] / "docs" / "guide" / "explain.md").read_text()
    (code,) = re.findall(r"```py\n(import torch\nfrom transformers import SamModel.*?)```", guide, re.DOTALL)
    names = {"model": (tiny_model(), tiny_processor)}
    exec(code.replace("dog.jpg", "dog.png").replace('"embedded"', "model"), names)
    regions = names["regions"]
    assert regions and names["best"].shape == (len(regions), 60, 90) and names["best"].dtype == torch.bool
    boxes = (
        names["inputs"]["input_boxes"][0] * 90 / 64
    )  # the longest edge has 64 pixels for SAM, the other a rounded number
    assert torch.allclose(boxes, torch.tensor([region["box"] for region in regions]).to(boxes), atol=1)
    points = names["inputs"]["input_points"][0] * 90 / 64
    peaks = torch.tensor([region["positive_points"][0] for region in regions]).to(points)
    assert torch.allclose(points[:, 0], peaks, atol=1)
    assert names["inputs"]["input_labels"].tolist() == [[[1, 0, 0, 0]] * len(regions)]


def test_arrays_and_pictures_are_one_image(tiny_processor):
    """Also where both ends of a shape could be channels."""
    model, draws = (tiny_model(), tiny_processor), np.random.default_rng(0)
    for shape in ((1, 40, 3), (3, 40, 3), (3, 1, 3), (30, 20, 3)):
        array = draws.integers(0, 256, shape, dtype=np.uint8)
        of_picture, of_array, of_tensor = (
            explain(model, image, "dog")
            for image in (Image.fromarray(array), array, torch.from_numpy(array).movedim(-1, 0))
        )
        for one in (of_array, of_tensor):
            assert one.size == of_picture.size == shape[:2]
            torch.testing.assert_close(one.raw_maps, of_picture.raw_maps, atol=1e-5, rtol=0)
        given = (tiny_processor(images=image)["pixel_values"] for image in (Image.fromarray(array), array))
        torch.testing.assert_close(*given, atol=1e-5, rtol=0)


def test_a_text_that_is_cut_is_told(tiny_processor, caplog):
    encode_texts(tiny_model(), tiny_processor, ["dog"], None, "cpu")
    assert not caplog.records
    encode_texts(tiny_model(), tiny_processor, ["dog", "dog " * 100], None, "cpu")
    assert "77 tokens or more; the others are cut off" in caplog.text
