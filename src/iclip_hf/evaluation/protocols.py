"""
The protocols by which papers on training-free open-vocabulary segmentation measure mIoU, as the papers' released
configurations state them. The help of a command lists the protocols, so this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..utils.tables import known


_NAMES_FOLDER = Path(__file__).parents[1] / "data" / "papers"


@dataclass(frozen=True)
class Protocol:
    """
    The settings of a paper for one data set.

    Attributes:
        methods (`dict`): the paper's method, with its options.
        short_side (`int`): short side of the resized images in pixels.
        window, stride (`int`): side and distance of the sliding windows in pixels; None for the whole image.
        logit_scale (`float`): scale of the softmax over the texts.
        threshold (`float`, *optional*): a pixel whose best class has a lower probability is background.
        min_area (`float`): a class needs more than this share of the pixels that are not background. The pixels of a
            smaller class go to the next best class.
        pamr_dilations (`tuple[int, ...]`): distances of the neighbours of PAMR in pixels; empty without PAMR.
        padding (`int`): windows are padded to multiples of this number of pixels, by the mean colour of the model's
            images; 0 if incomplete patches are left out. 1 keeps them, for methods that read the colours.
        overrides (`Path`, *optional*): file of class names and texts of the background, for `load_segmentation`; None
            for those of the data set.
    """

    methods: Mapping[str, Mapping]
    short_side: int = 336
    window: int | None = 224
    stride: int | None = 112
    logit_scale: float = 40.0
    threshold: float | None = None
    min_area: float = 0.0
    pamr_dilations: tuple[int, ...] = ()
    padding: int = 0
    overrides: Path | None = field(default=None, repr=False)


_WHOLE = {"window": None, "stride": None}
_CITYSCAPES = {"short_side": 560}


def _resclip(rcs: float, *sfr: float) -> dict[str, dict]:
    """Returns the method with the options of a data set."""
    return {"resclip": {"rcs": rcs, "sfr": list(sfr)}}


# The settings of each paper, and the settings that differ for single data sets.
_PAPERS = {
    "sclip": (
        Protocol({"sclip": {}}),
        {
            "voc21": {"logit_scale": 65.0, "threshold": 0.1, "min_area": 0.1},
            "context60": {"logit_scale": 50.0, "threshold": 0.1},
            "coco_object": {"logit_scale": 50.0, "threshold": 0.1},
            "coco_stuff": {"short_side": 448},
            "cityscapes": _CITYSCAPES,
        },
    ),
    "naclip": (
        Protocol({"naclip": {}}, pamr_dilations=(8, 16)),
        {
            "voc21": {"threshold": 0.1, **_WHOLE},
            "voc20": _WHOLE,
            "context60": {"threshold": 0.1},
            "coco_object": {"threshold": 0.1},
            "cityscapes": _CITYSCAPES,
        },
    ),
    "clearclip": (
        Protocol({"clearclip": {}}, short_side=448, window=448, stride=224, logit_scale=50.0, padding=16),
        {
            "voc21": {"threshold": 0.5},
            "context60": {"threshold": 0.15},
            "coco_object": {"threshold": 0.4},
            "cityscapes": {"window": 224},
        },
    ),
    "proxyclip": (
        Protocol({"proxyclip": {"proxy": "facebook/dino-vitb8", "holes": True}}, window=336, padding=56),
        {
            "voc21": {"threshold": 0.2},
            "context60": {"threshold": 0.15},
            "coco_object": {"threshold": 0.25},
            "ade20k": {"short_side": 448},
            "cityscapes": {"short_side": 448, "window": 224},
        },
    ),
    "sc_clip": (
        Protocol({"sc_clip": {}}),
        {
            "voc21": {"logit_scale": 50.0, "threshold": 0.15, "min_area": 0.1},
            "context60": {"threshold": 0.15},
            "coco_object": {"logit_scale": 55.0, "threshold": 0.35},
            "cityscapes": _CITYSCAPES,
        },
    ),
    "resclip": (
        Protocol(_resclip(0.4, 1.8, 0.7, 0.11), padding=1),
        {
            "voc21": {"methods": _resclip(0.3, 2.2, 0.7, 0.5), "threshold": 0.1, **_WHOLE},
            "context60": {"methods": _resclip(0.3, 1.8, 0.7, 0.3), "threshold": 0.1},
            "coco_object": {"threshold": 0.1},
            "voc20": {"methods": _resclip(0.6, 2.1, 0.6, 0.1), **_WHOLE},
            "context59": {"methods": _resclip(0.4, 1.8, 0.7, 0.25)},
            "cityscapes": {"methods": _resclip(0.2, 2.1, 0.6, 0.1), **_CITYSCAPES},
            "ade20k": {"methods": _resclip(0.3, 2.1, 0.7, 0.25)},
        },
    ),
}
PROTOCOLS = tuple(_PAPERS)
# Papers that took over the class names of SCLIP.
_NAMES_OF = dict.fromkeys(("naclip", "sc_clip", "resclip"), "sclip")


def protocol_settings(paper: str, dataset: str) -> Protocol:
    """
    Returns the settings of a paper, a name of `PROTOCOLS`, for a data set, a name of
    [`~iclip_hf.data.layouts.DATASETS`]. A data set that the paper does not measure gets the settings that the paper
    has for most data sets. Raises `ValueError` if there is no such paper.
    """
    paper = known(paper, PROTOCOLS, "protocol")
    settings, changes = _PAPERS[paper]
    files = [_NAMES_FOLDER / f"{dataset}-{_NAMES_OF.get(paper, paper)}.yaml", _NAMES_FOLDER / f"{dataset}.yaml"]
    overrides = next(filter(Path.is_file, files), None)
    return replace(settings, overrides=overrides, **changes.get(dataset, {}))
