"""mMIoU, mFMB and text contrast against own loops and other packages, and the memory of the metrics.

    python benchmarks/bench_metrics.py

Prints three Markdown tables. The contenders get the same inputs in turn, on one thread, and must agree on every value.
"""

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from measuring import command_line, cost, machine, medians, needed, ratio, table, take_turns

from iclip_hf.evaluation.functional import THRESHOLDS, contrast_counts, threshold_counts
from iclip_hf.evaluation.metrics import MeanForegroundMinusBackground, MeanMaxIoU, TextContrast
from iclip_hf.model.similarity import resize_and_normalize


with needed():
    from sklearn.metrics import roc_auc_score
    from torchmetrics.classification import BinaryPrecisionRecallCurve

SIZE = (480, 640)
LABEL, VOID = 1, 255


def make_pair(seed: int, grid: tuple[int, int] = (15, 20)) -> tuple[np.ndarray, np.ndarray]:
    """Returns a smooth map (H, W), float32, and a label mask (H, W), uint8, with one object in a void outline."""
    generator = torch.Generator().manual_seed(seed)
    heatmap = resize_and_normalize(torch.rand(1, *grid, generator=generator), SIZE)[0]
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
    """torchmetrics marks pixels with M >= t, and not M > t, so the thresholds are moved up to the next float."""
    heatmap, mask = torch.from_numpy(heatmap), torch.from_numpy(mask)
    target = torch.where(mask == VOID, -1, (mask == LABEL).long())
    above = torch.from_numpy(np.nextafter(THRESHOLDS.astype(np.float32), np.float32(2)))
    curve = BinaryPrecisionRecallCurve(above, ignore_index=-1, validate_args=False)
    curve.update(heatmap, target)
    (_, false_positives), (false_negatives, true_positives) = curve.confmat.permute(1, 2, 0).double().numpy()
    return true_positives / (true_positives + false_positives + false_negatives)


CONTENDERS = {
    "`iclip_hf`, one pass": iou_of_counts,
    "numpy, loop over 101 thresholds, tuned (`count_nonzero`, void cut away once)": iou_in_a_loop,
    "torchmetrics, `BinaryPrecisionRecallCurve` with 101 bins": iou_by_torchmetrics,
}


CLASSES = 3


def make_image(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Returns smooth maps (3, H, W) of three classes, float32, and a label mask (H, W), uint8, of these classes and
    background.
    """
    maps = np.stack([make_pair(3 * seed + k)[0] for k in range(CLASSES)])
    lowest = np.argmin([make_pair(10**6 + 4 * seed + k, grid=(6, 8))[0] for k in range(CLASSES + 1)], axis=0)
    return maps, lowest.astype(np.uint8)


def contrast_of_counts(maps, mask):
    partners, sums = contrast_counts(maps, mask, range(1, 1 + CLASSES))
    return sums / partners


def contrast_by_sklearn(maps, mask):
    sums = np.zeros(CLASSES)
    for pair in itertools.combinations(range(CLASSES), 2):
        chosen = np.isin(mask, [1 + k for k in pair])
        sums[list(pair)] += np.mean([roc_auc_score(mask[chosen] == 1 + k, maps[k][chosen]) for k in pair])
    return sums / (CLASSES - 1)


CONTRAST_CONTENDERS = {
    "`iclip_hf`, histograms": contrast_of_counts,
    "scikit-learn, `roc_auc_score` in a loop": contrast_by_sklearn,
}


def bench_speed(what: str, contenders: dict[str, Callable], inputs: list[tuple], tolerance: float) -> None:
    ours, taken = next(iter(contenders)), {name: [] for name in contenders}
    for arguments in inputs:
        for function in contenders.values():
            np.testing.assert_allclose(function(*arguments), contenders[ours](*arguments), rtol=0, atol=tolerance)
        calls = {name: partial(function, *arguments) for name, function in contenders.items()}
        for name, (seconds,) in take_turns(calls, 1).items():
            taken[name].append(seconds)
    rows = [[name, 1000 * median, f"{ratio(taken, name, ours):.2f}"] for name, median in medians(taken).items()]
    print(f"{what}, {SIZE[0]}x{SIZE[1]}, float32, one thread\n")
    print(table(["implementation", "median, ms", "times slower, median"], rows), end="\n\n")


def counting(images: int) -> Callable[[], object]:
    """Returns a function that updates all three metrics with `images` images."""
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


def bench_memory(images: int) -> None:
    rows = [[number, *cost(counting(number))] for number in (images // 10, images)]
    print(f"Maps and masks of {SIZE[0]}x{SIZE[1]}, 20 classes\n")
    print(table(["mMIoU, mFMB and text contrast of so many images", "seconds", "MiB"], rows))


def main():
    parser = command_line(__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--images", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine('torchmetrics')}\n")
    pairs = [make_pair(seed) for seed in range(args.pairs)]
    images = [make_image(seed) for seed in range(args.pairs)]
    bench_speed("IoU of one pair at the 101 thresholds of mMIoU", CONTENDERS, pairs, 1e-6)
    bench_speed(f"Text contrast of one image with {CLASSES} classes", CONTRAST_CONTENDERS, images, 1e-4)
    bench_memory(args.images)


if __name__ == "__main__":
    main()
