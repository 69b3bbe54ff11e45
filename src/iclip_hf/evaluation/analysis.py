"""Why maps look as they do: semantic shift (Fig. 3, Tables 6 and 7), and recognition against interpretability (Fig. 9)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..data.segmentation import VOID, SegmentationSample
from ..explainers.adapters import ModelAdapter
from ..explainers.explainer import adapt
from ..modeling_iclip import ICLIPImageFeatures


# Shares of an image that is foreground, low exclusive and high inclusive: the rows of Table 6, the last for all images.
# The paper's own last row is the mean of its others only with 3, 49 and 48 % of VOC's images in them, which fits shares
# of background: its first row is to be compared with the third here, its third with the first.
SHARES = ((0.0, 0.25), (0.25, 0.75), (0.75, 1.0), (0.0, 1.0))


@dataclass(frozen=True)
class ChannelMatch:
    """
    Where in an image the channels of its pooled vector come from (Fig. 3).

    Attributes:
        tokens (`np.ndarray` of shape `(P,)`): for each channel the patch whose value is nearest, row-major on the grid.
        values (`np.ndarray` of shape `(P,)`): the pooled value of each channel.
        grid (`tuple[int, int]`): height and width of the patch grid.
    """

    tokens: np.ndarray
    values: np.ndarray
    grid: tuple[int, int]


@dataclass(frozen=True)
class ShiftRow:
    """
    A row of Table 6: of the images whose foreground share is in (low, high], the average number of channels whose patch
    goes from background to foreground, the other way, or stays on its side; None without images.
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
    Attributes:
        rows (`list[ShiftRow]`): one for each of `SHARES` (Table 6).
        foreground_channels (`dict[str, float]`): for each pooling the average number of channels whose patch lies on the
            foreground (Table 7).
        images (`int`): images counted.
        left_out (`int`): images without any foreground.
    """

    rows: list[ShiftRow]
    foreground_channels: dict[str, float]
    images: int
    left_out: int

    def table(self) -> str:
        """Tables 6 and 7 in Markdown."""
        lines = ["| foreground | images | B2F | F2B | same |", "|---|---|---|---|---|"]
        for row in self.rows:
            counts = " | ".join("" if count is None else f"{count:.1f}" for count in (row.b2f, row.f2b, row.same))
            lines.append(f"| ({row.low:g}, {row.high:g}] | {row.images} | {counts} |")
        lines += ["", "| pooling | channels on the foreground |", "|---|---|"]
        return "\n".join(lines + [f"| {name} | {count:.1f} |" for name, count in self.foreground_channels.items()])


@dataclass(frozen=True)
class Relation:
    """
    Recognition against interpretability (Fig. 9).

    Attributes:
        names (`list[str]`): the classes that have both.
        recognition, interpretability (`np.ndarray` of shape `(K,)`): their scores.
        correlation (`float`): Pearson's, in [-1, 1]; NaN for fewer than two classes or a constant score.
    """

    names: list[str]
    recognition: np.ndarray
    interpretability: np.ndarray
    correlation: float


def match_channels(pooled: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """
    For each channel the patch whose value is nearest to the pooled one (Section 3.1); the first of equals.

    Args:
        pooled (`torch.Tensor` of shape `(P,)`): one vector.
        patches (`torch.Tensor` of shape `(N, P)`): what it was pooled from.

    Returns:
        `torch.Tensor` of shape `(P,)`, indices of patches.
    """
    return (patches - pooled).abs().argmin(0)


@torch.no_grad()
def channel_matches(model, processor, image: Image.Image) -> dict[str, ChannelMatch]:
    """
    Matches the channels of one image under each pooling, in the space where patches and texts are compared.

    Args:
        model, processor: any kind of model that `iclip_hf.explainers` takes.
        image: an RGB image.

    Returns:
        `dict` by pooling: `"class_token"` (of SigLIP and ResNets the attention pooling's; absent where the branch that draws the
        maps pools patch tokens: the vector of another branch is in another space), `"average"` and `"max"` of the patch embeddings, `"own"` (the vector that the
        model's maps were trained with).
    """
    family = adapt(model, processor)
    features = _features(family, image)
    return {
        name: ChannelMatch(
            match_channels(vector, features.patch_embeds[0].flatten(0, 1)).numpy(force=True),
            vector.numpy(force=True),
            features.grid,
        )
        for name, vector in _poolings(family, features).items()
    }


@torch.no_grad()
def semantic_shift(
    model, processor, samples: Iterable[SegmentationSample], before: str = "max", after: str = "average"
) -> SemanticShift:
    """
    Counts how many channels go from foreground to background, and back, when one pooling takes the place of another
    (Section 3.1, Tables 6 and 7): B2F channels lie on the background under `before` and on the foreground under `after`.
    One image is in memory at a time.

    A patch is foreground if most of its labelled pixels belong to a class; void pixels count nowhere.

    Args:
        model, processor: any kind of model that `iclip_hf.explainers` takes.
        samples: of a segmentation data set.
        before, after (`str`): poolings as in [`channel_matches`]. The defaults are those of Table 6.

    Raises:
        `ValueError`: for a pooling that the model does not have.
    """
    family = adapt(model, processor)
    sums = np.zeros((len(SHARES), 4), np.int64)  # images, b2f, f2b, same
    on_foreground: dict[str, int] = {}
    left_out = 0
    for sample in samples:
        foreground, labelled = _foreground(sample)
        share = foreground.sum() / max(labelled.sum(), 1)
        if share == 0:
            left_out += 1
            continue
        features = _features(family, sample.image)
        tokens = torch.from_numpy(foreground_tokens(foreground, labelled, features.grid)).to(
            features.patch_embeds.device
        )
        on = {
            name: tokens[match_channels(vector, features.patch_embeds[0].flatten(0, 1))]
            for name, vector in _poolings(family, features).items()
        }
        for pooling in (before, after):
            if pooling not in on:
                raise ValueError(f"Expected a pooling that this model has, one of {sorted(on)}, got {pooling!r}.")
        b2f, f2b = int((~on[before] & on[after]).sum()), int((on[before] & ~on[after]).sum())
        counts = (1, b2f, f2b, len(on[before]) - b2f - f2b)
        for row, (low, high) in enumerate(SHARES):
            if low < share <= high:
                sums[row] += counts
        for name, flags in on.items():
            on_foreground[name] = on_foreground.get(name, 0) + int(flags.sum())
    rows = [ShiftRow(*share, int(row[0]), *_average(row[1:], row[0])) for share, row in zip(SHARES, sums)]
    images = rows[-1].images
    return SemanticShift(rows, {name: count / images for name, count in on_foreground.items()}, images, left_out)


def foreground_tokens(foreground: np.ndarray, labelled: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """
    Which patches are foreground.

    Args:
        foreground, labelled (`np.ndarray` of shape `(H, W)`, boolean): pixels of a class, and pixels that count.
        grid (`tuple[int, int]`): height and width of the patch grid that the whole image is resized to.

    Returns:
        `np.ndarray` of shape `(h * w,)`, boolean: more than half of the patch's labelled pixels are of a class.
    """
    pixels = torch.from_numpy(np.stack([foreground & labelled, labelled])).double()
    area, total = F.adaptive_avg_pool2d(pixels, grid).flatten(1).numpy()
    return 2 * area > total


def relation(recognition: Mapping[str, float], interpretability: Mapping[str, float]) -> Relation:
    """
    Compares two scores class by class, such as average precision and mIoU of an evaluation.

    Args:
        recognition, interpretability: score by class name. Classes that lack one of them, or have NaN, are left out.
    """
    names = [
        name
        for name in recognition
        if name in interpretability and not math.isnan(recognition[name] + interpretability[name])
    ]
    x, y = (np.array([scores[name] for name in names], dtype=float) for scores in (recognition, interpretability))
    varied = len(names) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return Relation(names, x, y, float(np.corrcoef(x, y)[0, 1]) if varied else math.nan)


def _features(family: ModelAdapter, image: Image.Image) -> ICLIPImageFeatures:
    return family.encode_image(family.processor(images=[image])["pixel_values"])


def _poolings(family: ModelAdapter, features: ICLIPImageFeatures) -> dict[str, torch.Tensor]:
    """Pooled vectors `(P,)` of one image, beside its unit patch embeddings."""
    patches, own = features.patch_embeds[0], features.map_image_embeds
    vectors = {"average": patches.mean((0, 1)), "max": patches.amax((0, 1))}
    if family.pools_one_vector:
        vectors["own"] = (features.image_embeds if own is None else own)[0]
    if family.draws_by_class_token:
        vectors["class_token"] = vectors["own"]
    return vectors


def _foreground(sample: SegmentationSample) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of any class, and pixels that count: of a class or background."""
    foreground, void = np.zeros(sample.size, bool), np.zeros(sample.size, bool)
    for label in sample.labels:
        mask = sample.mask(label)
        foreground |= mask == label
        void |= mask == VOID
    return foreground, foreground | ~void


def _average(sums: np.ndarray, count: int) -> list[float | None]:
    return [float(value / count) if count else None for value in sums]
