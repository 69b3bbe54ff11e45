"""
Segmentation data sets with one type of samples: VOC 2012, COCO 2017 or a folder of index masks.

Class ids are 1..K in the order of `class_names`. 0 is background and 255 is void (ignored).
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from ..images import IMAGE_SUFFIXES, load_image, open_image
from ..utils.extras import require_extra


VOID = 255
DEFAULT_TEMPLATES = ("a photo of the {}",)

# In the order of VOC. The names "diningtable", "pottedplant" and "tvmonitor" are written as in a prompt.
VOC_CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "television",
)  # fmt: skip


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
    """

    name: str
    image_path: Path
    num_classes: int

    @cached_property
    def image(self) -> Image.Image:
        image = load_image(self.image_path)
        if (image.height, image.width) != self.size:
            raise ValueError(
                f"{self.image_path}: expected {self.size[0]}x{self.size[1]} pixels (height x width), the size of its "
                f"masks, but got {image.height}x{image.width}; use the image that was annotated."
            )
        return image

    def mask(self, label: int) -> np.ndarray:
        """
        Returns the mask of one class, which the image need not contain.

        Args:
            label (`int`): class id in 1..K.

        Returns:
            `np.ndarray` of shape `(H, W)`, uint8: `label` on the pixels of the class, 255 on ignored pixels, 0 on all others.

        Raises:
            `ValueError`: `label` is not a class id, or the mask file is not as described.
        """
        if not 1 <= label <= self.num_classes:
            raise ValueError(
                f"Expected a class id from 1 to {self.num_classes}, but got {label}: choose one of `labels`."
            )
        return self._mask(label)


@dataclass(frozen=True)
class _IndexSample(SegmentationSample):
    """A sample with one PNG file of class ids."""

    mask_path: Path

    @property
    def size(self) -> tuple[int, int]:
        return self._decoded[0].shape

    @property
    def labels(self) -> tuple[int, ...]:
        return self._decoded[1]

    def _mask(self, label: int) -> np.ndarray:
        index = self._decoded[0]
        mask = np.zeros_like(index)
        mask[index == label] = label
        mask[index == VOID] = VOID
        return mask

    @cached_property
    def _decoded(self) -> tuple[np.ndarray, tuple[int, ...]]:
        image = open_image(self.mask_path)
        if image.mode not in ("P", "L", "1"):
            raise ValueError(
                f"{self.mask_path}: expected an index mask (palette or 8-bit grayscale PNG of class ids), but got mode "
                f"{image.mode!r}; save class ids, not colours."
            )
        index = np.asarray(image).astype(np.uint8)
        present = np.flatnonzero(np.bincount(index.ravel(), minlength=256)).tolist()
        labels = tuple(label for label in present if label not in (0, VOID))
        unknown = [label for label in labels if label > self.num_classes]
        if unknown:
            raise ValueError(
                f"{self.mask_path}: expected class ids from 1 to {self.num_classes}, 0 (background) and {VOID} (void), "
                f"but got {unknown}; correct the mask or the list of classes."
            )
        return index, labels


@dataclass(frozen=True)
class _COCOSample(SegmentationSample):
    """
    A sample with COCO instances. The mask of a class is the union of its instances. Classes can overlap.

    Pixels of crowd regions are void for every class. A class that occurs only as a crowd is in `labels`, but its mask has no
    foreground.
    """

    size: tuple[int, int]
    annotation_path: Path
    annotations: list[dict] = field(repr=False)

    @cached_property
    def labels(self) -> tuple[int, ...]:
        return tuple(sorted({annotation["label"] for annotation in self.annotations}))

    def _mask(self, label: int) -> np.ndarray:
        mask = self._union([annotation for annotation in self.annotations if annotation["label"] == label])
        mask *= np.uint8(label)
        crowds = [annotation for annotation in self.annotations if annotation["iscrowd"]]
        if crowds:
            mask[self._union(crowds).view(bool)] = VOID
        return np.ascontiguousarray(mask)

    def _union(self, annotations: list[dict]) -> np.ndarray:
        """Returns ones on the pixels of all annotations, `(H, W)` uint8. Merges run lengths, then decodes once."""
        runs = [run for annotation in annotations for run in self._runs(annotation)]
        if not runs:
            return np.zeros(self.size, np.uint8)
        coco_mask = _pycocotools_mask()
        return coco_mask.decode(coco_mask.merge(runs))

    def _runs(self, annotation: dict) -> list[dict]:
        """Returns compressed run lengths of one annotation, which holds polygons, or plain or compressed run lengths."""
        coco_mask = _pycocotools_mask()
        segmentation = annotation["segmentation"]
        try:
            if isinstance(segmentation, list):  # polygons [x1, y1, x2, y2, ...]
                if not segmentation:
                    return []
                far = 2 * max(self.size)  # the memory of pycocotools grows with the distance
                if not all(
                    len(p) >= 6 and len(p) % 2 == 0 and -far <= np.min(p) and np.max(p) <= far for p in segmentation
                ):
                    raise ValueError(
                        "a polygon with fewer than 3 points, half a point or points far outside the image"
                    )
                return coco_mask.frPyObjects(segmentation, *self.size)
            if tuple(segmentation["size"]) != self.size:
                raise ValueError(f"run lengths for a size of {segmentation['size']}")
            if isinstance(segmentation["counts"], list):
                segmentation = coco_mask.frPyObjects(segmentation, *self.size)
            counts = _run_lengths(segmentation["counts"])
            # pycocotools does not check run lengths. It would read out of bounds or never return.
            if counts.min() < 0 or counts.sum() != self.size[0] * self.size[1]:
                raise ValueError("run lengths that do not add up to the image's pixels")
            return [segmentation]
        except Exception as error:  # pycocotools also raises plain `Exception`
            raise ValueError(
                f"{self.annotation_path}: annotation {annotation['id']} of {self.image_path.name}: expected polygons "
                f"or run lengths within {self.size[0]}x{self.size[1]} pixels (height x width), but got {error}; "
                "correct the annotation, or the size that the file states for the image."
            ) from error


def _pycocotools_mask() -> ModuleType:
    with require_extra("eval"):
        from pycocotools import mask
    return mask


def _run_lengths(counts: str | bytes) -> np.ndarray:
    """
    Decodes COCO's compressed string of run lengths: base-32 digits, lowest first. From the fourth number on, a number is stored as
    the difference from the number two places before.
    """
    digits = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((digits & 32) == 0)  # bit 5 marks that a digit follows; bit 4 of the last digit is the sign
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if digits.min() < 0 or digits.max() > 63 or length.sum() != len(digits) or length.max() > 8:
        raise ValueError("a string that holds no run lengths")
    place = np.arange(len(digits)) - np.repeat(first, length)
    values = np.add.reduceat((digits & 31) << (5 * place), first)
    values -= np.where(digits[last] & 16, 1 << (5 * length), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


class SegmentationDataset(Sequence):
    """
    A sequence of [`SegmentationSample`] with class names. Indexing returns a new sample, which is not decoded yet.

    Attributes:
        name (`str`): name of the data set.
        split (`str`, *optional*): split of the data set; None for a folder.
        class_names (`tuple[str, ...]`): names of the K classes, as used in prompts.
        labels (`tuple[int, ...]`): ids of the classes, 1..K.
        templates (`tuple[str, ...]`): prompt templates, each with one "{}".
    """

    def __init__(
        self,
        name: str,
        split: str | None,
        class_names: Sequence[str],
        samples: Sequence[SegmentationSample],
        annotation_paths: Sequence[Path],
    ):
        self.name = name
        self.split = split
        self.class_names = tuple(class_names)
        self.templates = DEFAULT_TEMPLATES
        self._samples = samples
        self._annotation_paths = annotation_paths

    @property
    def labels(self) -> tuple[int, ...]:
        """Ids of `class_names`, 1..K."""
        return tuple(range(1, len(self.class_names) + 1))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> SegmentationSample:
        return replace(self._samples[index])  # a copy, so that decoded data is freed with it

    def __repr__(self) -> str:
        return (
            f"SegmentationDataset({self.name!r}, split={self.split!r}, images={len(self)}, classes={len(self.labels)})"
        )

    def fingerprint(self) -> str:
        """Returns a digest, 16 hex digits, over the names and sizes in bytes of the images and the content of the annotations."""
        digest = hashlib.sha256()
        for sample in self._samples:
            digest.update(os.fsencode(f"{sample.image_path.name}\0{sample.image_path.stat().st_size}\0"))
        for path in self._annotation_paths:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]


def load_segmentation(
    name: str,
    root: str | os.PathLike,
    split: str | None = None,
    overrides: str | os.PathLike | Mapping | None = None,
) -> SegmentationDataset:
    """
    Opens a segmentation data set for evaluation. The layouts under `root` are:

    - `"voc2012"`: `VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation/<split>.txt}`, split "val" by default.
      `root` can also be the folder VOCdevkit or VOC2012 itself.
    - `"coco2017"`: `annotations/instances_<split>.json` and the images in `<split>/`, split "val2017" by default. Images without
      annotations are included. The classes are the categories of the file by ascending COCO id.
    - `"folder"`: `images/*`, for each image an index PNG with the same stem in `masks/`, and `classes.txt`. Line i of this file
      (from 1) is the name of class id i. Background (0) and void (255) are not listed. There are no splits.

    Args:
        name (`str`): name of one of these layouts.
        root (`str` or `os.PathLike`): folder of the data set.
        split (`str`, *optional*): split of the data set; the default split if not given.
        overrides (`dict`, `str` or `os.PathLike`, *optional*): other class names and prompt templates, as a mapping or as a JSON
            or YAML file: `{"names": {"old name": "new name"}, "templates": ["a photo of the {}"]}`. Both keys are optional.

    Returns:
        [`SegmentationDataset`].

    Raises:
        `FileNotFoundError`: a folder, list, image or mask is missing. `ValueError`: the data is not as described. The content of
        images and masks is checked when they are decoded.
    """
    if name not in _LOADERS:
        raise ValueError(f"Expected one of the data sets {list(_LOADERS)}, but got {name!r}: choose one of them.")
    dataset = _LOADERS[name](Path(root), split)
    if not len(dataset):
        raise ValueError(
            f"{root}: expected at least one image for {name!r}, but got none in split {dataset.split!r}; complete the data."
        )
    if overrides is not None:
        dataset.class_names, dataset.templates = _override(dataset.class_names, overrides)
    return dataset


def _load_voc2012(root: Path, split: str | None) -> SegmentationDataset:
    split = split or "val"
    nested = root / "VOCdevkit" / "VOC2012"
    devkit = next((path for path in (nested, root / "VOC2012", root) if (path / "ImageSets").is_dir()), nested)
    split_path = _split_file(devkit / "ImageSets" / "Segmentation", "{}.txt", split)
    names = [line.strip() for line in _read_text(split_path).splitlines() if line.strip()]
    images = _find(devkit / "JPEGImages", [f"{name}.jpg" for name in names], split_path)
    masks = _find(devkit / "SegmentationClass", [f"{name}.png" for name in names], split_path)
    samples = [_IndexSample(*paths[:2], len(VOC_CLASS_NAMES), paths[2]) for paths in zip(names, images, masks)]
    return SegmentationDataset("voc2012", split, VOC_CLASS_NAMES, samples, masks)


def _load_coco2017(root: Path, split: str | None) -> SegmentationDataset:
    _pycocotools_mask()  # raises now if the package is missing
    split = split or "val2017"
    path = _split_file(root / "annotations", "instances_{}.json", split)
    try:
        content = json.loads(_read_text(path))
        categories = sorted(content["categories"], key=lambda category: category["id"])
        class_names = [category["name"] for category in categories]
        labels = {category["id"]: label for label, category in enumerate(categories, start=1)}
        images = sorted(content["images"], key=lambda image: image["id"])
        names = [image["file_name"] for image in images]
        sizes = [(image["height"], image["width"]) for image in images]
        annotations = {image["id"]: [] for image in images}
        for item in content["annotations"]:
            if item["category_id"] not in labels or item["image_id"] not in annotations:
                raise ValueError(
                    f"annotation {item['id']} has the unlisted category {item['category_id']} or image {item['image_id']}"
                )
            kept = {"id": item["id"], "label": labels[item["category_id"]], "iscrowd": bool(item["iscrowd"])}
            annotations[item["image_id"]].append(kept | {"segmentation": item["segmentation"]})
        if len(labels) < len(categories) or not all(isinstance(name, str) for name in class_names + names):
            raise ValueError("categories without an id of their own, or they or images without a name")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected COCO instance annotations (categories, images, annotations), but got "
            f"{type(error).__name__}: {error}; download or correct the file."
        ) from error
    image_paths = _find(root / split, names, path)
    samples = [
        _COCOSample(image_path.stem, image_path, len(class_names), size, path, annotations[image["id"]])
        for image_path, size, image in zip(image_paths, sizes, images)
    ]
    return SegmentationDataset("coco2017", split, class_names, samples, [path])


def _load_folder(root: Path, split: str | None) -> SegmentationDataset:
    if split is not None:
        raise ValueError(
            f"Expected no split for a folder of masks, but got {split!r}; name that split's folder as root."
        )
    classes_path = root / "classes.txt"
    class_names = [line.strip() for line in _read_text(classes_path).rstrip().splitlines()]
    problem = None
    if not 1 <= len(class_names) < VOID:
        problem = f"{len(class_names)} of them"
    elif "" in class_names:
        problem = f"no name in line {class_names.index('') + 1}"
    elif len(set(class_names)) < len(class_names):
        problem = "a name twice"
    elif class_names[0] == "background":
        problem = "background, which is always id 0 and not listed"
    if problem:
        raise ValueError(
            f"{classes_path}: expected 1 to {VOID - 1} different class names, one a line (line 1 names class id 1), "
            f"but got {problem}; correct the list."
        )
    image_names = sorted(
        name for name in _list(root / "images") if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    )
    images = _find(root / "images", image_names, root)
    stems = [image.stem for image in images]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise ValueError(
            f"{root / 'images'}: expected one image a mask, but got several {twice!r}; remove all but one."
        )
    masks = _find(root / "masks", [f"{stem}.png" for stem in stems], root / "images")
    samples = [_IndexSample(*paths[:2], len(class_names), paths[2]) for paths in zip(stems, images, masks)]
    return SegmentationDataset("folder", None, class_names, samples, [classes_path, *masks])


_LOADERS = {"voc2012": _load_voc2012, "coco2017": _load_coco2017, "folder": _load_folder}


def _override(class_names: tuple[str, ...], overrides: str | os.PathLike | Mapping) -> tuple[tuple, tuple]:
    """Returns class names and templates with the user's overrides applied."""
    where = "overrides"
    if not isinstance(overrides, Mapping):
        where = overrides
        overrides = _read_mapping(Path(overrides))

    def fail(expected: str, got: object) -> None:
        raise ValueError(f"{where}: expected {expected}, but got {reprlib.repr(got):.300}; correct this entry.")

    unknown = [key for key in overrides if key not in ("names", "templates")]
    if unknown:
        fail("only the keys 'names' and 'templates'", unknown[0])

    names = overrides.get("names", {})
    if not isinstance(names, Mapping):
        fail("'names' to map old names to new ones", names)
    for old, new in names.items():
        if old not in class_names:
            fail(f"'names' to have keys out of {list(class_names)}", old)
        if not isinstance(new, str) or not new.strip():
            fail(f"the new name of {old!r} to be text (quoted, in YAML)", new)
    renamed = tuple(names.get(name, name) for name in class_names)
    for name in renamed:
        if renamed.count(name) > 1:
            fail("'names' to keep the classes distinct", name)

    templates = overrides.get("templates", DEFAULT_TEMPLATES)
    if not isinstance(templates, Sequence) or isinstance(templates, str) or not templates:
        fail("'templates' to be a list of at least one template", templates)
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            fail("each template to be text with one '{}' in the class name's place", template)
    return renamed, tuple(templates)


def _read_mapping(path: Path) -> Mapping:
    import yaml

    parse = json.loads if path.suffix.lower() == ".json" else yaml.safe_load
    try:
        content = parse(_read_text(path))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected JSON or YAML, as its suffix says, but got: {error}; correct it."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path}: expected a mapping with 'names' or 'templates', but got {type(content).__name__}; correct it."
        )
    return content


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a file, but there is none; check the path and the layout of the data."
        )
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, but got {error}; save it as UTF-8.") from error


def _split_file(folder: Path, pattern: str, split: str) -> Path:
    path = folder / pattern.format(split)
    if not path.is_file():
        start, end = pattern.split("{}")
        splits = sorted(file.name[len(start) : -len(end)] for file in folder.glob(pattern.format("*")))
        raise FileNotFoundError(
            f"{path}: expected the list of split {split!r}, but there is none; "
            + (f"available: {', '.join(splits)}." if splits else "check the root and the layout of the data.")
        )
    return path


def _list(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder, but there is none; check the root and the layout.")
    return os.listdir(folder)


def _find(folder: Path, names: list[str], listed_in: Path) -> list[Path]:
    """Returns the paths of files in a folder. Lists the folder once, because single look-ups are slow on network drives."""
    present = set(_list(folder))
    missing = [name for name in names if name not in present]
    if missing:
        raise FileNotFoundError(
            f"{folder / missing[0]!s:.500}: expected a file, as {listed_in} implies, but it is missing "
            f"({len(missing)} of {len(names)} are); complete the data."
        )
    return [folder / name for name in names]
