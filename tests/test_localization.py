import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from transformers import CLIPImageProcessor

from iclip_hf import ICLIPProcessor
from iclip_hf.explainers import explain
from iclip_hf.localization.localizer import BACKGROUND, Localizer, presence
from iclip_hf.regions import find_regions


IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
    for seed, size in enumerate([(40, 60), (50, 30)])
]
TEXTS = ["dog", "red ball", "car"]


def explained(localizer):
    return localizer.explain(torch.cat([localizer.prepare(image) for image in IMAGES]))


@pytest.mark.parametrize("one", [np.float32(0.25), np.array(0.25), torch.tensor(0.25), 0.25])
def test_thresholds_of_numpy_and_torch(tiny_processor, one):
    localizer = Localizer(tiny_model(), tiny_processor, ["dog", "cat"], threshold=one)
    assert localizer.thresholds == [0.25, 0.25] and json.dumps(localizer.settings)
    localizer = Localizer(tiny_model(), tiny_processor, ["dog", "cat"], threshold=np.array([0.1, 0.25]))
    assert localizer.thresholds == [0.1, 0.25]
    maps = [torch.rand(2, 5, 6)]
    assert tiny_processor.post_process_masks(maps, one)[0].equal(maps[0] > 0.25)


@pytest.mark.parametrize("wrong", [None, "a", [[0.5]], [], np.float64("nan"), [0.5, None], 1.5])
def test_other_thresholds_are_refused(tiny_processor, wrong):
    for refuse in (
        lambda: Localizer(tiny_model(), tiny_processor, ["dog"], threshold=wrong),
        lambda: tiny_processor.post_process_masks([torch.rand(1, 5, 6)], wrong),
    ):
        with pytest.raises(ValueError, match=r"Expected a threshold in \[0, 1\], or one a text, got"):
            refuse()


def test_presence_by_hand():
    background = torch.tensor([[-1.0, 0.0, 1.0], [1.0, 2.0, 3.0]])  # mean 0 and 2, deviation 1
    scores = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    expected = torch.tensor([[0.5, 0.8413], [0.5, 0.0228]])
    torch.testing.assert_close(presence(scores, background), expected, atol=1e-4, rtol=0)


def test_presence_is_the_share_of_texts_that_match_less_at_any_scale():
    generator = torch.Generator().manual_seed(0)
    background = 0.1 * torch.randn(1, 5000, generator=generator) + 0.2
    scores = torch.tensor([[0.1, 0.2, 0.35]])
    shares = (background[0] < scores[0][:, None]).float().mean(1)
    torch.testing.assert_close(presence(scores, background)[0], shares, atol=0.02, rtol=0)
    torch.testing.assert_close(presence(100 * scores - 7, 100 * background - 7), presence(scores, background))


@pytest.mark.parametrize("method", ["itsm", "reversed_itsm", "attention", "gem", "grad_cam", "clip_surgery"])
def test_presence_beside_the_maps_of_every_method(tiny_processor, method):
    """Neither way to the background's scores changes the maps, and both give the same presence."""
    model = tiny_model()
    maps, scores, presences = explained(Localizer(model, tiny_processor, TEXTS, method=method))
    for index, expected in enumerate(explain(model, tiny_processor, IMAGES, TEXTS, method=method)):
        torch.testing.assert_close(maps[index], expected.raw_maps, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(scores[index], expected.scores, atol=1e-5, rtol=0)
    with torch.no_grad():
        logits = model(**tiny_processor(IMAGES, labels=[*TEXTS, *BACKGROUND])).logits_per_image
    torch.testing.assert_close(presences, presence(logits[:, :3], logits[:, 3:]), atol=1e-4, rtol=0)


def test_many_images_give_what_each_gives_alone(tiny_processor):
    """In batches, in order, with those that cannot be read in their places."""
    localizer = Localizer(tiny_model(), tiny_processor, TEXTS)

    def load(item):
        if item == "absent":
            raise FileNotFoundError("there is\nnone")
        return f"image {item}", IMAGES[item]

    with ThreadPoolExecutor(2) as pool:
        found = list(localizer.explain_all(load, [0, "absent", 1, 0, 1], pool, batch_size=2))
    assert [one.name for one in found] == ["image 0", "there is none", "image 1", "image 0", "image 1"]
    assert found[1] == ("there is none", None, None, None)
    maps, scores, presences = explained(localizer)
    for position, index in ((0, 0), (2, 1), (3, 0), (4, 1)):
        one = found[position]
        assert one.image is IMAGES[index] and one.explanation.size == (one.image.height, one.image.width)
        torch.testing.assert_close(one.explanation.raw_maps, maps[index], atol=1e-5, rtol=0)
        torch.testing.assert_close(one.explanation.scores, scores[index], atol=1e-5, rtol=0)
        torch.testing.assert_close(one.presence, presences[index], atol=1e-4, rtol=0)


def test_images_that_keep_their_proportions_go_through_one_by_one(tiny_processor):
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    processor = ICLIPProcessor(image_processor, tiny_processor.tokenizer, patch_size=8)
    localizer = Localizer(tiny_model(), processor, TEXTS)
    with ThreadPoolExecutor(1) as pool:
        found = list(localizer.explain_all(lambda index: (str(index), IMAGES[index]), [0, 1, 1], pool))
    assert [one.explanation.raw_maps.shape for one in found] == [(3, 4, 6), (3, 7, 4), (3, 7, 4)]
    for one, image in zip(found, (IMAGES[0], IMAGES[1], IMAGES[1])):
        maps, _, presence = localizer.explain(localizer.prepare(image))
        torch.testing.assert_close(one.explanation.raw_maps, maps[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(one.presence, presence[0], atol=1e-4, rtol=0)


def test_texts_of_an_image(tiny_processor):
    model = tiny_model()
    thresholds = [0.3, 0.5, 0.7]
    localizer = Localizer(model, tiny_processor, TEXTS, threshold=thresholds, min_presence=0.5)
    (explanation,) = explain(model, tiny_processor, IMAGES[:1], TEXTS)
    found = list(localizer.locate(explanation, torch.tensor([0.9, 0.5, 0.49])))
    for index, text in enumerate(found):
        assert text.text == TEXTS[index] and text.score == pytest.approx(float(explanation.scores[index]))
        assert np.array_equal(text.heatmap, explanation.map(index).numpy())
    assert np.array_equal(found[0].mask, found[0].heatmap > 0.3) and found[0].mask.any()
    assert np.array_equal(found[1].mask, found[1].heatmap > 0.5) and found[1].mask.any()
    assert not found[2].mask.any() and found[2].record()["regions"] == []
    boxes = [list(region.box) for region in find_regions(found[0].heatmap, found[0].mask)]
    record = found[0].record()
    assert record["presence"] == 0.9 and [region["box"] for region in record["regions"]] == boxes
    ((x, y),) = record["regions"][0]["positive_points"]
    assert found[0].mask[y, x]
    assert not any(found[0].mask[y, x] for x, y in record["regions"][0]["negative_points"])


def test_the_image_size_is_the_models(tiny_processor):
    localizer = Localizer(tiny_model(), tiny_processor, TEXTS, image_size=48)
    assert localizer.prepare(IMAGES[0]).shape == (1, 3, 48, 48)
    assert explained(localizer)[0].shape == (2, 3, 6, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": [0.5]}, "3 thresholds, one a text, got 1"),
        ({"threshold": 1.5}, r"in \[0, 1\]"),
        ({"min_presence": -0.1}, r"in \[0, 1\]"),
        ({"method": "magic"}, "magic"),
    ],
)
def test_bad_options_are_named(tiny_processor, options, message):
    with pytest.raises(ValueError, match=message):
        Localizer(tiny_model(), tiny_processor, TEXTS, **options)


@pytest.mark.slow
def test_presence_tells_present_classes_better_than_the_cosine(iclip_data):
    from sklearn.metrics import roc_auc_score

    from iclip_hf import ICLIPModel, ICLIPProcessor
    from iclip_hf.data.segmentation import load_segmentation
    from iclip_hf.models.embedded import embedded_model

    folder = embedded_model()
    dataset = load_segmentation("coco2017", iclip_data / "coco100", "train2017")
    model, processor = ICLIPModel.from_pretrained(folder), ICLIPProcessor.from_pretrained(folder)
    localizer = Localizer(model, processor, dataset.class_names)
    samples = [dataset[index] for index in range(20)]
    _, scores, presences = localizer.explain(torch.cat([localizer.prepare(sample.image) for sample in samples]))
    truth = np.stack([np.isin(dataset.labels, sample.labels) for sample in samples])
    by_cosine, by_presence = (roc_auc_score(truth.ravel(), one.flatten()) for one in (scores, presences))
    assert by_presence > by_cosine and by_presence > 0.8
    # Calibrated: of absent texts about three in ten reach 0.7.
    assert float((presences[torch.from_numpy(~truth)] >= 0.7).float().mean()) == pytest.approx(0.3, abs=0.08)
