"""COCO's instances: a JSON file with the polygons or run lengths of all objects of a split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from ...utils.errors import require_extra
from ..files import read_text
from .sample import Annotations, SegmentationSample, mask_type


class Instance(NamedTuple):
    """
    One annotation of an image.

    Attributes:
        class_id: id of its class, 1..K.
        is_crowd: whether it is a region of many objects.
        segmentation: polygons, or plain or compressed run lengths; empty for a box alone.
    """

    class_id: int
    is_crowd: bool
    segmentation: list | dict | None


@dataclass(frozen=True)
class InstancesSample(SegmentationSample):
    """
    A sample with COCO instances. The mask of a class is the union of its instances. Masks of classes can overlap.

    Pixels of crowd regions are void for every class. A class that occurs only as a crowd is in `class_ids`, but its
    mask has no foreground.
    """

    size: tuple[int, int]
    instances: Sequence[Instance] = field(repr=False)

    @cached_property
    def class_ids(self) -> tuple[int, ...]:
        return tuple(sorted({instance.class_id for instance in self.instances}))

    @cached_property
    def label_map(self) -> np.ndarray:
        return self._painted(self.class_ids)

    def mask(self, class_id: int) -> np.ndarray:
        return self._painted([class_id])

    def _painted(self, class_ids: Sequence[int]) -> np.ndarray:
        """Returns an array with the id of each of these classes on the pixels of its instances, and void on crowds."""
        painted = np.zeros(self.size, mask_type(self.num_classes))
        shown = [instance for instance in self.instances if not instance.is_crowd and instance.class_id in class_ids]
        masks = [(instance.class_id, self._pixels(instance)) for instance in shown]
        # The smaller of two overlapping instances lies in front.
        for class_id, pixels in sorted(masks, key=lambda mask: -mask[1].sum()):
            painted[pixels] = class_id
        for instance in self.instances:
            if instance.is_crowd:
                painted[self._pixels(instance)] = self.void
        return painted

    def _pixels(self, instance: Instance) -> np.ndarray:
        """Decodes an instance to `(H, W)` boolean. Raises `ValueError` for run lengths of another size."""
        runs, coco_mask = instance.segmentation, _pycocotools_mask()
        if not runs:
            return np.zeros(self.size, bool)
        if isinstance(runs, list):
            runs = coco_mask.merge(coco_mask.frPyObjects(runs, *self.size))
        elif isinstance(runs["counts"], list):
            runs = coco_mask.frPyObjects(runs, *runs["size"])
        if tuple(runs["size"]) != self.size:
            raise ValueError(
                f"{self.image_path}: run lengths of this image are of {runs['size']} pixels, and its height and width "
                f"are {self.size}; correct them."
            )
        return coco_mask.decode(runs).view(bool)


def _pycocotools_mask() -> ModuleType:
    with require_extra("eval"):
        from pycocotools import mask
    return mask


def read_coco_instances(root: Path, split: str) -> Annotations:
    """
    Reads `annotations/instances_SPLIT.json`, whose images lie in the folder of the split. Raises `FileNotFoundError`
    if the file is missing, and `ValueError` if it is not as described or has boxes instead of masks.
    """
    _pycocotools_mask()  # raises now if the package is missing
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        splits = sorted(file.stem.removeprefix("instances_") for file in path.parent.glob("instances_*.json"))
        others = ", ".join(splits) or "none"
        raise FileNotFoundError(f"{path}: there is no such file; the splits of this folder: {others}.")
    try:
        content = json.loads(read_text(path))
        categories, images = (sorted(content[name], key=itemgetter("id")) for name in ("categories", "images"))
        class_ids = {category["id"]: class_id for class_id, category in enumerate(categories, start=1)}
        instances = {image["id"]: [] for image in images}
        for annotation in content["annotations"]:
            instance = Instance(
                class_id=class_ids[annotation["category_id"]],
                is_crowd=bool(annotation.get("iscrowd")),
                segmentation=annotation.get("segmentation"),
            )
            instances[annotation["image_id"]].append(instance)
        class_names = [category["name"] for category in categories]
        samples = []
        for image in images:
            # In some files, names are relative to the folder of the data set, and begin with the split.
            file = root / split / image["file_name"].removeprefix(f"{split}/")
            size = image["height"], image["width"]
            samples.append(InstancesSample(file.stem, file, len(class_names), size, instances[image["id"]]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: these are no COCO instance annotations (categories, images, annotations): "
            f"{type(error).__name__}: {error}"
        ) from error
    if content["annotations"] and not any(annotation.get("segmentation") for annotation in content["annotations"]):
        raise ValueError(f"{path}: the annotations are boxes without a mask; export polygons or run lengths.")
    supercategories = [category.get("supercategory") for category in categories]
    return Annotations(class_names, samples, [path], supercategories if all(supercategories) else None)
