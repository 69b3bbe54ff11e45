"""The former interface of [`Engine`], for the callers that do not use it yet."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace

from PIL import Image

from ..model.engine import Engine, PreparedImage
from ..model.explanation import Explanation
from ..model.presence import MIN_PRESENCE
from ..model.processing_iclip import check_thresholds
from ..model.prompts import split_texts
from ..utils.prefetch import Item, prefetch_map
from . import make_explainer
from .explain import explain


__all__ = ["Localizer", "PreparedImage", "explain"]


class Localizer:
    """Localizes the same texts in any number of images with one method."""

    def __init__(
        self,
        model,
        texts: str | Sequence[str],
        *,
        method: str = "itsm",
        templates: Sequence[str] | None = None,
        threshold: float | Sequence[float] = 0.5,
        min_presence: float = MIN_PRESENCE,
        image_size: int | dict[str, int] | None = None,
        refine: bool = False,
        **method_options,
    ):
        self.explainer = make_explainer(model, method, **method_options)
        self.model = self.explainer.model
        self.engine = Engine(self.model, self.model.processor, self.explainer, templates, image_size, refine)
        self.templates, self.min_presence = self.engine.templates, min_presence
        self._ask(texts, threshold)

    def _ask(self, texts: str | Sequence[str], threshold: float | Sequence[float]) -> None:
        self.texts = split_texts(texts)
        if not self.texts:
            raise ValueError("There is no text: name what to look for.")
        self.thresholds = check_thresholds(threshold).expand(len(self.texts)).tolist()

    def about(self, texts: str | Sequence[str], threshold: float | Sequence[float] = 0.5) -> Localizer:
        """Returns a localizer for other texts that shares the prepared model."""
        other = copy.copy(self)
        other._ask(texts, threshold)
        return other

    def prepare(self, image: Image.Image, size: tuple[int, int] | None = None) -> PreparedImage:
        """Prepares an RGB image for `explain`."""
        return self.engine.prepare(image, size)

    def encode(self, image: PreparedImage) -> PreparedImage:
        """Adds the features of an image, which `explain` then need not compute."""
        return self.engine.encode_images([image])[0]

    def explain(self, images: Iterable[PreparedImage | None], batch_size: int = 8) -> Iterator[Explanation | None]:
        """Yields explanations in the order of the images."""
        for explanation in self.engine.run(images, self.texts, batch_size):
            yield explanation and replace(explanation, threshold=self.thresholds, min_presence=self.min_presence)

    def explain_all(
        self,
        load: Callable[[Item], tuple[str, Image.Image]],
        items: Iterable[Item],
        pool: Executor,
        batch_size: int = 8,
    ) -> Iterator[tuple[str, Explanation | None]]:
        """Explains many images in order, while threads of the pool load the next ones."""

        def prepared(item: Item) -> tuple[str, PreparedImage | None]:
            try:
                name, image = load(item)
            except (ValueError, FileNotFoundError) as error:
                return " ".join(str(error).split()), None
            return name, self.prepare(image)

        loaded, images = itertools.tee(prefetch_map(pool, prepared, items, batch_size))
        explanations = self.explain((image for _, image in images), batch_size)
        for (name, _), explanation in zip(loaded, explanations):
            yield name, explanation
