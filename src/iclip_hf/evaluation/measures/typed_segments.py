"""Segments of typed texts: what `iclip segment` gives for the classes that an image shows and for two that it does not show."""

from __future__ import annotations

import numpy as np

from ...model.engine import Engine, PreparedImage
from ...model.explanation import Explanation
from ..metrics import Sums
from .measure import EvaluatedImage, Measure
from .recognition import like_classes


class TypedSegments(Measure):
    """
    Label maps as `iclip segment` computes them, with refined maps, its default thresholds and all texts competing: the classes that
    an image shows, and two absent ones. One of these is like a shown class, see [`like_classes`], the other is any. Both are sampled
    by `seed` and the position of the image.

    `typed_iou` is the mean IoU of a shown class with its mask, `without_pixel` the share of the shown classes that get no pixel,
    both over all pairs of an image and a shown class, and `absent_area` the mean share of an image that the absent classes take.
    All are in percent. Void pixels are not counted. A class without a pixel in its mask, and an image without a class, are left out.
    """

    name = "typed_segments"
    scores = {
        "typed_iou": ("IoU of typed texts %", 2),
        "without_pixel": ("without a pixel %", 1),
        "absent_area": ("area of absent texts %", 2),
    }
    metric = Sums
    definition = {"typed_segments": "the shown classes and two absent ones; refined maps and the default thresholds"}

    def __init__(self, seed: int = 0):
        self.seed = seed

    def prepare(self, run) -> None:
        super().prepare(run)
        self.like = like_classes(run.dataset.supercategories, run.texts.text_embeds)
        self.engines = {
            method: Engine(run.model, run.model.processor, explainer, run.templates, refine=True)
            for method, explainer in run.explainers.items()
        }

    def typed(self, image: EvaluatedImage) -> list[int]:
        """Returns the indices of the typed classes: those that the image shows, in the order of its labels, then the absent ones."""
        shown = np.isin(self.run.dataset.labels, image.sample.labels)
        generator = np.random.default_rng((self.seed, image.index))
        left, typed = ~shown, np.flatnonzero(shown).tolist()
        for preferred in (shown @ self.like, left):
            candidates = np.flatnonzero(left & preferred if (left & preferred).any() else left)
            if len(candidates):
                typed.append(int(generator.choice(candidates)))
                left[typed[-1]] = False
        return typed

    def forward(self, images: list[EvaluatedImage]) -> list[dict[str, Explanation]]:
        prepared = [PreparedImage(image.pixel_values, image.sample.size) for image in images]
        texts = [[self.run.dataset.class_names[row] for row in self.typed(image)] for image in images]
        explained = [engine.run(prepared, texts, len(images)) for engine in self.engines.values()]
        return [dict(zip(self.engines, explanations)) for explanations in zip(*explained)]

    def count(self, image: EvaluatedImage, method: str, heatmaps: None) -> list[tuple]:
        if not image.sample.labels:
            return []
        found = image.outputs[self.name][method].label_map().numpy()
        counted = (image.masks != image.sample.void).all(0)
        texts = np.zeros(3)
        for index, (label, mask) in enumerate(zip(image.sample.labels, image.masks)):
            own, segment = (mask == label) & counted, (found == index) & counted
            if own.any():
                texts += 1, (own & segment).sum() / (own | segment).sum(), not segment.any()
        absent = (found >= len(image.sample.labels))[counted]
        return [(texts, "texts"), (np.array([1, absent.mean()] if absent.size else [0, 0]), "images")]

    def report(self, method: str) -> tuple[dict, dict[int, dict]]:
        sums = self.totals[method].sums
        (texts, iou, without), (images, absent) = sums.get("texts", np.zeros(3)), sums.get("images", np.zeros(2))
        means = ((iou, texts), (without, texts), (absent, images))
        values = (100 * float(total / number) if number else None for total, number in means)
        return {**dict(zip(self.scores, values)), "texts": int(texts), "images": int(images)}, {}
