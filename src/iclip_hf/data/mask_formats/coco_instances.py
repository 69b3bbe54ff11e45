"""COCO's instances: a JSON file with the polygons or run lengths of all objects of a split."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from ...utils.extras import require_extra
from ..files import read_text
from .sample import Annotations, SegmentationSample, mask_type


logger = logging.getLogger(__name__)

_FARTHEST = 1e6  # pixels: more than an image has, also of a polygon that extends beyond it


class Instance(NamedTuple):
    """
    One annotation of an image.

    Attributes:
        label: class id in the data set, 1..K.
        is_crowd: whether it is a region of many objects.
        segmentation: polygons, or plain or compressed run lengths; empty for a box alone.
        annotation_id: id in the file, for errors.
    """

    label: int
    is_crowd: bool
    segmentation: list | dict | None
    annotation_id: int | None = None


@dataclass(frozen=True)
class InstancesSample(SegmentationSample):
    """
    A sample with COCO instances. The mask of a class is the union of its instances. Classes can overlap.

    Pixels of crowd regions are void for every class. A class that occurs only as a crowd is in `labels`, but its mask
    has no foreground.
    """

    size: tuple[int, int]
    instances: Sequence[Instance] = field(repr=False)
    annotation_path: Path

    @cached_property
    def labels(self) -> tuple[int, ...]:
        return tuple(sorted({instance.label for instance in self.instances}))

    @cached_property
    def label_map(self) -> np.ndarray:
        return self._painted(self.labels)

    def mask(self, label: int) -> np.ndarray:
        return self._painted([label])

    def _painted(self, labels: Sequence[int]) -> np.ndarray:
        """Returns an array with each of these labels on the pixels of its instances, and void on crowds."""
        areas = [
            (self.void if instance.is_crowd else instance.label, self._pixels(instance))
            for instance in self.instances
            if instance.is_crowd or instance.label in labels
        ]
        painted = np.zeros(self.size, mask_type(self.num_classes))
        # The smaller of two overlapping instances lies in front.
        for value, pixels in sorted(areas, key=lambda area: (area[0] == self.void, -area[1].sum())):
            painted[pixels] = value
        return painted

    def _pixels(self, instance: Instance) -> np.ndarray:
        """
        Decodes an instance to `(H, W)` boolean. Raises `ValueError` for polygons and run lengths that pycocotools
        refuses, for polygons that it would read beyond their end, and for run lengths of another size or sum.
        """
        segmentation = instance.segmentation
        if not segmentation:
            return np.zeros(self.size, bool)
        coco_mask = _pycocotools_mask()
        try:
            if isinstance(segmentation, list):
                if wrong := [polygon for polygon in segmentation if len(polygon) < 6 or len(polygon) % 2]:
                    raise ValueError(f"a polygon of {len(wrong[0])} numbers; it has x and y of at least 3 points")
                # pycocotools takes memory by the length of the outline, of NaN without a limit.
                if not all((np.abs(polygon) <= _FARTHEST).all() for polygon in segmentation):
                    raise ValueError("a polygon with a coordinate that is no position in pixels")
                return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, *self.size))).view(bool)
            size, counts = tuple(segmentation["size"]), segmentation["counts"]
            if size != self.size:
                raise ValueError(f"run lengths of {size[0]}x{size[1]} pixels")
            # pycocotools decodes run lengths that are cut off to a wrong mask.
            total = sum(counts if isinstance(counts, list) else _run_lengths(counts))
            if total != size[0] * size[1]:
                raise ValueError(f"run lengths of {total} of {size[0] * size[1]} pixels")
            packed = coco_mask.frPyObjects(segmentation, *size) if isinstance(counts, list) else segmentation
            return coco_mask.decode(packed).view(bool)
        except Exception as error:  # pycocotools raises any
            raise ValueError(
                f"{self.annotation_path}: the mask of annotation {instance.annotation_id}, on {self.image_path.name} "
                f"of {self.size[0]}x{self.size[1]} pixels (height x width), cannot be read: {error}; correct it."
            ) from error


def _run_lengths(text: str | bytes) -> list[int]:
    """
    Returns the run lengths in COCO's compressed form. A letter has 5 bits of a number, the lowest first. From the
    fourth on, a number is the difference to the last but one.
    """
    lengths, value, shift = [], 0, 0
    for letter in text.encode() if isinstance(text, str) else text:
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last letter of a number, with its sign
            value -= (bits & 16) << (shift - 4)
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return lengths


def _pycocotools_mask() -> ModuleType:
    with require_extra("eval"):
        from pycocotools import mask
    return mask


def read_coco_instances(root: Path, split: str) -> Annotations:
    """
    Reads `annotations/instances_SPLIT.json`, whose images lie in the folder of the split. Raises `FileNotFoundError`
    if the file or an image is missing, and `ValueError` if the file is not as described.
    """
    _pycocotools_mask()  # raises now if the package is missing
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        others = sorted(file.stem.removeprefix("instances_") for file in path.parent.glob("instances_*.json"))
        cure = (
            f"name another split (--split, or --eval_split of a training): {', '.join(others)}"
            if others
            else "the data set's folder has annotations/instances_SPLIT.json"
        )
        raise FileNotFoundError(f"{path}: there is no such file; {cure}.")
    folder = root / split
    try:
        content = json.loads(read_text(path))
        categories, images = (sorted(content[kind], key=itemgetter("id")) for kind in ("categories", "images"))
        # In some files, names are relative to the folder of the data set, and begin with the split.
        files = [folder / image["file_name"].removeprefix(f"{split}/") for image in images]
        sizes = [(image["height"], image["width"]) for image in images]
        labels = {category["id"]: label for label, category in enumerate(categories, start=1)}
        instances = {image["id"]: [] for image in images}
        for item in content["annotations"]:
            label, is_crowd = labels[item["category_id"]], bool(item.get("iscrowd"))
            instance = Instance(label, is_crowd, item.get("segmentation"), item.get("id"))
            instances[item["image_id"]].append(instance)
        class_names = [category["name"] for category in categories]
        if not images:
            raise ValueError("there are no images")
        for what, values in (
            ("images with the id", [image["id"] for image in images]),
            ("images with the file_name", [image["file_name"] for image in images]),
            ("categories with the id", [category["id"] for category in categories]),
            ("categories with the name", class_names),
        ):
            if twice := [value for value, count in Counter(values).items() if count > 1]:
                raise ValueError(f"there are two {what} {twice[0]}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: these are no COCO instance annotations (categories, images, annotations): "
            f"{type(error).__name__}: {error}"
        ) from error
    count = len(content["annotations"])
    if boxes := sum(not item.get("segmentation") for item in content["annotations"]):
        if boxes == count:
            raise ValueError(f"{path}: the annotations are boxes without a mask; export polygons or run lengths.")
        logger.warning("%s: %d of %d annotations have no mask: shown, without a pixel", path, boxes, count)
    # Folders are listed once, because single look-ups are slow on network drives.
    present = {file for parent in {file.parent for file in files} if parent.is_dir() for file in parent.iterdir()}
    if missing := [file for file in files if file not in present]:
        raise FileNotFoundError(
            f"{missing[0]}: {path} names this image, but it is missing ({len(missing)} of {len(files)} are); complete "
            "the data."
        )
    samples = [
        InstancesSample(file.stem, file, len(class_names), size, instances_of_image, path)
        for file, size, instances_of_image in zip(files, sizes, instances.values(), strict=True)
    ]
    supercategories = [category.get("supercategory") for category in categories]
    return Annotations(class_names, samples, [path], supercategories if all(supercategories) else None)
