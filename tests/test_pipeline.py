"""The "image-text-similarity-map" pipeline against the same steps by hand, and every door into it."""

import copy
import importlib.util
import json
import time

import numpy as np
import pytest
import torch
from conftest import TEXT, VISION, QuietHandler, noise, save, served, tiny_model
from datasets import Dataset, Image
from PIL import Image as PILImage
from transformers import CLIPConfig, CLIPModel
from transformers.pipelines import PIPELINE_REGISTRY, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from iclip_hf import (
    ICLIPModel,
    ImageTextSimilarityMapPipeline,
    ZeroShotImageSegmentationPipeline,
    __version__,
    load,
)
from iclip_hf.backends import embedded
from iclip_hf.backends.families import ExplainableICLIP
from iclip_hf.hub.folders import export_model
from iclip_hf.model import pipeline_iclip
from iclip_hf.model.pipeline_iclip import __file__ as pipeline_file
from iclip_hf.model.regions import find_regions, run_lengths


TASK = "image-text-similarity-map"
LABELS = ["dog", "red ball", "sky"]


@pytest.fixture(scope="module")
def pipe(tiny_processor):
    model = tiny_model(logit_bias_init_value=0.0)
    return ImageTextSimilarityMapPipeline(model=model, processor=tiny_processor, device="cpu")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """PNG files of different shapes."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, size in enumerate([(60, 40), (30, 90), (50, 50)]):
        noise(size, seed=number).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def inside(answer):
    """The mask of an answer as a boolean tensor."""
    mask = np.asarray(answer["mask"])
    assert answer["mask"].mode == "L" and set(np.unique(mask)) <= {0, 255}
    return torch.from_numpy(mask == 255)


def assert_same(answers, others):
    assert [answer["label"] for answer in answers] == [other["label"] for other in others]
    for answer, other in zip(answers, others):
        assert answer["score"] == pytest.approx(other["score"], abs=1e-5)
        assert answer["presence"] == pytest.approx(other["presence"], abs=1e-5)
        assert torch.allclose(answer["map"], other["map"], atol=1e-4)
        assert (inside(answer) != inside(other)).float().mean() < 0.01


def test_answers_are_those_of_model_and_processor(pipe, photographs):
    image = PILImage.open(photographs[0])
    options = {
        "hypothesis_template": ["{}", "a photo of the {}"],
        "threshold": 0.3,
        "min_presence": 0,
        "refine": False,
    }
    answers = pipe(image, LABELS, **options)
    with torch.no_grad():
        inputs = pipe.processor(images=[image], labels=LABELS, templates=["{}", "a photo of the {}"])
        outputs = pipe.model(**inputs, output_similarity_maps=True)
    maps = pipe.processor.post_process_similarity_maps(outputs.similarity_maps, [(40, 60)])[0]
    cosines = (outputs.image_embeds @ outputs.text_embeds.T)[0]
    assert [answer["label"] for answer in answers] == [LABELS[index] for index in cosines.argsort(descending=True)]
    for answer in answers:
        index = LABELS.index(answer["label"])
        assert answer["score"] == pytest.approx(cosines[index].item(), abs=1e-5)
        assert answer["presence"] == pytest.approx(outputs.logits_per_image[0, index].sigmoid().item(), abs=1e-4)
        assert answer["map"].shape == (40, 60) and torch.allclose(answer["map"], maps[index], atol=1e-5)
        assert torch.equal(inside(answer), answer["map"] > 0.3)
        regions = find_regions(answer["map"].numpy(), inside(answer).numpy())
        assert answer["boxes"] == [list(region.box) for region in regions] != []
    plain = pipe(image, LABELS, **options, return_json=True)
    for answer, other in zip(json.loads(json.dumps(plain)), answers, strict=True):
        assert answer == {**{name: other[name] for name in answer}, "mask": run_lengths(inside(other).numpy())}
        assert answer.keys() == other.keys() - {"map"}


class Silent(QuietHandler):
    """Answers with nothing."""

    def do_GET(self):
        time.sleep(5)


def test_a_server_that_does_not_answer_is_left(pipe):
    with served(Silent) as server:
        began = time.monotonic()
        with pytest.raises(OSError, match=f"{server.server_port}/a.png"):
            pipe(f"http://127.0.0.1:{server.server_port}/a.png", LABELS, timeout=0.3)
        assert time.monotonic() - began < 4


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_lists_data_sets_and_generators_answer_one_by_one(pipe, photographs, batch_size):
    paths = [str(path) for path in photographs]
    expected = [pipe(path, LABELS) for path in paths]
    dataset = Dataset.from_dict({"image": paths}).cast_column("image", Image())
    drawn = []

    def generate():
        for path in paths:
            drawn.append(path)
            yield path

    stream = pipe(generate(), LABELS, batch_size=batch_size)
    first = next(iter(stream))
    assert len(drawn) <= batch_size + 2  # drawn as needed, the one that was looked at included
    for found in (
        pipe(paths, LABELS, batch_size=batch_size),
        list(pipe(KeyDataset(dataset, "image"), LABELS, batch_size=batch_size)),
        [first, *stream],
    ):
        assert len(found) == 3
        for answers, others in zip(found, expected):
            assert_same(answers, others)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_a_batch_of_images_that_keep_their_proportions_answers_as_each_alone(pipe, photographs, recorded, batch_size):
    """Those of one shape go through the model together."""
    image, *others = (str(path) for path in photographs)
    images, options = [image, *others, image], {"image_size": {"shortest_edge": 32}}
    expected = [pipe(one, LABELS, **options) for one in images]
    forwards = recorded(pipe.model, "get_image_features", lambda pixels, **options: len(pixels))
    for answers, others in zip(pipe(images, LABELS, batch_size=batch_size, **options), expected, strict=True):
        assert_same(answers, others)
    # Twice for images that the model sees at another size than its own, for maps and for scores; the last shape is its
    # own.
    assert forwards == ([2, 2, 1, 1, 1] if batch_size == 4 else [1] * 7)


def test_labels_are_encoded_once_for_all_images(pipe, photographs, recorded):
    calls = recorded(pipe.model, "encode_text")
    pipe([str(path) for path in photographs], LABELS)
    assert len(calls) == 1


def test_one_label_and_a_threshold_of_each(pipe, photographs):
    image = str(photographs[0])
    assert [answer["label"] for answer in pipe(image, "dog")] == ["dog"]
    assert {answer["label"] for answer in pipe(image, "dog, red ball,")} == {"dog", "red ball"}
    assert [answer["label"] for answer in pipe(image, ["dog, asleep"])] == ["dog, asleep"]
    by_label = {a["label"]: a for a in pipe(image, LABELS, threshold=[0.2, 0.5, 0.9], min_presence=0)}
    maps = {answer["label"]: answer["map"] for answer in pipe(image, LABELS)}
    for label, threshold in zip(LABELS, (0.2, 0.5, 0.9)):
        assert torch.equal(inside(by_label[label]), maps[label] > threshold)


def test_a_saved_pipeline_keeps_its_processor(tiny_processor, photographs, tmp_path):
    processor = copy.deepcopy(tiny_processor)
    processor.templates, processor.max_text_length = ["a red {}", "the {} ."], 5
    before = ImageTextSimilarityMapPipeline(model=tiny_model(), processor=processor, device="cpu")
    before.save_pretrained(tmp_path)
    after = pipeline(TASK, model=str(tmp_path), device="cpu", pipeline_class=ImageTextSimilarityMapPipeline)
    assert (after.processor.templates, after.processor.patch_size) == (processor.templates, 8)
    assert_same(after(str(photographs[0]), LABELS), before(str(photographs[0]), LABELS))


def test_pipelines_take_a_folder_that_an_exported_model_was_saved_to(world, photographs, tmp_path):
    """It has a configuration without the code of pipelines, which the exported one names."""
    exported = export_model(world.model, world.processor, tmp_path / "exported")
    pipe = pipeline(TASK, model=str(exported), trust_remote_code=True)
    expected = pipe(str(photographs[0]), LABELS)
    for folder in (tmp_path / "saved", exported):
        save(folder, ICLIPModel.from_pretrained(exported), world.processor)
        named = "custom_pipelines" in json.loads((folder / "config.json").read_text())
        assert named == (folder == exported)
        answers = pipeline(TASK, model=str(folder), trust_remote_code=named)(str(photographs[0]), LABELS)
        assert_same(answers, expected)
    assert type(load(exported)) is ExplainableICLIP  # the code of the folder has not replaced the classes


def test_without_a_model_a_pipeline_takes_the_embedded_one(world, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "embedded_model", lambda: world.folder / "model")
    for task, implementation in pipeline_iclip.PIPELINES.items():
        logged = []
        monkeypatch.setattr("transformers.pipelines.logger.warning", logged.append)
        pipe = pipeline(task)
        assert f"defaulted to {world.folder / 'model'} and revision iclip-hf {__version__}" in "".join(logged)
        assert type(pipe) is implementation and pipe.model.name_or_path == str(world.folder / "model")
    pipe.save_pretrained(tmp_path)
    (saved,) = json.loads((tmp_path / "config.json").read_text())["custom_pipelines"].values()
    assert "default" not in saved  # which names a folder of this machine


def test_code_of_a_model_folder_does_not_take_the_task_over():
    spec = importlib.util.spec_from_file_location("iclip_hf.model.pipeline_copy", pipeline_file)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    assert other.ImageTextSimilarityMapPipeline is not ImageTextSimilarityMapPipeline
    assert PIPELINE_REGISTRY.check_task(TASK)[1]["impl"] is ImageTextSimilarityMapPipeline


# ---- "zero-shot-image-segmentation" ----


@pytest.fixture(scope="module")
def segment(pipe):
    return ZeroShotImageSegmentationPipeline(model=pipe.model, processor=pipe.processor, device="cpu")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"threshold": 0.5}),
        ({"threshold": None}, {}),
        ({"background_labels": "grass"}, {"threshold": 0.5, "background": [3]}),
        ({"background_labels": ["grass"], "threshold": 0.3}, {"background": [3], "threshold": 0.3}),
    ],
)
def test_segments_are_the_label_map_of_model_and_processor(segment, photographs, options, expected):
    image = PILImage.open(photographs[0])
    texts = [*LABELS, "grass"] if "background" in expected else LABELS
    with torch.no_grad():
        outputs = segment.model(**segment.processor(image, labels=texts), output_similarity_maps=True)
    size = [(image.height, image.width)]
    expected = {**expected, "presence": outputs.logits_per_image.sigmoid(), "min_presence": 0}
    found = segment.processor.post_process_semantic_segmentation(outputs, size, **expected)[0].numpy()
    answers = segment(str(photographs[0]), LABELS, min_presence=0, refine=False, **options)
    assert [one["label"] for one in answers] == [label for k, label in enumerate(LABELS) if (found == k).any()]
    assert answers
    for one in answers:
        assert one.keys() == {"label", "score", "presence", "mask"} and 0 <= one["presence"] <= 1
        assert one["mask"].mode == "L" and one["mask"].size == image.size
        np.testing.assert_array_equal(np.asarray(one["mask"]), 255 * (found == LABELS.index(one["label"])))


def test_a_present_label_without_a_pixel_is_named(segment, photographs, monkeypatch):
    warnings = []
    monkeypatch.setattr(pipeline_iclip.logger, "warning", warnings.append)
    answers = segment(str(photographs[0]), ["dog", "dog"], min_presence=0, background_labels="dog", return_json=True)
    assert len(answers) == 1 and json.loads(json.dumps(answers)) == answers
    assert len(warnings) == 1 and "'dog' is present" in warnings[0]  # the first of equals; no word on background
    segment(str(photographs[0]), ["dog", "dog"], min_presence=1)
    assert len(warnings) == 1


def test_what_is_no_label_and_no_threshold_is_named(pipe, segment, photographs):
    with pytest.raises(ValueError, match="threshold is a number"):
        pipe(str(photographs[0]), LABELS, threshold=None)
    for one in (pipe, segment):
        with pytest.raises(ValueError, match="Texts are a string or a list"):
            one(str(photographs[0]), None)


def test_other_models_are_refused(pipe):
    config = CLIPConfig(vision_config=VISION["clip_vision_model"], text_config=TEXT["clip_text_model"])
    with pytest.raises(ValueError, match="ICLIP models, not 'clip'.*iclip_hf.explain"):
        pipeline(TASK, model=CLIPModel(config), processor=pipe.processor)


def test_absent_labels_have_no_segment(segment, photographs):
    answers = {
        one["label"]: one["presence"] for one in segment(str(photographs[0]), LABELS, threshold=None, min_presence=0)
    }
    assert len(answers) > 1
    best = max(answers, key=answers.get)
    (only,) = segment(str(photographs[0]), LABELS, threshold=None, min_presence=answers[best])
    assert only["label"] == best and np.asarray(only["mask"]).min() == 255  # no other text is left
    assert segment(str(photographs[0]), LABELS, min_presence=1) == []
