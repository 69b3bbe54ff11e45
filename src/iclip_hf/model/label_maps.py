"""
Label maps from the raw maps of any method: the segments of an image, and the competition that benchmarks measure.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .presence import MIN_PRESENCE, is_present
from .similarity import check_finite, min_max_normalize, resize_maps, stretch


BACKGROUND_LABEL = -1  # label of a pixel that shows none of the texts
# Weight of the logit of the presence beside the standardized map, chosen on the even images of ADE20K and COCO.
PRESENCE_WEIGHT = 0.1


@torch.no_grad()
def segments(
    raw_maps: torch.Tensor,
    size: tuple[int, int],
    presence: torch.Tensor | None = None,
    min_presence: float = MIN_PRESENCE,
    threshold: float | Sequence[float] | None = 0.5,
    background: Sequence[int] = (),
) -> torch.Tensor:
    """
    Assigns each pixel to one of the texts that are present, or to the background: `(H, W)` int64, the index of the
    text or [`BACKGROUND_LABEL`]. A text competes for the pixels of its mask. Where masks overlap, the pixel gets the
    text with the highest sum of its standardized map and a tenth of the logit of its presence.

    The standardized map is the mean of two: by the mean and the standard deviation of the text's own values over the
    image, and by the mean and the root mean square of these of all texts that are present. By the first alone, a small
    thing would take as many pixels as a large one. By the second alone, a text whose cosines are higher everywhere
    would cover the others.

    Args:
        raw_maps (`torch.Tensor` of shape `(T, h, w)`): raw maps of one image.
        size (`tuple[int, int]`): height and width of the result in pixels.
        presence (`torch.Tensor` of shape `(T,)`, *optional*), min_presence (`float`): as for [`Explanation`].
        threshold (`float` or T of them, *optional*): of the masks; None makes each mask the whole image.
        background: indices of texts that describe the background. They compete, and their pixels are background.
    """
    check_finite(raw_maps)
    thresholds = threshold if np.ndim(threshold) else [threshold] * len(raw_maps)
    present, offsets = [True] * len(raw_maps), [0.0] * len(raw_maps)
    if presence is not None:
        present = [is_present(value, min_presence) for value in presence.tolist()]
        offsets = (PRESENCE_WEIGHT * presence.float().clamp(1e-4, 1 - 1e-4).logit()).tolist()
    labels = torch.full(size, BACKGROUND_LABEL, device=raw_maps.device)
    best = torch.full(size, -torch.inf, dtype=torch.float32, device=raw_maps.device)
    texts = [
        text for text in zip(range(len(raw_maps)), raw_maps, offsets, thresholds, present, strict=True) if text[-1]
    ]
    # Maps are enlarged one at a time, and twice, so the memory does not grow with the number of texts.
    moments = [torch.std_mean(resize_maps(raw_map, size), correction=0) for _, raw_map, *_ in texts]
    stds, means = torch.tensor(moments, dtype=torch.float32).reshape(-1, 2).unbind(1)
    stds = stds.clamp(min=1e-12)
    std_of_all = stds.square().mean().sqrt()
    for (index, raw_map, offset, least, _), std, mean in zip(texts, stds, means):
        values = resize_maps(raw_map, size)
        # The mean of all texts is left out: it is the same for each.
        standardized = ((values - mean) / std + values / std_of_all) / 2 + offset
        won = standardized > best
        if least is not None:
            won &= min_max_normalize(values) > least
        labels.masked_fill_(won, BACKGROUND_LABEL if index in background else index)
        best = torch.where(won, standardized, best)
    return labels


@torch.no_grad()
def label_map(
    raw_maps: torch.Tensor,
    size: tuple[int, int] | None = None,
    *,
    classes: Sequence[int] | None = None,
    threshold: float | None = None,
    logit_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds the text with the highest raw value at each pixel, as benchmarks of segmentation do with all classes of a
    data set. Maps are enlarged one at a time (bicubic, as in Eq. 4), so the memory does not grow with the number of
    texts.

    The confidence of a pixel is the map of its best text, stretched to [0, 1] over the image. With `logit_scale`, it
    is the probability of the best text: a softmax of the scaled values over all texts, which needs cosines.

    Args:
        raw_maps (`torch.Tensor` of shape `(T, h, w)`): raw maps of one image.
        size (`tuple[int, int]`, *optional*): height and width of the label map in pixels; (h, w) if not given.
        classes (T integers, *optional*): class of each text; 0, ..., T - 1 if not given. Texts of one class are
            synonyms. [`BACKGROUND_LABEL`] marks texts that describe the background.
        threshold (`float`, *optional*): a pixel whose confidence is not greater belongs to the background.

    Returns:
        `tuple`: class of each pixel `(H, W)`, int64, and the confidence `(H, W)`, float32, in [0, 1].
    """
    check_finite(raw_maps)
    classes = torch.arange(len(raw_maps)) if classes is None else torch.as_tensor(classes, dtype=torch.long)
    size = tuple(raw_maps.shape[1:] if size is None else size)
    best = resize_maps(raw_maps[0], size)  # one map at a time, so that equal maps stay equal
    winner = torch.zeros(size, dtype=torch.int32, device=best.device)
    values, total = torch.empty_like(best), torch.zeros_like(best)  # total: sum of exp(logit - highest logit so far)
    for index, raw in enumerate(raw_maps):
        resize_maps(raw, size, out=values)
        higher = values > best
        winner.masked_fill_(higher, index)
        if logit_scale is not None:
            below = (values - best).abs_().mul_(-logit_scale).exp_()
            total = torch.where(higher, total * below + 1, total + below)
        torch.maximum(best, values, out=best)
    if logit_scale is not None:
        confidence = 1 / total
    else:
        confidence = stretch(best, *best.aminmax(), out=best)
    labels = classes.to(best.device)[winner.long()]
    if threshold is not None:
        labels[confidence <= threshold] = BACKGROUND_LABEL
    return labels, confidence
