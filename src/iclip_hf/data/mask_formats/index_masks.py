"""Index masks: a PNG file for each image, whose values stand for classes."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ...model.images import image_suffixes, open_image, upright
from ..files import expand_braces, is_output_name, read_text
from ..layouts import VOID, Layout
from .sample import Annotations, SegmentationSample


# In the table from the values of mask files to class ids, marks a value that the data set does not use.
_UNKNOWN = -1


@dataclass(frozen=True)
class IndexSample(SegmentationSample):
    """A sample with one PNG file, whose values `table` (256,) converts to class ids."""

    mask_path: Path
    table: np.ndarray = field(repr=False, compare=False)

    @property
    def size(self) -> tuple[int, int]:
        return self.label_map.shape

    @cached_property
    def class_ids(self) -> tuple[int, ...]:
        return tuple(np.setdiff1d(self.label_map, (0, VOID)).tolist())

    def mask(self, class_id: int) -> np.ndarray:
        return self.label_map * ((self.label_map == class_id) | (self.label_map == VOID))

    @cached_property
    def label_map(self) -> np.ndarray:
        image = open_image(self.mask_path)
        if image.mode not in (("P", "L", "1") if self.num_classes == 1 else ("P", "L")):  # "1" is one bit
            raise ValueError(
                f"{self.mask_path}: a mask is a palette or 8-bit grayscale PNG of class ids, not of mode "
                f"{image.mode!r}; save class ids with 8 bits, not colours."
            )
        values = np.asarray(upright(image)).astype(np.uint8)
        if image.mode == "L":  # Pillow scales values of 2 and 4 bits to 255
            with open(self.mask_path, "rb") as file:
                bit_depth = file.read(25)[24]  # in the header
            values //= {2: 85, 4: 17}.get(bit_depth, 1)
        present = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
        if unknown := present[self.table[present] == _UNKNOWN].tolist():
            raise ValueError(
                f"{self.mask_path}: the data set has no classes with the values {unknown}; correct the mask or the "
                "list of classes."
            )
        return self.table.astype(np.uint8)[values]


def read_index_masks(root: Path, layout: Layout, split: str | None) -> Annotations:
    """
    Reads the images and masks of a layout. Raises `FileNotFoundError` if there are none, or one is missing, and
    `ValueError` if the list of classes is not as described, or two images have the same name for their mask.
    """
    image_pattern, images = _find_files(root, layout.images, split)
    mask_pattern, masks = _find_files(root, layout.masks, split)
    names = [*masks]
    if image_pattern.endswith("*"):
        images = {name: path for name, path in images.items() if name in masks or not is_output_name(path.name)}
        names = sorted({*images, *masks})
    if layout.image_list:
        paths = [root / path for path in _alternatives(layout.image_list, split)]
        lines = read_text(next(filter(Path.is_file, paths), paths[0])).splitlines()
        names = [*dict.fromkeys(line.strip() for line in lines if line.strip())]  # a joined list may repeat images
    if not names:
        raise FileNotFoundError(
            f"{root}: there are no images {image_pattern} with masks {mask_pattern}; check the root, the split and "
            "the layout of the data."
        )
    for pattern, files in ((image_pattern, images), (mask_pattern, masks)):
        if missing := [name for name in names if name not in files]:
            start, end = _around(pattern)
            raise FileNotFoundError(
                f"{root / f'{start}{missing[0]}{end}'}: this file is missing ({len(missing)} of {len(names)} are); "
                "complete the data."
            )
    class_files = [] if layout.classes else [root / "classes.txt"]
    class_names = layout.classes or _read_class_names(class_files[0])
    num_classes = len(class_names)
    table = _value_table(layout, num_classes)
    samples = [IndexSample(images[name].stem, images[name], num_classes, masks[name], table) for name in names]
    return Annotations(class_names, samples, [*class_files, *map(masks.get, names)])


def _value_table(layout: Layout, num_classes: int) -> np.ndarray:
    """Returns a table (256,) from values of mask files to class ids, 0 for background, `VOID` or `_UNKNOWN`."""
    table = np.full(256, _UNKNOWN, np.int16)
    table[[VOID, *layout.void_values]] = VOID
    table[list(layout.background_values)] = 0
    class_ids = range(1, num_classes + 1)
    table[list(layout.class_values or class_ids)] = class_ids
    return table


def has_index_masks(root: Path, layout: Layout, split: str | None) -> bool:
    return bool(_find_files(root, layout.masks, split)[1])


def _find_files(root: Path, pattern: str, split: str | None) -> tuple[str, dict[str, Path]]:
    """
    Returns the first alternative of a pattern that finds files, or the last one, and the files by the text that `*`
    stands for.
    """
    for chosen in _alternatives(pattern, split):
        start, end = _around(chosen)
        # Folders are listed, because single look-ups are slow on network drives.
        found = glob.glob(chosen, root_dir=root, recursive=True)
        # Other programs write converted masks beside the masks of a data set.
        paths = [path for path in found if not path.endswith("TrainIds.png")]
        names = sorted(path.removeprefix(start).removesuffix(end) for path in paths)
        if not end:
            names = [name for name in names if os.path.splitext(name)[1].lower() in image_suffixes()]
        files = {}
        for name in names:
            key = name if end else os.path.splitext(name)[0]
            path = root / f"{start}{name}{end}"
            if key in files:
                raise ValueError(f"{path}: {files[key].name} has the same name for its mask; rename one of them.")
            files[key] = path
        if files:
            break
    return chosen, files


def _alternatives(pattern: str, split: str | None) -> list[str]:
    return expand_braces(pattern.replace("<split>", split or ""))


def _around(pattern: str) -> tuple[str, str]:
    """Returns the parts of a pattern before and behind `*`."""
    return pattern.partition("*")[0], pattern.rpartition("*")[2]


def _read_class_names(path: Path) -> list[str]:
    names = [line.strip() for line in read_text(path).rstrip().splitlines()]
    # labelme writes "_background_", and others number the classes, as in "0: background".
    has_background = names[:1] and names[0].strip("_0:.,; \t").lower() == "background"
    if has_background or not 1 <= len(names) < VOID or "" in names or len({*names}) < len(names):
        raise ValueError(
            f"{path}: write the names of 1 to {VOID - 1} classes, all different, one in each line, without the "
            "background and without blank lines."
        )
    return names
