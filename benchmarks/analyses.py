"""The paper's analyses: semantic shift (Tables 6 and 7), pooled channels (Fig. 3), recognition against
interpretability (Fig. 9); and regions as prompts for SAM: whether their boxes and points are on the objects.

python benchmarks/analyses.py shift --dataset voc2012 --data-root VOC
python benchmarks/analyses.py channels dog.jpg cat.jpg --output channels.png
python benchmarks/analyses.py relation results.json --output relation.png    # results of `iclip evaluate --output`
python benchmarks/analyses.py prompts --dataset coco2017 --data-root DATA/coco100 --split train2017 --odd
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from measuring import command_line, needed, table
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from iclip_hf import ICLIPConfig, load
from iclip_hf.data.segmentation import SegmentationSample, load_segmentation
from iclip_hf.evaluation.results import read_results
from iclip_hf.explainers import make_explainer
from iclip_hf.model.engine import Engine
from iclip_hf.model.explanation import Explanation
from iclip_hf.model.images import load_image
from iclip_hf.model.regions import find_regions, positive_points


with needed():
    from matplotlib.figure import Figure

# Foreground shares of an image, low exclusive and high inclusive: the rows of Table 6. The last row is for all images.
# In the paper, the last row is the mean of the others only if these have 3, 49 and 48 % of VOC's images. This fits
# shares of background. So the first row of the paper corresponds to the third row here, and its third to the first.
SHARES = ((0.0, 0.25), (0.25, 0.75), (0.75, 1.0), (0.0, 1.0))
# Safe for colour-blind readers (Okabe and Ito).
BLUE, ORANGE = "#0072B2", "#D55E00"


class ChannelMatch(NamedTuple):
    """
    For each channel of a pooled vector: the index of the patch with the nearest value, row-major, and the pooled
    value, both `(P,)`.
    """

    tokens: np.ndarray
    values: np.ndarray
    grid: tuple[int, int]  # height and width of the patch grid


def match_channels(pooled: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """
    Finds the patch `(N, P)` whose value is nearest to the pooled value `(P,)`, for each channel (Section 3.1). Returns
    indices `(P,)`. The first of equal patches counts.
    """
    return (patches - pooled).abs().argmin(0)


@torch.no_grad()
def channel_matches(model, image: Image.Image) -> dict[str, ChannelMatch]:
    """
    Matches the channels of one image for each pooling, in the space where patches and texts are compared: `"average"`
    and `"max"` of the patch embeddings; `"own"`, the pooled vector of the map branch, unless this branch pools
    similarities; `"class_token"` (of SigLIP and ResNets the output of the attention pooling), unless the map branch
    pools patch tokens, because the class token of another branch is in another space.
    """
    features = model.get_image_features(model.processor(images=[image])["pixel_values"])
    patches, pooled = features.patch_embeds[0], features.map_image_embeds
    pooled = (features.image_embeds if pooled is None else pooled)[0]
    config = getattr(model.network, "config", None)
    pools_class_token, pools_similarities = not model.pools_patches, False
    if isinstance(config, ICLIPConfig):  # its map branch may have another pooling than its scores
        pools_class_token, pools_similarities = config.pooling == "class_token", config.max_over == "similarity"
    vectors = {"class_token": pooled} if pools_class_token else {}
    vectors |= {"average": patches.mean((0, 1)), "max": patches.amax((0, 1))}
    vectors |= {} if pools_similarities else {"own": pooled}
    matches = {}
    for name, vector in vectors.items():
        tokens = match_channels(vector, patches.flatten(0, 1))
        matches[name] = ChannelMatch(tokens.numpy(force=True), vector.numpy(force=True), features.grid)
    return matches


def semantic_shift(
    model, samples: Iterable[SegmentationSample], before: str = "max", after: str = "average"
) -> tuple[list[tuple], dict[str, float]]:
    """
    Counts the channels that move between foreground and background when one pooling replaces another (Section 3.1).

    Returns:
        `tuple` of

        - for each of `SHARES`, the number of images, and the mean number of channels whose patch moves from background
          to foreground (B2F), from foreground to background (F2B), or does neither; NaN without images (Table 6)
        - for each pooling, the mean number of channels whose patch lies on the foreground (Table 7)

        Images without foreground are left out.
    """
    sums = np.zeros((len(SHARES), 4), np.int64)  # images, B2F, F2B, same
    on_foreground: dict[str, int] = {}
    for sample in samples:
        masks = [sample.mask(label) for label in sample.class_ids] or [np.zeros(sample.size, np.uint8)]
        foreground = np.any([(mask > 0) & (mask != sample.void) for mask in masks], 0)
        labelled = foreground | ~np.any([mask == sample.void for mask in masks], 0)
        if not foreground.any():
            continue
        matches = channel_matches(model, sample.image)
        tokens = foreground_tokens(foreground, labelled, matches["average"].grid)
        flags = {name: tokens[match.tokens] for name, match in matches.items()}  # of channels on the foreground
        b2f = int((~flags[before] & flags[after]).sum())
        f2b = int((flags[before] & ~flags[after]).sum())
        for row, (low, high) in enumerate(SHARES):
            if low < foreground.sum() / labelled.sum() <= high:
                sums[row] += (1, b2f, f2b, len(flags[before]) - b2f - f2b)
        for name, pooling_flags in flags.items():
            on_foreground[name] = on_foreground.get(name, 0) + int(pooling_flags.sum())
    rows = [(count, *(total / count if count else math.nan for total in totals)) for count, *totals in sums.tolist()]
    num_images = rows[-1][0]
    return rows, {name: count / num_images for name, count in on_foreground.items()}


def prompt_hits(explanation: Explanation, sample: SegmentationSample) -> list[tuple[int, bool, bool]]:
    """
    Compares the regions of the shown classes, which are the texts of `explanation`, with the objects, the connected
    parts of a mask. Returns for each region: its rank among the regions of its class, whether its box has an IoU of at
    least 0.5 with the box of an object, and whether its first positive point lies on the class.
    """
    hits = []
    for index, label in enumerate(sample.class_ids):
        mask = sample.mask(label) == label
        heatmap, predicted = explanation.map_and_mask(index)
        objects = find_regions(mask.astype(np.float32), mask, min_weight=0)
        for rank, region in enumerate(find_regions(heatmap.numpy(), predicted.numpy())):
            ((x, y),) = positive_points(heatmap.numpy(), region)
            box_hits = any(box_iou(region.box, target.box) >= 0.5 for target in objects)
            hits.append((rank, box_hits, bool(mask[y, x])))
    return hits


def box_iou(box: Sequence[int], other: Sequence[int]) -> float:
    """Returns the intersection over union of boxes (xmin, ymin, xmax, ymax)."""
    width, height = (min(box[end], other[end]) - max(box[end - 2], other[end - 2]) for end in (2, 3))
    shared = max(0, width) * max(0, height)
    return shared / (sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (box, other)) - shared)


def foreground_tokens(foreground: np.ndarray, labelled: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """
    Returns for each patch whether more than half of its labelled pixels are foreground, `(h * w,)` boolean.
    `foreground` and `labelled` mark pixels, `(H, W)` boolean; pixels that are not labelled are void.
    """
    pixels = torch.from_numpy(np.stack([foreground & labelled, labelled])).double()
    area, total = F.adaptive_avg_pool2d(pixels, grid).flatten(1).numpy()
    return 2 * area > total


def channel_scatter(images: Sequence[Image.Image], matches: Sequence[Mapping[str, ChannelMatch]]) -> Figure:
    """
    Plots the patches that the channels of pooled vectors match (Fig. 3). Each row is an image, each column a pooling,
    and each point a channel. A point lies in the channel's patch, and its area is proportional to the magnitude of the
    pooled value.
    """
    heights = [image.height / image.width for image in images]
    figure = Figure(figsize=(2.8 * len(matches[0]), 2.8 * sum(heights) + 0.7), layout="constrained")
    axes = figure.subplots(len(images), len(matches[0]), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, pooling in zip(axes[0], matches[0]):
        axis.set_title(pooling.replace("_", " "), fontsize=11)
    panels = [(image, match) for image, by_pooling in zip(images, matches) for match in by_pooling.values()]
    for axis, (image, match) in zip(axes.flat, panels):
        axis.axis("off")
        axis.imshow(image.convert("L").point(lambda gray: (gray + 255) // 2).convert("RGB"))
        # Roberts' R2 sequence spreads the points of a patch evenly over it, so that they do not hide each other.
        offsets = (np.arange(len(match.tokens))[:, None] * (0.5698402910, 0.7548776662)) % 1
        corners = np.stack(np.divmod(match.tokens, match.grid[1]), 1)
        y, x = ((corners + offsets) / match.grid * (image.height, image.width)).T - 0.5
        sizes = np.abs(match.values) / (np.abs(match.values).max() or 1)
        axis.autoscale(False)
        axis.scatter(x, y, s=40 * sizes, c=ORANGE, alpha=0.6, edgecolors="white", linewidths=0.3)
    return figure


def relation_plot(names: Sequence[str], x: np.ndarray, y: np.ndarray, method: str) -> Figure:
    """Plots recognition against interpretability (Fig. 9), a point for each class and the least-squares line."""
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axis = figure.subplots()
    axis.scatter(x, y, s=28, c=BLUE, alpha=0.8, linewidths=0)
    for name, *point in zip(names, x, y):
        axis.annotate(name, point, xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set(xlabel="average precision, %", ylabel=f"IoU at the best threshold, % ({method})")
    axis.set_title(f"{len(x)} classes, Pearson correlation {np.corrcoef(x, y)[0, 1]:.2f}", fontsize=11)
    ends = np.array([x.min(), x.max()])
    axis.plot(ends, np.poly1d(np.polyfit(x, y, 1))(ends), color=ORANGE, linestyle="--", linewidth=1.2)
    return figure


def shift(args: argparse.Namespace) -> None:
    dataset = load_segmentation(args.dataset, args.data_root, args.split)
    samples = tqdm(dataset[: args.limit], unit="image")
    rows, on_foreground = semantic_shift(load(args.model), samples)
    shares = [f"({low:g}, {high:g}]" for low, high in SHARES]
    rows = [[share, count, *(f"{mean:.1f}" for mean in means)] for share, (count, *means) in zip(shares, rows)]
    print(table(["foreground", "images", "B2F", "F2B", "same"], rows), end="\n\n")
    print(table(["pooling", "channels on the foreground"], [[name, f"{n:.1f}"] for name, n in on_foreground.items()]))


def prompts(args: argparse.Namespace) -> None:
    dataset, model = load_segmentation(args.dataset, args.data_root, args.split), load(args.model)
    engine = Engine(model, model.processor, make_explainer(model), templates=dataset.templates, refine=True)
    texts, hits, pairs = engine.encode(dataset.class_names), [], 0
    for sample in tqdm(dataset[1::2] if args.odd else dataset[: args.limit], unit="image"):
        shown = [label - 1 for label in sample.class_ids]
        (explanation,) = engine.run([engine.prepare(sample.image, sample.size, shown)], texts)
        hits += prompt_hits(replace(explanation, min_presence=0.0), sample)
        pairs += len(shown)
    rows = []
    for name, chosen in (("first of each class", [hit for hit in hits if hit[0] == 0]), ("all", hits)):
        shares = [f"{100 * np.mean([hit[part] for hit in chosen]):.1f}" for part in (1, 2)]
        rows.append([name, f"{len(chosen) / pairs:.2f}", *shares])
    print(table(["regions", "for each shown class", "boxes with IoU >= 0.5 %", "points on the class %"], rows))


def channels(args: argparse.Namespace) -> None:
    model, images = load(args.model), [load_image(path) for path in args.images]
    channel_scatter(images, [channel_matches(model, image) for image in images]).savefig(args.output, dpi=120)
    print(args.output)


def relation(args: argparse.Namespace) -> None:
    try:
        per_class = read_results(args.evaluation, "per_class")["per_class"]
    except (OSError, ValueError) as error:
        args.refuse(str(error))
    method = next(iter(per_class))
    # Both are missing if the file has results of other metrics.
    rows = [(row["name"], row.get("mAP", {}).get("AP"), row.get("mMIoU", {}).get("IoU")) for row in per_class[method]]
    rows = [row for row in rows if None not in row]
    if len(rows) < 2:
        args.refuse(f"{args.evaluation}: fewer than two classes have an AP and an IoU; measure mAP and mMIoU.")
    names, x, y = zip(*rows)
    relation_plot(names, np.array(x), np.array(y), method).savefig(args.output, dpi=120)
    print(args.output)


def main():
    parser = command_line(__doc__)
    analyses = parser.add_subparsers(required=True)
    for run in (shift, channels, relation, prompts):
        analysis = analyses.add_parser(run.__name__)
        analysis.set_defaults(run=run, refuse=analysis.error)
        if run in (shift, prompts):
            for name in ("--dataset", "--data-root"):
                analysis.add_argument(name, required=True)
            analysis.add_argument("--split")
            analysis.add_argument("--limit", type=int)
            if run is prompts:
                analysis.add_argument("--odd", action="store_true", help="only the images at odd positions")
        elif run is channels:
            analysis.add_argument("images", nargs="+")
        else:
            analysis.add_argument("evaluation", type=Path)
        if run is not relation:
            analysis.add_argument("--model", default="embedded")
        if run in (channels, relation):
            analysis.add_argument("--output", default=f"{run.__name__}.png")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
