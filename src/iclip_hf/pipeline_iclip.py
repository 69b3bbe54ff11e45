"""Pipelines from images and labels to scores, maps and masks, and to segments."""

import os
from collections.abc import Sequence

import torch
from PIL import Image
from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline

from .images import map_groups, read_image
from .label_maps import classes_of, label_map
from .modeling_iclip import cosines
from .presence import BACKGROUND, MIN_PRESENCE, presence
from .processing_iclip import check_threshold
from .similarity import check_finite


class ImageTextSimilarityMapPipeline(Pipeline):
    """
    Predicts which labels an image shows, and which of its pixels match them.

    The labels are encoded once for each call, also for a data set or a generator of images, whose results are yielded one by one.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("image-text-similarity-map", model="org/iclip-vit-b16", trust_remote_code=True)
    >>> answers = pipe("dog.jpg", candidate_labels=["dog", "red ball"], threshold=0.4)
    >>> answers[0]["label"], answers[0]["score"], answers[0]["map"].shape
    ('dog', 0.27, torch.Size([480, 640]))
    ```

    A model folder with its own code needs `trust_remote_code=True`. With `pipeline_class=iclip_hf.ImageTextSimilarityMapPipeline`
    the code of the installed package is used instead.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _postprocess_options = ("threshold", "min_presence")

    def __call__(
        self, images, candidate_labels: str | Sequence[str], template: str | Sequence[str] | None = None, **kwargs
    ):
        """
        Explains images.

        Args:
            images: an image as a path, a URL, base64 text or a PIL image; or a list, a `Dataset` or a generator of them.
            candidate_labels (`str` or T of them): class names or phrases.
            template (`str` or a list, *optional*): prompts with one `{}` for the labels; several prompts are averaged. Those of the
                processor if not given; `"{}"` takes the labels as they are.
            threshold (`float` in [0, 1] or T of them, defaults to 0.5): a mask holds the pixels whose map is greater.
            min_presence (`float` in [0, 1], defaults to 0.7): a label with a lower presence gets an empty mask.
            size (`dict`, *optional*): size of the image for the model, see [`ICLIPProcessor`].
            timeout (`float`, defaults to 60): time limit in seconds for the download of an image.
            batch_size (`int`, defaults to 1): largest number of images in one forward pass. These have one shape.

        Returns:
            For one image, a list of T `dict`, best score first. For a list of images, a list of such lists. For a `Dataset` or a
            generator, an iterator over such lists. The items are:

            - **label** (`str`)
            - **score** (`float`): cosine of image and label, in [-1, 1].
            - **presence** (`float`): share of unrelated texts that would match the image less, in [0, 1], see [`presence`].
            - **map** (`torch.Tensor` of shape `(height, width)`): map at the size of the image, in [0, 1].
            - **mask** (`torch.Tensor` of shape `(height, width)`): boolean.
            - **boxes** (`torch.Tensor` of shape `(R, 4)`): (x0, y0, x1, y1) in pixels around the mask's parts, best first.

        Raises:
            `ValueError`, `TypeError`, `OSError`: an image cannot be read, or [`ICLIPProcessor`] refuses labels, templates or
            thresholds.
        """
        if isinstance(images, (list, tuple)) and not images:
            raise ValueError("Expected at least one image, got none: pass one or a list.")
        labels = _strings("candidate_labels", candidate_labels)
        if not labels:
            raise ValueError("Expected at least one label in candidate_labels, got none: name what to look for.")
        features = self._encode(labels, template), self._background(template)
        return super().__call__(images, candidate_labels=labels, text_features=features, **kwargs)

    @torch.no_grad()
    def _encode(self, labels: Sequence[str], template):
        return self.model.get_text_features(**self.processor(labels=labels, templates=template).to(self.device))

    def _background(self, template):
        """Returns the features of [`BACKGROUND`]. They are cached for the last template."""
        kept = self.__dict__.setdefault("_backgrounds", {})
        key = template if template is None or isinstance(template, str) else tuple(template)
        if key not in kept:
            kept.clear()  # a few megabytes each
            kept[key] = self._encode(BACKGROUND, template)
        return kept[key]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves the model with the pipeline's code, as the base class does, and the processor."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(self, **kwargs):
        steps = {"size": 0, "timeout": 0, "text_features": 1, "candidate_labels": 2}
        steps |= dict.fromkeys(self._postprocess_options, 2)
        parameters = {}, {}, {}
        for name, value in kwargs.items():
            if name not in steps:
                raise TypeError(
                    f"Expected one of {sorted(steps)} or template and batch_size, got {name!r}: correct or remove it."
                )
            parameters[steps[name]][name] = value
        return parameters

    def preprocess(self, image, size: dict | None = None, timeout: float = 60) -> dict:
        image = read_image(image, timeout)
        pixel_values = self.processor(images=[image], **({} if size is None else {"size": size}))["pixel_values"]
        # In a list, because the base class would concatenate tensors, whose shapes may differ.
        return {"pixel_values": [pixel_values.to(self.dtype)], "target_size": (image.height, image.width)}

    def _forward(self, model_inputs: dict, text_features) -> dict:
        images = model_inputs["pixel_values"]
        images = [image for (image,) in images] if isinstance(images[0], list) else images  # a batch or one image

        def forward(batch: list[torch.Tensor]):
            outputs = self.model(pixel_values=torch.cat(batch), text_features=texts, output_similarity_maps=True)
            image = outputs.vision_model_output
            presences = presence(self.model.match(image, texts), self.model.match(image, background))
            scores = cosines(outputs.image_embeds, outputs.text_embeds)
            check_finite(outputs.similarity_maps, scores, presences)
            return zip(scores, presences, outputs.similarity_maps)

        texts, background = text_features
        scores, presences, maps = zip(*map_groups(forward, images, [image.shape for image in images]))
        return {
            "scores": torch.stack(scores),
            "presences": torch.stack(presences),
            "maps": list(maps),
            "target_size": model_inputs["target_size"],
        }

    def postprocess(
        self,
        model_outputs: dict,
        candidate_labels: list[str],
        threshold: float | Sequence[float] = 0.5,
        min_presence: float = MIN_PRESENCE,
    ) -> list[dict]:
        scores, presences = model_outputs["scores"], model_outputs["presences"]
        raw_maps, processor = model_outputs["maps"][0], self.processor
        maps = processor.post_process_similarity_maps(raw_maps[None], [model_outputs["target_size"]])
        masks = processor.post_process_masks(maps, threshold, presences, min_presence)
        regions = processor.post_process_boxes(maps, masks)[0]
        answers = [
            {
                "label": label,
                "score": scores[0, index].item(),
                "presence": presences[0, index].item(),
                "map": maps[0][index],
                "mask": masks[0][index],
                "boxes": regions["boxes"][regions["labels"] == index],
            }
            for index, label in enumerate(candidate_labels)
        ]
        return sorted(answers, key=lambda answer: -answer["score"])


class ZeroShotImageSegmentationPipeline(ImageTextSimilarityMapPipeline):
    """
    Assigns each pixel of an image to the label that matches it best, or to the background. The answers have the form of
    transformers' "image-segmentation".

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("zero-shot-image-segmentation", model="org/iclip-vit-b16", trust_remote_code=True)
    >>> answers = pipe("dog.jpg", candidate_labels=["dog", "red ball"])
    >>> answers[0]["label"], answers[0]["score"], answers[0]["mask"].size
    ('dog', 0.98, (640, 480))
    ```
    """

    _postprocess_options = ("threshold", "min_presence", "background")

    def __call__(
        self,
        images,
        candidate_labels: str | Sequence[str],
        background_labels: str | Sequence[str] = (),
        template: str | Sequence[str] | None = None,
        **kwargs,
    ):
        """
        Segments images.

        Args:
            images, template: as for [`ImageTextSimilarityMapPipeline`].
            candidate_labels (`str` or T of them): class names or phrases.
            background_labels (`str` or a list): texts for the rest of the image, such as "sky" and "wall".
            threshold (`float` in [0, 1], *optional*): a pixel whose best map, stretched to [0, 1] over the image, is not greater
                belongs to the background; 0.5 if there are no `background_labels`, otherwise none. None assigns every pixel.
            min_presence (`float` in [0, 1], defaults to 0.7): a label with a lower presence gets no pixel.
            size, timeout, batch_size: as for [`ImageTextSimilarityMapPipeline`].

        Returns:
            For one image, a list with a `dict` for each label that has pixels, in the order of the labels. For several images, a
            list of such lists or an iterator over them, as [`ImageTextSimilarityMapPipeline`]. The items are:

            - **label** (`str`)
            - **score** (`float`): presence of the label, in [0, 1], see [`presence`].
            - **mask** (`PIL.Image.Image`): mode "L", size of the image, 255 at the pixels of the label and 0 elsewhere.

        Raises:
            `ValueError`, `TypeError`, `OSError`: as [`ImageTextSimilarityMapPipeline`].
        """
        labels = _strings("candidate_labels", candidate_labels)
        background = _strings("background_labels", background_labels)
        if labels:  # otherwise the base class raises an error
            kwargs["background"] = range(len(labels), len(labels) + len(background))
            kwargs.setdefault("threshold", None if background else 0.5)
            labels += background
        return super().__call__(images, labels, template, **kwargs)

    def postprocess(
        self,
        model_outputs: dict,
        candidate_labels: list[str],
        threshold: float | None = 0.5,
        min_presence: float = MIN_PRESENCE,
        background: Sequence[int] = (),
    ) -> list[dict]:
        presences = model_outputs["presences"][0]
        found, _ = label_map(
            model_outputs["maps"][0],
            model_outputs["target_size"],
            classes=classes_of(len(candidate_labels), background),
            present=presences >= min_presence,
            threshold=None if threshold is None else check_threshold(threshold),
        )
        masks = ((label, found == index) for index, label in enumerate(candidate_labels))
        return [
            {"label": label, "score": score, "mask": Image.fromarray(mask.mul(255).byte().cpu().numpy())}
            for (label, mask), score in zip(masks, presences.tolist())
            if mask.any()
        ]


def _strings(name: str, labels: str | Sequence[str]) -> list[str]:
    labels = [labels] if isinstance(labels, str) else labels
    if not isinstance(labels, Sequence) or not all(isinstance(label, str) for label in labels):
        raise TypeError(
            f"Expected {name} to be a list of strings, shared by all images, got {labels!r}: pass such a list."
        )
    return list(labels)


__all__ = ["ImageTextSimilarityMapPipeline", "ZeroShotImageSegmentationPipeline"]

PIPELINES = {
    "image-text-similarity-map": ImageTextSimilarityMapPipeline,
    "zero-shot-image-segmentation": ZeroShotImageSegmentationPipeline,
}
# Registers only once: the trusted code of one model folder must not replace the tasks for other models.
for task, implementation in PIPELINES.items():
    if task not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(task, implementation, pt_model=AutoModel, type="multimodal")
