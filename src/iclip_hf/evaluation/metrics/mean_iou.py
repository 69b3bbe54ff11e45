"""mIoU of label maps over a data set. This module does not import torch."""

from __future__ import annotations

import math

import numpy as np

from ..functional import area_counts


class MeanIoU:
    """
    mIoU of label maps: TP / (TP + FP + FN) of each class over the pixels of all images, averaged over the classes.

    Args:
        num_classes (`int`): K + 1, the number of classes including the background. Class ids are 0..K.
        background (`bool`): whether the mean includes the background, class 0.
        ignore_index (`int`, defaults to 255): value of ignored pixels in the reference.

    Example:
        >>> metric = MeanIoU(num_classes=2)
        >>> metric.update(np.array([[1, 1, 0]]), np.array([[1, 0, 0]]))
        >>> metric.compute()["miou"]
        50.0
    """

    def __init__(self, num_classes: int, background: bool = True, ignore_index: int = 255):
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.first_id = 0 if background else 1  # of the classes in the mean
        self.reset()

    def reset(self) -> None:
        """Removes all images."""
        self.areas = np.zeros((3, self.num_classes, 1), np.int64)

    def update(self, prediction, reference, confidence=None) -> None:
        """
        Adds one image, or a batch of images. Arguments are those of [`area_counts`]. All images have confidences, or
        none.
        """
        self.add_counts(area_counts(prediction, reference, self.num_classes, self.ignore_index, confidence))

    def add_counts(self, areas: np.ndarray) -> None:
        """Adds counts from [`area_counts`]."""
        self.areas = self.areas + areas

    def curve(self) -> np.ndarray:
        """Returns the mIoU at each of 101 thresholds, or 1 without confidence, percent (NaN without pixels)."""
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
        - **per_class_accuracy** -- {class id: share of the pixels of the class that are predicted as this class,
          percent}.
        - **floor**, **floor_class** -- the best mIoU of a map with one class everywhere, percent, and this class.
        - **pixels**, **left_out** -- number of pixels, and {"no_pixels": number of classes without any}.
        """
        first = self.first_id
        in_both, _, referenced = self.areas[:, first:, 0]
        iou = self._iou()[:, 0]
        shown = np.flatnonzero(referenced)
        pixels = int(referenced.sum())
        # A map with one class everywhere has an IoU of 0 for all other classes. It is wrong on all pixels of the
        # background, also if the mean leaves the background out.
        all_pixels = int(self.areas[2, :, 0].sum())
        floors = 100 * referenced / (all_pixels or math.nan) / (len(shown) or math.nan)
        return {
            "miou": float(self.curve()[0]),
            "pixel_accuracy": 100 * int(in_both.sum()) / (pixels or math.nan),
            "per_class": {first + int(index): float(iou[index]) for index in np.flatnonzero(~np.isnan(iou))},
            "per_class_accuracy": {
                first + int(index): 100 * int(in_both[index]) / int(referenced[index]) for index in shown
            },
            "floor": float(floors.max()),
            "floor_class": first + int(referenced.argmax()),
            "pixels": pixels,
            "left_out": {"no_pixels": int(np.isnan(iou).sum())},
        }

    def _iou(self) -> np.ndarray:
        """Returns the IoU of each class in the mean at each threshold, percent; NaN for a class without pixels."""
        in_both, predicted, referenced = self.areas[:, self.first_id :]
        union = predicted + referenced - in_both
        return 100 * in_both / np.where(union, union, np.nan)
