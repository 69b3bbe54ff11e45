"""
Label maps of typed texts: the scores of `Explanation.label_map` for the classes that an image shows and for two absent
ones.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import torch

from ...model.batches import map_tensors
from ...model.explanation import Explanation
from ..functional import to_numpy
from .metric import EvaluatedImage, Metric
from .recognition import like_classes


class LabelMaps(Metric):
    """
    Scores of label maps, which [`Explanation.label_map`] computes with its default thresholds. The competing texts are
    the classes that an image shows and two absent ones: one that is like a shown class, see [`like_classes`], and any
    other one. Both are sampled by `seed` and the index of the image. `iclip segment` computes the same label maps from
    refined maps.

    Args:
        seed (`int`): seed for sampling the absent classes.
        ignore_index (`int`): pixels with this value in any mask are ignored. [`evaluate_model`] takes the value of the
            data set.

    Example:
        >>> metric = LabelMaps()
        >>> metric.update(np.array([[0, 0, 1, -1]]), np.array([[[5, 0, 0, 5]]]), [5])  # the second text is absent
        >>> {name: round(metric.compute()[name], 1) for name in ("iou", "absent", "kept")}
        {'iou': 33.3, 'absent': 25.0, 'kept': 100.0}
    """

    name = "label_maps"
    columns = {
        "iou": ("IoU of label maps %", 2),
        "absent": ("area of absent classes %", 2),
        "kept": ("shown classes with a pixel %", 1),
    }
    legend = (
        "Label maps are those of the shown classes and two absent ones. IoU: overlap of the segment of a shown class "
        "and its mask."
    )
    needs = frozenset()
    definition = "the shown classes and two absent ones; the default thresholds"

    def __init__(self, seed: int = 0, ignore_index: int = 255):
        super().__init__()
        self.seed, self.ignore_index = seed, ignore_index

    def update(self, label_map, masks, class_ids) -> None:
        """
        Adds one image.

        Args:
            label_map (`np.ndarray` or `torch.Tensor` of shape `(H, W)`): the index of a text at each pixel, or -1. The
                first T texts are the shown classes, the others are absent.
            masks (`np.ndarray` or `torch.Tensor` of shape `(T, H, W)`): the mask of each shown class. Pixels equal to
                its id belong to it.
            class_ids (`Sequence[int]`): ids of the T classes. An image without a class is left out.
        """
        label_map, masks = to_numpy(label_map), to_numpy(masks)
        if not len(class_ids):
            return
        counted = (masks != self.ignore_index).all(0)
        for index, (class_id, mask) in enumerate(zip(class_ids, masks, strict=True)):
            reference, segment = (mask == class_id) & counted, (label_map == index) & counted
            if reference.any():
                iou = (reference & segment).sum() / (reference | segment).sum()
                self.state.add(np.array([1, iou, segment.any()]), "pairs")
        absent = (label_map >= len(class_ids))[counted]
        if absent.size:
            self.state.add(np.array([1, absent.mean()]), "images")

    def compute(self) -> dict:
        """
        Returns the scores of all images so far, in percent; NaN without data.

        - **iou** -- IoU of the segment of a shown class and its mask, mean over the image-class pairs whose mask has a
          pixel.
        - **kept** -- share of these pairs whose class has a pixel in the label map.
        - **absent** -- share of an image that the absent classes take, mean over the images.
        - **classes**, **images** -- numbers of image-class pairs and of images.
        """
        num_pairs, iou, kept = self.state.sums.get("pairs", np.zeros(3))
        num_images, absent = self.state.sums.get("images", np.zeros(2))
        return {
            "iou": _percent(iou, num_pairs),
            "absent": _percent(absent, num_images),
            "kept": _percent(kept, num_pairs),
            "classes": int(num_pairs),
            "images": int(num_images),
        }

    def prepare(self, run) -> None:
        super().prepare(run)
        self.like = like_classes(run.dataset.supercategories, run.texts.text_embeds)

    def text_indices(self, image: EvaluatedImage) -> list[int]:
        """Returns the indices of the shown classes, by ascending id, then of the two absent ones."""
        shown = np.isin(self.run.dataset.class_ids, image.sample.class_ids)
        absent = ~shown
        like_shown = absent & (shown @ self.like)
        indices = np.flatnonzero(shown).tolist()
        generator = np.random.default_rng((self.seed, image.index))
        for candidates in (like_shown if like_shown.any() else absent, absent):
            if candidates.any():
                sampled = int(generator.choice(np.flatnonzero(candidates)))
                indices.append(sampled)
                absent[sampled] = False  # so that the second one is another class
        return indices

    def run_model(self, images: list[EvaluatedImage]) -> list[dict[str, Explanation]]:
        # Only the competing texts are asked for, as by `iclip segment`: some methods compare the texts of an image.
        prepared = [replace(image.prepared, text_indices=None) for image in images]
        indices = [self.text_indices(image) for image in images]
        asked = [*dict.fromkeys(chain(*indices))]
        encoded = map_tensors(lambda values: values[asked], self.run.texts)
        labels = [[str(index) for index in of_image] for of_image in indices]
        explanations = {
            method: list(engine.run(prepared, labels, len(images), encoded=encoded))
            for method, engine in self.run.engines.items()
        }
        return [{method: explanations[method][index] for method in explanations} for index in range(len(images))]

    def update_from(self, image: EvaluatedImage, method: str, maps: torch.Tensor | None) -> None:
        self.update(image.outputs[self.name][method].label_map(), image.masks, image.sample.class_ids)


def _percent(total: float, count: float) -> float:
    """Returns a mean in percent; NaN without items."""
    return 100 * float(total / count) if count else float("nan")
