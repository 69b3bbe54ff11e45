"""Evaluation of a model on a segmentation data set: mAP, mMIoU, mFMB and text contrast (Tables 1, 4, 5 and 8)."""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..data.segmentation import SegmentationDataset, SegmentationSample
from ..explainers import Explainer, make_explainer, select_texts
from ..explainers.refinement import refine_maps
from ..localization.localizer import Localizer
from ..modeling_iclip import ICLIPTextFeatures
from ..presence import MIN_PRESENCE
from ..prompts import check_templates
from ..similarity import resize_and_normalize, reverse
from ..utils.distributed import this_process
from ..utils.extras import require_extra
from ..utils.prefetch import prefetch_map, spare_processors
from .metrics import MeanForegroundMinusBackground, MeanMaxIoU, MultiLabelAveragePrecision, TextContrast
from .results import Result, markdown, measured, rounded


with require_extra("eval"):
    from accelerate.utils import gather_object


@dataclass
class EvaluationResult(Result):
    """
    Result of [`evaluate`]. Attributes besides those of [`Result`]:

    Attributes:
        results (`dict`): for each method `mAP`, `mMIoU`, `text_contrast` and `floor` in percent and `mFMB` in [-1, 1]; `floor`
            is the mMIoU of a map that marks every pixel.
        presence (`dict`): `kept`, the share of the shown classes whose presence is at least `min_presence`, `passed`, the same
            share of the other classes, and `mAP` of images ranked by presence, all in percent.
        per_class (`dict`): for each method, a list with one `dict` for each class: id, name, AP, IoU in percent, its best
            threshold, FMB and text contrast.
    """

    presence: dict[str, float | None]

    def table(self) -> str:
        """Returns the scores as a Markdown table, and a line on presence."""
        digits = {"mAP": 2, "mMIoU": 2, "mFMB": 4, "text_contrast": 2, "floor": 2}
        rows = [
            [method, *(rounded(figures[name], number) for name, number in digits.items())]
            for method, figures in self.results.items()
        ]
        kept, passed, ap = (rounded(self.presence[name], 1) for name in ("kept", "passed", "mAP"))
        gate = f"presence of at least {self.presence['min_presence']}"
        return "\n".join(
            [
                markdown(["method", "mAP %", "mMIoU %", "mFMB", "text contrast %", "floor %"], rows),
                "",
                f"{gate}: {kept} % of the classes that an image shows, {passed} % of the others; mAP by presence {ap} %",
            ]
        )


class _Scores:
    """The metrics of one method. `count` can run in any thread. `add` takes its results in order."""

    def __init__(self, aggregate: str):
        self.miou = MeanMaxIoU(aggregate)
        self.mfmb = MeanForegroundMinusBackground(aggregate)
        self.contrast = TextContrast()

    @staticmethod
    def count(heatmaps: torch.Tensor, masks: np.ndarray, labels: Sequence[int]) -> tuple:
        """Counts the maps and masks `(K, H, W)` of the K classes of one image. Returns the argument of `add`."""
        pairs = [
            (label, MeanMaxIoU.count(heatmap, mask, label), MeanForegroundMinusBackground.count(heatmap, mask, label))
            for heatmap, mask, label in zip(heatmaps, masks, labels)
        ]
        return pairs, TextContrast.count(heatmaps, masks, labels)

    def add(self, counts: tuple) -> None:
        pairs, contrast = counts
        for label, threshold_counts, region_means in pairs:
            self.miou.add_counts(threshold_counts, label)
            self.mfmb.add_counts(region_means, label)
        self.contrast.add_counts(contrast, [label for label, *_ in pairs])

    def merge(self, other: _Scores) -> None:
        self.miou.merge(other.miou)
        self.mfmb.merge(other.mfmb)
        self.contrast.merge(other.contrast)

    def report(self, dataset: SegmentationDataset, ap: dict) -> tuple[dict, list[dict]]:
        """Returns the summary, and one row for each class."""
        miou, mfmb, contrast = self.miou.compute(), self.mfmb.compute(), self.contrast.compute()
        summary = {
            "mAP": measured(ap["map"]),
            "mMIoU": measured(miou["mmiou"]),
            "mFMB": measured(mfmb["mfmb"]),
            "text_contrast": measured(contrast["text_contrast"]),
            "floor": measured(miou["floor"]),
            "pairs": miou["pairs"],
            "left_out": {
                "mMIoU": miou["left_out"],
                "mFMB": mfmb["left_out"],
                "text_contrast": contrast["left_out"],
                "mAP": ap["left_out"],
            },
        }
        rows = [
            {
                "id": label,
                "name": name,
                "AP": ap["per_class"].get(label),
                "MIoU": miou["per_class"].get(label),
                "threshold": miou["thresholds"].get(label),
                "FMB": mfmb["per_class"].get(label),
                "text_contrast": contrast["per_class"].get(label),
            }
            for label, name in zip(dataset.labels, dataset.class_names)
        ]
        return summary, rows


class _Totals:
    """All sums over the images of one process."""

    def __init__(self, methods: Sequence[str], aggregate: str):
        self.scores = {method: _Scores(aggregate) for method in methods}
        self.average_precision = MultiLabelAveragePrecision()
        self.calibrated = MultiLabelAveragePrecision()
        # For absent and for shown classes: the number of all, and of those with a presence of at least MIN_PRESENCE.
        self.gate = np.zeros((2, 2), np.int64)
        self.seconds_in_model = 0.0  # of this process only; not merged

    def add_recognition(self, cosines: torch.Tensor, presence: torch.Tensor, shown: np.ndarray) -> None:
        """Adds images: cosines and presence of all classes, and whether the image shows the class, all `(B, K)`."""
        self.average_precision.update(cosines, shown)
        self.calibrated.update(presence, shown)
        enough = presence.numpy() >= MIN_PRESENCE
        self.gate += [[(shown == which).sum(), (enough & (shown == which)).sum()] for which in (False, True)]

    def merge(self, other: _Totals) -> None:
        for method, scores in self.scores.items():
            scores.merge(other.scores[method])
        self.average_precision.merge(other.average_precision)
        self.calibrated.merge(other.calibrated)
        self.gate += other.gate


def evaluate(
    model,
    dataset: SegmentationDataset,
    methods: Sequence[str] = ("itsm",),
    *,
    image_size: int | None = None,
    templates: Sequence[str] | None = None,
    aggregate: str = "image",
    refine: bool = False,
    limit: int | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """
    Measures recognition and interpretability of a model over a data set.

    Every image is resized as a whole, without a crop. Maps are computed for the classes that the image shows, enlarged to its size,
    stretched to [0, 1], and compared with the masks and with each other. The scores of all classes rank the image for mAP. Under
    `accelerate launch` the processes share the images, and every process returns the same result.

    Args:
        model ([`ExplainableModel`]): or anything that [`load`] takes.
        dataset ([`SegmentationDataset`]): from `load_segmentation`.
        methods: names of explainers.
        image_size (`int`, *optional*): side in pixels of the square that images are resized to; the processor's size if not
            given.
        templates: prompts for the class names; the data set's if not given.
        aggregate (`str`): `"image"` or `"pixel"`, see [`MeanMaxIoU`].
        refine (`bool`): whether to refine the maps by the colours of the image, see [`refine_maps`].
        limit (`int`, *optional*): evaluate only the first images.
        batch_size (`int`): number of images in one forward pass.
        num_workers (`int`, *optional*): number of threads that decode images and masks and count pixels; `spare_processors` if not
            given.
        progress (`bool`): whether the first process shows a progress bar.

    Returns:
        [`EvaluationResult`].

    Raises:
        `ValueError`, `TypeError`, `FileNotFoundError`: an option or a file is not as described.
    """
    start = time.perf_counter()
    state = this_process("eval")
    templates = check_templates(dataset.templates if templates is None else templates)
    drawer = MapMaker(model, methods, dataset.class_names, templates, refine)
    model = drawer.localizer.model
    plan = Plan.make(state, dataset, model.processor, image_size, limit, batch_size, num_workers)
    totals = _Totals(drawer.methods, aggregate)
    _run(plan, drawer, totals, progress=progress and state.is_main_process)
    seconds_in_model = totals.seconds_in_model

    totals, *others = gather_object([totals])  # equal on all processes
    for other in others:
        totals.merge(other)
    recognition = totals.average_precision.compute()
    reports = {method: scores.report(dataset, recognition) for method, scores in totals.scores.items()}
    passed, kept = (100 * some / all_ if all_ else None for all_, some in totals.gate.tolist())
    return EvaluationResult(
        protocol={
            **model.identity,
            **plan.protocol(),
            "templates": templates,
            "aggregate": aggregate,
            "maps": "bicubic to the image's size, then min-max; foreground is M > t for t in 0, 0.01, ..., 1",
            "refine": refine,
            "text_contrast": "c_ij = (P(M_i at i > M_i at j) + P(M_j at j > M_j at i)) / 2 for classes i, j of an image, ties "
            "half, without pixels of both; mean over a class's images and partners, then over classes",
        },
        results={method: summary for method, (summary, _) in reports.items()},
        presence={
            "min_presence": MIN_PRESENCE,
            "passed": passed,
            "kept": kept,
            "mAP": totals.calibrated.compute()["map"],
        },
        per_class={method: rows for method, (_, rows) in reports.items()},
        timing={
            "seconds": time.perf_counter() - start,
            "seconds_in_model": seconds_in_model,
            "images": len(plan.indices),
        },
    )


@dataclass
class Plan:
    """
    The images that this process evaluates, and the options.

    Attributes:
        dataset ([`SegmentationDataset`]): all images.
        processor: prepares whole images for the model.
        size (`dict`): options of the processor.
        count (`int`): number of images of all processes.
        indices (`range`): indices of the images of this process.
        batch_size (`int`): number of images in one forward pass.
        num_workers (`int`): number of threads.
    """

    dataset: SegmentationDataset
    processor: Callable
    size: dict
    count: int
    indices: range
    batch_size: int
    num_workers: int

    @classmethod
    def make(cls, state, dataset, processor, image_size, limit, batch_size, num_workers) -> Plan:
        """Checks the options of [`evaluate`] and shares the images out. `state` is that of `this_process`."""
        for name, number in (("limit", limit), ("batch_size", batch_size)):
            if number is not None and number < 1:
                raise ValueError(f"Expected {name} to be at least 1, got {number}: correct it.")
        count = min(len(dataset), limit or len(dataset))
        return cls(
            dataset=dataset,
            processor=processor,
            size={} if image_size is None else {"size": {"height": image_size, "width": image_size}},
            count=count,
            indices=range(state.process_index, count, state.num_processes),
            batch_size=batch_size,
            num_workers=num_workers or spare_processors(),
        )

    def load(self, index: int) -> tuple[SegmentationSample, torch.Tensor]:
        """Returns sample and `pixel_values` of one image."""
        sample = self.dataset[index]
        return sample, self.processor(images=[sample.image], **self.size)["pixel_values"]

    def protocol(self) -> dict:
        """Returns what is needed to repeat any evaluation of these images."""
        dataset, image_processor = self.dataset, self.processor.image_processor
        return {
            "dataset": {
                "name": dataset.name,
                "split": dataset.split,
                "images": self.count,
                "fingerprint": dataset.fingerprint(),
            },
            "image_size": self.size.get("size") or dict(image_processor.size),
            "resize": "whole image, no crop",
            "class_names": list(dataset.class_names),
            "versions": {name: version(name).split("+")[0] for name in ("iclip-hf", "torch", "transformers")},
            "python": platform.python_version(),
        }


def _run(plan: Plan, drawer: MapMaker, totals: _Totals, progress: bool) -> None:
    """Adds all images of the plan. Threads decode and count; this thread runs the model."""
    bar = tqdm(total=len(plan.indices), unit="image", disable=not progress)
    with ThreadPoolExecutor(plan.num_workers) as pool, bar:
        loaded = prefetch_map(pool, plan.load, plan.indices, 2 * plan.batch_size)
        for counts in prefetch_map(pool, _count, _draw(plan, drawer, totals, loaded), 2 * plan.batch_size):
            for method, of_image in counts.items():
                totals.scores[method].add(of_image)
            bar.update()


def _draw(
    plan: Plan, drawer: MapMaker, totals: _Totals, loaded: Iterator[tuple[SegmentationSample, torch.Tensor]]
) -> Iterator[tuple[SegmentationSample, dict[str, torch.Tensor]]]:
    """Yields sample and raw maps by method of each image, and adds the scores of the classes to the totals."""
    while batch := list(itertools.islice(loaded, plan.batch_size)):
        samples, pixels = zip(*batch)
        began = time.perf_counter()
        cosines, presence, drawn = drawer.draw(torch.cat(pixels), [sample.labels for sample in samples])
        totals.seconds_in_model += time.perf_counter() - began
        totals.add_recognition(
            cosines, presence, np.stack([np.isin(plan.dataset.labels, sample.labels) for sample in samples])
        )
        for sample, *maps in zip(samples, *drawn.values()):
            yield sample, dict(zip(drawn, maps))


class MapMaker:
    """
    Computes the maps of several methods. One forward pass gives the similarity map, its reversal, and scores and presence of all
    classes. Every other method needs a pass of its own.
    """

    def __init__(
        self,
        model,
        methods: Sequence[str],
        class_names: Sequence[str],
        templates: list[str],
        refine: bool = False,
    ):
        self.methods, self.refine = list(dict.fromkeys(methods)), refine
        self.localizer = Localizer(model, class_names, templates=templates)
        self.others = {
            method: make_explainer(self.localizer.model, method)
            for method in self.methods
            if method not in ("itsm", "reversed_itsm")
        }

    def draw(
        self, pixel_values: torch.Tensor, labels: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, np.ndarray, dict[str, torch.Tensor]]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`).
            labels: the class ids that each image shows.

        Returns:
            `tuple`: cosines of all classes `(B, K)`, their presence `(B, K)`, and raw maps `(B, T, h, w)` by method: the maps of an
            image's labels, padded with maps of any class to the longest list of labels in the batch. The raw maps of
            `reversed_itsm` are those of `itsm`.
        """
        rows = pad_sequence([torch.tensor(one or (1,)) - 1 for one in labels], batch_first=True)  # (B, T)
        shown = torch.arange(len(rows))[:, None], rows
        texts = self.localizer.encoded
        maps, cosines, presence, _ = self.localizer.explain_batch(pixel_values, texts)
        drawn = dict.fromkeys(("itsm", "reversed_itsm"), maps[shown])  # reversed once they are stretched to [0, 1]
        drawn |= {name: maps_of(explainer, pixel_values, texts, rows) for name, explainer in self.others.items()}
        drawn = {method: drawn[method].cpu() for method in self.methods}
        if self.refine:
            drawn = {method: refine_maps(maps, pixel_values.cpu()) for method, maps in drawn.items()}
        return cosines, presence, drawn


def maps_of(
    explainer: Explainer, pixel_values: torch.Tensor, texts: ICLIPTextFeatures, rows: torch.Tensor
) -> torch.Tensor:
    """Computes raw maps `(B, T, h, w)` of the texts `rows`, indices `(B, T)` into all texts of a data set, `(K, P)`."""
    if explainer.backward_per_text:  # the absent classes need none
        return explainer.raw_maps(pixel_values, select_texts(texts, rows))[0]
    # The other texts are almost free, and clip_surgery subtracts their mean.
    return explainer.raw_maps(pixel_values, texts)[0][torch.arange(len(rows))[:, None], rows]


def _count(item: tuple[SegmentationSample, dict[str, torch.Tensor]]) -> dict[str, tuple]:
    """Counts the raw maps of one image, by method. The maps of its classes come first. Returns arguments of `_Scores.add`."""
    sample, raw_maps = item
    labels = sample.labels
    masks = np.array([sample.mask(label) for label in labels], np.uint8).reshape(-1, *sample.size)
    counts = {}
    for method, raw in raw_maps.items():
        heatmaps = resize_and_normalize(raw[: len(labels)], sample.size)
        if method == "reversed_itsm":
            heatmaps = reverse(heatmaps)  # stretching the negative instead would round differently
        counts[method] = _Scores.count(heatmaps, masks, labels)
    return counts
