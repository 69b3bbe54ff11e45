"""Masks to what detectors and segmenters take: boxes, point prompts, run lengths; a class's threshold from an evaluation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage


# Half a patch of a 16x16 grid: what is smaller comes from the enlargement of the map, not from the image.
MIN_AREA = 0.002

# Corners connect too.
_NEIGHBOURS = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class Region:
    """
    A connected part of a mask.

    Attributes:
        box (`tuple[int, int, int, int]`): (x0, y0, x1, y1) in pixels; x1 and y1 are the first ones beyond.
        score (`float`): mean of the map over the region, in [0, 1].
        inside (`np.ndarray` of shape `(y1 - y0, x1 - x0)`): which pixels of the box belong to it, boolean.
    """

    box: tuple[int, int, int, int]
    score: float
    inside: np.ndarray


def find_regions(heatmap: np.ndarray, mask: np.ndarray, min_area: float = MIN_AREA) -> list[Region]:
    """
    The connected parts of a mask, best score first.

    Args:
        heatmap (`np.ndarray` of shape `(H, W)`): the map that the mask was made from, in [0, 1].
        mask (`np.ndarray` of shape `(H, W)`): boolean.
        min_area (`float`): smaller parts are left out, as a share of the image's area, in [0, 1].

    Raises:
        `ValueError`: for shapes that differ, or `min_area` outside [0, 1].
    """
    if heatmap.shape != mask.shape:
        raise ValueError(f"Expected a mask of the map's shape {heatmap.shape}, got {mask.shape}.")
    if not 0 <= min_area <= 1:
        raise ValueError(f"Expected min_area as a share of the image, in [0, 1], got {min_area}.")
    labels, _ = ndimage.label(mask, _NEIGHBOURS)
    regions = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[rows, columns] == number
        if inside.sum() >= min_area * mask.size:
            box = (columns.start, rows.start, columns.stop, rows.stop)
            regions.append(Region(box, float(heatmap[rows, columns][inside].mean()), inside))
    return sorted(regions, key=lambda region: -region.score)


def positive_points(heatmap: np.ndarray, region: Region, count: int = 1) -> np.ndarray:
    """
    The peak of a region, and further high places of it, half the box's shorter side apart.

    Args:
        heatmap (`np.ndarray` of shape `(H, W)`): the map that the region was found in.
        region ([`Region`]): from [`find_regions`].
        count (`int`): number of points.

    Returns:
        `np.ndarray` of shape `(count, 2)`: (x, y) in pixels. A region too small for others repeats its own.
    """
    x0, y0, x1, y1 = region.box
    cost = np.where(region.inside, -heatmap[y0:y1, x0:x1], np.inf)
    return _lowest_places(cost, count, min(cost.shape) / 2) + np.array((x0, y0))


def negative_points(heatmap: np.ndarray, mask: np.ndarray, count: int = 3) -> np.ndarray:
    """
    The lowest places of a map outside its mask, a quarter of the image's shorter side apart. A place counts with its
    surroundings: bicubic enlargement undershoots at the very edge of what is bright.

    Args:
        heatmap (`np.ndarray` of shape `(H, W)`): the map.
        mask (`np.ndarray` of shape `(H, W)`): boolean, what to keep away from.
        count (`int`): number of points.

    Returns:
        `np.ndarray` of shape `(count, 2)`: (x, y) in pixels. An image too small for others repeats its own.
    """
    around = ndimage.uniform_filter(heatmap, max(1, min(heatmap.shape) // 8), mode="nearest")
    cost = np.where(mask & ~mask.all(), np.inf, around)
    return _lowest_places(cost, count, min(cost.shape) / 4)


def _lowest_places(cost: np.ndarray, count: int, distance: float) -> np.ndarray:
    rows, columns = np.ogrid[: cost.shape[0], : cost.shape[1]]
    places = np.empty((count, 2), dtype=np.int64)
    for place in places:
        y, x = np.unravel_index(cost.argmin(), cost.shape)
        place[:] = x, y
        cost[(rows - y) ** 2 + (columns - x) ** 2 < distance**2] += 4  # after all others, whose cost spans 1
    return places


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """
    A mask in COCO's uncompressed form, which pycocotools reads: lengths of the runs of 0 and 1 by turns, down the columns,
    beginning with 0.

    Returns:
        `dict` of `size`, [H, W], and `counts`.
    """
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0, append=flat.size).tolist()}


def class_thresholds(path: str | Path, labels: Sequence[str], method: str = "itsm") -> list[float]:
    """
    The best threshold of each class, by mMIoU, from the JSON file that `iclip evaluate --output` writes.

    Args:
        path: of the file.
        labels: class names as the evaluation has them.
        method (`str`): whose thresholds.

    Raises:
        `FileNotFoundError`: there is no such file. `ValueError`: it is another kind of file, or lacks the method or a class.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["per_class"]
        thresholds = {name: {row["name"]: row["threshold"] for row in part} for name, part in rows.items()}
        if not all(value is None or 0 <= value <= 1 for part in thresholds.values() for value in part.values()):
            raise ValueError("thresholds outside [0, 1]")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: expected the JSON file that `iclip evaluate --output` writes.") from error
    if method not in thresholds:
        raise ValueError(f"{path}: expected thresholds of method {method!r}, it has those of {sorted(thresholds)}.")
    known = {name: value for name, value in thresholds[method].items() if value is not None}
    missing = [label for label in labels if label not in known]
    if missing:
        raise ValueError(f"{path}: expected thresholds of {missing}, it has those of {sorted(known)}.")
    return [known[label] for label in labels]
