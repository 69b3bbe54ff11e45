"""
Segmentation data sets: VOC, Pascal Context, COCO, COCO-Stuff, ADE20K, Cityscapes, CamVid, or a folder of index masks.
The readers of their masks are in `mask_formats`, the patterns of their files in `layouts`.

Class ids are 1..K in the order of `class_names`. 0 is background. Void pixels are ignored. They have the highest value
of the masks' type: 255 in uint8; 65535 in uint16, which more than 254 classes need.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..utils.cache import LARGE, content_digest, total_size
from ..utils.tables import known
from .layouts import DATASETS
from .mask_formats.coco_instances import read_coco_instances
from .mask_formats.index_masks import has_index_masks, read_index_masks
from .mask_formats.sample import SegmentationSample, mask_type
from .overrides import read_overrides


logger = logging.getLogger(__name__)


class SegmentationDataset(Sequence):
    """
    A sequence of [`SegmentationSample`] with class names. An index returns a new sample, which is not decoded yet; a
    slice returns a data set of its samples.

    Attributes:
        name (`str`): name of the data set.
        split (`str`, *optional*): its split; None for a folder.
        images_in_split (`int`): number of images of the whole split, also in a slice.
        synonyms (`tuple[tuple[str, ...], ...]`): all names of each class.
        class_names (`tuple[str, ...]`): the first name of each of the K classes, as used in prompts.
        class_ids (`tuple[int, ...]`): ids of the classes, 1..K.
        stuff (`tuple[int, ...]`, *optional*): ids of the classes without instances, such as sky and road; all others
            are things. None if the data set does not tell them apart, as in Pascal Context and folders.
        supercategories (`tuple[str, ...]`, *optional*): supercategory of each class, from COCO's files of instances;
            None in other data sets.
        void (`int`): value of ignored pixels in masks, 255; 65535 if K > 254.
        background (`bool`): whether pixels can be background (0). Otherwise, pixels of no class are void.
        background_texts (`tuple[str, ...]`): texts that describe the background; none by default.
        annotation_paths (`Sequence[Path]`): the files that hold masks and lists of classes.
        templates (`tuple[str, ...]`): prompt templates, each with one "{}": "a photo of the {}" for `"voc2012"`,
            `"coco2017"` and `"folder"`, CLIP's 80 templates of ImageNet for the data sets of open-vocabulary
            segmentation.
    """

    def __init__(
        self,
        name: str,
        split: str | None,
        class_names: Sequence[str],
        samples: Sequence[SegmentationSample],
        annotation_paths: Sequence[Path],
        supercategories: Sequence[str] | None = None,
    ):
        layout = DATASETS[name]
        self.name = name
        self.split = split
        self.background = bool(layout.background_values)
        self.templates = layout.templates
        self.annotation_paths = annotation_paths
        self._samples = samples
        self.images_in_split = len(samples)
        self.synonyms = tuple((name,) for name in class_names)
        self.supercategories = None if supercategories is None else tuple(supercategories)
        self.stuff: tuple[int, ...] | None = None
        if layout.stuff is not None:
            self.stuff = tuple(class_id for class_id, name in enumerate(class_names, 1) if name in layout.stuff)
        self.void = int(np.iinfo(mask_type(len(class_names))).max)
        self.background_texts: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(texts[0] for texts in self.synonyms)

    @property
    def class_ids(self) -> tuple[int, ...]:
        return tuple(range(1, len(self.synonyms) + 1))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int | slice) -> SegmentationSample | SegmentationDataset:
        if isinstance(index, slice):
            part = copy.copy(self)
            part._samples = self._samples[index]
            return part
        return replace(self._samples[index])  # a copy, so that decoded data is freed with it

    def __repr__(self) -> str:
        num_classes = len(self.class_ids)
        return f"SegmentationDataset({self.name!r}, split={self.split!r}, images={len(self)}, classes={num_classes})"

    def check_classes(self) -> None:
        """
        Raises `ValueError` if no image shows a class, as with binary masks of 0 and 255. Warns if the masks of a
        folder have all classes but the last one, as with ids from 0.
        """
        *others, last = self.class_ids
        shown: set[int] = set()
        for sample in self:
            shown.update(sample.class_ids)
            if last in shown or (shown and self.name != "folder"):
                return
        if not shown:
            raise ValueError(
                f"None of the {len(self)} images shows a class: a mask holds the ids of classes, and {self.void} is "
                "void."
            )
        if shown == {*others}:
            logger.warning(
                "No mask has the last of the %d classes, %r: ids are 1 to %d in the order of classes.txt, and 0 is "
                "background. Add 1 to the values if yours begin at 0.",
                last,
                self.class_names[-1],
                last,
            )

    @property
    def files(self) -> list[Path]:
        """The files of images and annotations."""
        return [*(sample.image_path for sample in self._samples), *self.annotation_paths]

    def fingerprint(self) -> str:
        """
        Returns a digest, 16 hex digits, over names and content of images and annotations. For data of more than a
        gigabyte, sizes and modification times of the files stand for the content.
        """
        return content_digest(self.files, read=total_size(self.files) <= LARGE)


def load_segmentation(
    name: str,
    root: str | os.PathLike,
    split: str | None = None,
    overrides: str | os.PathLike | Mapping | None = None,
) -> SegmentationDataset:
    """
    Opens a segmentation data set for evaluation.

    Args:
        name (`str`): one of [`~iclip_hf.data.layouts.DATASETS`]. The guide (`docs/guide/evaluate.md`) describes
            their files.
        root (`str` or `os.PathLike`): folder of the data set.
        split (`str`, *optional*): split of the data set; the default split if not given.
        overrides (`dict`, `str` or `os.PathLike`, *optional*): other class names, texts of the background and prompt
            templates. Either a mapping, or a JSON or YAML file, with optional keys:
            `{"names": {"old name": "new name", "other name": ["name", "synonym"]}, "background": ["sky", "wall"],
            "templates": ["a photo of the {}"]}`. Or a text file with a line for each class, by ascending id. If the
            data set has a background, a line with its texts can come first. Synonyms in a line are separated by
            semicolons if the file has any, otherwise by commas. A text can describe both a class and the background.

    Raises:
        `FileNotFoundError`: a folder, list, image or mask is missing. `ValueError`: the data is not as described. The
        content of images and masks is checked when they are decoded.
    """
    name = known(name, DATASETS, "data set")
    layout, root = DATASETS[name], Path(root)
    if split and layout.default_split is None:
        raise ValueError(f"{name} has no splits, such as {split!r}: name the folder of that split as root.")
    split = split or layout.default_split
    if layout.instances and not has_index_masks(root, layout, split):
        annotations = read_coco_instances(root, split)
    else:
        annotations = read_index_masks(root, layout, split)
    dataset = SegmentationDataset(name, split, *annotations)
    if overrides is not None:
        texts = read_overrides(overrides, name, dataset.class_names)
        dataset.synonyms, dataset.background_texts, dataset.templates = texts
    return dataset
