"""The evaluation of a model on a segmentation data set with any metrics, such as those of Tables 1, 4, 5 and 8."""

from __future__ import annotations

import copy
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ..backends.loading import load
from ..data.segmentation import SegmentationDataset
from ..explainers import make_explainer
from ..model.batches import map_groups
from ..model.engine import Engine
from ..model.outputs import ICLIPTextFeatures
from ..utils.distributed import broadcast_from_main, partial_state
from ..utils.errors import require_extra
from ..utils.files import check_new_folder
from ..utils.prefetch import ThreadPool, prefetch_map, spare_processors
from ..utils.published import without_path
from .metrics import make_metrics
from .metrics.metric import CannotMeasure, EvaluatedImage, Metric
from .report import Report
from .results import EvaluationResult, map_settings
from .tables import result_tables


with require_extra("eval"):
    from accelerate.utils import gather_object

if TYPE_CHECKING:
    from accelerate import PartialState

    from ..backends.explainable import ExplainableModel


def evaluate_model(
    model,
    dataset: SegmentationDataset,
    methods: str | Sequence[str] | Mapping[str, Mapping | tuple[str, Mapping]] | None = None,
    metrics: str | Sequence[str | Metric] = "interpretability",
    *,
    image_size: int | dict[str, int] | None = None,
    templates: Sequence[str] | None = None,
    refine: bool = False,
    multi_scale: bool = False,
    limit: int | None = None,
    batch_size: int = 8,
    report: str | Path | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """
    Measures a model and its maps over a data set.

    Every image is resized as a whole, without a crop. Under `accelerate launch` the processes share the images, and
    every process returns the same scores.

    Args:
        model: a loaded model, or anything that [`load`] accepts.
        dataset ([`SegmentationDataset`]): from `load_segmentation`.
        methods (*optional*): name or names of explainers, or a `dict` from names to options, such as
            `{"gem": {"depth": 3}}`, or from titles to a name and its options, such as `{"deep GEM": ("gem", {"depth":
            7})}`; if not given, the method that [`make_explainer`] chooses for the model.
        metrics: a name of `TASKS`, whose metrics are left out if the data set or the model does not have what they
            measure; or a list of names of `METRICS` and of metrics with options, such as `Segmentation(window=224)`.
        image_size (`int` or `dict`, *optional*): side in pixels of the square that images are resized to for the maps,
            or a `size` of [`ICLIPProcessor`]; if not given, the size that a metric prefers ([`Metric`]), or else the
            processor's. mAP and presence of whole images always come from the processor's size.
        templates: templates of the prompts for the class names; the data set's if not given.
        refine (`bool`): whether to refine the maps by the colours of the image, see [`refine_maps`].
        multi_scale (`bool`): whether to compute maps and scores at two scales, see [`Engine`].
        limit (`int`, *optional*): evaluate only the first images.
        batch_size (`int`): number of images in one forward pass.
        report (*optional*): a new folder for a page, `index.html`. The page shows the map of each class on each image,
            and the scores.
        progress (`bool`): whether the first process shows a progress bar.
    """
    start = time.perf_counter()
    if limit is not None and limit < 1:
        raise ValueError(f"limit is at least 1, not {limit}; leave it out for all images.")
    processes = partial_state("eval")
    metrics = [copy.copy(metric) for metric in make_metrics(metrics)]  # the metrics of the caller are not changed
    if report is not None:
        if processes.is_main_process:
            check_new_folder(Path(report))
        processes.wait_for_everyone()
        report = Report(report)
        report.image_size = metrics[0].image_size  # so that the report shares the run of the first metric
        metrics.append(report)
    model, progress = load(model), progress and processes.is_main_process
    settings = {"templates": templates, "refine": refine, "multi_scale": multi_scale}
    new_run = partial(EvaluationRun, model, dataset, methods, limit, batch_size, processes, progress, **settings)
    # Metrics that prefer another size of images have a run of their own, so that no metric changes the scores of
    # another. The key of a run is its size as text, because a size is a dict, which has no hash.
    runs: dict[str, EvaluationRun] = {}
    run_of_metric: dict[Metric, EvaluationRun] = {}
    for metric in metrics:
        size = metric.image_size if image_size is None else image_size
        if str(size) not in runs:
            runs[str(size)] = new_run(image_size=size)
        try:
            metric.prepare(runs[str(size)])
            run_of_metric[metric] = runs[str(size)]
        except CannotMeasure:
            if not metric.optional:
                raise
    dataset[:limit].check_classes()
    totals = {}
    for run in runs.values():
        totals |= run.measure([metric for metric in run_of_metric if run_of_metric[metric] is run])
    _join_processes(totals)

    first_run = next(iter(runs.values()))
    metrics = [metric for metric in run_of_metric if metric is not report]
    results, per_class = {}, {}
    for method in first_run.methods:
        results[method], rows_of_classes = {}, {}
        for metric in metrics:
            total = totals[metric.name, method if metric.by_method else None]
            results[method][metric.name], rows_of_classes[metric.name] = total.scores_and_rows()
        per_class[method] = _class_rows(rows_of_classes, dataset)
    protocol = None
    if processes.is_main_process:
        protocol = first_run.protocol({metric: run_of_metric[metric] for metric in metrics})
    result = EvaluationResult(
        protocol=broadcast_from_main(protocol),
        results=results,
        per_class=per_class,
        timing={
            "seconds": time.perf_counter() - start,
            "seconds_in_model": sum(run.seconds_in_model for run in runs.values()),
            "images": len(first_run.indices),
        },
        tables=result_tables(metrics, results, first_run.num_images, dataset.images_in_split),
    )
    if report is not None and processes.is_main_process:
        for method in first_run.methods:
            report.merge(totals[report.name, method])
        report.write(result, first_run.methods)
    return result


def _join_processes(totals: Mapping[tuple, Metric]) -> None:
    """Merges the items of all processes, so that every process has the same metrics."""
    states_of_processes = gather_object([[total.state for total in totals.values()]])
    for total, first, *others in zip(totals.values(), *states_of_processes):
        for other in others:
            first.merge(other)
        total.state = first


def _class_rows(by_metric: dict[str, dict[int, dict]], dataset: SegmentationDataset) -> list[dict]:
    """Returns a row for each class, from the rows of each metric by class id. A class without a score has None."""
    by_metric = {name: rows for name, rows in by_metric.items() if rows}
    has_background = any(0 in rows for rows in by_metric.values())
    names = ({0: "background"} if has_background else {}) | dict(zip(dataset.class_ids, dataset.class_names))
    # For each metric, a row with None for each score.
    empty = {name: dict.fromkeys(itertools.chain(*rows.values())) for name, rows in by_metric.items()}
    return [
        {"id": class_id, "name": class_name}
        | {name: empty[name] | rows.get(class_id, {}) for name, rows in by_metric.items()}
        for class_id, class_name in names.items()
    ]


class EvaluationRun:
    """
    Runs a model and its methods on images of one size, for all metrics that take this size. The parameters are those
    of [`evaluate_model`]; `settings` are `image_size`, `refine` and `multi_scale`.

    Attributes:
        engine ([`Engine`]): computes the scores.
        engines (`dict`): for each method an [`Engine`], which computes the maps of the method.
        num_images (`int`): number of images of all processes.
        indices (`range`): positions of the images of this process.
    """

    def __init__(
        self,
        model: ExplainableModel,
        dataset: SegmentationDataset,
        methods: str | Sequence[str] | Mapping[str, Mapping | tuple[str, Mapping]] | None,
        limit: int | None,
        batch_size: int,
        processes: PartialState,
        progress: bool,
        templates: Sequence[str] | None,
        **settings,
    ):
        self.model, self.dataset = model, dataset
        templates = dataset.templates if templates is None else templates
        new_engine = partial(Engine, self.model, self.model.processor, templates=templates, **settings)
        self.engine = new_engine()
        methods = [methods] if isinstance(methods, str) else methods or [None]
        if not isinstance(methods, Mapping):
            methods = {method: {} for method in methods}
        self.engines, self.method_options = {}, {}
        for title, options in methods.items():
            has_title = isinstance(options, tuple)
            method, options = options if has_title else (title, options)
            explainer = make_explainer(self.model, method, **options)
            title = title if has_title else explainer.name
            self.engines[title] = new_engine(method=explainer)
            self.method_options[title] = {"method": explainer.name, **options} if has_title else options
        self.methods = [*self.engines]
        self.batch_size = batch_size
        self.num_images = min(len(dataset), limit or len(dataset))
        self.indices = range(processes.process_index, self.num_images, processes.num_processes)
        self.progress, self.seconds_in_model = progress, 0.0

    @cached_property
    def texts(self) -> ICLIPTextFeatures:
        """The features of the class names, `(K, P)`, on the device of the model."""
        return self.engine.encode(self.dataset.class_names)

    def measure(self, metrics: Sequence[Metric]) -> dict[tuple, Metric]:
        """
        Measures the images of this process. Returns a copy of each metric, with the items of these images, by the
        names of metric and method. The method is None for a metric that has one value for all methods.
        """
        needs = frozenset().union(*(metric.needs for metric in metrics))
        metrics_of_method = {
            method: [metric for metric in metrics if metric.by_method == (method is not None)]
            for method in (None, *self.methods)
        }
        totals = {
            (metric.name, method): metric.empty() for method, group in metrics_of_method.items() for metric in group
        }

        def update(image: EvaluatedImage) -> list[Metric]:
            """Returns copies of the metrics with this image alone, in the order of `totals`."""
            parts = []
            for method, group in metrics_of_method.items():
                maps = image.explanations[method].maps if method and "maps" in needs else None
                for metric in group:
                    part = metric.empty()
                    part.update_from(image, method, maps)
                    parts.append(part)
            return parts

        if needs:
            _ = self.texts  # encoded before the bar, which estimates the remaining time from the time of the images
        bar = tqdm(total=len(self.indices), unit="image", disable=not self.progress)
        with ThreadPool(spare_processors()) as pool, bar:
            images = prefetch_map(pool, self._prepared_image, self.indices, 2 * self.batch_size)
            images = self._run_model(images, metrics, needs)
            for num_done, parts in enumerate(prefetch_map(pool, update, images, 2 * self.batch_size), 1):
                for total, part in zip(totals.values(), parts):
                    total.merge(part)
                # After the first image of a batch, the estimate would be many times too high.
                if num_done % self.batch_size == 0 or num_done == len(self.indices):
                    bar.update(num_done - bar.n)
        return totals

    def _prepared_image(self, index: int) -> EvaluatedImage:
        sample = self.dataset[index]
        text_indices = [class_id - 1 for class_id in sample.class_ids]
        return EvaluatedImage(index, sample, self.engine.prepare(sample.image, sample.size, text_indices))

    def _run_model(
        self, images: Iterator[EvaluatedImage], metrics: Sequence[Metric], needs: frozenset[str]
    ) -> Iterator[EvaluatedImage]:
        """Yields the images with their scores, explanations and outputs, batch by batch."""
        needs_scores = bool(needs & {"scores", "presence"})
        takes_features = any(engine.takes_features for engine in self.engines.values())
        # Images are encoded once, for the scores and for methods that compute maps from features. Every other method
        # runs the image tower itself, and so do metrics that compute other maps, such as those of windows.
        # `self.engine` always computes features, so it is the encoder only if something needs features.
        encoder = self.engine if needs_scores or takes_features else next(iter(self.engines.values()))

        def run_batch(images: list[EvaluatedImage]) -> list[EvaluatedImage]:
            if needs:
                for image, encoded in zip(images, encoder.encode_images([image.prepared for image in images])):
                    image.prepared = encoded
            prepared = [image.prepared for image in images]
            if needs_scores:
                without_maps = [replace(image.prepared, text_indices=()) for image in images]
                for image, explanation in zip(images, self.engine.run(without_maps, self.texts, len(images))):
                    image.scores = explanation.all_scores
                    presence = self.model.presence(explanation.all_scores.to(self.texts.text_embeds.device))
                    image.presence = None if presence is None else presence.cpu()
            if "maps" in needs:
                for method, engine in self.engines.items():
                    for image, explanation in zip(images, engine.run(prepared, self.texts, len(images))):
                        image.explanations[method] = explanation
            for metric in metrics:
                for image, output in zip(images, metric.run_model(images)):
                    image.outputs[metric.name] = output
            return images

        while batch := list(itertools.islice(images, self.batch_size)):
            start = time.perf_counter()
            batch = map_groups(run_batch, batch, [image.prepared.batch_key for image in batch])
            self.seconds_in_model += time.perf_counter() - start
            yield from batch

    def map_functions(self, image: EvaluatedImage) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """
        Returns for each method a function from prepared images `(B, 3, H, W)` to raw maps `(B, T, h, w)` of the
        classes that `image` shows. The raw maps are refined if the evaluation refines maps.
        """

        def compute_maps(engine: Engine, pixel_values: torch.Tensor) -> torch.Tensor:
            text_indices = [image.prepared.text_indices] * len(pixel_values)
            return engine.raw_maps(pixel_values, self.texts, text_indices=text_indices)[0]

        return {method: partial(compute_maps, engine) for method, engine in self.engines.items()}

    def protocol(self, run_of_metric: dict[Metric, EvaluationRun]) -> dict:
        """Returns what is needed to repeat an evaluation whose first run is this one."""
        dataset, metrics = self.dataset, {}
        for metric, run in run_of_metric.items():
            size = {} if run is self else {"image_size": map_settings(run.engine)["image_size"]}
            metrics[metric.name] = metric.settings() | size
        return {
            **self.model.identity,
            "dataset": {
                "name": dataset.name,
                "split": dataset.split,
                "images": self.num_images,
                "images_in_split": dataset.images_in_split,
                "fingerprint": dataset[: self.num_images].fingerprint(),
            },
            "methods": {  # a proxy may be a folder
                method: {name: without_path(option) for name, option in options.items()}
                for method, options in self.method_options.items()
            },
            **map_settings(self.engine),
            "resize": "whole image, no crop; scores of the whole at the model's own size",
            "class_names": list(dataset.class_names),
            "versions": {name: version(name).split("+")[0] for name in ("iclip-hf", "torch", "transformers")},
            "python": platform.python_version(),
            "metrics": metrics,
        }
