"""Label maps by the class with the highest map at each pixel, as benchmarks of segmentation compute them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..model.label_maps import BACKGROUND_LABEL
from ..model.similarity import resize_maps, stretch
from .window_maps import WindowMaps


@torch.no_grad()
def argmax_label_map(
    raw_maps: torch.Tensor,
    size: tuple[int, int],
    classes: Sequence[int],
    threshold: float | None = None,
    logit_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds the text with the highest raw value at each pixel, as benchmarks of segmentation do with all classes of a
    data set. Maps are enlarged one at a time (bicubic, as in Eq. 4), so the memory does not grow with the number of
    texts.

    The confidence of a pixel is the map of its best text, stretched to [0, 1] over the image. With `logit_scale`, the
    confidence is the probability of the best text: a softmax of the scaled values over all texts. The raw maps must
    then be cosines.

    Args:
        raw_maps (`torch.Tensor` of shape `(T, h, w)`): raw maps of one image.
        size (`tuple[int, int]`): height and width of the label map in pixels.
        classes (T integers): class of each text. Texts of one class are synonyms. [`BACKGROUND_LABEL`] marks texts
            that describe the background.
        threshold (`float`, *optional*): a pixel is background if its confidence is not above this threshold.
        logit_scale (`float`, *optional*): scale of the softmax.

    Returns:
        `tuple`: class of each pixel `(H, W)`, int64, and the confidence `(H, W)`, float32, in [0, 1].
    """
    values = torch.empty(size, dtype=torch.float32, device=raw_maps.device)
    # In a batch, rounding could make equal maps different.
    winner, best, confidence = _best_texts((resize_maps(raw, size, out=values) for raw in raw_maps), logit_scale)
    if confidence is None:
        confidence = stretch(best, *best.aminmax(), out=best)
    label_map = torch.as_tensor(classes, dtype=torch.long, device=best.device)[winner.long()]
    if threshold is not None:
        label_map[confidence <= threshold] = BACKGROUND_LABEL
    return label_map, confidence


def _best_texts(
    maps: Iterable[torch.Tensor], logit_scale: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    Returns the index of the highest map at each pixel (the first of equal ones), its value and, with `logit_scale`,
    its probability, `(H, W)` each.
    """
    best = None
    for index, values in enumerate(maps):
        if best is None:
            best, winner = values.clone(), torch.zeros_like(values, dtype=torch.int32)
            total = torch.zeros_like(best)  # sum of exp(logit - highest logit so far)
        higher = values > best
        winner.masked_fill_(higher, index)
        if logit_scale is not None:
            ratio = (values - best).abs_().mul_(-logit_scale).exp_()  # of the lower to the higher exp(logit)
            total = torch.where(higher, total * ratio + 1, total + ratio)
        torch.maximum(best, values, out=best)
    return winner, best, None if logit_scale is None else 1 / total


@torch.no_grad()
def protocol_label_map(
    maps: WindowMaps,
    classes: Sequence[int],
    threshold: float | None,
    logit_scale: float,
    min_area: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds the class with the highest probability at each pixel, as papers do, see [`~protocols.Protocol`]. Arguments
    and results are those of [`argmax_label_map`], with two differences:

    - A pixel is background if its probability is below the threshold, but not if both are equal.
    - A class needs more than `min_area`, a share of the pixels that are not background. The pixels of a smaller class
      go to the best of the other classes. Their confidence is the probability of that class among all texts.
    """
    classes = torch.as_tensor(classes, dtype=torch.long, device=maps.maps.device)
    winner, best, confidence = _best_texts(maps.enlarged(), logit_scale)
    label_map = classes[winner.long()]
    if min_area:
        areas = torch.bincount(label_map.flatten() + 1, minlength=int(classes.max()) + 2)[1:]  # without the background
        is_kept = (classes == BACKGROUND_LABEL) | (areas > min_area * areas.sum())[classes]
        kept_texts = is_kept.nonzero().flatten()
        label_map.fill_(BACKGROUND_LABEL)
        if len(kept_texts):
            winner, best_kept, _ = _best_texts(maps.enlarged(kept_texts.tolist()), logit_scale)
            label_map = classes[kept_texts][winner.long()]
            confidence *= (logit_scale * (best_kept - best)).exp()
    if threshold is not None:
        label_map[confidence < threshold] = BACKGROUND_LABEL
    return label_map, confidence
