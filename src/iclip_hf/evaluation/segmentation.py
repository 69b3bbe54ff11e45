"""Evaluation of open-vocabulary semantic segmentation: mIoU of label maps over a data set, as in its papers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..data.segmentation import SegmentationDataset, SegmentationSample
from ..explainers import make_explainer
from ..explainers.refinement import refine_maps
from ..explainers.windows import check_window, windowed_maps
from ..images import map_groups
from ..label_maps import BACKGROUND_LABEL, label_map
from ..localization.localizer import Localizer
from ..models.explainable import ExplainableModel
from ..models.loading import load
from ..processing_iclip import check_threshold
from ..prompts import check_templates
from ..utils.distributed import this_process
from ..utils.extras import require_extra
from ..utils.prefetch import prefetch_map
from .evaluate import Plan
from .metrics import THRESHOLDS, MeanIoU
from .results import Result, markdown, measured, rounded


with require_extra("eval"):
    from accelerate.utils import gather_object


# Short side of images under sliding windows, in pixels, as in SCLIP and its successors.
SHORT_SIDE = 336


@dataclass
class SegmentationResult(Result):
    """
    Result of [`evaluate_segmentation`]. Attributes besides those of [`Result`]:

    Attributes:
        results (`dict`): for each method `mIoU`, `pixel_accuracy` and `floor` in percent, `floor_class`, and `thresholds`: the
            background thresholds of the images at even and at odd positions, or None. `floor` is the mIoU of the best map with one
            class everywhere, which is `floor_class`.
        per_class (`dict`): for each method, a list with one `dict` for each class: id, name, IoU and accuracy in percent.
    """

    def table(self) -> str:
        """Returns the scores as a Markdown table."""
        rows = []
        for method, figures in self.results.items():
            thresholds = dict.fromkeys(figures["thresholds"] or ["-"])  # once if they are equal
            scores = [rounded(figures[name], 2) for name in ("mIoU", "pixel_accuracy", "floor")]
            rows.append([method, *scores, str(figures["floor_class"]), " / ".join(map(str, thresholds))])
        return markdown(
            ["method", "mIoU %", "pixel accuracy %", "floor %", "floor's class", "background threshold"], rows
        )


def evaluate_segmentation(
    model,
    dataset: SegmentationDataset,
    methods: Sequence[str] = ("itsm",),
    *,
    image_size: int | None = None,
    short_side: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    templates: Sequence[str] | None = None,
    background: Sequence[str] | None = None,
    threshold: float | None = None,
    logit_scale: float | None = None,
    min_presence: float = 0.0,
    refine: bool = False,
    limit: int | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    progress: bool = True,
) -> SegmentationResult:
    """
    Measures the label maps of a model over a data set. Each pixel gets the class with the highest raw map among all classes of the
    data set, see [`label_map`]. Under `accelerate launch`, the processes share the images, and all return the same result.

    If the data set has a background, it consists of the pixels whose confidence is not above a threshold, and of those where a text
    for the background is best. If neither a threshold nor such texts are given, the threshold is chosen on other images: the images
    at even positions take the best of 0, 0.01, ..., 1 for the images at odd positions, and the reverse.

    Args:
        model, methods, templates, limit, batch_size, num_workers, progress: as for [`evaluate`].
        dataset ([`SegmentationDataset`]): from `load_segmentation`.
        image_size (`int`, *optional*): side in pixels of the square that images are resized to; the processor's size if not given.
        short_side (`int`, *optional*): short side in pixels of images that keep their proportions; 336 with a window.
        window (`int`, *optional*): side in pixels of windows that slide over the image; the whole image if not given.
        stride (`int`, *optional*): distance in pixels of the windows; half of the window if not given.
        background: texts that describe the background; those of the data set's overrides if not given.
        threshold (`float` in [0, 1], *optional*): background threshold.
        logit_scale (`float`, *optional*): makes the confidence a probability, see [`label_map`].
        min_presence (`float` in [0, 1]): a class with a lower presence gets no pixel of the image. The papers have no such gate.
        refine (`bool`): whether to refine the maps by the colours of the image, see [`refine_maps`].

    Returns:
        [`SegmentationResult`].

    Raises:
        `ValueError`, `TypeError`, `FileNotFoundError`: an option or a file is not as described.
    """
    start = time.perf_counter()
    state = this_process("eval")
    background = list(dataset.background_texts if background is None else background)
    if not dataset.background and (background or threshold is not None):
        raise ValueError(
            f"Expected neither texts nor a threshold for the background of {dataset.name!r}, which is void, got {background} "
            f"and {threshold}: leave them out."
        )
    if image_size is not None and (short_side or window):
        raise ValueError("Expected image_size, or short_side and window, got both: leave one out.")
    templates = check_templates(dataset.templates if templates is None else templates)
    model = load(model)
    segmenter = _Segmenter(
        model,
        dataset,
        methods,
        templates=templates,
        background=background,
        threshold=threshold,
        logit_scale=logit_scale,
        window=window,
        stride=stride,
        min_presence=min_presence,
        refine=refine,
    )
    plan = Plan.make(state, dataset, model.processor, image_size, limit, batch_size, num_workers)
    if short_side or window:
        plan.size = {"size": {"shortest_edge": short_side or SHORT_SIDE}}
    if segmenter.sweeps and plan.count < 2:
        raise ValueError("Expected two images or more to choose the background threshold on, got 1: give a threshold.")

    count = len(dataset.labels) + 1
    folds = {method: [MeanIoU(count, dataset.background) for _ in range(2)] for method in segmenter.explainers}
    bar = tqdm(total=len(plan.indices), unit="image", disable=not (progress and state.is_main_process))
    with ThreadPoolExecutor(plan.num_workers) as pool, bar:
        loaded = prefetch_map(pool, lambda index: (index, *plan.load(index)), plan.indices, 2 * plan.batch_size)
        for index, counts in prefetch_map(pool, segmenter.count, segmenter.draw(loaded, plan), 2 * plan.batch_size):
            for method, areas in counts.items():
                folds[method][index % 2].add_counts(areas)
            bar.update()

    gathered, *others = gather_object([folds])  # alike on every process
    for other in others:
        for method, pair in gathered.items():
            for own, more in zip(pair, other[method]):
                own.merge(more)
    reports = {method: _report(dataset, pair, segmenter.sweeps) for method, pair in gathered.items()}
    for summary, _ in reports.values():
        if not segmenter.sweeps and threshold is not None:
            summary["thresholds"] = [threshold, threshold]
    return SegmentationResult(
        protocol={
            **model.identity,
            **plan.protocol(),
            "window": window,
            "stride": segmenter.stride,
            "templates": templates,
            "synonyms": [list(texts) for texts in dataset.synonyms],
            "background_texts": background,
            "logit_scale": logit_scale,
            "min_presence": min_presence,
            "label_maps": "raw maps of all classes, bicubic to the image's size; the highest one counts",
            "refine": refine,
            "background": _background_rule(dataset, background, segmenter.sweeps, threshold, logit_scale),
        },
        results={method: summary for method, (summary, _) in reports.items()},
        per_class={method: rows for method, (_, rows) in reports.items()},
        timing={
            "seconds": time.perf_counter() - start,
            "seconds_in_model": segmenter.seconds_in_model,
            "images": len(plan.indices),
        },
    )


class _Segmenter:
    """The methods with their texts. `draw` runs the model; `count` can run in any thread. Arguments: [`evaluate_segmentation`]."""

    def __init__(
        self,
        model: ExplainableModel,
        dataset: SegmentationDataset,
        methods: Sequence[str],
        *,
        templates: list[str],
        background: list[str],
        threshold: float | None,
        logit_scale: float | None,
        window: int | None,
        stride: int | None,
        min_presence: float,
        refine: bool,
    ):
        self.options = {
            "threshold": None if threshold is None else check_threshold(threshold),
            "logit_scale": logit_scale,
        }
        # Whether the background threshold is chosen on other images.
        self.sweeps = dataset.background and threshold is None and not background
        self.explainers = {method: make_explainer(model, method) for method in dict.fromkeys(methods)}
        first = next(iter(self.explainers.values()))
        self.window, self.stride, self.refine = window, stride, refine
        if window is not None:
            self.stride = stride or window // 2
            check_window(first, window, self.stride)
        elif stride is not None:
            raise ValueError(f"Expected stride with a window, got a stride of {stride} alone: add the window.")
        self.classes = [label for label, texts in enumerate(dataset.synonyms) for _ in texts]
        self.classes += [BACKGROUND_LABEL] * len(background)
        texts = [*itertools.chain(*dataset.synonyms), *background]
        self.texts = model.encode_texts(texts, templates)
        self.gate = None
        if min_presence:
            self.gate = Localizer(model, texts, templates=templates, min_presence=min_presence)
        self.metric = MeanIoU(len(dataset.labels) + 1, dataset.background)
        self.seconds_in_model = 0.0

    def draw(self, loaded: Iterator[tuple[int, SegmentationSample, torch.Tensor]], plan: Plan) -> Iterator[tuple]:
        """Yields index, sample, raw maps `(T, h, w)` by method, and presence `(T,)` or None of each image."""
        while batch := list(itertools.islice(loaded, plan.batch_size)):
            indices, samples, pixels = zip(*batch)
            began = time.perf_counter()
            drawn = map_groups(self._draw, pixels, [one.shape for one in pixels])
            self.seconds_in_model += time.perf_counter() - began
            for index, sample, (maps, present) in zip(indices, samples, drawn):
                yield index, sample, maps, present

    def _draw(self, pixels: list[torch.Tensor]) -> list[tuple[dict[str, torch.Tensor], torch.Tensor | None]]:
        """Returns raw maps by method and presence of each image, for images of one shape."""
        pixel_values = torch.cat(pixels)
        drawn = {}
        for method, explainer in self.explainers.items():
            if self.window is None:
                maps, _ = explainer.raw_maps(pixel_values, self.texts)
            else:
                maps = windowed_maps(explainer, pixel_values, self.texts, self.window, self.stride)
            if self.refine:
                maps = refine_maps(maps, pixel_values.to(maps.device))
            drawn[method] = (-maps if explainer.reversed else maps).cpu()
        present = [None] * len(pixels)
        if self.gate is not None:
            present = self.gate.explain_batch(pixel_values, self.texts)[2] >= self.gate.min_presence
        return [(dict(zip(drawn, maps)), one) for *maps, one in zip(*drawn.values(), present)]

    def count(self, item: tuple) -> tuple[int, dict]:
        """Returns the index of an image and the counts of its label maps by method, for [`MeanIoU.add_counts`]."""
        index, sample, drawn, present = item
        counts = {}
        for method, maps in drawn.items():
            labels, confidence = label_map(maps, sample.size, classes=self.classes, present=present, **self.options)
            counts[method] = self.metric.count(labels + 1, sample.label_map, confidence if self.sweeps else None)
        return index, counts


def _report(dataset: SegmentationDataset, folds: Sequence[MeanIoU], sweeps: bool) -> tuple[dict, list[dict]]:
    """Returns the summary, and one row for each class. Each of the two folds takes the best threshold of the other."""
    thresholds = None
    if sweeps:
        best = [fold.curve().argmax() for fold in folds]
        thresholds = [float(THRESHOLDS[index]) for index in reversed(best)]
        folds = [fold.at(index) for fold, index in zip(folds, reversed(best))]
    metric = MeanIoU(len(dataset.labels) + 1, dataset.background)
    for fold in folds:
        metric.merge(fold)
    scores = metric.compute()
    names = dict(zip(dataset.labels, dataset.class_names))
    if dataset.background:
        names = {0: "background", **names}
    summary = {
        "mIoU": measured(scores["miou"]),
        "pixel_accuracy": measured(scores["pixel_accuracy"]),
        "floor": measured(scores["floor"]),
        "floor_class": names[scores["floor_class"]],
        "thresholds": thresholds,
        "pixels": scores["pixels"],
        "left_out": scores["left_out"],
    }
    rows = [
        {
            "id": label,
            "name": name,
            "IoU": scores["per_class"].get(label),
            "accuracy": scores["per_class_accuracy"].get(label),
        }
        for label, name in names.items()
    ]
    return summary, rows


def _background_rule(
    dataset, background: list[str], sweeps: bool, threshold: float | None, logit_scale: float | None
) -> str:
    value = (
        "the map of the best class, stretched to [0, 1]"
        if logit_scale is None
        else "the probability of the best class"
    )
    if not dataset.background:
        return "void"
    if sweeps:
        return f"{value}, is not above the best threshold of the images at the other (even or odd) positions"
    parts = [f"{value}, is not above {threshold}"] if threshold is not None else []
    return " or ".join([*parts, *(["a background text is best"] if background else [])]) or "never"
