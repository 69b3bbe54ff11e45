"""Computes the label map of an image from the raw maps of any method."""

from collections.abc import Sequence

import numpy as np
import torch

from .presence import MIN_PRESENCE, is_present
from .similarity import check_finite, min_max_normalize, resize_maps


BACKGROUND_LABEL = -1  # label of background pixels
# Weight of the logit of the presence; the standardized map has the weight 1. Chosen on the even images of ADE20K and
# COCO.
PRESENCE_WEIGHT = 0.1


@torch.no_grad()
def label_map(
    raw_maps: torch.Tensor,
    size: tuple[int, int],
    presence: torch.Tensor | None = None,
    min_presence: float = MIN_PRESENCE,
    threshold: float | Sequence[float] | None = 0.5,
    background: Sequence[int] = (),
) -> torch.Tensor:
    """
    Assigns each pixel to one of the texts that are present, or to the background. Returns `(H, W)` int64: the index of
    the text, or [`BACKGROUND_LABEL`]. A text competes for the pixels of its mask. Where masks overlap, the text with
    the highest sum wins the pixel: its standardized map plus a tenth of the logit of its presence.

    The standardized map is the mean of two. The first is standardized by the mean and the standard deviation of the
    text's own map. The second is standardized by the maps of all present texts: by their mean, and by the root mean
    square of their standard deviations. With the first alone, a small thing would win as many pixels as a large one.
    With the second alone, a text whose cosines are higher everywhere would cover the others.

    Args:
        raw_maps (`torch.Tensor` of shape `(T, h, w)`): raw maps of one image.
        size (`tuple[int, int]`): height and width of the result in pixels.
        presence (`torch.Tensor` of shape `(T,)`, *optional*), min_presence (`float`): as in [`Explanation`].
        threshold (`float` or T of them, *optional*): threshold of the masks; with None, a mask is the whole image.
        background (list of `int`): indices of texts that describe the background. They compete like the others, and
            the pixels that they win are background.
    """
    check_finite(raw_maps)
    thresholds = threshold if np.ndim(threshold) else [threshold] * len(raw_maps)
    present, offsets = [True] * len(raw_maps), [0.0] * len(raw_maps)
    if presence is not None:
        present = [is_present(value, min_presence) for value in presence.tolist()]
        offsets = (PRESENCE_WEIGHT * presence.float().clamp(1e-4, 1 - 1e-4).logit()).tolist()
    labels = torch.full(size, BACKGROUND_LABEL, device=raw_maps.device)
    highest = torch.full(size, -torch.inf, dtype=torch.float32, device=raw_maps.device)
    all_texts = zip(range(len(raw_maps)), present, thresholds, strict=True)
    texts = [index for index, is_shown, _ in all_texts if is_shown]
    # Each map is enlarged twice, one map at a time, so that the memory does not grow with the number of texts.
    moments = [torch.std_mean(resize_maps(raw_maps[index], size), correction=0) for index in texts]
    stds, means = torch.tensor(moments, dtype=torch.float32).reshape(-1, 2).unbind(1)
    stds = stds.clamp(min=1e-12)
    common_std = stds.square().mean().sqrt()
    for index, std, mean in zip(texts, stds, means):
        values = resize_maps(raw_maps[index], size)
        # The common mean is left out, because it is the same for each text.
        sums = ((values - mean) / std + values / common_std) / 2 + offsets[index]
        won = sums > highest
        if thresholds[index] is not None:
            won &= min_max_normalize(values) > thresholds[index]
        labels.masked_fill_(won, BACKGROUND_LABEL if index in background else index)
        highest = torch.where(won, sums, highest)
    return labels
