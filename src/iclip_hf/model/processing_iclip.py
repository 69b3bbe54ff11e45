"""
Processor of ICLIP: prepares images and texts, and converts outputs to maps of the image's size, label maps and
explanations.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from numbers import Integral

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import get_image_size
from transformers.processing_utils import ProcessorMixin

from .configuration_iclip import ICLIPConfig, patch_side
from .explanation import Explanation, check_thresholds
from .images import load_image, to_8_bit, to_pixels, to_rgb
from .label_maps import label_map
from .presence import MIN_PRESENCE, check_min_presence
from .prompts import check_templates, check_text, split_texts
from .similarity import check_map_size, resize_and_normalize


# Largest number of pixels of a prepared image, 200 MB in float32. `shortest_edge` would otherwise make a narrow image
# much larger.
MAX_PIXELS = 2**24
# A text with words that every tokenizer knows.
_PROBE = "a photo of a dog"


def check_processor(name, processor, config) -> None:
    """Raises `ValueError` unless a processor prepares images and texts, and its tokenizer fits the model."""
    expected, parts = "the processor of the model", ["image_processor", "tokenizer"]
    if config.model_type == "iclip":
        expected, parts = "an ICLIPProcessor", [*parts, "patch_size"]
    if not all(hasattr(processor, part) for part in parts):
        raise ValueError(
            f"{name}: expected {expected}, got {type(processor).__name__}; load it from the model's folder."
        )
    check_tokenizer(name, processor.tokenizer, config)


def check_tokenizer(name, tokenizer, config=None) -> None:
    """
    Raises `ValueError` unless a tokenizer knows words, and fits the text tower in the configuration of a model. If the
    files of a tokenizer are missing, transformers returns one that knows no words. With the tokenizer of another
    model, scores and maps would be wrong.
    """
    tokens = tokenizer(_PROBE)["input_ids"]
    problem = None
    if set(tokens) <= {tokenizer.unk_token_id, *tokenizer.all_special_ids}:
        problem = f'knows no word of "{_PROBE}"'
    # Padded embeddings and added tokens make a difference below 2 %.
    elif config is not None and abs(len(tokenizer) / config.text_config.vocab_size - 1) > 0.02:
        problem = f"has {len(tokenizer)} tokens where the model has {config.text_config.vocab_size}"
    if problem:
        raise ValueError(
            f"{name}: expected the tokenizer of the model, but it {problem}; add files such as tokenizer.json."
        )


def size_dict(size: int | dict[str, int]) -> dict[str, int]:
    """Returns a size of images as a `dict`. A number is the side of a square. Raises `ValueError` if it is no size."""
    try:
        sides = dict.fromkeys(("height", "width"), int(size)) if isinstance(size, Integral) else dict(size)
        is_size = sides.keys() in ({"height", "width"}, {"shortest_edge"}) and min(sides.values()) >= 1
    except (TypeError, ValueError):  # such as a string
        is_size = False
    if not is_size:
        raise ValueError(f"size is a number, or has the keys height and width, or shortest_edge, not {size!r:.100}.")
    return sides


class ICLIPProcessor(ProcessorMixin):
    """
    Wraps an image processor and a tokenizer.

    Args:
        image_processor: image processor of the image tower. Images are resized without a crop, so that maps cover
            the whole image.
        tokenizer: tokenizer of the text tower.
        templates (`list[str]`, defaults to `["a photo of the {}"]`): templates of the prompts for `labels`; the
            features of several prompts are averaged. `"imagenet"` stands for CLIP's 80 templates for ImageNet.
        patch_size (`int`, defaults to 16): side of the model's patches in pixels. Image sides are multiples of it.
        max_text_length (`int`, defaults to 77): texts are truncated to this number of tokens.
        text_padding (`str`, defaults to `"longest"`): `"max_length"` for SigLIP towers, which were trained with it.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        templates: Sequence[str] = ("a photo of the {}",),
        patch_size: int = 16,
        max_text_length: int = 77,
        text_padding: str = "longest",
        **kwargs,
    ):
        self.templates = check_templates(templates)
        self.patch_size = patch_size
        self.max_text_length = max_text_length
        self.text_padding = text_padding
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "ICLIPProcessor":
        """
        Like the base class, but code of a tokenizer or an image processor runs only with `trust_remote_code=True`,
        without a question. Raises `ValueError` if the tokenizer knows no words.
        """
        kwargs["trust_remote_code"] = kwargs.get("trust_remote_code") or False
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        check_tokenizer(pretrained_model_name_or_path, processor.tokenizer)
        return processor

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str, text: str, image_size: int = 224, image_processor=None, **kwargs
    ) -> "ICLIPProcessor":
        """
        Joins the image processor and the tokenizer of two towers, as [`ICLIPModel.from_vision_text_pretrained`] joins
        the towers.

        Args:
            vision, text (`str`): folders or Hub ids of the towers.
            image_size (`int`, defaults to 224): side in pixels of the square to which whole images are resized,
                without a crop.
            image_processor (*optional*): image processor that replaces the image tower's; `image_size` does not apply
                to it.
            kwargs: arguments of [`ICLIPProcessor`]. Some defaults depend on the towers. With `vision_downsampling`,
                give `image_size` and `patch_size`, each larger by this factor.
        """
        config = AutoConfig.from_pretrained(vision, trust_remote_code=False)
        if image_processor is None:
            options = {"size": {"height": image_size, "width": image_size}, "do_center_crop": False}
            options |= {"do_convert_rgb": True, "trust_remote_code": False}
            image_processor = AutoImageProcessor.from_pretrained(vision, **options)
        kwargs.setdefault("patch_size", patch_side(config))
        if AutoConfig.from_pretrained(text, trust_remote_code=False).model_type.startswith("siglip"):
            kwargs.setdefault("max_text_length", 64)
            kwargs.setdefault("text_padding", "max_length")
        return cls(image_processor, AutoTokenizer.from_pretrained(text, trust_remote_code=False), **kwargs)

    def __call__(
        self,
        images=None,
        text: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        labels: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        templates: Sequence[str] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Prepares images and texts for [`ICLIPModel`].

        Args:
            images: one image or a list of images: PIL images of any mode, numpy arrays or tensors in the ranges of
                [`to_8_bit`], or other inputs of [`load_image`]. The EXIF orientation of a PIL image is ignored, as
                in Transformers, so that maps fit `image.size`. `PIL.ImageOps.exif_transpose` turns such an image.
            text: texts that are taken as they are: one text, a list of T texts for all images, or one list for each
                image (shorter lists are padded with their last text).
            labels: class names or phrases, inserted into each of the `templates`: a list for all images, one list for
                each image, or a string, which [`split_texts`] splits.
            templates: templates of the prompts, each with one `{}`; those of the processor if not given.
            kwargs: arguments of the image processor and the tokenizer, also as `images_kwargs` and `text_kwargs`.
                `size=s` or `size={"height": h, "width": w}` sets another size. `size={"shortest_edge": s}` keeps the
                proportions of the image. Sizes are multiples of the patch size with at most `MAX_PIXELS` pixels.

        Returns:
            `BatchFeature` with `pixel_values` of shape `(B, 3, H, W)`, `input_ids` and `attention_mask` of shape
            `(T * num_templates, L)` or `(B, T * num_templates, L)`, and `num_templates` where there are several.
        """
        if text is not None and (labels is not None or templates is not None):
            raise ValueError("Give text, which is taken as it is, or labels, which are put into templates, not both.")
        if labels is None:
            templates = ["{}"]
        else:
            text, templates = split_texts(labels), self.templates if templates is None else check_templates(templates)
        prompts = None if text is None else _as_prompts(text, templates)
        per_image = prompts is not None and isinstance(prompts[0], list)

        common_kwargs, text_kwargs, images_kwargs = (
            dict(kwargs.pop(name, None) or {}) for name in ("common_kwargs", "text_kwargs", "images_kwargs")
        )
        if images is not None:
            # The size is replaced where it was given, because the base class refuses a keyword that is given flat and
            # in a dictionary.
            size_kwargs = kwargs if "size" in kwargs else images_kwargs
            size = size_kwargs.get("size")
            images, size_kwargs["size"] = self._images_and_size(images, size, {**images_kwargs, **kwargs})
            kwargs.pop("do_center_crop", None)
            images_kwargs["do_center_crop"] = False  # maps cover the whole image
            if per_image and len(prompts) != len(images):
                raise ValueError(f"There are {len(prompts)} lists of texts for {len(images)} images.")
        defaults = {"padding": self.text_padding, "truncation": True, "max_length": self.max_text_length}
        given = {*common_kwargs, *text_kwargs, *kwargs}
        text_kwargs |= {name: value for name, value in defaults.items() if name not in given}
        batch = super().__call__(
            images,
            list(chain(*prompts)) if per_image else prompts,
            common_kwargs={"return_tensors": "pt", **common_kwargs},
            text_kwargs=text_kwargs,
            images_kwargs=images_kwargs,
            **kwargs,
        )
        if per_image:
            self._split_by_image(batch, len(prompts), len(prompts[0]))
        if len(templates) > 1:
            batch["num_templates"] = len(templates)
        return batch

    def _images_and_size(self, images, size: int | dict[str, int] | None, kwargs: dict) -> tuple[list, dict[str, int]]:
        """
        Returns images as a list of PIL images and tensors for the image processor, and the size to resize them to.
        `kwargs` of the call replace settings of the image processor.
        """
        is_batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 3) == 4
        do_rescale, do_resize = (
            kwargs.get(name, getattr(self.image_processor, name, True)) for name in ("do_rescale", "do_resize")
        )
        convert = to_8_bit if do_rescale else to_pixels
        images = [_converted(image, convert) for image in (images if is_batch else [images])]
        if not images:
            raise ValueError("There is no image.")
        exact_size = self._exact_size(images, size)
        if not do_resize:
            for image in images:
                sides = dict(zip(("height", "width"), get_image_size(image)))
                fits_patches = all(side % self.patch_size == 0 for side in sides.values())
                if (size is not None and sides != exact_size) or not fits_patches:
                    raise ValueError(
                        f"An image of {sides} needs to be resized: set do_resize=True of the image processor."
                    )
        return images, exact_size

    def _split_by_image(self, batch: BatchFeature, num_images: int, num_prompts: int) -> None:
        """
        Reshapes the tokens of all prompts in place, from `(num_images * num_prompts, L)` to
        `(num_images, num_prompts, L)`.
        """
        for name in {*self.tokenizer.model_input_names} & batch.keys():
            tokens = batch[name]
            if isinstance(tokens, list):
                batch[name] = [tokens[start : start + num_prompts] for start in range(0, len(tokens), num_prompts)]
            else:
                batch[name] = tokens.reshape(num_images, num_prompts, -1)

    def _exact_size(self, images: list, size: int | dict[str, int] | None) -> dict[str, int]:
        """
        Converts a requested size to height and width in multiples of the patch size. None is the size of the image
        processor.
        """
        size = size_dict(self.image_processor.size if size is None else size)
        patch = self.patch_size
        if edge := size.get("shortest_edge"):
            shapes = {get_image_size(image) for image in images}
            resized_shapes = {
                tuple(max(1, round(side * edge / min(shape) / patch)) * patch for side in shape) for shape in shapes
            }
            if len(resized_shapes) > 1:
                raise ValueError(
                    f"Images of {sorted(shapes)} have no common size by shortest_edge: pass them one by one."
                )
            size = dict(zip(("height", "width"), resized_shapes.pop()))
        if size["height"] % patch or size["width"] % patch:
            nearest = {name: max(1, round(side / patch)) * patch for name, side in size.items()}
            raise ValueError(f"A size of {size} pixels is no multiple of the patch size {patch}: use {nearest}.")
        if size["height"] * size["width"] > MAX_PIXELS:
            raise ValueError(f"An image of {size} has more than {MAX_PIXELS:,} pixels.")
        return size

    def post_process_similarity_maps(
        self,
        maps: torch.Tensor,
        target_sizes: Sequence[tuple[int, int]],
        reverse: bool = False,
    ) -> list[torch.Tensor]:
        """
        Converts raw maps to maps in [0, 1] at the size of the images (Eq. 4; reversed: Eq. 5).

        Args:
            maps (`torch.Tensor` of shape `(B, T, h, w)`): raw similarity maps of [`ICLIPModel`].
            target_sizes (list, array or tensor of B `(height, width)`): sizes of the original images in pixels.
            reverse (`bool`): whether to return 1 - M. This corrects CLIP's opposite maps without training.

        Returns:
            list of B `torch.Tensor` of shape `(T, height, width)`, float32, in [0, 1]; a constant map is zeros.
        """
        sizes = map(check_map_size, target_sizes)
        return [resize_and_normalize(image_maps, size, reverse) for image_maps, size in zip(maps, sizes, strict=True)]

    def post_process_explanations(
        self,
        outputs,
        labels: Sequence[str],
        target_sizes: Sequence[tuple[int, int]],
        scores: torch.Tensor,
        presence: torch.Tensor | None = None,
    ) -> list[Explanation]:
        """
        Converts outputs to explanations, which compute maps, masks, regions and points.

        Args:
            outputs ([`ICLIPOutput`]): outputs of [`ICLIPModel`] with `output_similarity_maps=True`.
            labels (list of T `str`): the texts.
            target_sizes (list, array or tensor of B `(height, width)`): sizes of the original images in pixels.
            scores, presence (`torch.Tensor` of shape `(B, T)`): from [`ICLIPModel.scores`] and
                [`ICLIPModel.presence`]. Without presence, no text counts as absent.

        Returns:
            list of B [`Explanation`].
        """
        raw_maps = _maps_of(outputs).float().cpu()
        presences = [None] * len(raw_maps) if presence is None else presence.cpu()
        return [
            Explanation([*labels], image_scores, image_presence, image_maps, check_map_size(size), method="itsm")
            for image_scores, image_presence, image_maps, size in zip(
                scores.cpu(), presences, raw_maps, target_sizes, strict=True
            )
        ]

    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes: Sequence[tuple[int, int]] | None = None,
        threshold: float | Sequence[float] | None = None,
        background: Sequence[int] = (),
        presence: torch.Tensor | None = None,
        min_presence: float = MIN_PRESENCE,
    ) -> list[torch.Tensor]:
        """
        Converts outputs to label maps: the text of each pixel, or -1 for the background, see
        [`~label_maps.label_map`].

        Args:
            outputs ([`ICLIPOutput`]): outputs of [`ICLIPModel`] with `output_similarity_maps=True`.
            target_sizes (list, array or tensor of B `(height, width)`, *optional*): sizes of the label maps in pixels;
                the patch grid's if not given.
            threshold (`float` in [0, 1], or T of them, *optional*): a text competes for the pixels where its map is
                greater, or for all pixels if not given.
            background (list of `int`): indices of texts that describe the background, such as "sky" and "wall".
            presence (`torch.Tensor` of shape `(B, T)`, *optional*): from [`ICLIPModel.presence`].
            min_presence (`float` in [0, 1]): a text with a lower presence gets no pixel.

        Returns:
            list of B `torch.Tensor` of shape `(height, width)`, int64: index of the text, or -1.
        """
        maps = _maps_of(outputs)
        sizes = [maps.shape[2:]] * len(maps) if target_sizes is None else target_sizes
        presences = [None] * len(maps) if presence is None else presence
        if threshold is not None:
            check_thresholds(threshold, maps.shape[1])
        check_min_presence(min_presence)
        background = [range(maps.shape[1])[index] for index in background]
        return [
            label_map(raw_maps, check_map_size(size), image_presences, min_presence, threshold, background)
            for raw_maps, size, image_presences in zip(maps, sizes, presences, strict=True)
        ]


def _maps_of(outputs) -> torch.Tensor:
    """Returns the raw maps of an [`ICLIPOutput`]."""
    if getattr(outputs, "similarity_maps", None) is None:
        raise ValueError("The outputs have no similarity_maps: call the model with output_similarity_maps=True.")
    return outputs.similarity_maps


def _converted(image, convert: Callable) -> Image.Image | torch.Tensor:
    """Converts an array or tensor by `convert`. Other images are loaded if needed, and become PIL images in RGB."""
    if hasattr(image, "shape"):
        return convert(image)
    return to_rgb(image) if isinstance(image, Image.Image) else load_image(image)


def _as_prompts(texts, templates: list[str]) -> list[str] | list[list[str]]:
    """Converts texts to a list of prompts, or lists of texts to lists of prompts of the same length."""
    texts = [texts] if isinstance(texts, str) else split_texts(texts)  # checks a list, and does not split its items
    if not texts:
        raise ValueError("There is no text.")
    if all(isinstance(text, (list, tuple)) for text in texts):
        lists = [_as_prompts(image_texts, templates) for image_texts in texts]
        longest = max(map(len, lists))
        num_templates = len(templates)
        # Shorter lists repeat the prompts of their last text.
        return [prompts + prompts[-num_templates:] * ((longest - len(prompts)) // num_templates) for prompts in lists]
    texts = [check_text(text) for text in texts]
    return [template.replace("{}", text) for text in texts for template in templates]


__all__ = ["ICLIPProcessor"]

AutoProcessor.register(ICLIPConfig, ICLIPProcessor, exist_ok=True)
