import copy
import io
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import presence_among, tiny_model
from PIL import Image
from transformers import CLIPImageProcessor

from iclip_hf import ICLIPProcessor, draw, explain
from iclip_hf.backends.explainable import ExplainableModel
from iclip_hf.backends.loading import load
from iclip_hf.cli.output import presence_column
from iclip_hf.explainers import make_explainer
from iclip_hf.explainers.localizer import Localizer
from iclip_hf.model.presence import at_prior, presence
from iclip_hf.model.prompts import split_texts
from iclip_hf.model.reference_nouns import REFERENCE_NOUNS
from iclip_hf.model.regions import find_regions, run_lengths
from iclip_hf.model.similarity import resize_and_normalize


IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
    for seed, size in enumerate([(40, 60), (50, 30)])
]
TEXTS = ["dog", "red ball", "car"]


def explained(localizer):
    return list(localizer.explain(map(localizer.prepare, IMAGES)))


@pytest.mark.parametrize(
    "threshold", [np.float32(0.25), np.array(0.25), torch.tensor(0.25), 0.25, np.array([0.25] * 2)]
)
def test_thresholds_of_numpy_and_torch(tiny_processor, threshold):
    localizer = Localizer((tiny_model(), tiny_processor), ["dog", "cat"], threshold=threshold)
    assert localizer.thresholds == [0.25, 0.25] and json.dumps(localizer.settings)
    maps = [torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0))]
    assert tiny_processor.post_process_masks(maps, threshold)[0].equal(maps[0] > 0.25)


@pytest.mark.parametrize("method", ["itsm", "reversed_itsm", "attention", "gem", "grad_cam", "clip_surgery"])
def test_presence_beside_the_maps_of_every_method(tiny_processor, method):
    """The background changes no map, and the presence is the same whatever the method."""
    model = tiny_model()
    explainer = make_explainer((model, tiny_processor), method)
    maps, scores = explainer.raw_maps(tiny_processor(IMAGES)["pixel_values"], explainer.model.encode_texts(TEXTS))
    with torch.no_grad():
        logits = model(**tiny_processor(IMAGES, labels=[*TEXTS, *REFERENCE_NOUNS])).logits_per_image
    presences = presence_among(logits[:, :3], logits[:, 3:])
    for index, found in enumerate(explained(Localizer((model, tiny_processor), TEXTS, method=method))):
        torch.testing.assert_close(found.raw_maps, maps[index], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.scores, scores[index], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.presence, presences[index], atol=1e-4, rtol=0)


def test_many_images_give_what_each_gives_alone(tiny_processor):
    """In batches, in order, with those that cannot be read in their places."""
    localizer = Localizer((tiny_model(), tiny_processor), TEXTS)

    def load(item):
        if item == "absent":
            raise FileNotFoundError("there is\nnone")
        return f"image {item}", IMAGES[item]

    with ThreadPoolExecutor(2) as pool:
        found = list(localizer.explain_all(load, [0, "absent", 1, 0, 1], pool, batch_size=2))
    assert [name for name, _ in found] == ["image 0", "there is none", "image 1", "image 0", "image 1"]
    assert found.pop(1)[1] is None
    for (_, one), image, alone in zip(found, IMAGES * 2, explained(localizer) * 2, strict=True):
        assert one.image is image and one.size == (image.height, image.width)
        assert_same(one, alone)


def assert_same(one, other):
    assert (one.labels, one.size) == (other.labels, other.size)
    torch.testing.assert_close(one.raw_maps, other.raw_maps, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.presence, other.presence, atol=1e-4, rtol=0)


def test_images_of_a_shape_with_equally_many_texts_share_a_forward(tiny_processor, recorded):
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    processor = ICLIPProcessor(image_processor, tiny_processor.tokenizer, patch_size=8)
    localizer = Localizer((tiny_model(), processor), TEXTS)
    forwards = recorded(localizer.explainer, "forward", lambda pixels, *args: len(pixels))
    asked = [(0, None), (1, None), (0, ["car"]), (1, None), (0, None), (0, ["dog"]), (0, ["car", "dog"]), (1, None)]
    prepared = [localizer.prepare(IMAGES[index], labels) for index, labels in asked]
    found = list(localizer.explain(prepared, batch_size=7))
    assert forwards == [2, 2, 2, 1, 1]  # the last image comes in the next batch
    for one, image in zip(found, prepared):
        assert_same(one, *localizer.explain([image]))
    assert [one.raw_maps.shape for one in found[:3]] == [(3, 4, 6), (3, 7, 4), (1, 4, 6)]
    assert found[6].labels == ["car", "dog"]
    torch.testing.assert_close(found[6].raw_maps, found[0].raw_maps[[2, 0]], atol=1e-5, rtol=0)


def test_maps_masks_regions_and_record_of_an_explanation(tiny_processor):
    localizer = Localizer((tiny_model(), tiny_processor), TEXTS, threshold=[0.3, 0.5, 0.7], min_presence=0.5)
    explanation = replace(explained(localizer)[0], presence=torch.tensor([0.9, 0.5, 0.49]))
    for index, threshold in enumerate((0.3, 0.5)):
        heatmap = resize_and_normalize(explanation.raw_maps, (40, 60))[index]
        assert torch.equal(explanation.map(index), heatmap) and torch.equal(explanation.maps[index], heatmap)
        assert torch.equal(explanation.mask(index), heatmap > threshold) and explanation.mask(index).any()
        assert torch.equal(explanation.mask(index, 0.8), heatmap > 0.8)
        for least in (threshold, 0.8):
            regions = find_regions(heatmap.numpy(), (heatmap > least).numpy())
            assert [one.box for one in explanation.regions(index, least)] == [one.box for one in regions]
    assert not explanation.mask(2).any() and explanation.regions(2) == []
    assert not explanation.mask(0, 1.0).any()  # the greatest value is 1, and foreground is M > threshold
    answer = json.loads(json.dumps(explanation.to_dict()))
    assert (answer["height"], answer["width"]) == (40, 60)
    record = answer["texts"]
    assert [one["text"] for one in record] == TEXTS
    assert [one["presence"] for one in record] == explanation.presence.tolist()
    assert [one["score"] for one in record] == pytest.approx(explanation.scores.tolist(), abs=1e-4)
    assert record[2]["regions"] == []
    for index, (one, array) in enumerate(explanation.records_and_masks()):
        mask = explanation.mask(index)
        assert [region["box"] for region in one["regions"]] == [list(part.box) for part in explanation.regions(index)]
        assert all(mask[y, x] for region in one["regions"] for x, y in region["positive_points"])
        assert not any(mask[y, x] for region in one["regions"] for x, y in region["negative_points"])
        assert {**one, "mask": run_lengths(array)} == record[index] and (array == mask.numpy()).all()
    score = explanation.scores[0].item()
    assert repr(explanation).startswith(f"Explanation('dog': {score:.2f}, 'red ball': ")


def test_the_reversed_map_is_one_minus_the_map_to_the_last_bit(tiny_processor):
    model = tiny_model()
    (straight,), (turned,) = (
        explain((model, tiny_processor), IMAGES[:1], TEXTS, method) for method in ("itsm", "reversed_itsm")
    )
    turned = replace(turned, min_presence=0)
    (processed,) = tiny_processor.post_process_similarity_maps(straight.raw_maps[None], [(40, 60)], reverse=True)
    for maps in (turned.maps, torch.stack([turned.map(index) for index in range(3)])):
        assert torch.equal(maps, 1 - straight.maps) and torch.equal(maps, processed)
    assert torch.equal(turned.mask(1, 0.6), 1 - straight.map(1) > 0.6)


@pytest.mark.parametrize("method", ["itsm", "grad_cam"])
def test_scores_and_presence_come_from_the_models_own_size(tiny_processor, method, recorded):
    """Whatever the size of the maps; in one more forward only if that size is another."""
    model = tiny_model(max_over="similarity")
    own, large, same = (
        Localizer((model, tiny_processor), TEXTS, method=method, words="grad_eclip", image_size=size)
        for size in (None, 48, tiny_processor.image_processor.size["height"])
    )
    forwards = [
        recorded(one.model.network, "get_image_features", lambda pixels, **options: len(pixels))
        for one in (own, large, same)
    ]
    expected, found, again = map(explained, (own, large, same))
    assert forwards == [[2], [2, 2], [2]]  # both images at once
    for one, other, third in zip(expected, found, again):
        assert other.raw_maps.shape[1:] == (6, 6) != one.raw_maps.shape[1:] == third.raw_maps.shape[1:]
        torch.testing.assert_close(other.scores, one.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.presence, one.presence, atol=1e-4, rtol=0)
        assert [word.score for word in other.words[0]] == pytest.approx(
            [word.score for word in one.words[0]], abs=1e-4
        )


def test_presence_uses_both_branches_and_the_templates(tiny_processor):
    model, templates = tiny_model(max_over="similarity"), ["a red {}"]
    with torch.no_grad():
        image = model.get_image_features(**tiny_processor(IMAGES[:1]))
        texts, nouns = (
            model.get_text_features(**tiny_processor(labels=list(labels), templates=templates))
            for labels in (TEXTS, REFERENCE_NOUNS)
        )
        expected = presence(model, image, texts, nouns)[0]
    (found,) = explain((model, tiny_processor), IMAGES[:1], TEXTS, templates=templates)
    torch.testing.assert_close(found.presence, expected, atol=1e-4, rtol=0)


def test_nouns_are_encoded_again_only_when_the_result_changes(tiny_processor, tmp_path, monkeypatch, recorded):
    """A later process reads the same numbers from the cache; other weights, options or templates and a damaged file are noticed."""
    monkeypatch.setenv("ICLIP_CACHE", str(tmp_path))
    encoded = recorded(ExplainableModel, "encode_texts", lambda self, labels, *args, **options: len(labels))

    def check(model, times, templates=None):
        """The nouns' features are right, and were encoded so many times."""
        found = load((model, tiny_processor)).references(templates or tiny_processor.templates)
        assert encoded.count(len(REFERENCE_NOUNS)) == times
        with torch.no_grad():
            expected = model.get_text_features(**tiny_processor(labels=REFERENCE_NOUNS, templates=templates))
        torch.testing.assert_close(found.text_embeds, expected.text_embeds)
        torch.testing.assert_close(found.map_text_embeds, expected.map_text_embeds)

    model = tiny_model()
    check(model, 1)
    check(model, 1)
    check(model, 2, ["a red {}", "{}"])
    model.text_model.get_input_embeddings().weight.data[10:].mul_(2)
    check(model, 3)
    model.interpretability.text_projection.weight.data.mul_(-1)
    check(model, 4)
    model.config.text_pooling = "class_token"
    check(model, 5)
    check(model, 5)
    files = list(tmp_path.glob("*/*"))
    assert len(files) == 2  # one for each name and templates, however often the weights change
    check(copy.deepcopy(model), 5)  # as in another process, which has the files only
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    check(model, 5)
    check(copy.deepcopy(model), 6)
    check(copy.deepcopy(model), 6)


def test_thresholds_follow_their_texts(tiny_processor):
    localizer = Localizer((tiny_model(), tiny_processor), TEXTS, threshold=[0.3, 0.5, 0.7])
    (found,) = localizer.explain([localizer.prepare(IMAGES[0], ["car", "dog"])])
    assert found.threshold == [0.7, 0.3]
    other = localizer.about(["cat"], 0.2)
    assert (other.texts, other.thresholds, localizer.texts) == (["cat"], [0.2], TEXTS)


def test_settings_hold_everything_that_results_depend_on(tiny_processor):
    changes = {
        "texts": {"texts": ["cat"]},
        "thresholds": {"threshold": 0.4},
        "min_presence": {"min_presence": 0.6},
        "image_size": {"image_size": 48},
        "templates": {"templates": ["{}"]},
        "refine": {"refine": True},
        "method": {"method": "gem"},
        "iterations": {"method": "gem", "iterations": 2},
    }
    model, usual = tiny_model(), {"texts": ["dog"]}
    before = Localizer((model, tiny_processor), **usual).settings
    for name, options in changes.items():
        after = Localizer((model, tiny_processor), **{**usual, **options}).settings
        assert {one for one in after if after[one] != before.get(one)} == {name, *("method",) * ("method" in options)}


@pytest.mark.slow
def test_presence_separates_classes_better_than_the_cosine_and_is_calibrated(iclip_data):
    from sklearn.metrics import roc_auc_score

    from iclip_hf import ICLIPModel, ICLIPProcessor
    from iclip_hf.backends.embedded import embedded_model
    from iclip_hf.data.segmentation import load_segmentation

    folder = embedded_model()
    dataset = load_segmentation("coco2017", iclip_data / "coco100", "train2017")
    model, processor = ICLIPModel.from_pretrained(folder), ICLIPProcessor.from_pretrained(folder)
    localizer = Localizer((model, processor), dataset.class_names)
    samples = [dataset[index] for index in range(20)]
    found = list(localizer.explain(localizer.prepare(sample.image) for sample in samples))
    scores, presences = (torch.stack([getattr(one, name) for one in found]).numpy() for name in ("scores", "presence"))
    truth = np.stack([np.isin(dataset.labels, sample.labels) for sample in samples])
    by_cosine, by_presence = (roc_auc_score(truth.ravel(), one.ravel()) for one in (scores, presences))
    assert by_presence > max(0.9, by_cosine)
    # Of the shown texts about four of five reach 0.5, of the absent ones one in six.
    assert (presences[truth] >= 0.5).mean() == pytest.approx(0.81, abs=0.1)
    assert (presences[~truth] >= 0.5).mean() == pytest.approx(0.16, abs=0.04)
    probable = at_prior(presences, truth.mean())
    for low, high in ((0.0, 0.05), (0.05, 0.2), (0.2, 1.0)):
        inside = (low <= probable) & (probable < high)
        assert truth[inside].mean() == pytest.approx(probable[inside].mean(), rel=0.5, abs=0.02)


def test_a_text_is_named_by_itself_or_by_its_index(tiny_processor):
    localizer = Localizer(
        (tiny_model(), tiny_processor), TEXTS, threshold=[0.3, 0.5, 0.7], min_presence=0, words="grad_eclip"
    )
    (found,) = localizer.explain([localizer.prepare(IMAGES[0])])
    assert [one.labels for one in found] == [["dog"], ["red ball"], ["car"]] and len(found) == 3
    for index, text in enumerate(TEXTS):
        for one in (found[text], found[index], found[index - 3]):
            assert (one.labels, one.size, one.words) == ([text], found.size, [found.words[index]])
            assert one.scores == found.scores[index] and one.presence == found.presence[index]
            assert one.mask().equal(found.mask(text)) and one.mask().equal(found.map(index) > (0.3, 0.5, 0.7)[index])
            assert one.map().equal(found.map(text)) and one.regions() == found.regions(text) == found.regions(index)
            assert one.to_dict()["texts"] == [found.to_dict()["texts"][index]]
    assert found.label_map(background=["car"]).equal(found.label_map(background=[2]))
    with pytest.raises(KeyError, match="horse"):
        found["horse"]
    for ask, index in itertools.product((found.__getitem__, found.map, found.regions), (3, -4)):
        with pytest.raises(IndexError):
            ask(index)
    with pytest.raises(ValueError, match="threshold"):
        found.mask("dog", float("nan"))


def test_a_notebook_shows_the_picture(tiny_processor):
    found = explain((tiny_model(), tiny_processor), np.asarray(IMAGES[0]), TEXTS)
    shown = Image.open(io.BytesIO(found._repr_png_()))
    assert np.array_equal(np.asarray(shown), np.asarray(draw(found, IMAGES[0])))
    assert replace(found, image=None)._repr_png_() is None


@pytest.mark.parametrize("presence", [0.79997, 0.8, 0.80003, np.nextafter(np.float32(0.8), np.float32(0))])
def test_the_presence_in_json_decides_whether_the_mask_is_empty(tiny_processor, presence):
    (found,) = explain((tiny_model(), tiny_processor), IMAGES[:1], ["dog"])
    found = replace(found, presence=torch.tensor([presence], dtype=torch.float32), min_presence=0.8)
    (text,) = json.loads(json.dumps(found.to_dict()))["texts"]
    shown = text["presence"] >= 0.8
    assert shown == bool(text["regions"]) == bool(found.mask("dog").any()) == bool((found.label_map() == 0).any())
    column = presence_column(found.presence.item(), 0.8)
    assert (float(column.split()[-1]) >= 0.8) == (not column.startswith("absent")) == shown


def test_one_string_is_several_texts_and_a_list_is_taken_as_it_is(tiny_processor):
    model, image = (tiny_model(), tiny_processor), IMAGES[0]
    for texts, labels in (
        ("dog, red ball,", ["dog", "red ball"]),
        ("dog", ["dog"]),
        (r"a dog\, asleep, cat", ["a dog, asleep", "cat"]),
        ("a dog, asleep\ncat", ["a dog, asleep", "cat"]),
        (["a dog, asleep"], ["a dog, asleep"]),
    ):
        assert explain(model, image, texts).labels == labels == Localizer(model, texts).texts
        assert tiny_processor(labels=texts)["input_ids"].equal(tiny_processor(labels=labels)["input_ids"])
        assert load(model).encode_texts(split_texts(texts)).text_embeds.shape[0] == len(labels)
    assert len(tiny_processor(text="dog, cat")["input_ids"]) == 1  # not a label: a text as it is
