"""Open-vocabulary semantic segmentation: mIoU of label maps over a data set, as in its papers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ...model.label_maps import BACKGROUND_LABEL
from ...model.similarity import resize_maps, stretch
from ...model.windows import WholeImage, mean_of_windows, sliding_windows
from ..functional import THRESHOLDS, area_counts
from ..protocols import protocol_settings
from ..window_maps import WindowMaps, resized
from .metric import EvaluatedImage, Metric


# Short side of images under sliding windows, in pixels, as in SCLIP and its successors.
SHORT_SIDE = 336
# Options that a protocol sets if they are not given.
_PROTOCOL_OPTIONS = ("window", "stride", "logit_scale", "threshold")


class MeanIoU:
    """
    mIoU of label maps: TP / (TP + FP + FN) of each class over the pixels of all images, averaged over the classes.

    Args:
        num_classes (`int`): number of classes K, with the background; class ids are 0..K-1.
        background (`bool`): whether the background, class 0, is one of the classes of the mean.
        ignore_index (`int`, defaults to 255): value of the pixels of the reference that are ignored.

    Example:
        >>> metric = MeanIoU(num_classes=2)
        >>> metric.update(np.array([[1, 1, 0]]), np.array([[1, 0, 0]]))
        >>> metric.compute()["miou"]
        50.0
    """

    def __init__(self, num_classes: int, background: bool = True, ignore_index: int = 255):
        self.num_classes, self.background, self.ignore_index = num_classes, background, ignore_index
        self.areas = np.zeros((3, self.num_classes, 1), np.int64)

    def update(self, prediction, reference, confidence=None) -> None:
        """
        Adds one image. Arguments are those of [`area_counts`]; all images have confidences, or none.
        """
        self.add_counts(area_counts(prediction, reference, self.num_classes, self.ignore_index, confidence))

    def add_counts(self, areas: np.ndarray) -> None:
        """Adds one image by its counts from [`area_counts`]."""
        self.areas = self.areas + areas

    def curve(self) -> np.ndarray:
        """Returns the mIoU at each threshold, `(L,)`, percent (NaN without pixels)."""
        iou = self._iou()
        known = ~np.isnan(iou)
        return np.where(known, iou, 0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)

    def compute(self) -> dict:
        """
        Returns the scores of all images so far, at the lowest threshold.

        - **miou** -- mean over classes, percent (NaN without pixels).
        - **pixel_accuracy** -- share of the pixels with the right class, percent.
        - **per_class** -- {class id: IoU in percent}. A class that is neither predicted nor in the reference is left
          out.
        - **per_class_accuracy** -- {class id: share of its pixels that are predicted, percent}.
        - **floor**, **floor_class** -- the best mIoU of a map with one class everywhere, percent, and this class.
        - **pixels**, **left_out** -- number of pixels, and {"no_pixels": number of classes without any}.
        """
        first = 0 if self.background else 1
        in_both, _, referenced = self.areas[:, first:, 0]
        iou = self._iou()[:, 0]
        shown, pixels = np.flatnonzero(referenced), int(referenced.sum())
        floor = 100 * referenced / (pixels or math.nan) / (len(shown) or math.nan)
        return {
            "miou": float(self.curve()[0]),
            "pixel_accuracy": 100 * int(in_both.sum()) / (pixels or math.nan),
            "per_class": {first + int(k): float(iou[k]) for k in np.flatnonzero(~np.isnan(iou))},
            "per_class_accuracy": {first + int(k): 100 * int(in_both[k]) / int(referenced[k]) for k in shown},
            "floor": float(floor.max()),
            "floor_class": first + int(referenced.argmax()),
            "pixels": pixels,
            "left_out": {"no_pixels": int(np.isnan(iou).sum())},
        }

    def _iou(self) -> np.ndarray:
        """Returns the IoU of each class of the mean at each threshold, percent; NaN for a class without pixels."""
        in_both, predicted, referenced = self.areas[:, 0 if self.background else 1 :]
        union = predicted + referenced - in_both
        return 100 * in_both / np.where(union, union, np.nan)


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

    The confidence of a pixel is the map of its best text, stretched to [0, 1] over the image. With `logit_scale`, it
    is the probability of the best text: a softmax of the scaled values over all texts, which needs cosines.

    Args:
        raw_maps (`torch.Tensor` of shape `(T, h, w)`): raw maps of one image.
        size (`tuple[int, int]`): height and width of the label map in pixels.
        classes (T integers): class of each text. Texts of one class are synonyms. [`BACKGROUND_LABEL`] marks texts
            that describe the background.
        threshold (`float`, *optional*): a pixel whose confidence is not greater belongs to the background.

    Returns:
        `tuple`: class of each pixel `(H, W)`, int64, and the confidence `(H, W)`, float32, in [0, 1].
    """
    values = torch.empty(size, dtype=torch.float32, device=raw_maps.device)
    # One map at a time, so that equal maps stay equal.
    winner, best, confidence = _best_texts((resize_maps(raw, size, out=values) for raw in raw_maps), logit_scale)
    if confidence is None:
        confidence = stretch(best, *best.aminmax(), out=best)
    labels = torch.as_tensor(classes, dtype=torch.long, device=best.device)[winner.long()]
    if threshold is not None:
        labels[confidence <= threshold] = BACKGROUND_LABEL
    return labels, confidence


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
            below = (values - best).abs_().mul_(-logit_scale).exp_()
            total = torch.where(higher, total * below + 1, total + below)
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
    and results are those of [`argmax_label_map`], with two differences. A pixel is background if its probability is
    lower than the threshold, not if it is equal. And the pixels of a class below `min_area` go to the best of the
    other classes, with the probability of that class among all texts.
    """
    classes = torch.as_tensor(classes, dtype=torch.long, device=maps.maps.device)
    winner, best, confidence = _best_texts(maps.enlarged(), logit_scale)
    labels = classes[winner.long()]
    if min_area:
        areas = torch.bincount(labels.flatten() + 1, minlength=int(classes.max()) + 2)[1:]  # without the background
        stays = (classes == BACKGROUND_LABEL) | (areas > min_area * areas.sum())[classes]
        kept = stays.nonzero().flatten()
        labels.fill_(BACKGROUND_LABEL)
        if len(kept):
            winner, lower, _ = _best_texts(maps.enlarged(kept.tolist()), logit_scale)
            labels = classes[kept][winner.long()]
            confidence *= (logit_scale * (lower - best)).exp()
    if threshold is not None:
        labels[confidence < threshold] = BACKGROUND_LABEL
    return labels, confidence


class SlidingWindows(WholeImage):
    """
    Square windows, as benchmarks of segmentation have them. The value of a patch is its mean over the windows that
    contain it.

    Args:
        window, stride (`int`): side and distance of the windows in pixels, multiples of `patch_size`.
        patch_size (`int`): side of a patch in pixels.
    """

    def __init__(self, window: int, stride: int, patch_size: int):
        self.window, self.stride, self.patch_size = window, stride, patch_size

    def _positions(self, size: tuple[int, int]) -> list[tuple[slice, slice]]:
        return sliding_windows(size, (self.window,) * 2, (self.stride,) * 2)

    def views(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        return [pixel_values[..., rows, columns] for rows, columns in self._positions(pixel_values.shape[2:])]

    def join(self, maps: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        return mean_of_windows(maps, self._positions(size), size, self.patch_size)


class Segmentation(Metric):
    """
    The scores of [`MeanIoU`], where each pixel gets the class with the highest raw map among all classes of the data
    set, see [`argmax_label_map`]. `prepare` takes classes and background from the data set; without a data set, use
    [`MeanIoU`].

    If the data set has a background, it consists of the pixels whose confidence is not above a threshold, and of those
    where a text for the background is best. If neither a threshold nor such texts are given, the threshold is chosen
    on other images: the images at even positions take the best of 0, 0.01, ..., 1 for the images at odd positions, and
    the reverse.

    Args:
        window (`int`, *optional*): side in pixels of windows that slide over the image; the whole image if not given.
            Images then keep their proportions, with a short side of 336 pixels unless `image_size` says otherwise.
        stride (`int`, *optional*): distance in pixels of the windows; half of the window if not given.
        background: texts that describe the background; those of the data set's overrides if not given. Where such a
            text and a class have equal values, the background counts.
        threshold (`float` in [0, 1], *optional*): background threshold.
        logit_scale (`float`, *optional*): makes the confidence a probability, see [`argmax_label_map`].
        protocol (`str`, *optional*): takes the steps of a paper, and its values for the data set where options are not
            given. [`~iclip_hf.evaluation.protocols.protocol_settings`] has these, and the paper's method and class
            names, which are arguments of [`evaluate_model`] and `load_segmentation`.
    """

    name = "segmentation"
    columns = {
        "miou": ("mIoU %", 2),
        "pixel_accuracy": ("pixel accuracy %", 2),
        "floor": ("floor of mIoU %", 2),
        "floor_class": ("floor's class", None),
        "thresholds": ("background threshold", None),
    }
    legend = (
        "mIoU: overlap of label maps and masks over the pixels of all images, mean over the classes. Floor: the mIoU "
        "of one class everywhere."
    )
    rows = {"IoU": "per_class", "accuracy": "per_class_accuracy"}
    needs = frozenset()
    definition = "raw maps of all classes, bicubic to the image's size; the highest one counts"
    protocol_definition = (
        "image resized to int(factor * side + 0.5), bilinear without antialiasing; maps of windows averaged in "
        "pixels, bilinear to the image's size, PAMR there; softmax over all texts; the highest class counts"
    )

    def __init__(
        self,
        window: int | None = None,
        stride: int | None = None,
        background: Sequence[str] | None = None,
        threshold: float | None = None,
        logit_scale: float | None = None,
        protocol: str | None = None,
    ):
        super().__init__()
        self.window, self.stride = window, stride or (window and window // 2)
        self.background, self.threshold, self.logit_scale = background, threshold, logit_scale
        self.protocol, self.resolved = protocol, None
        if window and not protocol:
            self.image_size = {"shortest_edge": SHORT_SIDE}

    def prepare(self, run) -> None:
        dataset = run.dataset
        if self.protocol:
            self._resolve(run)
        self.background_texts = list(dataset.background_texts if self.background is None else self.background)
        if not dataset.background and (self.background_texts or self.threshold is not None):
            raise ValueError(f"Leave out texts and threshold of the background of {dataset.name!r}, which is void.")
        # Whether the background threshold is chosen on other images.
        self.sweeps = dataset.background and self.threshold is None and not self.background_texts
        if self.sweeps and run.count < 2:
            raise ValueError(
                "The background threshold cannot be chosen on other images than this one: give a threshold."
            )
        if self.window and run.engine.multi_scale:
            raise ValueError("Leave out window or multi_scale: each has windows of its own.")
        patch = run.model.processor.patch_size
        steps = (self.window, self.stride) if self.window and not self.protocol else ()
        if self.window and (any(step % patch for step in steps) or not 0 < self.stride <= self.window):
            raise ValueError(
                f"window and stride are multiples of the patch size of {patch} pixels, and the stride is at most the "
                f"window, not {self.window} and {self.stride}."
            )
        self.classes = [BACKGROUND_LABEL] * len(self.background_texts)
        self.classes += [label for label, texts in enumerate(dataset.synonyms) for _ in texts]
        texts = [*self.background_texts, *itertools.chain(*dataset.synonyms)]
        different = [*dict.fromkeys(texts)]  # a text of a class and of the background has one map
        self.text_indices = [different.index(text) for text in texts]
        self.encoded = run.engine.encode(different)
        self.new_iou = partial(MeanIoU, len(dataset.labels) + 1, dataset.background, dataset.void)
        super().prepare(run)

    def _resolve(self, run) -> None:
        """Takes the values of the protocol for the options that are not given."""
        size = run.engine.image_size or {}
        if run.engine.refine or run.engine.multi_scale or "height" in size:
            raise ValueError(
                "Leave out protocol, or else refine, multi_scale and image_size: a protocol has a refinement, windows "
                "and a size of its own."
            )
        given = {"short_side": size.get("shortest_edge"), **{name: getattr(self, name) for name in _PROTOCOL_OPTIONS}}
        given = {name: value for name, value in given.items() if value is not None}
        self.resolved = replace(protocol_settings(self.protocol, run.dataset.name), **given)
        for name in _PROTOCOL_OPTIONS:
            setattr(self, name, getattr(self.resolved, name))

    def run_model(self, images: list[EvaluatedImage]) -> list[dict[str, torch.Tensor | WindowMaps]]:
        """Returns raw maps of all texts `(T, h, w)` by method for each image; with a protocol, maps of its windows."""
        if self.protocol:
            return [self._window_maps(image) for image in images]
        pixel_values = torch.cat([image.prepared.pixel_values for image in images])
        windows = self.window and SlidingWindows(self.window, self.stride, self.run.model.processor.patch_size)
        method_maps = {
            method: engine.raw_maps(pixel_values, self.encoded, tiling=windows)[0][:, self.text_indices].cpu()
            for method, engine in self.run.engines.items()
        }
        return [dict(zip(method_maps, maps)) for maps in zip(*method_maps.values())]

    def _window_maps(self, image: EvaluatedImage) -> dict[str, WindowMaps]:
        processor, settings = self.run.model.processor, self.resolved
        cut = WindowMaps.cut(
            resized(image.sample.image, settings.short_side),
            self.window,
            self.stride,
            size=image.sample.size,
            dilations=settings.pamr_dilations,
        )
        pixel_values = processor(images=cut.views(processor.patch_size), do_resize=False)["pixel_values"]
        batches = pixel_values.split(self.run.batch_size)
        method_maps = {}
        for method, engine in self.run.engines.items():
            maps = torch.cat([engine.raw_maps(batch, self.encoded)[0] for batch in batches])
            method_maps[method] = replace(cut, maps=maps[:, self.text_indices])
        return method_maps

    def update_from(self, image: EvaluatedImage, method: str, maps: None) -> None:
        maps, options = image.outputs[self.name][method], (self.classes, self.threshold, self.logit_scale)
        if self.protocol:
            labels, confidence = protocol_label_map(maps, *options, self.resolved.min_area)
            labels, confidence = labels.cpu(), confidence.cpu()
        else:
            labels, confidence = argmax_label_map(maps, image.sample.size, *options)
        self.update(labels + 1, image.sample.label_map, confidence, image.index)

    def update(self, prediction, reference, confidence, index: int) -> None:
        """Adds the image at this position of the data set. The other arguments are those of [`MeanIoU`]."""
        iou = self.new_iou()
        iou.update(prediction, reference, confidence if self.sweeps else None)
        self.state.add(iou.areas, index % 2)  # by even and odd positions

    def compute(self) -> dict:
        """
        Returns the scores of [`MeanIoU`], with the name of `floor_class`, and `thresholds`: the background thresholds
        of the images at even and at odd positions, or None.
        """
        whole, folds = self.new_iou(), [self.new_iou(), self.new_iou()]
        thresholds, best = None, [0, 0]
        for fold, areas in self.state.sums.items():
            folds[fold].add_counts(areas)
        if self.sweeps:  # each fold takes the best threshold of the other
            best = [int(fold.curve().argmax()) for fold in reversed(folds)]
            thresholds = [float(THRESHOLDS[index]) for index in best]
        elif self.threshold is not None:
            thresholds = [self.threshold] * 2
        for fold, index in zip(folds, best):
            whole.add_counts(fold.areas[..., [index]])
        scores = whole.compute()
        scores["floor_class"] = ["background", *self.run.dataset.class_names][scores["floor_class"]]
        return scores | {"thresholds": thresholds}

    def settings(self) -> dict:
        chosen = "the best of the images at the other (even or odd) positions"
        resolved = {}
        if self.protocol:
            resolved = {name: getattr(self.resolved, name) for name in ("short_side", "min_area", "pamr_dilations")}
            resolved["definition"] = self.protocol_definition
        return (
            super().settings()
            | resolved
            | {
                "synonyms": [list(texts) for texts in self.run.dataset.synonyms],
                "background": self.background_texts,
                "threshold": chosen if self.sweeps else self.threshold,
            }
        )
