"""
The explanation of one image, with scores, presence, maps, masks and regions of texts, and its annotations for COCO.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from .label_maps import label_map
from .presence import EVEN_PRIOR, MIN_PRESENCE, check_min_presence, is_present, presence_word
from .regions import Region, find_regions, negative_points, positive_points, run_lengths
from .similarity import resize_and_normalize


# A text is covered by the others if it keeps less than this fraction of its own mask in a label map.
_COVERED = 0.25


@dataclass(frozen=True, repr=False, eq=False)
class Explanation:
    """
    The explanation of one image. Maps, masks and regions are computed on request, one text at a time, so the memory
    does not grow with the number of texts. A text is named by its index or as a string: `explanation.map(0)` or
    `explanation.map("dog")`. `explanation["dog"]` is the explanation of this text alone.

    Attributes:
        labels (`list[str]`): the T texts.
        scores (`torch.Tensor` of shape `(T,)`): from [`ICLIPModel.scores`], in [-1, 1]. An absent text has a low
            score, though its map is stretched to [0, 1] like any other.
        presence (`torch.Tensor` of shape `(T,)`, *optional*): probability that the image shows the text, in [0, 1], at
            the prior `prior`, see [`ICLIPModel.presence`]. If the model has no presence, it is None, and no text
            counts as absent.
        raw_maps (`torch.Tensor` of shape `(T, h, w)`): values of the method on the patch grid. Refined maps have half
            the height and width of the prepared image.
        unrefined_maps (`torch.Tensor` of shape `(T, h, w)`, *optional*): the values of refined maps before their
            refinement, on the patch grid.
        size (`tuple[int, int]`): height and width of maps and masks in pixels, by default those of the image.
        threshold (`float` in [0, 1], or T of them, in any sequence or array): a pixel is foreground where the map is
            greater. With None, which only `label_map` takes, texts compete for all pixels.
        min_presence (`float` in [0, 1]): a text with a lower presence has an empty mask.
        prior (`float` in [0, 1], or a `torch.Tensor` of shape `(T,)`): probability that a text is shown, before the
            image is seen. It is 0.5 unless the texts are given with priors. For `explain` without texts, it is the
            prior of each noun in [`vocabulary`].
        image (`PIL.Image.Image`, *optional*): the image.
        all_scores (1D `torch.Tensor`, *optional*): scores of all texts of the image, including those without a map,
            see [`Engine.prepare`].
        method (`str`, *optional*): name of the method that computed the maps.
        refined (`bool`): whether the maps are refined by the colours of the image, see [`refine_maps`]. Refined maps
            show edges of the image, which the model may not use.
        sentence (`str`, *optional*): the sentence whose words the texts are, see [`~words.explain_words`].
    """

    labels: list[str]
    scores: torch.Tensor
    presence: torch.Tensor | None
    raw_maps: torch.Tensor
    size: tuple[int, int]
    threshold: float | Sequence[float] | None = 0.5
    min_presence: float = MIN_PRESENCE
    prior: float | torch.Tensor = EVEN_PRIOR
    image: Image.Image | None = None
    all_scores: torch.Tensor | None = None
    method: str | None = None
    refined: bool = False
    unrefined_maps: torch.Tensor | None = None
    sentence: str | None = None

    def __post_init__(self):
        if self.threshold is not None:
            check_thresholds(self.threshold, len(self))
        check_min_presence(self.min_presence)

    def __repr__(self) -> str:
        texts = ", ".join(f"{label!r}: {score:.2f}" for label, score in zip(self.labels, self.scores.tolist()))
        height, width = self.size
        return f"Explanation({texts}; {height}x{width})"

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.labels)

    def __contains__(self, text: str) -> bool:
        """Whether this is one of the texts."""
        return text in self.labels

    def __getitem__(self, text: int | str) -> Explanation:
        """Returns the explanation of one text. Raises `IndexError` or `KeyError` if there is no such text."""
        index = self.index(text)
        return replace(
            self,
            labels=[self.labels[index]],
            scores=self.scores[[index]],
            presence=None if self.presence is None else self.presence[[index]],
            raw_maps=self.raw_maps[[index]],
            unrefined_maps=None if self.unrefined_maps is None else self.unrefined_maps[[index]],
            threshold=self._threshold(index),
            prior=self.priors[index],
        )

    def index(self, text: int | str) -> int:
        """Returns the index of a text, from 0. Raises `IndexError` or `KeyError` if there is no such text."""
        if isinstance(text, str):
            if text not in self.labels:
                raise KeyError(f"{text!r} is none of the texts {self.labels}")
            return self.labels.index(text)
        return range(len(self))[text]

    @property
    def texts(self) -> list[str]:
        """The same as `labels`."""
        return self.labels

    @property
    def maps(self) -> torch.Tensor:
        """All maps, `(T, H, W)`, computed at each access. `map` needs less memory for many texts."""
        return resize_and_normalize(self.raw_maps, self.size)

    @property
    def made_by(self) -> str:
        """The method of the maps, and whether they are refined, as a text for captions."""
        return f"{self.method}, {'refined' if self.refined else 'unrefined'}"

    @property
    def presences(self) -> list[float | None]:
        """
        The presence of each text as a `float`, which can be compared with `min_presence`; None if the model has no
        presence.
        """
        return [None] * len(self) if self.presence is None else self.presence.tolist()

    @property
    def priors(self) -> list[float]:
        """The prior of the presence of each text."""
        return torch.as_tensor(self.prior).expand(len(self)).tolist()

    @property
    def present(self) -> list[bool]:
        """Whether each text counts as shown, see [`is_present`]."""
        return [is_present(presence, self.min_presence) for presence in self.presences]

    @property
    def presence_words(self) -> list[str | None]:
        """The presence of each text as a word, see [`presence_word`]; None if the model has no presence."""
        return [presence_word(value, self.min_presence) for value in self.presences]

    def map(self, text: int | str = 0) -> torch.Tensor:
        """Returns the map of one text, `(H, W)` float32 in [0, 1]: bicubic resize, then min-max (Eq. 4)."""
        return resize_and_normalize(self.raw_maps[[self.index(text)]], self.size)[0]

    def mask(self, text: int | str = 0, threshold: float | None = None) -> torch.Tensor:
        """Returns the mask of one text, `(H, W)` boolean. The default threshold is that of the explanation."""
        return self.map_and_mask(text, threshold)[1]

    def map_and_mask(self, text: int | str = 0, threshold: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the map and the mask of one text. The map is computed once for both."""
        index = self.index(text)
        threshold = self._threshold(index) if threshold is None else threshold
        heatmap = self.map(index)
        return heatmap, (heatmap > check_thresholds(threshold, 1).float()) & self.present[index]

    def regions(self, text: int | str = 0, threshold: float | None = None) -> list[Region]:
        """Returns the connected parts of the mask of one text, best first, see [`find_regions`]."""
        return find_regions(*(part.numpy() for part in self.map_and_mask(text, threshold)))

    def label_map(self, threshold: float | None = None, background: Sequence[int | str] = ()) -> torch.Tensor:
        """
        Returns the index of the text of each pixel, or -1 for the background, `(H, W)` int64. Where masks of present
        texts overlap, the texts compete, see [`~label_maps.label_map`]. `background` lists texts that describe the
        background. The default threshold is that of the explanation.
        """
        return label_map(
            self.raw_maps,
            self.size,
            self.presence,
            self.min_presence,
            threshold=self.threshold if threshold is None else check_thresholds(threshold, len(self)).tolist(),
            background=[self.index(text) for text in background],
        )

    def is_covered(self, text: int | str, segment: torch.Tensor | np.ndarray) -> bool:
        """
        Returns whether the other texts cover a text in a label map. A text is covered if its `segment`, `(H, W)`
        boolean, has less than a quarter of the area of its mask. If the explanation has no threshold, that of the mask
        is 0.5.
        """
        index = self.index(text)
        area = int(segment.sum())
        if not self.present[index] or area >= _COVERED * math.prod(self.size):
            return False  # without computing the mask, which is empty, or at most the whole image
        threshold = Explanation.threshold if self.threshold is None else None
        return area < _COVERED * int(self.mask(index, threshold).sum())

    def segments(self, background: Sequence[int | str] = ()) -> Iterator[tuple[str, torch.Tensor, bool]]:
        """
        Yields each text, its segment in the [`Explanation.label_map`], `(H, W)` boolean, and whether the other texts
        cover this text. Texts in `background` have empty segments and do not count as covered.
        """
        label_map = self.label_map(background=background)
        background_indices = [self.index(text) for text in background]
        for index, text in enumerate(self.labels):
            segment = label_map == index
            yield text, segment, index not in background_indices and self.is_covered(index, segment)

    def arrays(self) -> dict[str, np.ndarray]:
        """
        Returns the explanation as arrays, for `np.savez`: `texts`, `scores` and `presence` `(T,)` (NaN for a model
        without presence), `prior` `(T,)`, `raw_maps` `(T, h, w)`, and `masks` `(T, H, W)`, boolean.
        """
        return {
            "texts": np.array(self.labels),
            "scores": self.scores.numpy(),
            "presence": np.array(self.presences, float),
            "prior": np.array(self.priors, np.float32),
            "raw_maps": self.raw_maps.numpy(),
            "masks": np.stack([self.mask(index) for index in range(len(self))]),
        }

    def to_dict(self) -> dict:
        """
        Returns the explanation as plain values, for JSON.

        Returns:
            `dict` with `height` and `width` of maps and masks in pixels, `method` and `refined` of the maps, the
            `sentence` if the texts are its words, and `texts`, a list of T `dict`:

            - **text** (`str`), **score** (`float`), **presence** and its **prior** (`float`; both None if the model
              has no presence)
            - **regions** (list of `dict`): connected parts of the mask, best first: `mean` of the map, in [0, 1];
              `box`, [xmin, ymin, xmax, ymax] in pixels, xmax and ymax exclusive; `positive_points` and
              `negative_points`, [x, y] in pixels
            - **mask** (`dict`): COCO's uncompressed run lengths, see [`run_lengths`]

            Floats are rounded to 4 decimals, the prior to 4 digits. The presence is not rounded, because it decides
            whether the mask is empty.
        """
        sentence = {} if self.sentence is None else {"sentence": self.sentence}
        return {**self.settings(), **sentence, "texts": [self._text_to_dict(index) for index in range(len(self))]}

    def to_supervision(self):
        """
        Returns the regions of all texts as [`supervision.Detections`](https://supervision.roboflow.com): `confidence`
        is the mean of the map, `class_id` the index of the text, and `data["class_name"]` the text.
        """
        import supervision

        found = [(index, region) for index in range(len(self)) for region in self.regions(index)]
        return supervision.Detections(
            xyxy=np.array([region.box for _, region in found], np.float32).reshape(-1, 4),
            confidence=np.array([region.mean for _, region in found], np.float32),
            class_id=np.array([index for index, _ in found], int),
            mask=np.array([region.mask for _, region in found], bool).reshape(-1, *self.size),
            data={"class_name": np.array([self.labels[index] for index, _ in found], str)},
        )

    def settings(self) -> dict:
        """Returns `height` and `width` of maps and masks in pixels, and `method` and `refined` of the maps."""
        height, width = self.size
        return {"height": height, "width": width, "method": self.method, "refined": self.refined}

    def _text_to_dict(self, index: int) -> dict:
        """Returns one of the `texts` of `to_dict`."""
        heatmap, mask = (part.numpy() for part in self.map_and_mask(index))
        regions = find_regions(heatmap, mask)
        negative = negative_points(heatmap, mask).tolist() if regions else None
        return {
            "text": self.labels[index],
            "score": round(self.scores[index].item(), 4),
            "presence": self.presences[index],
            "prior": None if self.presence is None else float(f"{self.priors[index]:.4g}"),
            "regions": [
                {
                    "mean": round(region.mean, 4),
                    "box": list(region.box),
                    "positive_points": positive_points(heatmap, region).tolist(),
                    "negative_points": negative,
                }
                for region in regions
            ],
            "mask": run_lengths(mask),
        }

    def _threshold(self, index: int) -> float | None:
        """Returns the threshold of one text."""
        return self.threshold[index] if np.ndim(self.threshold) else self.threshold


def coco_annotations(
    explanation: Explanation, image_id: int, category_ids: Sequence[int] | None = None, first_id: int = 1
) -> list[dict]:
    """
    Returns the regions of an explanation as annotations of COCO, for the list `annotations` of its JSON format.

    Args:
        explanation ([`Explanation`]): of one image.
        image_id (`int`): id of the image in the list `images`.
        category_ids (list of T `int`, *optional*): ids of the texts in the list `categories`; 1, ..., T if not given.
        first_id (`int`): id of the first annotation. Ids are unique in a file.

    Returns:
        list of `dict`, one for each region, ordered by text, then best first: `id`, `image_id`, `category_id`,
        `segmentation` (run lengths, see [`run_lengths`]), `area` in pixels, `bbox` ([x, y, width, height] in pixels),
        `iscrowd` (0), and `score`, the mean of the map over the region, in [0, 1].
    """
    category_ids = range(1, len(explanation) + 1) if category_ids is None else category_ids
    annotations = []
    for index, category_id in zip(range(len(explanation)), category_ids, strict=True):
        for region in explanation.regions(index):
            x0, y0, x1, y1 = region.box
            annotations.append(
                {
                    "id": first_id + len(annotations),
                    "image_id": image_id,
                    "category_id": category_id,
                    "segmentation": run_lengths(region.mask),
                    "area": int(region.inside.sum()),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "iscrowd": 0,
                    "score": round(region.mean, 4),
                }
            )
    return annotations


def check_thresholds(threshold: float | Sequence[float], num_texts: int) -> torch.Tensor:
    """
    Returns one threshold for each of T = `num_texts` texts, `(T,)` float64. Raises `ValueError` unless `threshold` is
    a number in [0, 1], or T of them.
    """
    try:
        thresholds = torch.as_tensor(threshold, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # such as None or a string
        thresholds = torch.tensor(torch.nan)
    in_range = ((thresholds >= 0) & (thresholds <= 1)).all()  # False for NaN
    if thresholds.shape not in ((), (num_texts,)) or not in_range:
        or_list = f", or a list of {num_texts}, one for each text" if num_texts > 1 else ""
        raise ValueError(f"threshold is a number in [0, 1]{or_list}, not {threshold!r:.100}.")
    return thresholds.expand(num_texts)
