"""
Segmentation data sets with one type of samples: VOC, Pascal Context, COCO, COCO-Stuff, ADE20K, Cityscapes, CamVid or a
folder of index masks.

Class ids are 1..K in the order of `class_names`. 0 is background. Void pixels, which are ignored, are the highest value of the masks'
type: 255 of uint8, or 65535 of uint16, which more than 254 classes need.
"""

from __future__ import annotations

import copy
import json
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..images import IMAGE_SUFFIXES, load_image, open_image
from ..prompts import IMAGENET_TEMPLATES
from ..utils.digests import content_digest
from ..utils.extras import require_extra
from .class_names import (
    ADE20K,
    ADE20K_STUFF,
    CAMVID,
    CAMVID_STUFF,
    CITYSCAPES,
    COCO_STUFF,
    COCO_THINGS,
    CONTEXT,
    DATASETS,
    VOC,
)


_VOID = 255  # in files of index masks
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
        label_map (`np.ndarray` of shape `(H, W)`): uint8, the class id of each pixel, 0 for background, `void` for ignored pixels;
            uint16 if K > 254.
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
                f"{self.image_path}: expected {self.size[0]}x{self.size[1]} pixels (height x width), the size of its "
                f"masks, but got {image.height}x{image.width}; use the image that was annotated."
            )
        return image

    def mask(self, label: int) -> np.ndarray:
        """
        Returns the mask of one class, an id in 1..K, which the image need not contain: `(H, W)` of the type of `label_map`, `label` on
        the pixels of the class, `void` on ignored pixels, 0 on all others. Raises `ValueError` if `label` is no class id, or the file is
        not as described.
        """
        if not 1 <= label <= self.num_classes:
            raise ValueError(
                f"Expected a class id from 1 to {self.num_classes}, but got {label}; choose one of the data set's `labels`."
            )
        return self._mask(label)


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
        present = np.flatnonzero(np.bincount(self.label_map.ravel()))
        return tuple(id_ for id_ in present.tolist() if id_ not in (0, _VOID))

    def _mask(self, label: int) -> np.ndarray:
        return self.label_map * ((self.label_map == label) | (self.label_map == _VOID))

    @cached_property
    def label_map(self) -> np.ndarray:
        image = open_image(self.mask_path)
        if image.mode not in ("P", "L", "1"):
            raise ValueError(
                f"{self.mask_path}: expected an index mask (palette or 8-bit grayscale PNG of class ids), but got mode "
                f"{image.mode!r}; save class ids, not colours."
            )
        values = np.asarray(image).astype(np.uint8)
        present = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
        unknown = present[self.table[present] == _UNKNOWN].tolist()
        if unknown:
            raise ValueError(
                f"{self.mask_path}: expected the ids of the data set's classes, but got {unknown}; correct the mask or the "
                "list of classes."
            )
        return self.table.astype(np.uint8)[values]


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

    @cached_property
    def label_map(self) -> np.ndarray:
        instances = [(a["label"], self._union([a])) for a in self.annotations if not a["iscrowd"]]
        # The smaller of two overlapping instances lies in front.
        return self._painted(sorted(instances, key=lambda instance: -instance[1].sum()))

    def _mask(self, label: int) -> np.ndarray:
        return self._painted([(label, self._union([a for a in self.annotations if a["label"] == label]))])

    def _painted(self, masks: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
        """Returns an array with the label of each mask on its pixels, and void on crowds."""
        painted = np.zeros(self.size, _mask_type(self.num_classes))
        for label, mask in (*masks, (self.void, self._union([a for a in self.annotations if a["iscrowd"]]))):
            painted[mask] = label
        return painted

    def _union(self, annotations: list[dict]) -> np.ndarray:
        """Returns the pixels of all annotations, `(H, W)` boolean."""
        union = np.zeros(self.size, bool)
        for annotation in annotations:
            try:
                union |= self._pixels(annotation["segmentation"])
            except Exception as error:  # pycocotools also raises plain `Exception`
                raise ValueError(
                    f"{self.annotation_path}: annotation {annotation['id']} of {self.image_path.name}: expected polygons "
                    f"or run lengths within {self.size[0]}x{self.size[1]} pixels (height x width), but got {error}; "
                    "correct the annotation, or the size that the file states for the image."
                ) from error
        return union

    def _pixels(self, segmentation: list | dict) -> np.ndarray:
        """Decodes polygons, or plain or compressed run lengths, to `(H, W)` boolean."""
        height, width = self.size
        if isinstance(segmentation, dict):
            counts = segmentation["counts"]
            counts = np.array(counts, np.int64) if isinstance(counts, list) else _run_lengths(counts)
            if tuple(segmentation["size"]) != self.size or counts.min() < 0 or counts.sum() != height * width:
                raise ValueError(f"run lengths of {counts.sum()} pixels for a size of {segmentation['size']}")
            return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
        if segmentation == []:
            return np.zeros(self.size, bool)
        far = 2 * max(self.size)  # the memory of pycocotools grows with the distance
        if not all(len(p) >= 6 and len(p) % 2 == 0 and -far <= np.min(p) and np.max(p) <= far for p in segmentation):
            raise ValueError("a polygon with fewer than 3 points, half a point or points far outside the image")
        coco_mask = _pycocotools_mask()  # polygons [x1, y1, x2, y2, ...]
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))).view(bool)


def _pycocotools_mask() -> ModuleType:
    with require_extra("eval"):
        from pycocotools import mask
    return mask


def _run_lengths(counts: str | bytes) -> np.ndarray:
    """Decodes COCO's string of run lengths: base-32 digits, lowest first; from the fourth on, differences to the last but one."""
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
    A sequence of [`SegmentationSample`] with class names. Indexing returns a new sample, which is not decoded yet; a slice returns a
    data set of these samples.

    Attributes:
        name (`str`): name of the data set.
        split (`str`, *optional*): its split; None for a folder.
        synonyms (`tuple[tuple[str, ...], ...]`): all names of each class.
        class_names (`tuple[str, ...]`): the first name of each of the K classes, as used in prompts.
        labels (`tuple[int, ...]`): ids of the classes, 1..K.
        stuff (`tuple[int, ...]`, *optional*): ids of the classes without instances, such as sky and road; all others are things. None
            if the data set does not tell them apart, as Pascal Context and folders.
        supercategories (`tuple[str, ...]`, *optional*): that of each class, from COCO's files of instances; None in other data sets.
        void (`int`): value of ignored pixels in masks, 255; 65535 if K > 254.
        background (`bool`): whether pixels can be background (0). Otherwise, pixels of no class are void.
        background_texts (`tuple[str, ...]`): texts that describe the background; none by default.
        annotation_paths (`Sequence[Path]`): the files that hold masks and lists of classes.
        templates (`tuple[str, ...]`): prompt templates, each with one "{}": "a photo of the {}" for `"voc2012"`, `"coco2017"` and
            `"folder"`, CLIP's 80 templates of ImageNet for the data sets of open-vocabulary segmentation.
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
        layout = _LAYOUTS[name]
        self.name, self.split, self.background, self.templates = name, split, layout.background, layout.templates
        self.annotation_paths, self._samples = annotation_paths, samples
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

    def fingerprint(self) -> str:
        """
        Returns a digest, 16 hex digits, over names and content of images and annotations. The first call reads the files; later ones
        only after a change.
        """
        return content_digest([*(sample.image_path for sample in self._samples), *self.annotation_paths])


def load_segmentation(
    name: str,
    root: str | os.PathLike,
    split: str | None = None,
    overrides: str | os.PathLike | Mapping | None = None,
) -> SegmentationDataset:
    """
    Opens a segmentation data set for evaluation.

    Args:
        name (`str`): one of [`~iclip_hf.data.class_names.DATASETS`]. The guide (`docs/guide/evaluate.md`) describes their files.
        root (`str` or `os.PathLike`): folder of the data set.
        split (`str`, *optional*): split of the data set; the default split if not given.
        overrides (`dict`, `str` or `os.PathLike`, *optional*): other class names and prompt templates. A mapping, or a JSON or YAML
            file, with optional keys: `{"names": {"old name": "new name", "other name": ["name", "synonym"]}, "background": ["sky",
            "wall"], "templates": ["a photo of the {}"]}`. Or a text file with a line for each class by ascending id, synonyms
            separated by commas; if the data set has a background, a line with its texts can come first.

    Returns:
        [`SegmentationDataset`].

    Raises:
        `FileNotFoundError`: a folder, list, image or mask is missing. `ValueError`: the data is not as described. The content of
        images and masks is checked when they are decoded.
    """
    if name not in _LAYOUTS:
        raise ValueError(f"Expected one of the data sets {list(DATASETS)}, but got {name!r}: choose one of them.")
    split = split or _LAYOUTS[name].split
    dataset = SegmentationDataset(name, split, *_LAYOUTS[name].read(Path(root), split))
    if not len(dataset):
        raise ValueError(
            f"{root}: expected at least one image for {name!r}, but got none in split {split!r}; complete the data."
        )
    if overrides is not None:
        _override(dataset, overrides)
    return dataset


# ------------------------------------------------------------------------- files: images of a split, and a mask for each


def _voc_files(year: str, masks: str, lists: str, root: Path, split: str) -> tuple[list[Path], list[Path]]:
    nested = root / "VOCdevkit" / year
    devkit = next((path for path in (nested, root / year, root) if (path / "ImageSets").is_dir()), nested)
    split_path = _split_file(devkit / "ImageSets" / lists, "{}.txt", split)
    stems = [line.strip() for line in _read_text(split_path).splitlines() if line.strip()]
    images = _find(devkit / "JPEGImages", [f"{stem}.jpg" for stem in stems], split_path)
    return images, _find(devkit / masks, [f"{stem}.png" for stem in stems], split_path)


def _with_masks(
    images: Path, masks: Path, image_end: str = ".jpg", mask_end: str = ".png"
) -> tuple[list[Path], list[Path]]:
    """Returns the images of all masks in a folder, and these masks. Files of a pair have one stem before their ends."""
    # Other programs write converted files beside them.
    files = [file for file in _list(masks) if file.endswith(mask_end) and not file.endswith("TrainIds.png")]
    stems = sorted(file.removesuffix(mask_end) for file in files)
    return _find(images, [stem + image_end for stem in stems], masks), [masks / (stem + mask_end) for stem in stems]


def _stuffthingmaps(root: Path, split: str) -> Path | None:
    """Returns the folder of the PNG files of COCO-Stuff, None without one."""
    folders = (root / name / split for name in ("stuffthingmaps", "annotations"))
    return next((folder for folder in folders if folder.is_dir()), None)


def _stuff_files(root: Path, split: str) -> tuple[list[Path], list[Path]]:
    images = next((path for path in (root / "images" / split, root / split) if path.is_dir()), root / split)
    return _with_masks(images, _stuffthingmaps(root, split) or root / "stuffthingmaps" / split)


def _ade20k_files(root: Path, split: str) -> tuple[list[Path], list[Path]]:
    folder = root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root
    return _with_masks(folder / "images" / split, folder / "annotations" / split)


def _cityscapes_files(root: Path, split: str) -> tuple[list[Path], list[Path]]:
    images, masks = [], []
    for city in sorted(_list(root / "gtFine" / split)):
        folders = (root / kind / split / city for kind in ("leftImg8bit", "gtFine"))
        pairs = _with_masks(*folders, "_leftImg8bit.png", "_gtFine_labelIds.png")
        images, masks = images + pairs[0], masks + pairs[1]
    return images, masks


def _images_and_masks(root: Path, split: str | None) -> tuple[list[Path], list[Path]]:
    """Returns the files of `images/` and, for each, the PNG file with the same stem in `masks/`."""
    if split is not None:
        raise ValueError(
            f"Expected no split for a folder of masks, but got {split!r}; name that split's folder as root."
        )
    image_names = sorted(
        name for name in _list(root / "images") if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    )
    images = _find(root / "images", image_names, root)
    stems = [image.stem for image in images]
    if twice := [stem for stem, times in Counter(stems).items() if times > 1]:
        raise ValueError(
            f"{root / 'images'}: expected one image for each mask, but got several {twice[0]!r}; remove all but one."
        )
    return images, _find(root / "masks", [f"{stem}.png" for stem in stems], root / "images")


# -------------------------------------------------------------------------- class names, samples and annotations of a split

_Content = (
    tuple  # class names, samples and annotation paths of a `SegmentationDataset`, and perhaps its supercategories
)


def _index_masks(
    files: Callable[[Path, str | None], tuple[list[Path], list[Path]]],
    class_names: Sequence[str],
    root: Path,
    split: str | None,
    values: Sequence[int] | None = None,
    background: Sequence[int] = (0,),
    void: Sequence[int] = (),
) -> _Content:
    """
    Reads index masks: images and masks are `files(root, split)`. In the masks, `values` are the classes, by default 1..K, and
    `background` and `void` are these, like 255 if it is not named. Further values are errors.
    """
    images, masks = files(root, split)
    table = np.full(256, _UNKNOWN, np.int16)
    table[[_VOID, *void]] = _VOID
    table[list(background)] = 0
    table[list(values or range(1, len(class_names) + 1))] = range(1, len(class_names) + 1)
    samples = [_IndexSample(image.stem, image, len(class_names), mask, table) for image, mask in zip(images, masks)]
    return class_names, samples, masks


def _folder(root: Path, split: str | None) -> _Content:
    classes = root / "classes.txt"
    class_names, samples, masks = _index_masks(_images_and_masks, _read_class_names(classes), root, split)
    return class_names, samples, [classes, *masks]


def _coco_object(root: Path, split: str) -> _Content:
    """Reads stuffthingmaps, or else instances. The background is all that is no thing, also unlabelled, as in GroupViT's conversion."""
    if _stuffthingmaps(root, split) is None:
        return _instances(root, split)
    background = (*_STUFF_VALUES[80:], _VOID)
    return _index_masks(_stuff_files, COCO_THINGS, root, split, _STUFF_VALUES[:80], background)


def _instances(root: Path, split: str) -> _Content:
    _pycocotools_mask()  # raises now if the package is missing
    path = _split_file(root / "annotations", "instances_{}.json", split)
    try:
        content = json.loads(_read_text(path))
        categories, images = (sorted(content[kind], key=itemgetter("id")) for kind in ("categories", "images"))
        class_names, names = [item["name"] for item in categories], [item["file_name"] for item in images]
        sizes = [(image["height"], image["width"]) for image in images]
        labels = {category["id"]: label for label, category in enumerate(categories, start=1)}
        annotations = {image["id"]: [] for image in images}
        keys = [("image id", image["id"]) for image in images]
        keys += [(f"category {key}", item[key]) for item in categories for key in ("id", "name")]
        if twice := next((key for key, times in Counter(keys).items() if times > 1), None):
            raise ValueError("the {} {!r:.100} more than once".format(*twice))
        if not all(isinstance(name, str) for name in class_names + names):
            raise ValueError("categories or images without a name")
        for item in content["annotations"]:
            if item["category_id"] not in labels or item["image_id"] not in annotations:
                raise ValueError(
                    f"annotation {item['id']} has the unlisted category {item['category_id']} or image {item['image_id']}"
                )
            kept = {"id": item["id"], "label": labels[item["category_id"]], "iscrowd": bool(item["iscrowd"])}
            annotations[item["image_id"]].append(kept | {"segmentation": item["segmentation"]})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected COCO instance annotations (categories, images, annotations), but got "
            f"{type(error).__name__}: {error}; download it again, or correct it."
        ) from error
    samples = [
        _COCOSample(image.stem, image, len(class_names), size, path, annotations[id_])
        for image, size, id_ in zip(_find(root / split, names, path), sizes, annotations)
    ]
    supercategories = [str(item.get("supercategory", "")) for item in categories]
    return class_names, samples, [path], supercategories if all(supercategories) else None


class _Layout(NamedTuple):
    """
    A data set. Its content is `read(root, split)`, with the default `split`. The classes of `stuff` have no instances; None if the data
    set does not tell. The data sets of ICLIP's paper, and folders, have its prompt; others have CLIP's, as papers on segmentation do.
    """

    read: Callable[[Path, str | None], _Content]
    split: str | None
    stuff: Sequence[str] | None = ()
    background: bool = True
    templates: tuple[str, ...] = IMAGENET_TEMPLATES


_PHOTO = ("a photo of the {}",)
_VOC = partial(_index_masks, partial(_voc_files, "VOC2012", "SegmentationClass", "Segmentation"), VOC)
_CONTEXT = partial(
    _index_masks, partial(_voc_files, "VOC2010", "SegmentationClassContext", "SegmentationContext"), CONTEXT
)
# Values of COCO's things, then of its stuff, in the stuffthingmaps: one less than the category ids, of which 11 are not used.
_STUFF_VALUES = [value for value in range(182) if value not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]
_COCO_STUFF = partial(_index_masks, _stuff_files, COCO_STUFF, values=_STUFF_VALUES, background=())
_ADE20K = partial(_index_masks, _ade20k_files, ADE20K, background=(), void=(0,))
# Label ids of Cityscapes' 19 classes.
_CITYSCAPES_VALUES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES = partial(
    _index_masks, _cityscapes_files, CITYSCAPES, values=_CITYSCAPES_VALUES, background=(), void=range(35)
)
_CAMVID = partial(_index_masks, _images_and_masks, CAMVID, values=range(11), background=(), void=(11,))
_LAYOUTS = {
    "voc2012": _Layout(_VOC, "val", templates=_PHOTO),
    "coco2017": _Layout(_instances, "val2017", templates=_PHOTO),
    "folder": _Layout(_folder, None, None, templates=_PHOTO),
    "voc21": _Layout(_VOC, "val"),
    "voc20": _Layout(partial(_VOC, background=(), void=(0,)), "val", background=False),
    "context60": _Layout(_CONTEXT, "val", None),
    "context59": _Layout(partial(_CONTEXT, background=(), void=(0,)), "val", None, background=False),
    "coco_object": _Layout(_coco_object, "val2017"),
    "coco_stuff": _Layout(_COCO_STUFF, "val2017", COCO_STUFF[len(COCO_THINGS) :], background=False),
    "ade20k": _Layout(_ADE20K, "validation", ADE20K_STUFF, background=False),
    "cityscapes": _Layout(_CITYSCAPES, "val", CITYSCAPES[: CITYSCAPES.index("person")], background=False),
    "camvid": _Layout(_CAMVID, None, CAMVID_STUFF, background=False),
}


def _read_class_names(path: Path) -> list[str]:
    """Reads the names of the classes of a folder of masks."""
    class_names = [line.strip() for line in _read_text(path).rstrip().splitlines()]
    wrong = (
        f"{name!r:.100} in line {line}"
        for line, name in enumerate(class_names, 1)
        if name in ("", *class_names[: line - 1]) or (line, name) == (1, "background")
    )
    if problem := next(wrong, None) if 1 <= len(class_names) < _VOID else f"{len(class_names)} of them":
        raise ValueError(
            f"{path}: expected 1 to {_VOID - 1} different class names without the background, one in each line (line 1 names class "
            f"id 1), but got {problem}; correct the list."
        )
    return class_names


def _override(dataset: SegmentationDataset, overrides: str | os.PathLike | Mapping) -> None:
    """Applies the user's overrides of class names, background texts and templates."""
    where = "overrides"
    if not isinstance(overrides, Mapping):
        where = Path(overrides)
        overrides = _read_class_lines(where, dataset) if where.suffix.lower() == ".txt" else _read_mapping(where)

    def check(holds: bool, expected: str, got: object) -> None:
        if not holds:
            raise ValueError(f"{where}: expected {expected}, but got {reprlib.repr(got):.300}; correct this entry.")

    def texts(entry: str, given: object) -> tuple[str, ...]:
        several = (given,) if isinstance(given, str) else given
        whole = isinstance(several, Sequence) and several and all(isinstance(t, str) and t.strip() for t in several)
        check(whole, f"{entry} to be text (quoted, in YAML) or a list of texts", given)
        return tuple(several)

    for key in overrides:
        check(key in ("names", "background", "templates"), "only the keys 'names', 'background' and 'templates'", key)
    names = overrides.get("names", {})
    check(isinstance(names, Mapping), "'names' to map old names to new ones", names)
    for old in names:
        check(old in dataset.class_names, f"'names' to have keys out of {list(dataset.class_names)}", old)
    synonyms = [texts(f"the new name of {name!r}", names.get(name, name)) for name in dataset.class_names]
    background = texts("'background'", overrides["background"]) if "background" in overrides else ()
    without = f"no 'background' for {dataset.name!r}, whose background is void"
    check(dataset.background or not background, without, background)
    for name, times in Counter(name for several in (background, *synonyms) for name in several).items():
        check(times == 1, "'names' to keep the classes distinct", name)

    templates = overrides.get("templates", dataset.templates)
    whole = isinstance(templates, Sequence) and templates
    whole = whole and all(isinstance(template, str) and template.count("{}") == 1 for template in templates)
    check(whole, "'templates' to be a list of texts, each with one '{}' in the class name's place", templates)
    dataset.synonyms, dataset.background_texts = tuple(synonyms), background
    dataset.templates = tuple(templates)


def _read_class_lines(path: Path, dataset: SegmentationDataset) -> Mapping:
    """Reads a text file with a line for each class, synonyms separated by commas, and perhaps one for the background before."""
    lines = [[text.strip() for text in line.split(",")] for line in _read_text(path).rstrip().splitlines()]
    count = len(dataset.labels)
    with_background = dataset.background and len(lines) == count + 1
    if len(lines) != count and not with_background:
        optional = f", or {count + 1} with the texts of the background first" if dataset.background else ""
        raise ValueError(
            f"{path}: expected {count} lines, one for each class of {dataset.name!r}{optional}, but got {len(lines)}; "
            "correct the list."
        )
    background = {"background": lines.pop(0)} if with_background else {}
    return {"names": dict(zip(dataset.class_names, lines)), **background}


def _read_mapping(path: Path) -> Mapping:
    import yaml

    parse = json.loads if path.suffix.lower() == ".json" else yaml.safe_load
    try:
        content = parse(_read_text(path))
        if not isinstance(content, Mapping):
            raise ValueError(f"a {type(content).__name__} instead of a mapping with 'names' or 'templates'")
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected JSON or YAML, as its suffix says, but got: {error}; correct it."
        ) from error
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
