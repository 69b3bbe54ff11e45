"""COCO's instances: a JSON file with the polygons or run lengths of all objects of a split."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from ...utils.extras import require_extra
from ..files import read_text
from .sample import Annotations, SegmentationSample, mask_type


logger = logging.getLogger(__name__)

_MAX_COORDINATE = 1e6  # in pixels; larger than any image, and than polygons that extend beyond it


class Instance(NamedTuple):
    """
    One annotation of an image.

    Attributes:
        class_id: id of its class, 1..K.
        is_crowd: whether it is a region of many objects.
        segmentation: polygons, or plain or compressed run lengths; empty for a box alone.
        annotation_id: id in the file, for errors.
    """

    class_id: int
    is_crowd: bool
    segmentation: list | dict | None
    annotation_id: int | None = None


@dataclass(frozen=True)
class InstancesSample(SegmentationSample):
    """
    A sample with COCO instances. The mask of a class is the union of its instances. Masks of classes can overlap.

    Pixels of crowd regions are void for every class. A class that occurs only as a crowd is in `class_ids`, but its
    mask has no foreground.
    """

    size: tuple[int, int]
    instances: Sequence[Instance] = field(repr=False)
    annotation_path: Path

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
        """Decodes an instance to `(H, W)` boolean. Raises `ValueError` if it cannot be decoded."""
        if not instance.segmentation:
            return np.zeros(self.size, bool)
        decode = _decode_polygons if isinstance(instance.segmentation, list) else _decode_run_lengths
        try:
            return decode(instance.segmentation, self.size).view(bool)
        except Exception as error:  # pycocotools raises many types
            raise ValueError(
                f"{self.annotation_path}: the mask of annotation {instance.annotation_id}, on {self.image_path.name} "
                f"of {self.size[0]}x{self.size[1]} pixels (height x width), cannot be read: {error}; correct it."
            ) from error


def _decode_polygons(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """
    Decodes polygons to `(H, W)` uint8. Raises `ValueError` for a polygon that pycocotools would read beyond its end.
    Also raises for coordinates that are NaN or far outside of any image: the memory that pycocotools needs grows with
    the length of the outline.
    """
    if wrong := [polygon for polygon in polygons if len(polygon) < 6 or len(polygon) % 2]:
        raise ValueError(f"a polygon has {len(wrong[0])} numbers instead of x and y of at least 3 points")
    if not all((np.abs(polygon) <= _MAX_COORDINATE).all() for polygon in polygons):
        raise ValueError("a polygon has a coordinate that is no position in pixels")
    coco_mask = _pycocotools_mask()
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size)))


def _decode_run_lengths(segmentation: dict, size: tuple[int, int]) -> np.ndarray:
    """
    Decodes plain or compressed run lengths to `(H, W)` uint8. Raises `ValueError` for run lengths of another size, and
    for incomplete ones, which pycocotools would decode to a wrong mask.
    """
    height, width = segmentation["size"]
    counts = segmentation["counts"]
    if (height, width) != size:
        raise ValueError(f"the run lengths are of {height}x{width} pixels")
    is_plain = isinstance(counts, list)
    total = sum(counts if is_plain else _decompress(counts))
    if total != height * width:
        raise ValueError(f"the run lengths are of {total} of {height * width} pixels")
    coco_mask = _pycocotools_mask()
    compressed = coco_mask.frPyObjects(segmentation, *size) if is_plain else segmentation
    return coco_mask.decode(compressed)


def _decompress(text: str | bytes) -> list[int]:
    """
    Returns the run lengths in COCO's compressed text. Each letter holds 5 bits of a number, the lowest bits first.
    From the fourth number on, the text holds the difference of a number and the number two before it.
    """
    letters = text.encode() if isinstance(text, str) else text
    lengths, value, shift = [], 0, 0
    for letter in letters:
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
    path = _instances_file(root, split)
    try:
        categories, images, instances = _parse(json.loads(read_text(path)))
        class_names = [category["name"] for category in categories]
        sizes = [(image["height"], image["width"]) for image in images]
        # In some files, names are relative to the folder of the data set, and begin with the split.
        files = [root / split / image["file_name"].removeprefix(f"{split}/") for image in images]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: these are no COCO instance annotations (categories, images, annotations): "
            f"{type(error).__name__}: {error}"
        ) from error
    _check_masks(path, [*chain(*instances)])
    _check_images(path, files)
    samples = [
        InstancesSample(file.stem, file, len(class_names), size, instances_of_image, path)
        for file, size, instances_of_image in zip(files, sizes, instances, strict=True)
    ]
    supercategories = [category.get("supercategory") for category in categories]
    return Annotations(class_names, samples, [path], supercategories if all(supercategories) else None)


def _instances_file(root: Path, split: str) -> Path:
    """Returns the file of a split. Raises `FileNotFoundError` if there is none."""
    path = root / "annotations" / f"instances_{split}.json"
    if path.is_file():
        return path
    cure = "the folder of the data set must have annotations/instances_SPLIT.json"
    if others := sorted(file.stem.removeprefix("instances_") for file in path.parent.glob("instances_*.json")):
        cure = f"name another split (--split, or --eval_split of a training): {', '.join(others)}"
    raise FileNotFoundError(f"{path}: there is no such file; {cure}.")


def _parse(content: dict) -> tuple[list[dict], list[dict], list[list[Instance]]]:
    """
    Returns categories and images by ascending id, and the instances of each image. Raises `KeyError`, `TypeError` or
    `ValueError` if the content is not as described.
    """
    categories, images = (sorted(content[name], key=itemgetter("id")) for name in ("categories", "images"))
    if not images:
        raise ValueError("there are no images")
    class_ids = {category["id"]: class_id for class_id, category in enumerate(categories, start=1)}
    instances = {image["id"]: [] for image in images}
    for annotation in content["annotations"]:
        instance = Instance(
            class_id=class_ids[annotation["category_id"]],
            is_crowd=bool(annotation.get("iscrowd")),
            segmentation=annotation.get("segmentation"),
            annotation_id=annotation.get("id"),
        )
        instances[annotation["image_id"]].append(instance)
    for name, items, key in (
        ("images", images, "id"),
        ("images", images, "file_name"),
        ("categories", categories, "id"),
        ("categories", categories, "name"),
    ):
        counts = Counter(item[key] for item in items)
        if twice := [value for value, count in counts.items() if count > 1]:
            raise ValueError(f"there are two {name} with the {key} {twice[0]}")
    for image in images:
        if wrong := [side for side in ("height", "width") if not isinstance(image[side], int)]:
            raise ValueError(f"the {wrong[0]} {image[wrong[0]]!r} of {image['file_name']} is no integer")
    return categories, images, [*instances.values()]


def _check_masks(path: Path, instances: Sequence[Instance]) -> None:
    """Raises `ValueError` if no instance has a mask. Warns if some have none."""
    num_boxes = sum(not instance.segmentation for instance in instances)
    if num_boxes and num_boxes == len(instances):
        raise ValueError(f"{path}: the annotations are boxes without a mask; export polygons or run lengths.")
    if num_boxes:
        logger.warning(
            "%s: %d of %d annotations have no mask; their classes count as shown, without pixels",
            path,
            num_boxes,
            len(instances),
        )


def _check_images(path: Path, files: Sequence[Path]) -> None:
    """Raises `FileNotFoundError` if an image is missing."""
    # Folders are listed once, because single look-ups are slow on network drives.
    folders = filter(Path.is_dir, {file.parent for file in files})
    present = {*chain.from_iterable(map(Path.iterdir, folders))}
    if missing := [file for file in files if file not in present]:
        raise FileNotFoundError(
            f"{missing[0]}: {path} names this image, but it is missing ({len(missing)} of {len(files)} are); complete "
            "the data."
        )
