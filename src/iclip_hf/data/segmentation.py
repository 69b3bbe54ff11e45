"""
Segmentation data sets with one type of samples: VOC, Pascal Context, COCO, COCO-Stuff, ADE20K, Cityscapes, CamVid or a
folder of index masks.

Class ids are 1..K in the order of `class_names`. 0 is background. Void pixels, which are ignored, are the highest
value of the masks' type: 255 of uint8, or 65535 of uint16, which more than 254 classes need.
"""

from __future__ import annotations

import copy
import glob
import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from ..model.images import image_suffixes, load_image, open_image, upright
from ..utils.digests import LARGE, content_digest, total_size
from ..utils.extras import require_extra
from .files import expand_braces, is_written, read_text
from .layouts import DATASETS, VOID
from .overrides import read_overrides


logger = logging.getLogger(__name__)

# Value of an id that a data set does not have, in the tables from the values of mask files to class ids.
_UNKNOWN = -1


def _mask_type(num_classes: int) -> np.dtype:
    """Returns the smallest unsigned type that holds background, K classes and void."""
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
        labels (`tuple[int, ...]`): ids of the classes in the image, ascending, without background and void.
        label_map (`np.ndarray` of shape `(H, W)`): uint8, the class id of each pixel, 0 for background, `void` for
            ignored pixels; uint16 if K > 254.
        void (`int`): value of ignored pixels, 255; 65535 if K > 254.
    """

    name: str
    image_path: Path
    num_classes: int

    @property
    def void(self) -> int:
        return np.iinfo(_mask_type(self.num_classes)).max

    @cached_property
    def image(self) -> Image.Image:
        image = load_image(self.image_path)
        if (image.height, image.width) != self.size:
            raise ValueError(
                f"{self.image_path}: this image has {image.height}x{image.width} pixels (height x width), and its "
                f"masks have {self.size[0]}x{self.size[1]}; use the image that was annotated."
            )
        return image

    def mask(self, label: int) -> np.ndarray:
        """
        Returns the mask of one class, an id in 1..K, which the image need not contain: `(H, W)` of the type of
        `label_map`, `label` on the pixels of the class, `void` on ignored pixels, 0 on all others. Raises `ValueError`
        if the file is not as described.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class _IndexSample(SegmentationSample):
    """A sample with one PNG file, whose values `table` (256,) converts to class ids."""

    mask_path: Path
    table: np.ndarray = field(repr=False, compare=False)

    @property
    def size(self) -> tuple[int, int]:
        return self.label_map.shape

    @cached_property
    def labels(self) -> tuple[int, ...]:
        return tuple(np.setdiff1d(self.label_map, (0, VOID)).tolist())

    def mask(self, label: int) -> np.ndarray:
        return self.label_map * ((self.label_map == label) | (self.label_map == VOID))

    @cached_property
    def label_map(self) -> np.ndarray:
        image = open_image(self.mask_path)
        if image.mode not in ("P", "L", "1"):
            raise ValueError(
                f"{self.mask_path}: a mask is a palette or 8-bit grayscale PNG of class ids, not of mode "
                f"{image.mode!r}; save class ids, not colours."
            )
        if image.mode == "1" and self.num_classes > 1:
            raise ValueError(
                f"{self.mask_path}: a mask of 1 bit can hold one class, but the data set has {self.num_classes}; save "
                "class ids with 8 bits."
            )
        values = np.asarray(upright(image)).astype(np.uint8)
        if image.mode == "L":  # which Pillow scales to 255
            with open(self.mask_path, "rb") as file:
                values //= {2: 85, 4: 17}.get(file.read(25)[24], 1)  # by the bit depth in the header
        present = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
        if unknown := present[self.table[present] == _UNKNOWN].tolist():
            raise ValueError(
                f"{self.mask_path}: the data set has no classes with the ids {unknown}; correct the mask or the list "
                "of classes."
            )
        return self.table.astype(np.uint8)[values]


@dataclass(frozen=True)
class _COCOSample(SegmentationSample):
    """
    A sample with COCO instances. The mask of a class is the union of its instances. Classes can overlap.

    Pixels of crowd regions are void for every class. A class that occurs only as a crowd is in `labels`, but its mask
    has no foreground.
    """

    size: tuple[int, int]
    annotations: list[dict] = field(repr=False)
    annotation_path: Path

    @cached_property
    def labels(self) -> tuple[int, ...]:
        return tuple(sorted({annotation["label"] for annotation in self.annotations}))

    @cached_property
    def label_map(self) -> np.ndarray:
        return self._painted(self.labels)

    def mask(self, label: int) -> np.ndarray:
        return self._painted([label])

    def _painted(self, labels: Sequence[int]) -> np.ndarray:
        """Returns an array with each of these labels on the pixels of its instances, and void on crowds."""
        areas = [
            (self.void if annotation["iscrowd"] else annotation["label"], self._pixels(annotation))
            for annotation in self.annotations
            if annotation["iscrowd"] or annotation["label"] in labels
        ]
        painted = np.zeros(self.size, _mask_type(self.num_classes))
        # The smaller of two overlapping instances lies in front.
        for value, pixels in sorted(areas, key=lambda area: (area[0] == self.void, -area[1].sum())):
            painted[pixels] = value
        return painted

    def _pixels(self, annotation: Mapping) -> np.ndarray:
        """
        Decodes polygons, or plain or compressed run lengths, to `(H, W)` boolean; nothing for a box alone. Raises
        `ValueError` for those that pycocotools refuses, or would read beyond.
        """
        segmentation = annotation["segmentation"]
        if not segmentation:
            return np.zeros(self.size, bool)
        coco_mask = _pycocotools_mask()
        try:
            if isinstance(segmentation, list):
                if wrong := [polygon for polygon in segmentation if len(polygon) < 6 or len(polygon) % 2]:
                    raise ValueError(f"a polygon of {len(wrong[0])} numbers; it has x and y of at least 3 points")
                return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, *self.size))).view(bool)
            size, counts = tuple(segmentation["size"]), segmentation["counts"]
            if size != self.size:
                raise ValueError(f"run lengths of {size[0]}x{size[1]} pixels")
            total = sum(counts if isinstance(counts, list) else _run_lengths(counts))
            if total != size[0] * size[1]:
                raise ValueError(f"run lengths of {total} of {size[0] * size[1]} pixels")
            packed = coco_mask.frPyObjects(segmentation, *size) if isinstance(counts, list) else segmentation
            return coco_mask.decode(packed).view(bool)
        except Exception as error:  # of pycocotools, any
            raise ValueError(
                f"{self.annotation_path}: the mask of annotation {annotation['id']}, on {self.image_path.name} of "
                f"{self.size[0]}x{self.size[1]} pixels (height x width), cannot be read: {error}; correct it."
            ) from error


def _run_lengths(text: str | bytes) -> list[int]:
    """
    Returns the run lengths in COCO's compressed form: numbers of 5 bits a letter, lowest first, of which those from
    the fourth on are differences to the last but one.
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


class SegmentationDataset(Sequence):
    """
    A sequence of [`SegmentationSample`] with class names. Indexing returns a new sample, which is not decoded yet; a
    slice returns a data set of these samples.

    Attributes:
        name (`str`): name of the data set.
        split (`str`, *optional*): its split; None for a folder.
        images_in_split (`int`): number of images of the whole split, also in a slice.
        synonyms (`tuple[tuple[str, ...], ...]`): all names of each class.
        class_names (`tuple[str, ...]`): the first name of each of the K classes, as used in prompts.
        labels (`tuple[int, ...]`): ids of the classes, 1..K.
        stuff (`tuple[int, ...]`, *optional*): ids of the classes without instances, such as sky and road; all others
            are things. None if the data set does not tell them apart, as Pascal Context and folders.
        supercategories (`tuple[str, ...]`, *optional*): that of each class, from COCO's files of instances; None in
            other data sets.
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
        self.name, self.split, self.background, self.templates = name, split, bool(layout.background), layout.templates
        self.annotation_paths, self._samples, self.images_in_split = annotation_paths, samples, len(samples)
        self.synonyms = tuple((name,) for name in class_names)
        self.supercategories = None if supercategories is None else tuple(supercategories)
        stuff = layout.stuff
        self.stuff = None if stuff is None else tuple(id_ for id_ in self.labels if class_names[id_ - 1] in stuff)
        self.void = int(np.iinfo(_mask_type(len(class_names))).max)
        self.background_texts: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(texts[0] for texts in self.synonyms)

    @property
    def labels(self) -> tuple[int, ...]:
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
        return (
            f"SegmentationDataset({self.name!r}, split={self.split!r}, images={len(self)}, classes={len(self.labels)})"
        )

    def check_classes(self) -> None:
        """Raises `ValueError` if no image shows a class, as with binary masks of 0 and 255."""
        if not any(sample.labels for sample in self):
            raise ValueError(
                f"None of the {len(self)} images shows a class: a mask holds the ids of classes, and {self.void} is "
                "void."
            )

    @property
    def files(self) -> list[Path]:
        """The files of images and annotations."""
        return [*(sample.image_path for sample in self._samples), *self.annotation_paths]

    def fingerprint(self) -> str:
        """
        Returns a digest, 16 hex digits, over names and content of images and annotations. Of more than a gigabyte,
        sizes and modification times of the files stand for the content.
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
        overrides (`dict`, `str` or `os.PathLike`, *optional*): other class names and prompt templates. A mapping, or a
            JSON or YAML file, with optional keys:
            `{"names": {"old name": "new name", "other name": ["name", "synonym"]}, "background": ["sky", "wall"],
            "templates": ["a photo of the {}"]}`. Or a text file with a line for each class by ascending id, synonyms
            separated by semicolons if the file has any, otherwise by commas; if the data set has a background, a line
            with its texts can come first. A text can describe both a class and the background.

    Returns:
        [`SegmentationDataset`].

    Raises:
        `FileNotFoundError`: a folder, list, image or mask is missing. `ValueError`: the data is not as described. The
        content of images and masks is checked when they are decoded.
    """
    if name not in DATASETS:
        raise ValueError(f"{name!r} is none of the data sets {', '.join(DATASETS)}.")
    layout, root = DATASETS[name], Path(root)
    if split and layout.split is None:
        raise ValueError(f"{name} has no splits, such as {split!r}: name the folder of that split as root.")
    split = split or layout.split
    if layout.instances and not _found(root, layout.masks, split)[1]:
        dataset = _instances(name, root, split)
    else:
        dataset = _index_masks(name, root, split)
    if overrides is not None:
        texts = read_overrides(overrides, name, dataset.class_names)
        dataset.synonyms, dataset.background_texts, dataset.templates = texts
    return dataset


def _around(pattern: str) -> tuple[str, str]:
    """Returns what is before and behind the `*` of a pattern."""
    return pattern.partition("*")[0], pattern.rpartition("*")[2]


def _alternatives(pattern: str, split: str | None) -> list[str]:
    return expand_braces(pattern.replace("<split>", split or ""))


def _found(root: Path, pattern: str, split: str | None) -> tuple[str, dict[str, Path]]:
    """
    Returns the first alternative of a pattern that finds files, else the last, and these files by what `*` is in them.
    They are listed, because single look-ups are slow on network drives.
    """
    for chosen in _alternatives(pattern, split):
        start, end = _around(chosen)
        # Other programs write converted masks beside those of a data set.
        paths = [
            path for path in glob.glob(chosen, root_dir=root, recursive=True) if not path.endswith("TrainIds.png")
        ]
        names = sorted(path.removeprefix(start).removesuffix(end) for path in paths)
        if not end:
            names = [name for name in names if os.path.splitext(name)[1].lower() in image_suffixes()]
        files = {}
        for name in names:
            key, path = name if end else os.path.splitext(name)[0], root / f"{start}{name}{end}"
            if key in files:
                raise ValueError(f"{path}: {files[key].name} has the same name for its mask; rename one of them.")
            files[key] = path
        if files:
            break
    return chosen, files


def _index_masks(name: str, root: Path, split: str | None) -> SegmentationDataset:
    layout = DATASETS[name]
    image_pattern, images = _found(root, layout.images, split)
    mask_pattern, masks = _found(root, layout.masks, split)
    names = [*masks]
    if image_pattern.endswith("*"):
        images = {name: path for name, path in images.items() if name in masks or not is_written(path.name)}
        names = sorted({*images, *masks})
    if layout.lists:
        lists = [root / path for path in _alternatives(layout.lists, split)]
        lines = read_text(next(filter(Path.is_file, lists), lists[0])).splitlines()
        names = [*dict.fromkeys(line.strip() for line in lines if line.strip())]  # a joined list may repeat images
    if not names:
        raise FileNotFoundError(
            f"{root}: there are no images {image_pattern} with masks {mask_pattern}; check the root, the split and "
            "the layout of the data."
        )
    for pattern, files in ((image_pattern, images), (mask_pattern, masks)):
        if missing := [name for name in names if name not in files]:
            raise FileNotFoundError(
                f"{root / missing[0].join(_around(pattern))}: this file is missing ({len(missing)} of {len(names)} "
                "are); complete the data."
            )
    listed = [] if layout.classes else [root / "classes.txt"]
    class_names = layout.classes or _read_class_names(listed[0])
    count = len(class_names)
    table = np.full(256, _UNKNOWN, np.int16)
    table[[VOID, *layout.void]] = VOID
    table[list(layout.background)] = 0
    table[list(layout.values or range(1, count + 1))] = range(1, count + 1)
    samples = [_IndexSample(images[name].stem, images[name], count, masks[name], table) for name in names]
    return SegmentationDataset(name, split, class_names, samples, [*listed, *map(masks.get, names)])


def _instances(name: str, root: Path, split: str) -> SegmentationDataset:
    _pycocotools_mask()  # raises now if the package is missing
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        others = sorted(one.stem.removeprefix("instances_") for one in path.parent.glob("instances_*.json"))
        named = (
            f"name another split (--split, or --eval_split of a training): {', '.join(others)}"
            if others
            else "the data set's folder has annotations/instances_SPLIT.json"
        )
        raise FileNotFoundError(f"{path}: there is no such file; {named}.")
    folder = root / split
    try:
        content = json.loads(read_text(path))
        categories, images = (sorted(content[kind], key=itemgetter("id")) for kind in ("categories", "images"))
        # Some name files as in the folder of the data set, with that of the split.
        files = [folder / image["file_name"].removeprefix(f"{split}/") for image in images]
        sizes = [(image["height"], image["width"]) for image in images]
        labels = {category["id"]: label for label, category in enumerate(categories, start=1)}
        annotations = {image["id"]: [] for image in images}
        for item in content["annotations"]:
            label, crowd = labels[item["category_id"]], item.get("iscrowd", 0)
            mask = {"id": item.get("id"), "segmentation": item.get("segmentation")}
            annotation = {"label": label, "iscrowd": crowd, **mask}
            annotations[item["image_id"]].append(annotation)
        class_names = [category["name"] for category in categories]
        if not images:
            raise ValueError("there are no images")
        if len(annotations) < len(images):
            twice = next(one["id"] for one, other in itertools.pairwise(images) if one["id"] == other["id"])
            raise ValueError(f"there are two images with the id {twice}")
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
        _COCOSample(file.stem, file, len(class_names), size, of_image, path)
        for file, size, of_image in zip(files, sizes, annotations.values(), strict=True)
    ]
    supercategories = [category.get("supercategory") for category in categories]
    known = supercategories if all(supercategories) else None
    return SegmentationDataset(name, split, class_names, samples, [path], known)


def _read_class_names(path: Path) -> list[str]:
    """Reads the names of the classes of a folder of masks."""
    names = [line.strip() for line in read_text(path).rstrip().splitlines()]
    is_background = names[:1] and names[0].strip("_").lower() == "background"  # labelme writes "_background_"
    if is_background or not 1 <= len(names) < VOID or "" in names or len({*names}) < len(names):
        raise ValueError(
            f"{path}: line 1 names class id 1, without the background; there are 1 to {VOID - 1} lines with "
            "different names, and none is blank."
        )
    return names
