"""Analyses of the paper: semantic shift (Fig. 3, Tables 6 and 7), and recognition against interpretability (Fig. 9)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..data.segmentation import SegmentationSample
from ..modeling_iclip import ICLIPImageFeatures
from ..models.explainable import ExplainableModel, Pooling
from ..models.loading import load


# Foreground shares of an image, low exclusive and high inclusive: the rows of Table 6. The last row is for all images. The last
# row of the paper is the mean of its other rows only if they have 3, 49 and 48 % of VOC's images, which fits shares of background.
# So the first row of the paper corresponds to the third row here, and the third to the first.
SHARES = ((0.0, 0.25), (0.25, 0.75), (0.75, 1.0), (0.0, 1.0))


@dataclass(frozen=True)
class ChannelMatch:
    """
    The patches of an image that the channels of its pooled vector match (Fig. 3): for each channel, the index of the patch with the
    nearest value, row-major, and the pooled value, `(P,)` each; and height and width of the patch grid.
    """

    tokens: np.ndarray
    values: np.ndarray
    grid: tuple[int, int]


@dataclass(frozen=True)
class ShiftRow:
    """
    A row of Table 6, for images whose foreground share is in (low, high]: the mean number of channels whose patch moves from
    background to foreground (`b2f`), from foreground to background (`f2b`), or does neither (`same`); None without images.
    """

    low: float
    high: float
    images: int
    b2f: float | None
    f2b: float | None
    same: float | None


@dataclass(frozen=True)
class SemanticShift:
    """
    Result of [`semantic_shift`].

    Attributes:
        rows (`list[ShiftRow]`): one row for each of `SHARES` (Table 6).
        foreground_channels (`dict[str, float]`): for each pooling, the mean number of channels whose patch lies on the
            foreground (Table 7).
        images (`int`): number of counted images.
        left_out (`int`): number of images without foreground.
    """

    rows: list[ShiftRow]
    foreground_channels: dict[str, float]
    images: int
    left_out: int

    def table(self) -> str:
        """Returns Tables 6 and 7 in Markdown."""
        lines = ["| foreground | images | B2F | F2B | same |", "|---|---|---|---|---|"]
        for row in self.rows:
            counts = " | ".join("" if count is None else f"{count:.1f}" for count in (row.b2f, row.f2b, row.same))
            lines.append(f"| ({row.low:g}, {row.high:g}] | {row.images} | {counts} |")
        lines += ["", "| pooling | channels on the foreground |", "|---|---|"]
        return "\n".join(lines + [f"| {name} | {count:.1f} |" for name, count in self.foreground_channels.items()])


@dataclass(frozen=True)
class Relation:
    """
    Recognition against interpretability (Fig. 9): the K classes that have both scores, the scores `(K,)`, and their Pearson correlation
    in [-1, 1], which is NaN for fewer than two classes or a constant score.
    """

    names: list[str]
    recognition: np.ndarray
    interpretability: np.ndarray
    correlation: float


def match_channels(pooled: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """
    Finds the patch `(N, P)` whose value is nearest to the pooled value `(P,)`, for each channel (Section 3.1). Returns indices `(P,)`.
    The first of equal patches counts.
    """
    return (patches - pooled).abs().argmin(0)


@torch.no_grad()
def channel_matches(model, image: Image.Image) -> dict[str, ChannelMatch]:
    """
    Matches the channels of one image for each pooling, in the space where patches and texts are compared.

    Args:
        model ([`ExplainableModel`]): or anything that [`load`] takes.
        image: an RGB image.

    Returns:
        `dict` by pooling:

        - `"average"` and `"max"` of the patch embeddings.
        - `"own"`, the pooled vector of the branch that draws the maps; absent if this branch pools similarities.
        - `"class_token"`; of SigLIP and ResNets, the output of the attention pooling. Absent if the branch that draws the maps pools
          patch tokens, because the class token of another branch is in another space.
    """
    model = load(model)
    features = model.get_image_features(model.processor(images=[image])["pixel_values"])
    patches = features.patch_embeds[0].flatten(0, 1)
    return {
        name: ChannelMatch(match_channels(vector, patches).numpy(force=True), vector.numpy(force=True), features.grid)
        for name, vector in _poolings(model, features).items()
    }


def semantic_shift(
    model, samples: Iterable[SegmentationSample], before: str = "max", after: str = "average"
) -> SemanticShift:
    """
    Counts the channels that move between foreground and background when one pooling replaces another (Section 3.1, Tables 6
    and 7). B2F channels match the background with `before` and the foreground with `after`. One image is in memory at a time.

    A patch is foreground if most of its labelled pixels belong to a class. Void pixels are ignored.

    Args:
        model ([`ExplainableModel`]): or anything that [`load`] takes.
        samples: samples of a segmentation data set.
        before, after (`str`): poolings as in [`channel_matches`]. The defaults are those of Table 6.

    Raises:
        `ValueError`: the model does not have one of the poolings.
    """
    model = load(model)
    sums = np.zeros((len(SHARES), 4), np.int64)  # images, b2f, f2b, same
    on_foreground: dict[str, int] = {}
    left_out = 0
    for sample in samples:
        foreground, labelled = _foreground(sample)
        share = foreground.sum() / max(labelled.sum(), 1)
        if share == 0:
            left_out += 1
            continue
        matches = channel_matches(model, sample.image)
        tokens = foreground_tokens(foreground, labelled, matches["average"].grid)
        on = {name: tokens[match.tokens] for name, match in matches.items()}
        for pooling in (before, after):
            if pooling not in on:
                raise ValueError(
                    f"Expected a pooling that this model has, one of {sorted(on)}, got {pooling!r}: choose one of them."
                )
        b2f, f2b = int((~on[before] & on[after]).sum()), int((on[before] & ~on[after]).sum())
        counts = (1, b2f, f2b, len(on[before]) - b2f - f2b)
        for row, (low, high) in enumerate(SHARES):
            if low < share <= high:
                sums[row] += counts
        for name, flags in on.items():
            on_foreground[name] = on_foreground.get(name, 0) + int(flags.sum())
    rows = [
        ShiftRow(*share, count, *((float(total / count) if count else None) for total in totals))
        for share, (count, *totals) in zip(SHARES, sums.tolist())
    ]
    images = rows[-1].images
    return SemanticShift(rows, {name: count / images for name, count in on_foreground.items()}, images, left_out)


def foreground_tokens(foreground: np.ndarray, labelled: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """
    Returns whether more than half of the labelled pixels of a patch belong to a class, `(h * w,)` boolean, from the pixels of a class and
    those that are not void, `(H, W)` boolean.
    """
    pixels = torch.from_numpy(np.stack([foreground & labelled, labelled])).double()
    area, total = F.adaptive_avg_pool2d(pixels, grid).flatten(1).numpy()
    return 2 * area > total


def relation(recognition: Mapping[str, float], interpretability: Mapping[str, float]) -> Relation:
    """
    Compares two scores by class name, such as average precision and mIoU of an evaluation. Classes without both, or with NaN, are left
    out.
    """
    shared = [name for name in recognition if name in interpretability]
    names = [name for name in shared if not math.isnan(recognition[name] + interpretability[name])]
    x, y = (np.array([scores[name] for name in names], dtype=float) for scores in (recognition, interpretability))
    varied = len(names) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return Relation(names, x, y, float(np.corrcoef(x, y)[0, 1]) if varied else math.nan)


def _poolings(model: ExplainableModel, features: ICLIPImageFeatures) -> dict[str, torch.Tensor]:
    """Returns the pooled vectors `(P,)` of one image, in the space of its unit patch embeddings."""
    patches, own = features.patch_embeds[0], features.map_image_embeds
    own = (features.image_embeds if own is None else own)[0]
    vectors = {"class_token": own} if model.map_pooling is Pooling.ONE_QUERY else {}
    vectors |= {"average": patches.mean((0, 1)), "max": patches.amax((0, 1))}
    return vectors | ({"own": own} if model.map_pooling is not Pooling.SIMILARITIES else {})


def _foreground(sample: SegmentationSample) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels of any class, and the pixels that are not void."""
    foreground, void = np.zeros(sample.size, bool), np.zeros(sample.size, bool)
    for label in sample.labels:
        mask = sample.mask(label)
        foreground |= mask == label
        void |= mask == sample.void
    return foreground, foreground | ~void
