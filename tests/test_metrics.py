"""mMIoU, mFMB, text contrast and mAP against loops, hand-computed examples and other libraries."""

import itertools
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from iclip_hf.evaluation import functional
from iclip_hf.evaluation.functional import THRESHOLDS, region_means, reliability, threshold_counts
from iclip_hf.evaluation.metrics import (
    METRICS,
    LabelMaps,
    MeanForegroundMinusBackground,
    MeanIoU,
    MeanMaxIoU,
    MultiLabelAveragePrecision,
    PointingGame,
    Presence,
    TextContrast,
    make_metrics,
)
from iclip_hf.evaluation.metrics.recognition import like_classes
from iclip_hf.model.similarity import resize_and_normalize


DTYPES = (np.float16, np.float32, np.float64)
PAIR_METRICS = (MeanMaxIoU, MeanForegroundMinusBackground)


def naive_counts(heatmap, mask, label, ignore_index=255):
    """One comparison a threshold, and one before them that holds everywhere."""
    valid = mask != ignore_index
    levels = [np.ones(mask.shape, bool)] + [heatmap > t for t in THRESHOLDS.astype(heatmap.dtype)]
    return np.array([[np.sum(p & valid & ((mask == label) == side)) for p in levels] for side in (False, True)])


def naive_mmiou(pairs, aggregate):
    """mMIoU, the IoU at each threshold by class, and the floor, in loops and floats."""
    counts = {}
    for heatmap, mask, label in pairs:
        false_positives, true_positives = naive_counts(heatmap, mask, label)
        if true_positives[0]:
            counts.setdefault(label, []).append((true_positives, true_positives[0] + false_positives))
    scores, curves, floors = [], {}, []
    for label, images in counts.items():
        if aggregate == "image":
            curve = np.mean([intersection / union for intersection, union in images], axis=0)
        else:
            curve = np.sum([i for i, _ in images], axis=0) / np.sum([u for _, u in images], axis=0)
        scores.append(100 * max(curve[1:]))
        curves[label] = curve[1:]
        floors.append(100 * curve[0])
    return np.mean(scores), curves, np.mean(floors)


def naive_mfmb(pairs, aggregate):
    """mFMB in loops and floats."""
    values = {}
    for heatmap, mask, label in pairs:
        heatmap = heatmap.astype(np.float64)
        foreground, background = heatmap[mask == label], heatmap[(mask != label) & (mask != 255)]
        if len(foreground) and len(background):
            values.setdefault(label, []).append((foreground, background))
    if aggregate == "image":
        return np.mean([np.mean([f.mean() - b.mean() for f, b in images]) for images in values.values()])
    pooled = [[np.concatenate(side).mean() for side in zip(*images)] for images in values.values()]
    return np.mean([foreground - background for foreground, background in pooled])


@st.composite
def random_pairs(draw, least=1, most=6):
    """Pairs of several sizes and dtypes; half of the map values lie on the grid or next to it."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pairs = []
    for _ in range(draw(st.integers(least, most))):
        dtype = np.dtype(draw(st.sampled_from(DTYPES))).type
        shape = tuple(random.integers(1, 12, size=2))
        on_grid = random.choice(THRESHOLDS, size=shape).astype(dtype)
        beside = np.nextafter(on_grid, random.choice([0, 1], size=shape).astype(dtype))
        heatmap = np.choose(
            random.integers(4, size=shape), [on_grid, beside, *random.random((2, *shape)).astype(dtype)]
        )
        pairs.append((heatmap, random.choice([0, 1, 2, 255], size=shape), int(random.integers(1, 3))))
    return pairs


def filled(metric, pairs):
    for pair in pairs:
        metric.update(*pair)
    return metric


# --- mMIoU -----------------------------------------------------------------------------------------------------------


def test_counts_of_a_map_longer_than_a_block():
    random = np.random.default_rng(0)
    shape = (301, 700)  # three blocks and a rest
    heatmap = random.random(shape, dtype=np.float32)
    mask = random.choice([0, 1, 255], size=shape).astype(np.uint8)
    assert heatmap.size > 3 * functional._BLOCK
    np.testing.assert_array_equal(threshold_counts(heatmap, mask, 1), naive_counts(heatmap, mask, 1))
    (background, low), (foreground, high) = region_means(heatmap, mask, 1).tolist()
    assert (background, foreground) == (np.sum(mask == 0), np.sum(mask == 1))
    assert low == pytest.approx(heatmap[mask == 0].mean(dtype=np.float64), abs=1e-12)
    assert high == pytest.approx(heatmap[mask == 1].mean(dtype=np.float64), abs=1e-12)


@given(random_pairs(), st.sampled_from(["image", "pixel"]))
def test_mmiou_equals_loops(pairs, aggregate):
    result = filled(MeanMaxIoU(aggregate), pairs).compute()
    if not result["pairs"]:
        assert math.isnan(result["mmiou"])
        return
    score, curves, floor = naive_mmiou(pairs, aggregate)
    assert result["mmiou"] == pytest.approx(score, abs=1e-9)
    assert result["floor"] == pytest.approx(floor, abs=1e-9)
    assert result["thresholds"].keys() == result["per_class"].keys() == curves.keys()
    for label, curve in curves.items():
        at_threshold = curve[round(100 * result["thresholds"][label])]
        assert 100 * at_threshold == pytest.approx(100 * max(curve), abs=1e-9)
        assert result["per_class"][label] == pytest.approx(100 * max(curve), abs=1e-9)
    assert 0 <= result["mmiou"] <= 100


def test_the_best_threshold_may_be_better_by_one_pixel_in_a_million():
    counts = np.zeros((2, 102), np.int64)
    counts[:, :2], counts[:, 2] = 10**6, (10**6 - 1, 10**6)  # all, M > 0, M > 0.01
    metric = MeanMaxIoU()
    metric.add_counts(counts, 1)
    assert metric.compute()["thresholds"] == {1: 0.01}


@pytest.mark.parametrize("metric", PAIR_METRICS)
def test_absent_class_and_void_image_change_nothing(metric):
    pair = np.array([[0.9, 0.2, 0.5]]), np.array([[1, 0, 0]]), 1
    absent, void = (pair[0], pair[1], 2), (pair[0], np.full((1, 3), 99), 1)
    result = filled(metric(ignore_index=99), [absent, pair, void]).compute()
    left_out = result.pop("left_out")
    assert left_out["no_foreground"] == left_out["all_void"] == 1
    assert result.items() <= filled(metric(), [pair]).compute().items()


def test_image_that_is_all_foreground():
    mask, heatmap = np.ones((2, 3), int), np.full((2, 3), 0.25)
    iou = filled(MeanMaxIoU(), [(heatmap, mask, 1)]).compute()
    assert (iou["mmiou"], iou["floor"], iou["pairs"]) == (100.0, 100.0, 1)
    fmb = filled(MeanForegroundMinusBackground(), [(heatmap, mask, 1)]).compute()
    assert math.isnan(fmb["mfmb"]) and fmb["per_class"] == {}
    assert fmb["left_out"] == {"all_void": 0, "no_foreground": 0, "no_background": 1}


@pytest.mark.parametrize("metric", [*PAIR_METRICS, TextContrast])
def test_a_class_whose_pixels_are_ignored_is_refused(metric):
    """As in masks of 0 and 255. Counted as class and as ignored, its pixels would give a wrong mFMB."""
    maps, mask = np.array([[[0.9, 0.2, 0.5]]] * 2), np.array([[255, 0, 0]])
    item = (maps, mask, [255, 0]) if metric is TextContrast else (maps[0], mask, 255)
    with pytest.raises(ValueError, match="255 is the value of ignored pixels: set another ignore_index"):
        metric().update(*item)
    metric(ignore_index=-1).update(*item)


def test_the_lowest_of_thresholds_that_differ_by_rounding_alone():
    """
    IoUs of three images: 0.3, 0.2 and 0.1 up to a threshold of 0.5, then 0.1, 0.2 and 0.3, whose sum is rounded up.
    """
    assert 0.1 + 0.2 + 0.3 > 0.3 + 0.2 + 0.1
    metric, low = MeanMaxIoU(), np.arange(102) <= 51
    for background, foreground in ((0, np.where(low, 3, 1)), (0, 2), (np.where(low, 20, 0), 3)):
        counts = np.zeros((2, 102), int)
        counts[0], counts[1] = background, foreground
        counts[1, 0] = 10
        metric.add_counts(counts, 1)
    assert metric.compute()["thresholds"] == {1: 0.0}


# --- mFMB ------------------------------------------------------------------------------------------------------------


@given(random_pairs(), st.sampled_from(["image", "pixel"]))
def test_mfmb_equals_loops(pairs, aggregate):
    result = filled(MeanForegroundMinusBackground(aggregate), pairs).compute()
    if result["pairs"]:
        assert result["mfmb"] == pytest.approx(naive_mfmb(pairs, aggregate), abs=1e-12)


# --- what both share -------------------------------------------------------------------------------------------------


@given(random_pairs(least=2, most=8), st.randoms(use_true_random=False), st.sampled_from(["image", "pixel"]))
def test_any_order_and_any_merge_give_the_same(pairs, random, aggregate):
    for metric in PAIR_METRICS:
        expected = filled(metric(aggregate), pairs).compute()
        shuffled = random.sample(pairs, len(pairs))
        cut = random.randint(0, len(pairs))
        left, right = filled(metric(aggregate), shuffled[:cut]), filled(metric(aggregate), shuffled[cut:])
        right = pickle.loads(pickle.dumps(right))  # as it comes from another process
        left.merge(right)
        for name, value in left.compute().items():
            assert value == pytest.approx(expected[name], rel=1e-12, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("metric", PAIR_METRICS)
def test_torch_numpy_and_lists_are_equal(metric):
    random = np.random.default_rng(4)
    heatmap, mask = random.random((6, 5)), random.integers(0, 2, (6, 5))
    heatmap = np.rint(64 * heatmap) / 64  # exact in bfloat16 too
    expected = filled(metric(), [(heatmap, mask, 1)]).compute()
    inputs = [
        (torch.tensor(heatmap, requires_grad=True).bfloat16(), torch.tensor(mask), torch.tensor(1)),
        (heatmap.tolist(), mask.tolist(), np.int64(1)),
        (np.asfortranarray(heatmap), mask.astype(np.uint8), 1),
    ]
    for pair in inputs:
        assert filled(metric(), [pair]).compute() == expected


@pytest.mark.parametrize("metric", [*PAIR_METRICS, PointingGame, TextContrast])
def test_a_batch_equals_its_items_and_reset_removes_them(metric):
    random = np.random.default_rng(5)
    masks = random.integers(0, 4, (6, 4, 5))
    heatmaps = random.random((6, 4, 5) if metric is not TextContrast else (6, 3, 4, 5))
    class_ids = random.integers(1, 4, 6) if metric is not TextContrast else np.tile([1, 2, 3], (6, 1))
    expected = filled(metric(), zip(heatmaps, masks, class_ids.tolist())).compute()
    found = metric()
    found.update(heatmaps, masks, class_ids)
    assert found.compute() == expected
    found.reset()
    found.update(torch.tensor(heatmaps), torch.tensor(masks), torch.tensor(class_ids))
    assert found.compute() == expected


# --- text contrast ---------------------------------------------------------------------------------------------------


def smooth_maps(number, size=(120, 160), seed=0):
    """(T, H, W) float32 in [0, 1], as a grid of patches enlarged."""
    maps = torch.rand(number, 8, 10, generator=torch.Generator().manual_seed(seed))
    return resize_and_normalize(maps, size).numpy()


def naive_contrast(maps, masks, labels):
    """{label: c with each partner}, by scikit-learn's AUC of the unrounded maps."""
    contrast = {label: [] for label in labels}
    void = (masks == 255).any(0)
    for i, j in itertools.combinations(range(len(maps)), 2):
        inside = [(masks[k] == labels[k]) & ~void for k in (i, j)]
        only = inside[0] & ~inside[1], inside[1] & ~inside[0]
        if only[0].any() and only[1].any():
            chosen = only[0] | only[1]
            c = [roc_auc_score(own[chosen], maps[k][chosen]) for k, own in zip((i, j), only)]
            contrast[labels[i]].append(np.mean(c))
            contrast[labels[j]].append(np.mean(c))
    return {label: values for label, values in contrast.items() if values}


@pytest.mark.parametrize("seed", range(2))
def test_text_contrast_equals_the_sorted_auc(seed):
    """Overlapping classes, void in one mask only, a class without pixels, one hidden in another; two images."""
    random, metric, values = np.random.default_rng(seed), TextContrast(), {}
    for labels in ([3, 1, 7, 4], [1, 3, 9, 4]):
        maps = smooth_maps(4, seed=int(random.integers(1000)))
        coarse = random.random((4, 6, 8)) < [[[0.4]], [[0.3]], [[0.2]], [[0.0]]]
        masks = np.where(coarse, np.array(labels)[:, None, None], 0).repeat(20, 1).repeat(20, 2)
        masks[0, :5] = 255
        masks[2] = np.where(masks[1] == labels[1], masks[2], 0)  # inside the second class
        metric.update(torch.tensor(maps), torch.tensor(masks), torch.tensor(labels))
        for label, one in naive_contrast(maps, masks, labels).items():
            values.setdefault(label, []).extend(one)
    result = metric.compute()
    per_class = {label: 100 * np.mean(one) for label, one in sorted(values.items())}
    assert result["per_class"] == pytest.approx(per_class, abs=1e-3)
    assert result["text_contrast"] == pytest.approx(np.mean(list(per_class.values())), abs=1e-3)
    assert (result["images"], result["left_out"]) == (2, {"fewer_than_two_classes": 0})


def test_text_contrast_by_hand():
    # Classes 1 and 2: M_1 is higher at 1 in 1 of 2 pairs, ties half -> 0.75; M_2 is higher at 2 in none of 2 -> 0.
    maps = np.array([[[0.9, 0.9, 0.1, 0.0]], [[0.5, 0.2, 0.1, 1.0]], [[0.3, 0.3, 0.3, 0.3]]])
    result = TextContrast()
    result.update(maps, np.array([[1, 2, 2, 0]]), [1, 2, 3])
    assert result.compute() == {
        "text_contrast": 37.5,
        "per_class": {1: 37.5, 2: 37.5},  # and none of class 3, which has no pixel
        "images": 1,
        "left_out": {"fewer_than_two_classes": 0},
    }
    result.update(maps[:2], np.array([[1, 2, 255, 0]]), [1, 2])  # the tie alone, and 0
    assert result.compute()["text_contrast"] == (37.5 + 25) / 2


@given(st.integers(0, 2**32 - 1), st.sampled_from(DTYPES))
def test_a_map_that_does_not_see_the_text_has_exactly_50(seed, dtype):
    random, metric = np.random.default_rng(seed), TextContrast()
    for _ in range(3):
        shape = tuple(random.integers(2, 12, size=2))
        maps = np.broadcast_to(random.random(shape).astype(dtype), (3, *shape))
        masks = random.integers(0, 2, (3, *shape)) * np.array([1, 2, 3])[:, None, None]
        metric.update(maps, masks, [1, 2, 3])
    assert {*metric.compute()["per_class"].values()} <= {50.0}


@pytest.mark.parametrize(
    ("mask", "labels"),
    [
        ([[1, 0]], [1]),  # one class
        ([[255, 2]], [1, 2]),  # the other's are void
        ([[[1, 1]], [[2, 0]]], [1, 2]),  # one inside the other
    ],
)
def test_images_with_fewer_than_two_classes_are_left_out_and_counted(mask, labels):
    metric = TextContrast()
    metric.update(np.array([[[0.9, 0.1]], [[0.2, 0.7]]])[: len(labels)], np.array(mask), labels)
    result = metric.compute()
    assert math.isnan(result["text_contrast"]) and result["left_out"] == {"fewer_than_two_classes": 1}


# --- mAP -------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 5), st.integers(1, 12))
def test_average_precision_equals_sklearn_with_ties(seed, images, classes, levels):
    random = np.random.default_rng(seed)
    scores = random.integers(0, levels, (images, classes)) / levels - 0.5
    presence = random.integers(0, 2, (images, classes))
    metric = MultiLabelAveragePrecision()
    metric.update(scores, presence)
    result = metric.compute()
    shown = np.flatnonzero(presence.any(0))
    expected = {k + 1: 100 * average_precision_score(presence[:, k], scores[:, k]) for k in shown}
    assert result["per_class"] == pytest.approx(expected, abs=1e-9)
    assert result["left_out"] == {"no_positive": classes - len(expected)}
    if expected:
        assert result["map"] == pytest.approx(np.mean(list(expected.values())), abs=1e-9)


def test_average_precision_in_batches_any_order_and_merged_is_the_same_to_the_bit():
    random = np.random.default_rng(6)
    scores = random.random((40, 3)).astype(np.float32).round(1)
    presence = random.integers(0, 2, (40, 3))
    whole = MultiLabelAveragePrecision()
    whole.update(torch.tensor(scores), torch.tensor(presence))
    order = random.permutation(40)
    merged, part, empty = (MultiLabelAveragePrecision() for _ in range(3))
    merged.update(scores[order[:7]], presence[order[:7]].astype(bool))
    part.update(scores[order[7:]], presence[order[7:]].astype(float))
    for other in (empty, part):
        merged.merge(other)
    assert merged.compute() == whole.compute()


def test_reliability_by_hand():
    bins = reliability(np.array([0, 0.2, 0.25, 0.25, 1.0, 0.9]), np.array([0, 0, 1, 0, 1, 0], bool), 4)
    np.testing.assert_allclose(bins["mean"], [0.1, 0.25, np.nan, 0.95])
    np.testing.assert_allclose(bins["shown"], [0, 0.5, np.nan, 0.5])
    assert bins["items"].tolist() == [2, 2, 0, 2]


# ---- mIoU of label maps ----


def naive_miou(images, num_classes, first, threshold=None):
    """IoU, accuracy and mIoU in loops over pixels; pixels not above the threshold are background."""
    hits, either, own = ([0] * num_classes for _ in range(3))
    for prediction, reference, confidence in images:
        for p, r, c in zip(prediction.ravel(), reference.ravel(), confidence.ravel()):
            p = p if threshold is None or c > threshold else 0
            if r != 255:
                own[r] += 1
                for k in {p, r}:
                    either[k] += 1
                    hits[k] += p == r
    classes = [k for k in range(first, num_classes) if either[k]]
    iou = {k: 100 * hits[k] / either[k] for k in classes}
    accuracy = {k: 100 * hits[k] / own[k] for k in classes if own[k]}
    return np.mean(list(iou.values())), iou, accuracy, 100 * sum(hits[first:]) / sum(own[first:])


def label_maps(count=4, num_classes=5, seed=0):
    draws = np.random.default_rng(seed)
    for _ in range(count):
        shape = tuple(draws.integers(3, 12, 2))
        # The last class is only predicted.
        reference = draws.choice([*range(num_classes - 1), 255], shape).astype(np.uint8)
        confidence = draws.choice([0, 0.29, 0.3, 0.31, 1], shape).astype(np.float32)  # some at a threshold
        yield draws.integers(0, num_classes, shape), reference, confidence


@pytest.mark.parametrize("background", [True, False])
def test_miou_equals_a_loop_over_pixels(background):
    images = list(label_maps())
    if not background:
        images = [(p, np.where(r == 0, 255, r), c) for p, r, c in images]
    plain, swept = MeanIoU(5, background), MeanIoU(5, background)
    for prediction, reference, confidence in images:
        plain.update(prediction, torch.tensor(reference))
        swept.update(torch.tensor(prediction), reference, torch.tensor(confidence))
    miou, iou, accuracy, pixel_accuracy = naive_miou(images, 5, 0 if background else 1)
    found = plain.compute()
    assert found["miou"] == pytest.approx(miou) and found["pixel_accuracy"] == pytest.approx(pixel_accuracy)
    assert found["per_class"] == pytest.approx(iou) and found["per_class_accuracy"] == pytest.approx(accuracy)
    assert found["per_class"][4] == 0 and 4 not in found["per_class_accuracy"]
    curve = swept.curve()
    for index in (0, 29, 30, 31, 100):
        miou, iou, _, _ = naive_miou(images, 5, 0 if background else 1, np.float32(THRESHOLDS[index]))
        assert curve[index] == pytest.approx(miou)
        at_threshold = MeanIoU(5, background)
        at_threshold.add_counts(swept.areas[..., [index]])
        assert at_threshold.compute()["per_class"] == pytest.approx(iou)


@pytest.mark.parametrize("confidence", [1.5, -0.1, math.nan])
def test_a_confidence_beyond_0_and_1_is_refused(confidence):
    """It would be counted for the class with the next id."""
    labels = np.array([[1, 2]])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        MeanIoU(5).update(labels, labels, np.array([[confidence, 0.2]]))


@pytest.mark.parametrize(
    ("background", "prediction", "reference", "floor"),
    [
        (True, [3, 3, 1, 1], [1, 1, 1, 2], 37.5),  # 3/4 of class 1, nothing of class 2
        # 1/4 of class 1: the mean leaves the background out, but its pixels count
        (False, [1, 1, 1, 1], [1, 0, 0, 2], 12.5),
    ],
)
def test_the_floor_of_miou_is_the_best_map_of_one_class(background, prediction, reference, floor):
    metric = MeanIoU(5, background)
    metric.update(np.array([prediction]), np.array([reference]))
    assert (metric.compute()["floor"], metric.compute()["floor_class"]) == (floor, 1)


# ---- label maps of typed texts ----


def test_label_maps_by_hand_without_void_pixels():
    metric, other = LabelMaps(ignore_index=9), LabelMaps(ignore_index=9)
    # Of two shown classes the first has two of three pixels and one too many; the second, whose pixels are partly
    # void, has none.
    metric.update(torch.tensor([[0, 0, -1, 0, 2, 0]]), np.array([[[5, 5, 5, 0, 0, 0]], [[0, 0, 0, 6, 6, 9]]]), [5, 6])
    first = {"iou": 100 * (2 / 4 + 0) / 2, "absent": 20.0, "kept": 50.0, "classes": 2, "images": 1}
    for label_map, masks, class_ids in (
        ([[1, -1]], [[[9, 9]], [[6, 0]]], [5, 6]),  # no pixel counts that is void in a mask
        ([[0, 0]], np.zeros((0, 1, 2)), []),  # an image without a class
    ):
        metric.update(np.array(label_map), np.array(masks), class_ids)
    assert metric.compute() == pytest.approx(first)
    other.update(np.array([[0, 1, -1]]), np.array([[[5, 0, 0]], [[0, 9, 6]]]), [5, 6])
    assert other.compute()["kept"] == 50.0  # the only pixel of the second segment is void
    metric.merge(other)
    expected = {"iou": 100 * (2 / 4 + 1) / 4, "absent": 10.0, "kept": 50.0, "classes": 4, "images": 2}
    assert metric.compute() == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", METRICS)
def test_a_metric_without_data_computes(name):
    """A score is NaN or None, and None in a report, which JSON can hold."""
    (metric,) = make_metrics([name])
    if name == "segmentation":
        names = {"class_ids": [1], "synonyms": [["a"]], "class_names": ["a"]}
        dataset = SimpleNamespace(**names, background=True, background_texts=[], void=255)
        model = SimpleNamespace(processor=SimpleNamespace(patch_size=8))
        engine = SimpleNamespace(encode=len, multi_scale=False)
        metric.prepare(SimpleNamespace(dataset=dataset, num_images=2, model=model, engine=engine))
    scores, rows = metric.scores_and_rows()
    json.dumps(scores, allow_nan=False)
    columns = {*metric.columns} - {"floor_class", "thresholds"}
    assert rows == {} and all(scores.get(column) is None for column in columns)


@pytest.mark.parametrize("name", ["mMIoU", "text_contrast", "stuff_contrast", "label_maps", "pointing_game"])
def test_void_pixels_are_those_of_the_data_set(name):
    """65535 in one of more than 254 classes, of which 255 is one."""
    (metric,) = make_metrics([name])
    dataset = SimpleNamespace(void=65535, stuff=(1,), supercategories=None)
    metric.prepare(SimpleNamespace(dataset=dataset, texts=SimpleNamespace(text_embeds=torch.eye(2))))
    assert metric.ignore_index == 65535


# ---- presence ----


def above(values, others):
    """The share of pairs whose first is greater, ties half."""
    return np.mean([(value > other) + (value == other) / 2 for value in values for other in others])


def test_presence_of_each_class_in_loops():
    draws = np.random.default_rng(0)
    values, shown = draws.random((7, 5)), draws.random((7, 5)) < 0.4
    shown[:, 0], shown[:, 1] = True, False  # classes without an AUC of their own
    metric = Presence()
    for row in range(7):
        metric.update(values[[row]], shown[[row]])
    found = metric.compute()
    assert found["auc_hard"] is found["passed_hard"] is None  # it is not known which classes are alike
    of_class = [above(values[shown[:, k], k], values[~shown[:, k], k]) for k in (2, 3, 4)]
    assert found["auc_of_classes"] == pytest.approx(np.mean(of_class))
    assert found["auc"] == pytest.approx(above(values[shown], values[~shown]))


@pytest.mark.parametrize("shown", [0, 1])
def test_calibration_cannot_be_measured_where_the_prior_is_0_or_1(shown):
    metric = Presence()
    metric.update(np.array([[1.0, 0.3], [0.0, 0.9]]), np.full((2, 2), shown))
    found = metric.compute()
    assert found["prior"] == shown and found["calibration_error"] is found["reliability"] is found["auc"] is None
    (table,) = metric.tables(found)  # without the table of the bins
    assert ("passed" in table) != shown and "AUC" not in table  # without rows that cannot be measured
    metric.update(np.array([[1.0, 0.0]]), np.array([[1, 0]]))  # certain, at a prior between 0 and 1
    found = metric.compute()
    assert 0 <= found["calibration_error"] <= 1 and sum(row["pairs"] for row in found["reliability"]) == 6


@pytest.mark.parametrize(("number", "nearest"), [(4, 1), (24, 2)])
def test_like_classes_are_the_nearest_tenth(number, nearest):
    vectors = torch.nn.functional.normalize(torch.randn(number, 8, generator=torch.Generator().manual_seed(0)))
    like = like_classes(None, vectors)
    for index, cosines in enumerate((vectors @ vectors.T).tolist()):
        order = sorted(set(range(number)) - {index}, key=lambda other: -cosines[other])
        assert np.flatnonzero(like[index]).tolist() == sorted(order[:nearest])
