"""Where the texts are in an image, and whether they are: presence, masks and regions beside the maps of any explainer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..explainers import Explanation, identity, join_texts, make_explainer
from ..modeling_iclip import cosines
from ..presence import BACKGROUND, MIN_PRESENCE, presence
from ..processing_iclip import check_templates, check_thresholds
from ..regions import Region, find_regions, negative_points, positive_points
from ..utils.prefetch import Item, prefetch_map


class LocalizedText(NamedTuple):
    """
    One text in one image.

    Attributes:
        text (`str`), score (`float`, cosine in [-1, 1]), presence (`float` in [0, 1]).
        heatmap (`np.ndarray` of shape `(H, W)`): the map, in [0, 1].
        mask (`np.ndarray` of shape `(H, W)`): boolean, empty where the text counts as absent.
        regions: the mask's connected parts, best first.
    """

    text: str
    score: float
    presence: float
    heatmap: np.ndarray
    mask: np.ndarray
    regions: list[Region]

    def record(self) -> dict:
        """Everything but map and mask as plain values; boxes (x0, y0, x1, y1) and points (x, y) in pixels."""
        negative = negative_points(self.heatmap, self.mask).tolist() if self.regions else []
        return {
            "text": self.text,
            "score": round(self.score, 4),
            "presence": round(self.presence, 4),
            "regions": [
                {
                    "score": round(region.score, 4),
                    "box": list(region.box),
                    "positive_points": positive_points(self.heatmap, region).tolist(),
                    "negative_points": negative,
                }
                for region in self.regions
            ],
        }


class Explained(NamedTuple):
    """
    One of many images.

    Attributes:
        name (`str`): of the image, or the reason why it could not be read, in which case the others are None.
        image (`PIL.Image.Image`): RGB.
        explanation ([`Explanation`]): of its T texts.
        presence (`torch.Tensor` of shape `(T,)`): in [0, 1].
    """

    name: str
    image: Image.Image | None = None
    explanation: Explanation | None = None
    presence: torch.Tensor | None = None


class Localizer:
    """
    Finds the same texts in any number of images.

    Args:
        model, processor, method: as for [`make_explainer`].
        texts: T labels.
        templates: prompts with one `{}` each; the processor's if not given.
        threshold (`float` in [0, 1], or T of them): foreground is M > threshold.
        min_presence (`float` in [0, 1]): a text of lower presence gets an empty mask.
        image_size (`int`, *optional*): side in pixels at which the model sees images; the processor's if not given.

    Attributes:
        settings (`dict`): all that results depend on beside the images, as plain values.

    Raises:
        `ValueError`, `TypeError`: as [`make_explainer`]; for thresholds out of range or not T.
    """

    def __init__(
        self,
        model,
        processor,
        texts: Sequence[str],
        *,
        method: str = "itsm",
        templates: Sequence[str] | None = None,
        threshold: float | Sequence[float] = 0.5,
        min_presence: float = MIN_PRESENCE,
        image_size: int | None = None,
    ):
        if not 0 <= min_presence <= 1:
            raise ValueError(f"Expected min_presence in [0, 1], got {min_presence}.")
        self.explainer = make_explainer(model, processor, method)
        self.templates = check_templates(templates or self.explainer.family.templates)
        self.min_presence = min_presence
        self._background = self.explainer.encode_texts(BACKGROUND, self.templates)
        self._size = {} if image_size is None else {"size": {"height": image_size, "width": image_size}}
        self.settings = {
            **identity(model),
            "method": method,
            "templates": self.templates,
            "min_presence": min_presence,
            "image_size": image_size,
        }
        self._ask(texts, threshold)

    def _ask(self, texts: Sequence[str], threshold: float | Sequence[float]) -> None:
        self.texts = list(texts)
        thresholds = check_thresholds(threshold)
        self.thresholds = thresholds.expand(len(self.texts) if thresholds.ndim == 0 else -1).tolist()
        if not self.texts:
            raise ValueError("Expected at least one text, got none.")
        if len(self.thresholds) != len(self.texts):
            raise ValueError(f"Expected {len(self.texts)} thresholds, one a text, got {len(self.thresholds)}.")
        self.settings = {**self.settings, "texts": self.texts, "thresholds": self.thresholds}
        self._encoded = self.explainer.encode_texts(self.texts, self.templates)

    def about(self, texts: Sequence[str], threshold: float | Sequence[float] = 0.5) -> Localizer:
        """The same for other texts, at the cost of these alone: the prepared model and the background are shared."""
        other = copy.copy(self)
        other._ask(texts, threshold)
        return other

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """An RGB image of any shape -> `(1, 3, H, W)` as the model sees it."""
        return self.explainer.processor(images=[image], **self._size)["pixel_values"]

    def explain(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images `(B, 3, H, W)` -> raw maps `(B, T, h, w)`, cosines `(B, T)` and presence `(B, T)`, on the CPU."""
        if self.explainer.more_texts_are_free:
            maps, scores = self.explainer.raw_maps(pixel_values, join_texts([self._encoded, self._background]))
            count = len(self.texts)
            maps, scores, background = maps[:, :count], scores[:, :count], scores[:, count:]
        else:
            maps, scores = self.explainer.raw_maps(pixel_values, self._encoded)
            with torch.no_grad():
                image = self.explainer.family.encode_image(pixel_values)
            background = cosines(image.image_embeds, self._background.text_embeds)
        return maps.cpu(), scores.cpu(), presence(scores, background).cpu()

    def explain_all(
        self,
        load: Callable[[Item], tuple[str, Image.Image]],
        items: Iterable[Item],
        pool: Executor,
        batch_size: int = 8,
    ) -> Iterator[Explained]:
        """
        Explains many images in their order, while a pool loads the next ones.

        Args:
            load: an item to the name and the RGB image that it stands for; `ValueError` or `FileNotFoundError` is the reason
                why there is none.
            items: what it takes.
            pool: threads.
            batch_size (`int`): images that go through the model at once.
        """

        def prepared(item: Item) -> tuple[Explained, torch.Tensor | None]:
            try:
                name, image = load(item)
            except (ValueError, FileNotFoundError) as error:
                return Explained(" ".join(str(error).split())), None
            return Explained(name, image), self.prepare(image)

        loaded = prefetch_map(pool, prepared, items, batch_size)
        while batch := list(itertools.islice(loaded, batch_size)):
            # Images that keep their proportions may differ in shape, and those that cannot be read have none.
            for shape, group in itertools.groupby(batch, lambda item: getattr(item[1], "shape", None)):
                found, pixels = zip(*group)
                if shape is None:
                    yield from found
                    continue
                for one, raw_maps, scores, present in zip(found, *self.explain(torch.cat(pixels))):
                    size = (one.image.height, one.image.width)
                    yield one._replace(explanation=Explanation(self.texts, scores, raw_maps, size), presence=present)

    def locate(self, explanation: Explanation, presences: torch.Tensor) -> Iterator[LocalizedText]:
        """One explained image with the presence `(T,)` of its texts -> its texts one by one, at its own size."""
        for index, (score, present) in enumerate(zip(explanation.scores.tolist(), presences.tolist())):
            heatmap = explanation.map(index).numpy()
            mask = (heatmap > self.thresholds[index]) & (present >= self.min_presence)
            yield LocalizedText(explanation.labels[index], score, present, heatmap, mask, find_regions(heatmap, mask))
