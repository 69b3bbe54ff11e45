"""An image with its label masks, and what a format reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ...model.images import load_image


def mask_type(num_classes: int) -> np.dtype:
    """Returns the smallest unsigned type that holds background, K classes and, as its highest value, void."""
    return np.min_scalar_type(num_classes + 1)


@dataclass(frozen=True)
class SegmentationSample:
    """
    One image and its label masks, decoded on first use.

    Attributes:
        name (`str`): file name of the image without its suffix.
        image_path (`Path`): path of the image.
        num_classes (`int`): number K of classes of the data set.
        image (`PIL.Image.Image`): image of mode "RGB".
        size (`tuple[int, int]`): height and width of image and masks in pixels.
        class_ids (`tuple[int, ...]`): ids of the classes in the image, ascending, without background and void.
        label_map (`np.ndarray` of shape `(H, W)`): uint8, the class id of each pixel, 0 for background, `void` for
            ignored pixels; uint16 if K > 254.
        void (`int`): value of ignored pixels, 255; 65535 if K > 254.
    """

    name: str
    image_path: Path
    num_classes: int

    @property
    def void(self) -> int:
        return np.iinfo(mask_type(self.num_classes)).max

    @cached_property
    def image(self) -> Image.Image:
        image = load_image(self.image_path)
        if (image.height, image.width) != self.size:
            raise ValueError(
                f"{self.image_path}: this image has {image.height}x{image.width} pixels (height x width), and its "
                f"masks have {self.size[0]}x{self.size[1]}; use the image that was annotated."
            )
        return image

    def mask(self, class_id: int) -> np.ndarray:
        """
        Returns the mask of a class, an id in 1..K: `(H, W)` of the type of `label_map`, with `class_id` on the pixels
        of the class, `void` on ignored pixels, and 0 on all others. The image need not contain the class. Raises
        `ValueError` if the file is not as described.
        """


class Annotations(NamedTuple):
    """
    The annotated images of a data set.

    Attributes:
        class_names: names of the K classes, by ascending id.
        samples: the images.
        paths: the files that hold masks and lists of classes.
        supercategories: name of the supercategory of each class; None if the format has none.
    """

    class_names: Sequence[str]
    samples: Sequence[SegmentationSample]
    paths: Sequence[Path]
    supercategories: Sequence[str] | None = None
