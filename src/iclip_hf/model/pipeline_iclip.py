"""Pipelines that predict scores, maps and masks, or segments, for images and labels."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline
from transformers.utils import logging

from .engine import Engine
from .explanation import Explanation
from .images import load_image
from .presence import MIN_PRESENCE
from .processing_iclip import check_processor
from .prompts import split_texts
from .regions import find_regions, run_lengths


logger = logging.get_logger(__name__)


class ImageTextSimilarityMapPipeline(Pipeline):
    """
    Predicts which labels an image shows, and which of its pixels match them.

    A call encodes the labels once for all its images. The results of a data set or a generator are yielded one by one.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("image-text-similarity-map", model="org/iclip-vit-b16", trust_remote_code=True)
    >>> answers = pipe("dog.jpg", candidate_labels=["dog", "red ball"], threshold=0.4)
    >>> answers[0]["label"], answers[0]["score"], answers[0]["map"].shape
    ('dog', 0.27, torch.Size([480, 640]))
    ```

    A model folder with its own code needs `trust_remote_code=True`. With
    `pipeline_class=iclip_hf.ImageTextSimilarityMapPipeline`, the code of the installed package runs instead.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _postprocess_parameters = ("threshold", "min_presence", "return_json")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.model.config.model_type != "iclip":
            raise ValueError(
                f"The pipeline takes ICLIP models, not {self.model.config.model_type!r}: call iclip_hf.explain for "
                "other models."
            )
        check_processor(self.model.name_or_path, self.processor, self.model.config)

    def __call__(
        self,
        images,
        candidate_labels: str | Sequence[str],
        hypothesis_template: str | Sequence[str] | None = None,
        **kwargs,
    ):
        """
        Explains images.

        Args:
            images: an image as a path, a URL, base64 text, a PIL image or an array; or a list, a `Dataset` or a
                generator of images.
            candidate_labels (`str` or T of them): class names or phrases. In one string, commas separate the labels,
                as in transformers. In a list, commas belong to the label, see [`split_texts`].
            hypothesis_template (`str` or a list, *optional*): templates of prompts, with one `{}` for the label, also
                by the name `templates`; the processor's if not given. The features of several prompts are averaged.
                `"{}"` takes the labels as they are.
            threshold (`float` in [0, 1] or T of them, defaults to 0.5): a mask has the pixels where the map is
                greater.
            min_presence (`float` in [0, 1], defaults to 0.5): a label with a lower presence gets an empty mask.
            refine (`bool`, defaults to `True`): whether to refine the maps by the colours of the image, see
                [`refine_maps`].
            multi_scale (`bool`, defaults to `False`): whether to compute maps and scores at two scales, see
                [`Engine`].
            return_json (`bool`, defaults to `False`): whether to return plain values only, for JSON: no `map`, and
                `mask` as COCO's uncompressed run lengths, see [`run_lengths`].
            image_size (`int` or `dict`, *optional*): size of the image for the maps, see [`Engine`]. Another size than
                the processor's costs a second forward pass.
            timeout (`float`, defaults to 60): time limit in seconds for the download of an image.
            batch_size (`int`, defaults to 1): largest number of images in one forward pass. The images of one pass
                have the same shape.

        Returns:
            For one image, a list of T `dict`, best score first. For a list of images, a list of such lists. For a
            `Dataset` or a generator, an iterator over such lists. The items are:

            - **label** (`str`)
            - **score** (`float`): cosine of image and label, in [-1, 1].
            - **presence** (`float`): probability that the image shows the label, in [0, 1] at a prior of 0.5, see
              [`ICLIPModel.presence`]; None if the model has no presence.
            - **map** (`torch.Tensor` of shape `(height, width)`): map at the size of the image, in [0, 1].
            - **mask** (`PIL.Image.Image`): mode "L", size of the image, 255 where the map is above the threshold and 0
              elsewhere.
            - **boxes** (list of R lists of 4 `int`): [xmin, ymin, xmax, ymax] in pixels around each part of the mask,
              xmax and ymax exclusive, best part first.
        """
        labels = _strings("candidate_labels", candidate_labels)
        if "template" in kwargs:
            warnings.warn(
                "template is hypothesis_template; the old name goes with the next release.", FutureWarning, 2
            )
        for name in ("templates", "template"):
            hypothesis_template = kwargs.pop(name, hypothesis_template)
        encoded = Engine(self.model, self.processor, templates=hypothesis_template).encode(labels)
        return super().__call__(images, candidate_labels=labels, text_features=encoded, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves the model and the pipeline's code, as the base class does, and also the processor."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(self, **kwargs):
        preprocess = {"image_size", "multi_scale", "timeout"}
        forward = {"text_features", "refine", "multi_scale"}
        postprocess = {"candidate_labels", *self._postprocess_parameters}
        steps = (preprocess, forward, postprocess)
        if unknown := kwargs.keys() - set().union(*steps):
            raise TypeError(f"The pipeline has no argument {sorted(unknown)}.")
        return tuple({name: value for name, value in kwargs.items() if name in step} for step in steps)

    def preprocess(self, image, image_size=None, multi_scale: bool = False, timeout: float = 60) -> dict:
        engine = Engine(self.model, self.processor, image_size=image_size, multi_scale=multi_scale)
        return {"image": replace(engine.prepare(load_image(image, timeout=timeout)), image=None)}

    def _forward(self, model_inputs: dict, text_features, refine: bool = True, multi_scale: bool = False) -> dict:
        image = model_inputs["image"]
        is_batch = isinstance(image, list)  # with batch_size > 1, transformers joins several images
        images = image if is_batch else [image]
        engine = Engine(self.model, self.processor, refine=refine, multi_scale=multi_scale)
        explanations = list(engine.run(images, text_features, len(images)))
        return {"explanation": explanations if is_batch else explanations[0]}

    def postprocess(
        self,
        model_outputs: dict,
        candidate_labels: list[str],
        threshold: float | Sequence[float] = 0.5,
        min_presence: float = MIN_PRESENCE,
        return_json: bool = False,
    ) -> list[dict]:
        explanation: Explanation = replace(
            model_outputs["explanation"], labels=candidate_labels, threshold=threshold, min_presence=min_presence
        )
        answers = []
        for index, (label, presence) in enumerate(zip(candidate_labels, explanation.presences)):
            heatmap, mask = explanation.map_and_mask(index)
            answers.append(
                {
                    "label": label,
                    "score": explanation.scores[index].item(),
                    "presence": presence,
                    **({} if return_json else {"map": heatmap}),
                    "mask": _mask(mask, return_json),
                    "boxes": [list(region.box) for region in find_regions(heatmap.numpy(), mask.numpy())],
                }
            )
        return sorted(answers, key=lambda answer: -answer["score"])


class ZeroShotImageSegmentationPipeline(ImageTextSimilarityMapPipeline):
    """
    Assigns each pixel of an image to one of the labels, or to the background, see [`~label_maps.label_map`]. The
    answers have the form of transformers' "image-segmentation".

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("zero-shot-image-segmentation", model="org/iclip-vit-b16", trust_remote_code=True)
    >>> answers = pipe("dog.jpg", candidate_labels=["dog", "red ball"])
    >>> answers[0]["label"], answers[0]["presence"], answers[0]["mask"].size
    ('dog', 0.98, (640, 480))
    ```
    """

    _postprocess_parameters = ("threshold", "min_presence", "return_json", "background")

    def __call__(
        self,
        images,
        candidate_labels: str | Sequence[str],
        background_labels: str | Sequence[str] = (),
        hypothesis_template: str | Sequence[str] | None = None,
        **kwargs,
    ):
        """
        Segments images.

        Args:
            images, hypothesis_template: as for [`ImageTextSimilarityMapPipeline`].
            candidate_labels (`str` or T of them): as for [`ImageTextSimilarityMapPipeline`].
            background_labels (`str` or a list): texts that describe the background, such as "sky" and "wall", in the
                form of `candidate_labels`. They compete like the others, and their pixels are background.
            threshold (`float` in [0, 1] or one for each text, defaults to 0.5): a label competes for the pixels where
                its map is greater. With None, it competes for all pixels.
            min_presence (`float` in [0, 1], defaults to 0.5): a label with a lower presence gets no pixel.
            refine, return_json, image_size, multi_scale, timeout, batch_size: as for
                [`ImageTextSimilarityMapPipeline`].

        Returns:
            For one image, a list with a `dict` for each label that has pixels, in the order of the labels. A warning
            names the present labels that other labels cover. For several images, a list of such lists or an iterator
            over them, as for [`ImageTextSimilarityMapPipeline`]. The items are:

            - **label** (`str`)
            - **score** (`float`): cosine of image and label, in [-1, 1].
            - **presence** (`float`): probability that the image shows the label; None if the model has no presence.
            - **mask** (`PIL.Image.Image`): mode "L", size of the image, 255 at the pixels of the label and 0
              elsewhere.
        """
        labels = _strings("candidate_labels", candidate_labels)
        background = _strings("background_labels", background_labels) if background_labels else []
        kwargs["background"] = range(len(labels), len(labels) + len(background))
        return super().__call__(images, labels + background, hypothesis_template, **kwargs)

    def postprocess(
        self,
        model_outputs: dict,
        candidate_labels: list[str],
        threshold: float | Sequence[float] | None = 0.5,
        min_presence: float = MIN_PRESENCE,
        return_json: bool = False,
        background: Sequence[int] = (),
    ) -> list[dict]:
        explanation: Explanation = replace(
            model_outputs["explanation"],
            labels=candidate_labels,
            threshold=threshold,
            min_presence=min_presence,
        )
        scores, presences, answers = explanation.scores.tolist(), explanation.presences, []
        segments = explanation.segments(background)
        for score, presence, (label, mask, is_covered) in zip(scores, presences, segments):
            if mask.any():
                mask = _mask(mask, return_json)
                answers.append({"label": label, "score": score, "presence": presence, "mask": mask})
            if is_covered:
                logger.warning(f"{label!r} is present, but other labels match better in most of its mask.")
        return answers


def _mask(mask: torch.Tensor, return_json: bool) -> Image.Image | dict:
    """Returns a mask as an image of 255 and 0, as transformers' pipelines do, or as run lengths for JSON."""
    mask = mask.cpu().numpy()
    return run_lengths(mask) if return_json else Image.fromarray(mask.astype(np.uint8) * 255)


def _strings(name: str, labels: str | Sequence[str]) -> list[str]:
    """Splits labels, and raises `ValueError` unless they are strings."""
    labels = split_texts(labels)
    if not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{name} is a list of strings, shared by all images, not {labels!r}.")
    return labels


__all__ = ["ImageTextSimilarityMapPipeline", "ZeroShotImageSegmentationPipeline"]

PIPELINES = {
    "image-text-similarity-map": ImageTextSimilarityMapPipeline,
    "zero-shot-image-segmentation": ZeroShotImageSegmentationPipeline,
}
# Registers only once: the trusted code of one model folder must not replace the tasks for other models.
for task, implementation in PIPELINES.items():
    if task not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(task, implementation, pt_model=AutoModel, type="multimodal")
