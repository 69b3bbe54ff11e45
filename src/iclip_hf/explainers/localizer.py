"""From images and texts to explanations."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from ..model.explanation import Explanation
from ..model.explanation_core import Pixels, forward, join, prepare
from ..model.images import load_image, map_groups
from ..model.presence import MIN_PRESENCE
from ..model.processing_iclip import check_thresholds
from ..model.prompts import check_templates, split_texts
from ..utils.prefetch import Item, prefetch_map
from . import WordExplainer, make_explainer, select_texts


class PreparedImage(NamedTuple):
    """An image prepared for the model, with its texts, from [`Localizer.prepare`]."""

    pixels: Pixels
    image: Image.Image | None  # for the explanation
    size: tuple[int, int]  # height and width of its maps in pixels
    rows: list[int]  # indices of its texts among those of the localizer


class Localizer:
    """
    Localizes the same texts in any number of images with one method. Texts are encoded once, and images are batched by shape.

    Args:
        model, method, method_options: as for [`make_explainer`].
        texts: T labels, or one string of them, see [`split_texts`].
        templates: prompts with one `{}` each; the processor's if not given.
        threshold (`float` in [0, 1], or T of them): foreground is M > threshold.
        min_presence (`float` in [0, 1]): a text with a lower presence gets an empty mask.
        image_size (`int` or `dict`, *optional*): side in pixels of the square that images are resized to, or a `size` of
            [`ICLIPProcessor`]; the processor's if not given. Scores and presence always come from the processor's size, so another
            one costs a second forward pass.
        words (`str`, *optional*): method that scores the words of the texts, `"grad_eclip"` or `"bi_modal"`, see
            [`WordExplainer`]; no word scores if not given.
        refine (`bool`): whether `explain` refines the maps by the colours of the image, see [`refine_maps`].

    Attributes:
        model ([`ExplainableModel`]): the loaded model.
        encoded ([`ICLIPTextFeatures`]): the encoded texts, `(T, P)`.

    Raises:
        `ValueError`, `TypeError`: as [`make_explainer`]; there is no text; or thresholds are out of range.
    """

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
        words: str | None = None,
        refine: bool = False,
        **method_options,
    ):
        self.explainer = make_explainer(model, method, **method_options)
        self.model = self.explainer.model
        self.templates = check_templates(self.model.templates if templates is None else templates)
        self._references = self.model.references(self.templates)
        self.min_presence, self.image_size, self.words, self.refine = min_presence, image_size, words, refine
        self._method = {"method": method, **method_options}
        self._ask(texts, threshold)

    def _ask(self, texts: str | Sequence[str], threshold: float | Sequence[float]) -> None:
        self.texts = split_texts(texts)
        if not self.texts:
            raise ValueError("There is no text: name what to look for.")
        self.thresholds = check_thresholds(threshold).expand(len(self.texts)).tolist()
        self.encoded = self.model.encode_texts(self.texts, self.templates)
        self._words = self.words and WordExplainer(self.model, self.texts, self.templates, self.words)

    @property
    def settings(self) -> dict:
        """Everything that results depend on besides the images, as plain values. Computes the identity of the model."""
        names = ("texts", "thresholds", "templates", "min_presence", "image_size", "words", "refine")
        own = {name: getattr(self, name) for name in names}
        return {**self.model.identity, **self._method, **self.explainer.content, **own}

    def about(self, texts: str | Sequence[str], threshold: float | Sequence[float] = 0.5) -> Localizer:
        """Returns a localizer for other texts that shares the prepared model."""
        other = copy.copy(self)
        other._ask(texts, threshold)
        return other

    def prepare(
        self, image: Image.Image, labels: Sequence[str] | None = None, size: tuple[int, int] | None = None
    ) -> PreparedImage:
        """
        Prepares an RGB image for `explain`, with some of the localizer's texts (all if not given), and with the height and width of its
        maps in pixels (those of the image if not given).
        """
        rows = range(len(self.texts)) if labels is None else map(self.texts.index, labels)
        pixels = prepare(self.model.processor, image, self.image_size)
        return PreparedImage(pixels, image, (image.height, image.width) if size is None else size, list(rows))

    def encode(self, image: PreparedImage) -> PreparedImage:
        """Adds the features of an image, which `explain` then need not compute, if the method can use them for any texts."""
        features = self.explainer.encode_images(image.pixels.pixel_values)
        return image._replace(pixels=image.pixels._replace(features=features))

    def explain(self, images: Iterable[PreparedImage | None], batch_size: int = 8) -> Iterator[Explanation | None]:
        """
        Yields explanations in the order of the images, which are results of `prepare`; None stays None. At most `batch_size` images,
        of one shape and with equally many texts, share a forward pass.
        """
        images = iter(images)
        while batch := list(itertools.islice(images, batch_size)):
            readable = [image for image in batch if image is not None]
            keys = [
                # Images with features are explained alone.
                (image.pixels.shape, len(image.rows), None if image.pixels.features is None else index)
                for index, image in enumerate(readable)
            ]
            explanations = iter(map_groups(self._explain, readable, keys))
            yield from (None if image is None else next(explanations) for image in batch)

    def _explain(self, images: list[PreparedImage]) -> list[Explanation]:
        """Explains images of one shape with equally many texts in one forward pass."""
        texts = select_texts(self.encoded, torch.tensor([image.rows for image in images]))
        pixels = join([image.pixels for image in images])
        result = forward(self.model, pixels, texts, self._references, self.explainer, self.refine)
        words = self._words(result.image.image_embeds) if self._words else [None] * len(images)
        return [
            Explanation(
                labels=[self.texts[row] for row in image.rows],
                scores=scores,
                presence=presences,
                raw_maps=raw_maps,
                size=image.size,
                threshold=[self.thresholds[row] for row in image.rows],
                min_presence=self.min_presence,
                reversed=self.explainer.reversed,
                words=None if of_words is None else [of_words[row] for row in image.rows],
                image=image.image,
            )
            for image, raw_maps, scores, presences, of_words in zip(images, *result[:3], words)
        ]

    def explain_all(
        self,
        load: Callable[[Item], tuple[str, Image.Image]],
        items: Iterable[Item],
        pool: Executor,
        batch_size: int = 8,
    ) -> Iterator[tuple[str, Explanation | None]]:
        """
        Explains many images in order, while threads of the pool load the next ones: `load` returns the name and the RGB image of an
        item. Yields the name of each with its explanation. If `load` raises `ValueError` or `FileNotFoundError`, the name is the
        error message, in one line, and the explanation is None.
        """

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


def explain(
    model,
    images,
    texts: str | Sequence[str] | Sequence[Sequence[str]],
    method: str = "itsm",
    *,
    templates: Sequence[str] | None = None,
    target_sizes: Sequence[tuple[int, int]] | None = None,
    size: int | dict[str, int] | None = None,
    batch_size: int = 8,
    words: str | None = None,
    refine: bool = False,
    timeout: float = 60,
    progress: bool = False,
    **method_options,
) -> Explanation | list[Explanation]:
    """
    Explains which pixels of images match which text.

    Example:

    ```python
    >>> from iclip_hf import explain, load

    >>> explanation = explain(load("embedded"), "dog.jpg", ["dog", "red ball"])
    >>> explanation.scores, explanation.presence, explanation.maps.shape
    ```

    Args:
        model ([`ExplainableModel`]): or anything that [`load`] takes.
        images: an image, or a list of B images of any shapes: PIL images, numpy arrays or tensors as for [`ICLIPProcessor`], paths,
            URLs, base64 text or bytes of files.
        texts: labels shared by all images, as a list or in one string, see [`split_texts`]; or for a list of images a list of labels for
            each; these may differ in length.
        method (`str`), method_options: as for [`make_explainer`].
        templates, words, refine: as for [`Localizer`]. The templates `["{}"]` take the texts as they are.
        target_sizes: `(height, width)` in pixels of each image's maps; the size of the image if not given.
        size: the size of images for the model, as for [`ICLIPProcessor`]; the processor's if not given.
        batch_size (`int`): largest number of images in one forward pass. These have one shape and equally many texts.
        timeout (`float`): time limit in seconds for the download of an image.
        progress (`bool`): whether to show a progress bar, for many images.

    Returns:
        [`Explanation`] of one image, or a list of B for a list of images.

    Raises:
        `ValueError`, `TypeError`: as [`Localizer`] and [`ICLIPProcessor`]; or the numbers of images, texts and sizes differ.
        `OSError`: an image cannot be read.
    """
    is_one = isinstance(images, (str, bytes)) or not isinstance(images, Iterable) or getattr(images, "ndim", 4) < 4
    images = [load_image(image, timeout=timeout) for image in ([images] if is_one else images)]
    texts = split_texts(texts)
    per_image = bool(texts) and not isinstance(texts[0], str)
    labels = texts if per_image else [None] * len(images)
    unique = list(dict.fromkeys(itertools.chain(*texts))) if per_image else texts
    sizes = [None] * len(images) if target_sizes is None else target_sizes
    if not len(images) == len(labels) == len(sizes):
        raise ValueError(f"There are {len(images)} images, {len(labels)} lists of texts and {len(sizes)} sizes.")
    options = {"templates": templates, "image_size": size, "words": words, "refine": refine, **method_options}
    localizer = Localizer(model, unique, method=method, **options)
    explanations = localizer.explain(map(localizer.prepare, images, labels, sizes), batch_size)
    explanations = list(tqdm(explanations, total=len(images), unit="image", disable=not progress))
    return explanations[0] if is_one else explanations
