"""Label maps and their doors, against loops over pixels with torch's own interpolation."""

import math

import pytest
import torch
from torch.nn import functional as F

from iclip_hf import ICLIPProcessor
from iclip_hf.evaluation.argmax import argmax_label_map
from iclip_hf.model.explanation import Explanation
from iclip_hf.model.label_maps import BACKGROUND_LABEL, label_map
from iclip_hf.model.outputs import ICLIPOutput
from iclip_hf.model.prompts import IMAGENET_TEMPLATES, check_templates


SIZE = (13, 22)


def slowly(raw, size, classes, threshold, logit_scale):
    """Pixel by pixel: all enlarged maps are held, and every rule is a comparison of numbers."""
    big = F.interpolate(raw[None].double(), size=size, mode="bicubic", align_corners=False)[0]
    best = [[max(range(len(raw)), key=lambda t: big[t, y, x].item()) for x in range(size[1])] for y in range(size[0])]
    values = torch.tensor([[big[t, y, x].item() for x, t in enumerate(row)] for y, row in enumerate(best)])
    if logit_scale is None:
        confidence = (values - values.min()) / (values.max() - values.min())
    else:
        confidence = (logit_scale * big).softmax(0).amax(0).float()
    labels = [
        [classes[t] if threshold is None or confidence[y, x] > threshold else -1 for x, t in enumerate(row)]
        for y, row in enumerate(best)
    ]
    return torch.tensor(labels), confidence


@pytest.mark.parametrize("logit_scale", [None, 40.0])
@pytest.mark.parametrize("threshold", [None, 0.4])
@pytest.mark.parametrize("classes", [[0, 1, 2, 3], [0, 0, 1, -1]])
def test_argmax_label_map_equals_a_loop_over_pixels(classes, threshold, logit_scale):
    raw = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.1
    options = {"threshold": threshold, "logit_scale": logit_scale}
    labels, confidence = argmax_label_map(raw, SIZE, classes=classes, **options)
    expected, expected_confidence = slowly(raw, SIZE, classes, **options)
    assert labels.dtype == torch.int64 and torch.equal(labels, expected)
    assert torch.allclose(confidence, expected_confidence.float(), atol=1e-5)
    assert len(labels.unique()) > 1 and labels.min() >= -1 and labels.max() <= 3


def test_constant_and_equal_maps():
    raw = torch.rand(1, 4, 5, generator=torch.Generator().manual_seed(1))
    labels, _ = argmax_label_map(raw, SIZE, [0], threshold=1.0)
    assert (labels == BACKGROUND_LABEL).all()  # though the confidence reaches 1
    constant = torch.full((3, 4, 4), 0.3)
    constant[1] = 0.7
    labels, confidence = argmax_label_map(constant, SIZE, range(3))
    assert (labels == 1).all() and (confidence == 0).all()  # of a constant map, not the rounding of its enlargement
    assert (argmax_label_map(constant[[0, 0]], SIZE, [0, 1])[0] == 0).all()  # of equal texts, the first


def test_large_scales_are_finite():
    raw = torch.tensor([[[100.0, -100.0]], [[-100.0, 100.0]]])
    labels, confidence = argmax_label_map(raw, (1, 2), [0, 1], logit_scale=100.0)
    assert labels.tolist() == [[0, 1]] and confidence.tolist() == [[1.0, 1.0]]
    apart = torch.tensor([[[-1.0, 1.0]], [[-1.0, 0.99]]])  # exp(100 * (-1 - 1)) is 0 in float32
    _, confidence = argmax_label_map(apart, (1, 2), [0, 1], logit_scale=100.0)
    assert torch.allclose(confidence, (100 * apart.double()).softmax(0).amax(0).float())


def test_more_texts_than_16_bits_count():
    raw = torch.zeros(2**15 + 2, 1, 1)
    raw[-1] = 1
    assert argmax_label_map(raw, (1, 1), range(len(raw)))[0].item() == 2**15 + 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_maps_that_are_not_finite_are_refused(value):
    """All their pixels would be background."""
    raw = torch.rand(2, 4, 5)
    raw[1, 2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        label_map(raw, SIZE)


# ---- label_map ----


def competing_slowly(raw, size, presence, thresholds, background):
    """
    Pixel by pixel: of the texts whose mask holds it, the one with the highest mean of its map standardized by its own
    values and by those of all texts that are present, plus a tenth of its logit.
    """
    big = F.interpolate(raw[None].double(), size=size, mode="bicubic", align_corners=False)[0]
    low, high, mean, std = big.amin((1, 2)), big.amax((1, 2)), big.mean((1, 2)), big.std((1, 2), correction=0)
    found, competing = torch.full(size, -1), [t for t in range(len(raw)) if presence[t] >= 0.5]
    mean_of_all = sum(mean[t] for t in competing) / max(1, len(competing))
    std_of_all = (sum(std[t] ** 2 for t in competing) / max(1, len(competing))) ** 0.5
    for y in range(size[0]):
        for x in range(size[1]):
            inside = [
                t
                for t in competing
                if thresholds is None or (big[t, y, x] - low[t]) / (high[t] - low[t]) > thresholds[t]
            ]
            if inside:
                odds = [math.log(p / (1 - p)) for p in presence]
                by_own, by_all = (big[:, y, x] - mean) / std, (big[:, y, x] - mean_of_all) / std_of_all
                best = max(inside, key=lambda t: (by_own[t] + by_all[t]).item() / 2 + 0.1 * odds[t])
                found[y, x] = -1 if best in background else best
    return found


@pytest.mark.parametrize("thresholds", [None, [0.4] * 4, [0.2, 0.4, 0.6, 0.5]])
@pytest.mark.parametrize("background", [(), (3,)])
@pytest.mark.parametrize("presence", [[0.6, 0.7, 0.99, 0.5], [0.1, 0.9, 0.8, 0.7], [0.9, 0.1, 0.999, 0.2], [0.1] * 4])
def test_label_map_equals_a_loop_over_pixels(presence, thresholds, background):
    raw = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.1
    raw[1] += 0.1  # higher everywhere, which counts half
    raw[2] *= 0.3
    found = label_map(raw, SIZE, torch.tensor(presence), 0.5, thresholds, background)
    expected = competing_slowly(raw, SIZE, presence, thresholds, background)
    assert found.dtype == torch.int64 and torch.equal(found, expected)


def test_without_a_presence_every_text_competes():
    raw = torch.rand(3, 3, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(label_map(raw, SIZE, min_presence=0.9), label_map(raw, SIZE, torch.full((3,), 0.95), 0.9))


def test_maps_are_standardized_by_the_deviation_over_all_pixels():
    """Of two pixels, 1 from their mean: the logits differ by 16.1, and a tenth of that is less than 2."""
    raw, presence = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]]), torch.tensor([0.001, 0.9999])
    assert label_map(raw, (1, 2), presence, 0.0, threshold=None).tolist() == [[1, 0]]


@pytest.mark.parametrize("number", [2, 4])
def test_each_text_has_one_presence_and_one_threshold(number):
    raw = torch.rand(3, 3, 5, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="zip"):
        label_map(raw, SIZE, torch.full((number,), 0.9))
    with pytest.raises(ValueError, match="zip"):
        label_map(raw, SIZE, threshold=[0.5] * number)


def test_label_map_of_constant_and_no_maps():
    constant = torch.full((2, 4, 4), 0.3)
    assert (label_map(constant, SIZE) == -1).all()  # of a constant map, nothing is above the threshold
    assert (label_map(constant, SIZE, threshold=None) == 0).all()  # of equal texts, the first
    assert (label_map(constant[:0], SIZE) == -1).all()


# ---- doors ----


def test_processor_gives_a_label_map_of_each_image():
    raw = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    process = ICLIPProcessor.post_process_semantic_segmentation
    outputs, sizes = ICLIPOutput(similarity_maps=raw), [(9, 12), (7, 20)]
    for found, one, size in zip(process(None, outputs, sizes), raw, sizes, strict=True):
        assert torch.equal(found, label_map(one, size, threshold=None))
    assert [tuple(one.shape) for one in process(None, outputs)] == [(4, 6), (4, 6)]
    presence = torch.tensor([[0.9, 0.1, 0.9], [0.1, 0.1, 0.1]])
    options = {"presence": presence, "min_presence": 0.5, "background": [2]}
    found = process(None, outputs, sizes, threshold=[0.2, 0.3, 0.4], **options)
    assert torch.equal(found[0], label_map(raw[0], sizes[0], presence[0], 0.5, [0.2, 0.3, 0.4], [2]))
    assert found[0].unique().tolist() == [-1, 0] and (found[1] == -1).all()


@pytest.mark.parametrize(("share", "covered"), [(0.24, True), (0.26, False)])
@pytest.mark.parametrize("threshold", [0.5, None])
def test_a_covered_text_keeps_less_than_a_quarter_of_its_own_mask(share, covered, threshold):
    """However large the mask is, in an array or a tensor; an absent text has none."""
    raw = torch.zeros(2, 20, 20)
    raw[:, :5, :10] = 1
    presence = torch.tensor([0.9, 0.1])
    explanation = Explanation(["a", "b"], presence, presence, raw, (20, 20), threshold)
    segment = torch.zeros(20, 20, dtype=torch.bool)
    segment[0, : round(share * 50)] = True
    for kept in (segment, segment.numpy()):
        assert explanation.is_covered("a", kept) == covered and not explanation.is_covered("b", kept)


def test_an_explanation_segments_by_its_own_masks():
    raw = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(4))
    presence, thresholds = torch.tensor([0.9, 0.2, 0.8]), [0.5, 0.5, 0.3]
    explanation = Explanation(["a", "b", "c"], presence, presence, raw, SIZE, thresholds)
    masks = torch.stack([explanation.mask(index) for index in range(3)])
    found = explanation.label_map()
    assert torch.equal(found >= 0, masks.any(0)) and found.unique().tolist() == [-1, 0, 2]
    assert all(masks[index][found == index].all() for index in range(3))
    assert torch.equal(found, label_map(raw, SIZE, presence, 0.7, thresholds))
    assert torch.equal(explanation.label_map(background=[2]), found.masked_fill(found == 2, -1))
    assert torch.equal(explanation.label_map(0.8), label_map(raw, SIZE, presence, 0.7, 0.8))


def test_templates_by_name(tiny_processor):
    assert len(set(IMAGENET_TEMPLATES)) == 80 and all(one.count("{}") == 1 for one in IMAGENET_TEMPLATES)
    assert check_templates("imagenet") == check_templates(["imagenet"]) == list(IMAGENET_TEMPLATES)
    batch = tiny_processor(labels=["dog", "cat"], templates="imagenet")
    assert batch["num_templates"] == 80 and len(batch["input_ids"]) == 160
    with pytest.raises(ValueError, match="imagenet"):
        check_templates(["imagenet", "{}"])
