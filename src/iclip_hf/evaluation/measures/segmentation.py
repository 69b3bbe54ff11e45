"""Open-vocabulary semantic segmentation: mIoU of label maps over a data set, as in its papers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch

from ...explainers import Explainer
from ...model.engine import Engine
from ...model.label_maps import BACKGROUND_LABEL, label_map
from ...model.modeling_iclip import ICLIPTextFeatures
from ...model.refinement import refine_maps
from ..metrics import THRESHOLDS, MeanIoU, Sums
from ..results import measured
from .measure import EvaluatedImage, Measure


# Short side of images under sliding windows, in pixels, as in SCLIP and its successors.
SHORT_SIDE = 336


def windowed_maps(
    explainer: Explainer, pixel_values: torch.Tensor, texts: ICLIPTextFeatures, window: int, stride: int
) -> torch.Tensor:
    """
    Computes raw maps from square windows that slide over the images. The value of a patch is its mean over the windows that contain
    it. The last window of a row or column ends at the image's edge, and a window is never larger than the image.

    Args:
        explainer ([`Explainer`]), pixel_values, texts: as for [`Explainer.forward`].
        window, stride (`int`): side of the windows and their distance, multiples of the patch size in pixels; `stride <= window`.

    Returns:
        `torch.Tensor` of shape `(B, T, h, w)`, float32.
    """
    engine = Engine(explainer.model, explainer.model.processor, explainer)
    patch, total = engine.processor.patch_size, None
    edges = [max(side - window, 0) for side in pixel_values.shape[2:]]
    for top, left in itertools.product(*([*range(0, edge, stride), edge] for edge in edges)):
        maps, _ = engine.raw_maps(pixel_values[..., top : top + window, left : left + window], texts)
        if total is None:
            total = maps.new_zeros(*maps.shape[:2], *(side // patch for side in pixel_values.shape[2:]))
            number = torch.zeros_like(total[0, 0])
        rows = slice(top // patch, top // patch + maps.shape[2])
        columns = slice(left // patch, left // patch + maps.shape[3])
        total[..., rows, columns] += maps
        number[rows, columns] += 1
    return total / number


class Segmentation(Measure):
    """
    mIoU, pixel accuracy and `floor` in percent, where each pixel gets the class with the highest raw map among all classes of the
    data set, see [`label_map`]. `floor` is the mIoU of the best map with one class everywhere, which is `floor_class`. `thresholds`
    are the background thresholds of the images at even and at odd positions, or None. Rows: `IoU` and `accuracy`.

    If the data set has a background, it consists of the pixels whose confidence is not above a threshold, and of those where a text
    for the background is best. If neither a threshold nor such texts are given, the threshold is chosen on other images: the images
    at even positions take the best of 0, 0.01, ..., 1 for the images at odd positions, and the reverse.

    Args:
        window (`int`, *optional*): side in pixels of windows that slide over the image; the whole image if not given. Images then
            keep their proportions, with a short side of 336 pixels unless `image_size` says otherwise.
        stride (`int`, *optional*): distance in pixels of the windows; half of the window if not given.
        background: texts that describe the background; those of the data set's overrides if not given.
        threshold (`float` in [0, 1], *optional*): background threshold.
        logit_scale (`float`, *optional*): makes the confidence a probability, see [`label_map`].
    """

    name = "segmentation"
    scores = {"mIoU": ("mIoU %", 2), "pixel_accuracy": ("pixel accuracy %", 2), "floor": ("floor %", 2)}
    scores |= {"floor_class": ("floor's class", 0), "thresholds": ("background threshold", 0)}
    metric = Sums  # of the images at even and at odd positions

    def __init__(
        self,
        window: int | None = None,
        stride: int | None = None,
        background: Sequence[str] | None = None,
        threshold: float | None = None,
        logit_scale: float | None = None,
    ):
        if stride and not window:
            raise ValueError(f"The stride of {stride} needs a window.")
        if logit_scale is not None and not 0 < logit_scale < float("inf"):
            raise ValueError(f"logit_scale is a positive number such as 40, not {logit_scale}.")
        self.window, self.stride = window, stride or (window and window // 2)
        self.background, self.threshold, self.logit_scale = background, threshold, logit_scale
        if window:
            self.image_size = {"shortest_edge": SHORT_SIDE}

    def prepare(self, run) -> None:
        dataset = run.dataset
        self.texts_of_background = list(dataset.background_texts if self.background is None else self.background)
        if not dataset.background and (self.texts_of_background or self.threshold is not None):
            raise ValueError(f"Leave out texts and threshold of the background of {dataset.name!r}, which is void.")
        # Whether the background threshold is chosen on other images.
        self.sweeps = dataset.background and self.threshold is None and not self.texts_of_background
        if self.sweeps and run.count < 2:
            raise ValueError(
                "The background threshold cannot be chosen on other images than this one: give a threshold."
            )
        patch = run.model.processor.patch_size
        if self.window and (self.window % patch or self.stride % patch or not 0 < self.stride <= self.window):
            raise ValueError(
                f"window and stride are multiples of the patch size of {patch} pixels, and the stride is at most the window, not "
                f"{self.window} and {self.stride}."
            )
        self.classes = [label for label, texts in enumerate(dataset.synonyms) for _ in texts]
        self.classes += [BACKGROUND_LABEL] * len(self.texts_of_background)
        texts = [*itertools.chain(*dataset.synonyms), *self.texts_of_background]
        self.encoded = run.model.encode_texts(texts, run.templates)
        self.iou = partial(MeanIoU, len(dataset.labels) + 1, dataset.background, dataset.void)
        super().prepare(run)

    def forward(self, images: list[EvaluatedImage]) -> list[dict[str, torch.Tensor]]:
        """Returns raw maps of all texts `(T, h, w)` by method for each image."""
        pixel_values = torch.cat([image.pixel_values for image in images])
        by_method = {}
        for method, explainer in self.run.explainers.items():
            if self.window is None:
                engine = Engine(explainer.model, explainer.model.processor, explainer)
                maps, _ = engine.raw_maps(pixel_values, self.encoded)
            else:
                maps = windowed_maps(explainer, pixel_values, self.encoded, self.window, self.stride)
            if self.run.refine:
                maps = refine_maps(maps, pixel_values.to(maps.device))
            by_method[method] = (-maps if explainer.reversed else maps).cpu()
        return [dict(zip(by_method, maps)) for maps in zip(*by_method.values())]

    def count(self, image: EvaluatedImage, method: str, heatmaps: None) -> list[tuple]:
        options = {"threshold": self.threshold, "logit_scale": self.logit_scale, "classes": self.classes}
        labels, confidence = label_map(image.outputs[self.name][method], image.sample.size, **options)
        areas = self.iou().count(labels + 1, image.sample.label_map, confidence if self.sweeps else None)
        return [(areas, image.index % 2)]

    def report(self, method: str) -> tuple[dict, dict[int, dict]]:
        whole, folds, thresholds, best = self.iou(), [self.iou(), self.iou()], None, [0, 0]
        for fold, areas in self.totals[method].sums.items():
            folds[fold].add_counts(areas)
        if self.sweeps:  # each fold takes the best threshold of the other
            best = [int(fold.curve().argmax()) for fold in reversed(folds)]
            thresholds = [float(THRESHOLDS[index]) for index in best]
        elif self.threshold is not None:
            thresholds = [self.threshold] * 2
        for fold, index in zip(folds, best):
            whole.add_counts(fold.areas[..., [index]])
        scores = whole.compute()
        reported = {
            **{name: measured(scores[name.lower()]) for name in ("mIoU", "pixel_accuracy", "floor")},
            "floor_class": ["background", *self.run.dataset.class_names][scores["floor_class"]],
            "thresholds": thresholds,
            **{name: scores[name] for name in ("pixels", "left_out")},
        }
        accuracy = scores["per_class_accuracy"]
        ids = range(0 if self.run.dataset.background else 1, whole.num_classes)
        rows = {k: {"IoU": scores["per_class"].get(k), "accuracy": accuracy.get(k)} for k in ids}
        return reported, rows

    def cells(self, reported: dict) -> list[str]:
        thresholds = dict.fromkeys(reported["thresholds"] or ["-"])  # once if they are equal
        shown = reported | {"floor_class": None, "thresholds": None}
        return [*super().cells(shown)[:3], str(reported["floor_class"]), " / ".join(map(str, thresholds))]

    def protocol(self) -> dict:
        chosen = "the best of the images at the other (even or odd) positions"
        return {
            "window": self.window,
            "stride": self.stride,
            "synonyms": [list(texts) for texts in self.run.dataset.synonyms],
            "background_texts": self.texts_of_background,
            "logit_scale": self.logit_scale,
            "label_maps": "raw maps of all classes, bicubic to the image's size; the highest one counts",
            "background_threshold": chosen if self.sweeps else self.threshold,
        }
