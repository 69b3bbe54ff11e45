"""
Metrics over a data set: recognition, maps, label maps and faithfulness. This module lists their names and options
without an import of torch, so that the help of a command is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING

from ...utils.lazy import lazy_names
from ...utils.tables import known
from ..protocols import PROTOCOLS


if TYPE_CHECKING:
    from .metric import Metric

# Module and class of each metric.
METRICS = {
    "mAP": "recognition:MultiLabelAveragePrecision",
    "mMIoU": "maps:MeanMaxIoU",
    "mFMB": "maps:MeanForegroundMinusBackground",
    "text_contrast": "maps:TextContrast",
    "stuff_contrast": "maps:StuffContrast",
    "presence": "recognition:Presence",
    "segmentation": "segmentation:Segmentation",
    "label_maps": "label_maps:LabelMaps",
    "deletion_insertion": "faithfulness:DeletionInsertion",
    "max_sensitivity": "faithfulness:MaxSensitivity",
    "randomization": "faithfulness:Randomization",
    "pointing_game": "maps:PointingGame",
}
# The metrics of each task of `iclip evaluate`.
TASKS = {
    "interpretability": ("mAP", "mMIoU", "mFMB", "text_contrast", "stuff_contrast", "presence"),
    "segmentation": ("segmentation",),
    "faithfulness": ("deletion_insertion", "max_sensitivity", "randomization", "pointing_game"),
}
MAX_SEED = 2**32 - 1  # as numpy's

# Form and help of each parameter of metrics that is an option of `iclip evaluate`. A form is a kind of number
# ("pixels" and "count" from 1, "seed" from 0 to `MAX_SEED`, "positive", "share" in [0, 1]), "texts", or a tuple of
# choices.
OPTIONS = {
    "aggregate": (
        ("image", "pixel"),
        "of mMIoU and mFMB: image is the mean over the images of a class, pixel pools the pixels of all its images "
        "(default: image)",
    ),
    "window": ("pixels", "of segmentation: side of sliding windows, for example 224 (default: the whole image)"),
    "stride": ("pixels", "of segmentation: distance of the windows (default: half of the window)"),
    "background": (
        "texts",
        "of segmentation: texts that describe the background, such as sky, between commas, or by repeating the option",
    ),
    "threshold": (
        "share",
        "of segmentation: confidence up to which a pixel is background, in [0, 1] (default: images at even positions "
        "take the best threshold of the images at odd positions, and the reverse; none with texts for the background)",
    ),
    "logit_scale": (
        "positive",
        "of segmentation: the confidence is the softmax of similarities times this number, for example 40 "
        "(default: the map of the best class, stretched to [0, 1])",
    ),
    "protocol": (
        PROTOCOLS,
        "of segmentation: measure by the steps of this paper, with its method, class names, sizes and thresholds "
        "where no other option gives them; excludes --refine, --multi-scale and --image-size (default: none)",
    ),
    "steps": ("count", "of deletion_insertion: number of steps (default: 10)"),
    "seed": ("seed", "seed of all random values (default: 0)"),
}

_MODULES = {name: f".{module}" for module, _, name in (path.partition(":") for path in METRICS.values())}
_MODULES |= dict.fromkeys(["Metric", "ClassMeans", "MeasuredClassMeans"], ".metric") | {"MeanIoU": ".mean_iou"}
__all__ = ["METRICS", "OPTIONS", "TASKS", "make_metrics", *_MODULES]
__getattr__, __dir__ = lazy_names(__name__, _MODULES)


def make_metrics(metrics: str | Sequence[str | Metric], **options) -> list[Metric]:
    """
    Creates metrics.

    Args:
        metrics: a name of `TASKS`, whose metrics are then optional; a name of `METRICS`; or a list of names of
            `METRICS` and of metrics.
        options: parameters of the metrics that `metrics` names. Each goes to all of these metrics that have it.
    """
    is_task = False
    if isinstance(metrics, str):
        name = known(metrics, [*TASKS, *METRICS], "metric or task")
        is_task = name in TASKS
        metrics = TASKS.get(name, [name])
    made, used = [], set()
    for metric in metrics:
        if isinstance(metric, str):
            module, _, name = METRICS[known(metric, METRICS, "metric")].partition(":")
            metric_class = getattr(import_module(f"{__name__}.{module}"), name)
            taken = options.keys() & signature(metric_class).parameters.keys()
            metric = metric_class(**{option: options[option] for option in taken})
            metric.optional = is_task
            used |= taken
        made.append(metric)
    if not made:
        raise ValueError(f"There is no metric: choose some of {', '.join(METRICS)}.")
    names = [metric.name for metric in made]
    if unused := [option for option in options if option not in used]:
        raise ValueError(f"{unused[0]} is no option of {', '.join(names)}: leave it out, or choose other metrics.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"There are two metrics with the name {twice[0]!r}: measure them one after the other.")
    return made
