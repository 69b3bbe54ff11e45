"""The function that explains images with any model and method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from inspect import signature

from tqdm import tqdm

from ..backends.embedded import encoded_vocabulary, vocabulary
from ..model.engine import Engine
from ..model.explanation import Explanation
from ..model.images import load_image
from ..model.outputs import ICLIPTextFeatures
from ..model.presence import MIN_PRESENCE
from ..model.prompts import split_texts
from ..model.words import explain_words, without_each_word
from . import make_explainer


# The highest number of nouns that an explanation without texts has.
NOUNS = 8


def explain(
    model,
    images,
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
    min_presence: float = MIN_PRESENCE,
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
    >>> explain(load("embedded"), "dog.jpg").labels  # what is in this image?
    ```

    Args:
        model ([`ExplainableModel`]): or anything that [`load`] takes.
        images: an image, or a list or column of B images of any shapes: PIL images, numpy arrays or tensors as for
            [`ICLIPProcessor`], paths, URLs, base64 text or bytes of files.
        texts: labels for all images, as a list or in one string, see [`split_texts`]; or a mapping from each label to
            the prior of its presence; or, for a list of images, a list of labels for each image; or
            [`ICLIPTextFeatures`] of encoded texts or of other unit vectors, with the labels "0", "1", ... If not
            given, the nouns of [`vocabulary`] with the highest presence, at most `NOUNS`, one for each thing, see
            [`~naming.best_texts`]. Nouns with a presence below `min_presence` are left out, except for the best one.
            Priors that are not given are 0.5.
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
        threshold, min_presence: for the masks, as for [`Explanation`].
        timeout (`float`): time limit in seconds for the download of an image.
        progress (`bool`): whether to show a progress bar, for many images.

    Returns:
        [`Explanation`] of one image, or a list of B explanations for a list of images.

    Raises:
        `ValueError`, `TypeError`: as [`make_explainer`], [`Engine`] and [`ICLIPProcessor`]. `ValueError`: the numbers
            of images, texts and sizes differ.
        `OSError`, `ValueError`: an image cannot be read.
    """
    dimensions = getattr(images, "ndim", 1)  # a column of paths has one, a batch of pixels four
    is_one_image = dimensions not in (1, 4) or isinstance(images, (str, bytes)) or not isinstance(images, Iterable)
    if is_one_image:
        images = [images]
    elif not isinstance(images, Sized):
        images = [*images]
    best = None
    if words:
        labels, shorter = without_each_word(texts)
        texts = [texts, *shorter]
    if texts is None:
        best, texts = NOUNS, vocabulary()
    texts = texts if isinstance(texts, Mapping) else split_texts(texts)
    has_lists = isinstance(next(iter(texts), None), (list, tuple))
    sizes = [None] * len(images) if target_sizes is None else target_sizes
    if len(sizes) != len(images) or (has_lists and len(texts) != len(images)):
        lists = f", {len(texts)} lists of texts" if has_lists else ""
        raise ValueError(f"There are {len(images)} images{lists} and {len(sizes)} sizes: give one for each image.")
    explainer = make_explainer(model, method, signature(explain).parameters, **method_options)
    engine = Engine(explainer.model, explainer.model.processor, explainer, templates, image_size, refine, multi_scale)
    encoded = encoded_vocabulary(engine.model, engine.templates) if best else None
    loaded = (load_image(image, timeout=timeout) for image in images)  # loaded when they are needed
    explanations = engine.run(map(engine.prepare, loaded, sizes), texts, batch_size, best, encoded, min_presence)
    if words:
        explanations = (explain_words(explanation, labels) for explanation in explanations)
    explanations = [
        replace(explanation, threshold=threshold, min_presence=min_presence)
        for explanation in tqdm(explanations, total=len(images), unit="image", disable=not progress)
    ]
    return explanations[0] if is_one_image else explanations
