"""The functions that explain images with any model and method."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from inspect import signature
from itertools import repeat

from tqdm import tqdm

from ..backends.embedded import encoded_vocabulary, vocabulary
from ..data.files import images_of
from ..model.batches import PreparedImage
from ..model.engine import Engine
from ..model.explanation import Explanation
from ..model.images import load_image
from ..model.outputs import ICLIPTextFeatures
from ..model.prompts import split_texts
from ..model.words import explain_words, without_each_word
from . import make_explainer


logger = logging.getLogger(__name__)

# The highest number of nouns that an explanation without texts has.
NOUNS = 8


def explain(
    model,
    images,
    texts: str | Sequence[str] | Sequence[Sequence[str]] | Mapping[str, float] | ICLIPTextFeatures | None = None,
    method: str | None = None,
    **options,
) -> Explanation | list[Explanation]:
    """
    Explains which pixels of images match which text.

    Example:

    ```python
    >>> from iclip_hf import explain, load

    >>> explanation = explain(load("embedded"), "dog.jpg", ["dog", "red ball"])
    >>> explanation.scores, explanation.presence, explanation.maps.shape
    >>> explain(load("embedded"), "dog.jpg").labels  # what is in this image?
    ```

    Args:
        model ([`ExplainableModel`]): or anything that [`load`] takes.
        images: an image, or images as for [`explain_images`]; or the name of a folder, or a pattern such as
            "photos/*.jpg".
        texts, method, options: as for [`explain_images`].

    Returns:
        [`Explanation`] of one image, or a list of explanations for a folder or several images.
    """
    dimensions = getattr(images, "ndim", 1)  # a column of paths has one, a batch of pixels four
    is_one_image = dimensions not in (1, 4) or isinstance(images, (str, bytes)) or not isinstance(images, Iterable)
    if isinstance(images, (str, os.PathLike)) and (found := images_of(images)):
        images, is_one_image = found, False
    explanations = [*explain_images(model, [images] if is_one_image else images, texts, method, **options)]
    return explanations[0] if is_one_image else explanations


def explain_images(
    model,
    images: Iterable,
    texts: str | Sequence[str] | Sequence[Sequence[str]] | Mapping[str, float] | ICLIPTextFeatures | None = None,
    method: str | None = None,
    *,
    templates: Sequence[str] | None = None,
    target_sizes: Sequence[tuple[int, int]] | None = None,
    image_size: int | dict[str, int] | None = None,
    batch_size: int = 8,
    refine: bool = True,
    multi_scale: bool = False,
    words: bool = False,
    threshold: float | Sequence[float] = 0.5,
    min_presence: float | None = None,
    timeout: float = 60,
    skip_unreadable: bool = False,
    progress: bool = False,
    **method_options,
) -> Iterator[Explanation | None]:
    """
    Yields the explanations of images in their order. An image is loaded when its batch is explained, and no image or
    explanation is kept, so `images` can be a stream.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from iclip_hf import explain_images

    >>> files = sorted(Path("photos").glob("*.jpg"))
    >>> for file, explanation in zip(files, explain_images("embedded", files, ["dog"], progress=True)):
    ...     print(file.name, explanation.presences)
    ```

    Args:
        model ([`ExplainableModel`]): or anything that [`load`] takes.
        images: a list, column, generator or other iterable of images of any shapes: PIL images, numpy arrays or
            tensors as for [`ICLIPProcessor`], paths, URLs, "data:" URLs or bytes of files.
        texts: labels for all images, as a list or in one string, see [`split_texts`]; or a mapping from each label to
            the prior of its presence; or a list of labels for each image; or [`ICLIPTextFeatures`] of encoded texts or
            of other unit vectors, with the labels "0", "1", ... If not given, the nouns of [`vocabulary`] with the
            highest presence, at most `NOUNS`, one for each thing, see [`~naming.best_texts`]. Nouns with a presence
            below `min_presence` are left out, except for the best one. Priors that are not given are 0.5. Equal labels
            have a map each.
        method (`str`, *optional*), method_options: as for [`make_explainer`], which names the default.
        templates, image_size, multi_scale: as for [`Engine`]. With the templates `["{}"]`, texts are taken as they
            are.
        words (`bool`): whether to explain the words of `texts`, one sentence. The labels are its words, the scores are
            what each adds to the score of the sentence, and the maps show what each finds, see [`explain_words`].
        refine (`bool`): as for [`Engine`]. Refined maps follow edges of the image that the model may not have used.
            With `False`, maps are as the method computes them.
        target_sizes: `(height, width)` in pixels of the maps of each image, as a list, array or tensor; the image's
            size if not given.
        batch_size (`int`): as for [`Engine.run`].
        threshold (`float` in [0, 1], or T of them): for the masks, as for [`Explanation`].
        min_presence (`float` in [0, 1], *optional*): for the masks, as for [`Explanation`]; the model's if not given,
            see [`ExplainableModel`].
        timeout (`float`): time limit in seconds for the answer to the download of an image.
        skip_unreadable (`bool`): whether to log the error of an image that cannot be read, and yield None for it.
        progress (`bool`): whether to show a progress bar.

    Raises:
        `ValueError`, `TypeError`: as [`make_explainer`], [`Engine`] and [`ICLIPProcessor`]. `ValueError`: the numbers
            of images, lists of texts and sizes differ. `OSError`, `ValueError`: an image cannot be read.
    """
    if names := {"labels", "candidate_labels", "text"} & method_options.keys():
        raise TypeError(f"{min(names)}: what to look for is given as `texts`.")
    best = None
    if words:
        texts = without_each_word(texts)
    if texts is None:
        best, texts = NOUNS, vocabulary()
    texts = texts if isinstance(texts, Mapping) else split_texts(texts)
    total = len(images) if isinstance(images, Sized) else None
    sizes = repeat(None) if target_sizes is None else target_sizes
    num_lists = len(texts) if isinstance(next(iter(texts), None), (list, tuple)) else total
    num_sizes = total if target_sizes is None else len(target_sizes)
    if total is not None and not total == num_lists == num_sizes:
        raise ValueError(
            f"There are {total} images, {num_lists} lists of texts and {num_sizes} sizes: give one for each image."
        )
    explainer = make_explainer(model, method, signature(explain_images).parameters, **method_options)
    engine = Engine(explainer.model, explainer.model.processor, explainer, templates, image_size, refine, multi_scale)
    encoded = encoded_vocabulary(engine.model, engine.templates) if best else None
    min_presence = engine.model.min_presence if min_presence is None else min_presence
    limits = {"threshold": threshold, "min_presence": min_presence}

    def prepared(image, size: tuple[int, int] | None) -> PreparedImage | None:
        try:
            return engine.prepare(load_image(image, timeout=timeout), size)
        except (OSError, ValueError) as error:
            if not skip_unreadable:
                raise
            logger.warning("%s", error)
            return None

    explanations = engine.run(map(prepared, images, sizes), texts, batch_size, best, encoded, min_presence)
    if words:
        explanations = (each and explain_words(each) for each in explanations)
    bar = tqdm(explanations, total=total, unit="image", disable=not progress)
    return (None if explanation is None else replace(explanation, **limits) for explanation in bar)
