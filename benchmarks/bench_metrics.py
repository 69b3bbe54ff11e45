"""mMIoU, mFMB and text contrast against what a user would write or pick instead, and the memory of the metrics.

    python benchmarks/bench_metrics.py

Prints three Markdown tables. The contenders take the same inputs in turn, on one thread, and must agree on every value.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import datasets
import evaluate
import numpy as np
import torch
from measuring import command_line, cost, machine, table
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F
from torchmetrics.classification import BinaryPrecisionRecallCurve

from iclip_hf.evaluation.metrics import (
    THRESHOLDS,
    MeanForegroundMinusBackground,
    MeanMaxIoU,
    TextContrast,
    contrast_counts,
    threshold_counts,
)


SIZE = (480, 640)
LABEL, VOID = 1, 255


def make_pair(seed: int, grid: tuple[int, int] = (15, 20)) -> tuple[np.ndarray, np.ndarray]:
    """A smooth map (H, W), float32, and a label mask (H, W), uint8, with one object in a void outline."""
    generator = torch.Generator().manual_seed(seed)
    heatmap = F.interpolate(torch.rand(1, 1, *grid, generator=generator), SIZE, mode="bicubic", align_corners=False)[
        0, 0
    ]
    heatmap = (heatmap - heatmap.min()) / (heatmap.max() - heatmap.min())
    top, left = (int(torch.randint(20, side // 2, (), generator=generator)) for side in SIZE)
    mask = np.zeros(SIZE, np.uint8)
    mask[top - 4 : top + 154, left - 4 : left + 204] = VOID
    mask[top : top + 150, left : left + 200] = LABEL
    return heatmap.numpy(), mask


def iou_of_counts(heatmap, mask):
    background, foreground = threshold_counts(heatmap, mask, LABEL)
    return foreground[1:] / (foreground[0] + background[1:])


def iou_in_a_loop(heatmap, mask):
    valid = mask != VOID
    heatmap, foreground = heatmap[valid], mask[valid] == LABEL
    inside, number = heatmap[foreground], np.count_nonzero(foreground)
    iou = []
    for threshold in THRESHOLDS.astype(heatmap.dtype):
        intersection = np.count_nonzero(inside > threshold)
        iou.append(intersection / (number + np.count_nonzero(heatmap > threshold) - intersection))
    return np.array(iou)


def iou_by_torchmetrics(heatmap, mask):
    """Its binned curve marks M >= t, so the thresholds are moved up to the next float."""
    heatmap, mask = torch.from_numpy(heatmap), torch.from_numpy(mask)
    target = torch.where(mask == VOID, -1, (mask == LABEL).long())
    above = torch.from_numpy(np.nextafter(THRESHOLDS.astype(np.float32), np.float32(2)))
    curve = BinaryPrecisionRecallCurve(above, ignore_index=-1, validate_args=False)
    curve.update(heatmap, target)
    (_, false_positives), (false_negatives, true_positives) = curve.confmat.permute(1, 2, 0).double().numpy()
    return true_positives / (true_positives + false_positives + false_negatives)


# name, function, and how many times fewer pairs the slow ones get
CONTENDERS = (
    ("`iclip_hf.evaluation.metrics`, one pass", iou_of_counts, 1),
    ("numpy, loop over 101 thresholds, tuned (`count_nonzero`, void cut away once)", iou_in_a_loop, 1),
    ("torchmetrics, `BinaryPrecisionRecallCurve` with 101 bins", iou_by_torchmetrics, 10),
)


CLASSES = 3


def make_image(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth maps (3, H, W) of three classes, float32, and a label mask (H, W), uint8, that they share with background."""
    maps = np.stack([make_pair(3 * seed + k)[0] for k in range(CLASSES)])
    lowest = np.argmin([make_pair(10**6 + 4 * seed + k, grid=(6, 8))[0] for k in range(CLASSES + 1)], axis=0)
    return maps, lowest.astype(np.uint8)


def contrast_of_counts(maps, mask):
    partners, sums = contrast_counts(maps, mask, range(1, 1 + CLASSES))
    return sums / partners


def contrast_by(auc):
    """The same by a function (values, of the first class) -> AUC of sorted values, pair by pair."""

    def contrast(maps, mask):
        sums = np.zeros(CLASSES)
        for pair in itertools.combinations(range(CLASSES), 2):
            chosen = np.isin(mask, [1 + k for k in pair])
            sums[list(pair)] += np.mean([auc(maps[k][chosen], mask[chosen] == 1 + k) for k in pair])
        return sums / (CLASSES - 1)

    return contrast


CONTRAST_CONTENDERS = (
    ("`iclip_hf.evaluation.metrics`, histograms", contrast_of_counts, 1),
    ("scikit-learn, `roc_auc_score` in a loop", contrast_by(lambda values, first: roc_auc_score(first, values)), 10),
)


def bench_speed(what: str, contenders, pairs: int, make=make_pair, tolerance: float = 1e-6) -> None:
    (ours_name, ours_function, _), *_ = contenders
    seconds = {name: {} for name, _, _ in contenders}
    for seed in range(pairs):
        pair = make(seed)
        expected = ours_function(*pair)
        for name, function, rarity in contenders:
            if seed % rarity:
                continue
            start = time.perf_counter()
            found = function(*pair)
            seconds[name][seed] = time.perf_counter() - start
            if not np.allclose(found, expected, rtol=0, atol=tolerance):
                raise RuntimeError(f"{name} computes another value for input {seed}.")
    ours = seconds[ours_name]
    print(f"{what}, {SIZE[0]}x{SIZE[1]}, float32, one thread\n")
    rows = []
    for name, times in seconds.items():
        ratios = [times[seed] / ours[seed] for seed in times]
        low, high = np.quantile(ratios, [0.1, 0.9])
        median = 1000 * statistics.median(times.values())
        rows.append([name, len(times), median, f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"])
    print(table(["implementation", "inputs", "median, ms", "times slower, median (10 % to 90 %)"], rows), end="\n\n")


def counting(images: int) -> Callable[[], object]:
    """All three metrics over so many images."""
    pool = [make_pair(seed) for seed in range(8)]

    def measure():
        metrics, contrast = [MeanMaxIoU(), MeanForegroundMinusBackground()], TextContrast()
        for image in range(images):
            heatmap, mask = pool[image % len(pool)]
            label = 1 + image % 20
            for metric in metrics:
                metric.update(np.roll(heatmap, image), np.where(mask == LABEL, label, mask).astype(np.uint8), label)
            contrast.update([heatmap, np.roll(heatmap, image)], np.where(mask == LABEL, label, 30), [label, 30])

    return measure


def storing(images: int) -> Callable[[], object]:
    """What a metric of `evaluate` does by itself: it keeps every pixel until the end."""
    pool = [make_pair(seed) for seed in range(8)]
    metric = StoresPixels()

    def measure():
        for image in range(images):
            heatmap, mask = pool[image % len(pool)]
            metric.add(prediction=heatmap, reference=mask)
        metric.compute()

    return measure


class StoresPixels(evaluate.Metric):
    def _info(self):
        features = {
            "predictions": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
            "references": datasets.Sequence(datasets.Sequence(datasets.Value("uint8"))),
        }
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features))

    def _compute(self, predictions, references):
        return {"images": len(predictions)}


def bench_memory(images: int) -> None:
    rows = []
    for name, make, number in (
        ("`iclip_hf.evaluation.metrics`", counting, 100),
        ("`iclip_hf.evaluation.metrics`", counting, images),
        ("a metric of `evaluate` that stores pixels", storing, 100),
    ):
        seconds, memory = cost(make, number)
        rows.append([name, number, seconds, f"{memory:.0f}"])
    print(f"Maps and masks of {SIZE[0]}x{SIZE[1]}, 20 classes\n")
    print(table(["mMIoU, mFMB and text contrast", "images", "seconds", "MiB"], rows))


def main():
    parser = command_line(__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--images", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine('torchmetrics', 'evaluate')}\n")
    bench_speed("IoU of one pair at the 101 thresholds of mMIoU", CONTENDERS, options.pairs)
    bench_speed(
        f"Text contrast of one image with {CLASSES} classes",
        CONTRAST_CONTENDERS,
        options.pairs,
        make_image,
        tolerance=1e-4,
    )
    bench_memory(options.images)


if __name__ == "__main__":
    main()
