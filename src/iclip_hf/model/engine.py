"""
The engine computes explanations from a model, images and texts. `explain`, the pipelines, evaluation, pictures in
training and the demo use it.

A model here is an [`ICLIPModel`], or any object with its methods `get_image_features`, `get_text_features`,
`similarity_maps`, `scores` and `presence`, such as an [`ExplainableModel`].
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from operator import itemgetter

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .batches import (
    ImageBatch,
    PreparedImage,
    for_images,
    join_images,
    join_texts,
    map_groups,
    map_tensors,
    pad_indices,
    select_texts,
)
from .explanation import Explanation
from .images import load_image
from .naming import best_texts
from .outputs import ICLIPImageFeatures, ICLIPTextFeatures
from .presence import EVEN_PRIOR, MIN_PRESENCE, at_prior, check_priors
from .processing_iclip import size_dict
from .prompts import check_templates, split_texts
from .questions import Best, Question
from .refinement import refine_maps
from .similarity import check_finite, check_map_size
from .windows import Tiling, TwoScales


logger = logging.getLogger(__name__)

# Number of prompts in one forward pass. All prompts of 80 classes in 80 templates would take gigabytes.
PROMPT_BATCH = 64


class Engine:
    """
    Explains images with one model and one method.

    Scores and presence of the whole image are always computed at the model's own image size, so maps of another size
    cost a second forward pass.

    Example:

    ```python
    >>> from iclip_hf import load
    >>> from iclip_hf.model.engine import Engine

    >>> model = load("embedded")
    >>> engine = Engine(model, model.processor)
    >>> for explanation in engine.run(images, ["dog", "red ball"]):
    ...     print(explanation.scores, explanation.presence, explanation.map("dog").shape)
    ```

    Args:
        model, processor: a model, as described above, and its [`ICLIPProcessor`].
        method ([`Explainer`], *optional*): object that computes the maps by `forward(pixel_values, texts)`, which may
            also take `features`, `text_indices` and `templates`, see [`Explainer.forward`]. The default is the model's
            own map, the method `itsm`. [`make_explainer`] returns the method that suits the model.
        templates (`list[str]`, *optional*): templates of prompts, with one `{}` each; the processor's if not given.
            With `["{}"]`, texts are taken as they are.
        image_size (`int` or `dict`, *optional*): side in pixels of the square that images are resized to for the maps,
            or a `size` of [`ICLIPProcessor`]; the processor's if not given.
        refine (`bool`): whether to refine the maps by the colours of the image, see [`refine_maps`].
        multi_scale (`bool`): whether to compute maps and scores at two scales, see [`TwoScales`]. This takes ten times
            as long.

    Attributes:
        takes_features (`bool`): whether the method computes maps from the features of encoded images. Such methods can
            share the features of [`Engine.encode_images`].
        method_name (`str`): the name of the method.
    """

    def __init__(
        self,
        model,
        processor,
        method=None,
        templates: str | Sequence[str] | None = None,
        image_size: int | dict[str, int] | None = None,
        refine: bool = False,
        multi_scale: bool = False,
    ):
        self.model, self.processor, self.method = model, processor, method
        self.templates = check_templates(processor.templates if templates is None else templates)
        self.image_size = None if image_size is None else size_dict(image_size)
        self.refine, self.multi_scale = refine, multi_scale
        self.tiling = TwoScales(processor.patch_size) if multi_scale else Tiling()
        self._forward = self._own_maps if method is None else method.forward
        self.method_name = "itsm" if method is None else getattr(method, "name", type(method).__name__)
        self._argument_names = signature(self._forward).parameters.keys()
        self.takes_features = "features" in self._argument_names

    def encode(self, labels: Sequence[str]) -> ICLIPTextFeatures:
        """
        Encodes T labels as unit vectors `text_embeds` and `map_text_embeds` of shape `(T, P)`, averaged over the
        templates. Raises `ValueError` if a label is empty.
        """
        labels_at_once = max(1, PROMPT_BATCH // len(self.templates))
        starts = range(0, len(labels), labels_at_once)
        parts = []
        for start in tqdm(starts, "Encoding texts", leave=False, unit="batch", delay=2):
            prompts = self.processor(labels=labels[start : start + labels_at_once], templates=self.templates)
            mask = prompts.get("attention_mask")
            if mask is not None and mask.shape[1] == self.processor.max_text_length and mask[:, -1].any():
                logger.warning("A text has %d tokens or more; the others are cut off.", mask.shape[1])
            with torch.no_grad():
                parts.append(self.model.get_text_features(**prompts.to(self.model.device)))
        return join_texts(parts)

    def prepare(
        self,
        image: Image.Image,
        size: tuple[int, int] | None = None,
        text_indices: Sequence[int] | None = None,
    ) -> PreparedImage:
        """
        Prepares an image. This does not run the model, so threads can prepare the next images meanwhile, see
        [`~prefetch.prefetch_map`].

        Args:
            image (`PIL.Image.Image`): of any mode and EXIF orientation.
            size (`tuple[int, int]`, *optional*): height and width of its maps in pixels; those of the image if not
                given.
            text_indices (*optional*): indices of the texts to map; all if not given. Methods that compare the texts
                still see all of them, and `Explanation.all_scores` has all scores.
        """
        image, own_size = load_image(image), size_dict(self.processor.image_processor.size)
        prepared_size = self.tiling.prepared_size(self.image_size or own_size)

        def pixel_values_at(new_size: dict[str, int]) -> torch.Tensor:
            # With do_resize=False, the processor takes no size.
            return self.processor(images=[image], size=None if new_size == own_size else new_size)["pixel_values"]

        pixel_values = pixel_values_at(prepared_size)
        score_pixel_values = None
        if self.image_size is not None:
            score_pixel_values = pixel_values if prepared_size == own_size else pixel_values_at(own_size)
            if score_pixel_values.shape == pixel_values.shape and not self.multi_scale:
                score_pixel_values = None  # the maps are computed at the model's own size
        return PreparedImage(
            pixel_values=pixel_values,
            score_pixel_values=score_pixel_values,
            size=(image.height, image.width) if size is None else check_map_size(size),
            text_indices=text_indices,
            image=image,
        )

    @torch.no_grad()
    def encode_images(self, images: Sequence[PreparedImage]) -> list[PreparedImage]:
        """
        Encodes images once, for several calls of `run`, also of other engines of the model with the same `image_size`
        and `multi_scale`. Returns the images with the features for the scores and, if `takes_features`, for the maps.
        Other methods run the image tower again.
        """

        def encode(group: list[PreparedImage]) -> list[PreparedImage]:
            if not self.takes_features and group[0].score_pixel_values is None:
                return group  # the scores come with the maps
            batch = self._encode_views(join_images(group), self.takes_features)
            encoded = []
            for index, image in enumerate(group):
                take_image = itemgetter(slice(index, index + 1))
                score_features = map_tensors(take_image, batch.score_features)
                features = map_tensors(take_image, batch.features)
                encoded.append(replace(image, score_features=score_features, features=features))
            return encoded

        return map_groups(encode, images, [image.batch_key for image in images])

    def run(
        self,
        images: Iterable[Image.Image | PreparedImage | None],
        texts: str | Sequence[str] | Sequence[Sequence[str]] | Mapping[str, float] | ICLIPTextFeatures,
        batch_size: int = 8,
        best: int | None = None,
        encoded: ICLIPTextFeatures | None = None,
        min_presence: float = 0.0,
    ) -> Iterator[Explanation | None]:
        """
        Yields the explanations of images in their order.

        Args:
            images: PIL images, or results of `prepare`. None stands for an image that cannot be read; its explanation
                is None.
            texts: labels for all images, as a list, in one string ([`split_texts`]), or as a `dict` with the prior of
                each, which is 0.5 otherwise; one list of labels for each image; or encoded texts, whose labels are
                "0", "1", ... A text of several images is encoded once.
            batch_size (`int`): largest number of images in one forward pass. The images of one pass have the same
                shape and the same number of texts.
            best (`int`, *optional*): highest number of texts to explain for each image: those with the highest
                presence, or with the highest score if the model has no presence, best first. Of texts that name one
                thing, such as "sofa" and "couch", one is explained ([`~naming.best_texts`]). `Explanation.all_scores`
                has all scores. For an image with `text_indices`, only these texts count.
            encoded ([`ICLIPTextFeatures`], *optional*): the labels in `texts`, encoded.
            min_presence (`float` in [0, 1]): with `best`, other texts than the best one are left out if they have a
                lower presence.
        """
        for name, number in (("batch_size", batch_size), ("best", best)):
            if number is not None and number < 1:
                raise ValueError(f"{name} is at least 1, not {number}.")
        question = self._question(texts, encoded)
        if best is not None:
            question = question._replace(best=Best(best, min_presence))
        return self._explanations(images, question, batch_size)

    def _question(self, texts, encoded: ICLIPTextFeatures | None) -> Question:
        """Brings the texts of `run` to one form, and encodes them unless they are `encoded`."""
        if isinstance(texts, ICLIPTextFeatures):
            return Question([str(index) for index in range(len(texts.text_embeds))], texts)
        priors = label_indices = None
        if isinstance(texts, Mapping):
            check_priors(texts)
            texts, priors = [*texts], torch.tensor([*texts.values()], dtype=torch.float32)
        labels = split_texts(texts)
        lists = [item for item in labels if isinstance(item, (list, tuple))]
        if lists and len(lists) < len(labels):  # as a list, a string would be its letters
            raise ValueError("Texts are either strings for all images, or a list of strings for each image, not both.")
        if not all(lists or [labels]):
            raise ValueError("There is no text: name what to look for, for each image.")
        if lists:
            labels = list(dict.fromkeys(itertools.chain(*lists)))
            index_of = {label: index for index, label in enumerate(labels)}
            label_indices = [[index_of[label] for label in image_labels] for image_labels in lists]
        return Question(labels, self.encode(labels) if encoded is None else encoded, priors, label_indices)

    def _explanations(self, images: Iterable, question: Question, batch_size: int) -> Iterator[Explanation | None]:
        """Yields the explanations of images in their order, computed in batches."""
        label_indices = question.label_indices or itertools.repeat(None)
        images_with_indices = zip(images, label_indices, strict=question.label_indices is not None)
        while batch := list(itertools.islice(images_with_indices, batch_size)):
            asked = [
                (self.prepare(image) if isinstance(image, Image.Image) else image, indices)
                for image, indices in batch
                if image is not None
            ]
            keys = [(image.batch_key, None if indices is None else len(indices)) for image, indices in asked]
            positions = [position for position, (image, _) in enumerate(batch) if image is not None]
            explained = dict(zip(positions, map_groups(partial(self._explain, question), asked, keys)))
            yield from map(explained.get, range(len(batch)))

    @torch.no_grad()
    def _explain(
        self, question: Question, asked: Sequence[tuple[PreparedImage, list[int] | None]]
    ) -> list[Explanation]:
        """Explains B images of one `batch_key`, each with the indices of its T labels, None for all labels."""
        images, label_indices = zip(*asked)
        labels, texts = question.select(label_indices)
        scores, presence, mapped, raw_maps, unrefined_maps = self._answer(question, images, labels, texts)
        explanations = []
        for position, (image, indices) in enumerate(zip(images, mapped)):
            explanation = Explanation(
                labels=[labels[position][index] for index in indices],
                scores=scores[position][indices],
                presence=None if presence is None else presence[position][indices],
                raw_maps=raw_maps[position, : len(indices)],
                unrefined_maps=None if unrefined_maps is None else unrefined_maps[position, : len(indices)],
                size=image.size,
                prior=EVEN_PRIOR if question.priors is None else question.priors[indices],
                image=image.image,
                all_scores=scores[position],
                min_presence=getattr(self.model, "min_presence", MIN_PRESENCE),
                method=self.method_name,
                refined=self.refine,
            )
            explanations.append(explanation)
        return explanations

    def _answer(
        self,
        question: Question,
        images: Sequence[PreparedImage],
        labels: Sequence[Sequence[str]],
        texts: ICLIPTextFeatures,
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[list[int]], torch.Tensor, torch.Tensor | None]:
        """
        Computes the scores of B images with texts `(B, T, P)`, and the maps of the best or the wanted texts. Returns
        scores and presence `(B, T)`, the indices of the texts with maps for each image, at most S, their raw maps
        `(B, S, h, w)` and, if these are refined, the unrefined maps, all on the CPU.
        """
        batch = join_images(images)
        all_indices = range(texts.text_embeds.shape[1])
        mapped = [all_indices if image.text_indices is None else image.text_indices for image in images]
        text_indices = None if images[0].text_indices is None else mapped
        maps = None
        if not any(map(len, mapped)):
            maps = torch.zeros(len(images), 0, 1, 1)  # no map is wanted
        elif question.best is None and not self.takes_features:
            # The features that the method computes are also used for the scores.
            maps, features = self.raw_maps(batch.pixel_values, texts, text_indices=text_indices, refine=False)
            batch = replace(batch, features=features)
        batch = self._encode_views(batch, for_maps=maps is None and self.takes_features)
        scores, presence = self._score(batch.score_features, texts, question.priors)
        if question.best is not None:
            map_texts = partial(self.model.similarity_maps, batch.score_features[0])
            mapped = best_texts(labels, scores, presence, question.priors, texts, mapped, map_texts, *question.best)
            maps = self._best_maps(batch, texts, mapped)
        elif maps is None:
            maps, _ = self.raw_maps(batch.pixel_values, texts, batch.features, text_indices, refine=False)
        unrefined = None
        if self.refine and maps.shape[1]:
            unrefined, maps = maps, refine_maps(maps, batch.pixel_values.to(maps.device))
        scores, presence, maps, unrefined = map_tensors(torch.Tensor.cpu, [scores, presence, maps, unrefined])
        return scores, presence, [*map(list, mapped)], maps, unrefined

    def _best_maps(self, batch: ImageBatch, texts: ICLIPTextFeatures, best: Sequence[Sequence[int]]) -> torch.Tensor:
        """
        Computes the maps `(B, S, h, w)` of the best of texts `(B, T, P)`, at most S of an image. Images with equally
        many are mapped together, because some methods compare the texts of an image.
        """

        def maps_of(rows: list[int]) -> torch.Tensor:
            rows_of_texts, features = map_tensors(lambda values: values[rows], [texts, batch.features])
            selected = select_texts(rows_of_texts, torch.tensor([best[row] or [0] for row in rows]))
            maps, _ = self.raw_maps(batch.pixel_values[rows], selected, features, refine=False)
            return maps[:, : len(best[rows[0]])]

        return pad_sequence(map_groups(maps_of, range(len(best)), map(len, best)), batch_first=True)

    def _encode_views(self, batch: ImageBatch, for_maps: bool) -> ImageBatch:
        """
        Encodes the views of images for the scores and, with `for_maps`, for the maps. Features that the batch has
        already are kept.
        """
        features, score_features = batch.features, batch.score_features
        if features is None and for_maps:
            features = [self._features(view) for view in self.tiling.views(batch.pixel_values)]
        if score_features is None:
            views = [*(features or self.tiling.views(batch.pixel_values))]  # features or pixel values
            if batch.score_pixel_values is not None:
                views[0] = batch.score_pixel_values  # the whole image, at the model's own size
            score_features = [map_tensors(torch.Tensor.detach, self._features(view)) for view in views]
        return replace(batch, features=features, score_features=score_features)

    def _score(
        self, view_features: Sequence[ICLIPImageFeatures], texts: ICLIPTextFeatures, priors: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the scores and the presence, `(B, T)` each. The presence is None if the model has none."""
        scores = self.tiling.join_scores([self.model.scores(features, texts) for features in view_features])
        check_finite(scores)
        presence = self.model.presence(scores)
        if presence is not None and priors is not None:
            presence = at_prior(presence, priors.to(presence))
        return scores, presence

    def raw_maps(
        self,
        pixel_values: torch.Tensor,
        texts: ICLIPTextFeatures,
        features: Sequence[ICLIPImageFeatures] | None = None,
        text_indices: Sequence[Sequence[int]] | None = None,
        tiling: Tiling | None = None,
        refine: bool = True,
    ) -> tuple[torch.Tensor, list[ICLIPImageFeatures]]:
        """
        Computes the raw maps `(B, T, h, w)`, float32, of prepared images `(B, 3, H, W)`, with the tiling and the
        refinement of the engine. Returns the maps, and the features of the views.

        Args:
            texts ([`ICLIPTextFeatures`]): from `encode`, `(T, P)`, or different texts for each image, `(B, T, P)`.
            features (`list[ICLIPImageFeatures]`, *optional*): features of the views, if they are encoded already.
            text_indices (*optional*): for each image the indices of the texts to map; all if not given. The maps are
                then `(B, S, h, w)`, where S is the largest number of indices. An image with fewer indices has maps of
                any texts after its own.
            tiling ([`Tiling`], *optional*): tiling to use instead of the engine's, such as [`SlidingWindows`].
            refine (`bool`): whether to refine the maps, if the engine does.
        """
        texts = for_images(texts, len(pixel_values))
        tiling = tiling or self.tiling
        views = tiling.views(pixel_values)
        results = [
            self._view_maps(view, texts, known_features, text_indices)
            for view, known_features in zip(views, features or [None] * len(views))
        ]
        view_maps, view_features = map(list, zip(*results))
        maps = tiling.join_maps(view_maps, pixel_values.shape[2:])
        if refine and self.refine:
            maps = refine_maps(maps, pixel_values.to(maps.device))
        return maps, view_features

    def _view_maps(
        self,
        pixel_values: torch.Tensor,
        texts: ICLIPTextFeatures,
        known_features: ICLIPImageFeatures | None,
        text_indices: Sequence[Sequence[int]] | None,
    ) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        """
        Computes the maps of the method for one view of the images, and checks them. Returns the maps and the features
        of the view. `known_features` are those of the view, if it is encoded already.
        """
        arguments = {}
        if self.takes_features:
            arguments["features"] = self._features(pixel_values) if known_features is None else known_features
        if "templates" in self._argument_names:
            arguments["templates"] = self.templates
        expected = tuple(texts.text_embeds.shape[:2])
        selected = None if text_indices is None else pad_indices(text_indices)
        if selected is not None and "text_indices" in self._argument_names:
            arguments["text_indices"] = selected
            expected = tuple(selected.shape)
        maps, features = self._forward(pixel_values, texts, **arguments)
        if maps.ndim != 4 or maps.shape[:2] != expected:
            raise ValueError(
                f"{type(self.method).__name__} returned maps of shape {tuple(maps.shape)} for {expected[0]} images "
                f"with {expected[1]} texts each, instead of {(*expected, 'h', 'w')}."
            )
        maps = maps.float()
        if selected is not None and "text_indices" not in arguments:  # the method mapped all texts
            maps = maps[torch.arange(len(maps))[:, None], selected]
        if not getattr(self.method, "has_holes", False):
            check_finite(maps)
        return maps, map_tensors(torch.Tensor.detach, features)

    @torch.no_grad()
    def _own_maps(
        self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures, features: ICLIPImageFeatures
    ) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        """Computes the model's own maps. Takes and returns the same as [`Explainer.forward`]."""
        return self.model.similarity_maps(features, texts), features

    @torch.no_grad()
    def _features(self, view: torch.Tensor | ICLIPImageFeatures) -> ICLIPImageFeatures:
        """Encodes pixel values. Features are returned unchanged."""
        if not isinstance(view, torch.Tensor):
            return view
        # Models that are not from transformers convert the dtype themselves.
        return self.model.get_image_features(view.to(self.model.device, getattr(self.model, "dtype", None)))
