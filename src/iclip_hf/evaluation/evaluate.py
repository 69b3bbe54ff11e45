"""One loop that evaluates a model on a segmentation data set, with any measures (Tables 1, 4, 5 and 8 among them)."""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from importlib.metadata import version

import torch
from tqdm import tqdm

from ..backends.loading import load
from ..data.segmentation import SegmentationDataset
from ..explainers import Explainer, make_explainer
from ..model.engine import Engine, map_groups
from ..model.modeling_iclip import ICLIPTextFeatures, cosines
from ..model.prompts import check_templates
from ..model.similarity import resize_and_normalize
from ..utils.distributed import partial_state
from ..utils.extras import require_extra
from ..utils.prefetch import prefetch_map, spare_processors
from .measures import TASKS, make_measure
from .measures.measure import EvaluatedImage, Measure
from .results import EvaluationResult


with require_extra("eval"):
    from accelerate.utils import gather_object


def evaluate(
    model,
    dataset: SegmentationDataset,
    methods: Sequence[str] = ("itsm",),
    measures: Sequence[str | Measure] | None = None,
    *,
    image_size: int | dict[str, int] | None = None,
    templates: Sequence[str] | None = None,
    refine: bool = False,
    limit: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> EvaluationResult:
    """
    Measures a model and its maps over a data set.

    Every image is resized as a whole, without a crop. Under `accelerate launch` the processes share the images, and every process
    returns the same result.

    Args:
        model: a loaded model, or anything that [`load`] accepts.
        dataset ([`SegmentationDataset`]): from `load_segmentation`.
        methods: names of explainers.
        measures: names of `MEASURES`, or measures with options such as `Segmentation(window=224)`; those of the task
            `"interpretability"` that the data set allows if not given.
        image_size (`int` or `dict`, *optional*): side in pixels of the square that images are resized to, or a `size` of
            [`ICLIPProcessor`]; the processor's if not given.
        templates: prompts for the class names; the data set's if not given.
        refine (`bool`): whether to refine the maps by the colours of the image, see [`refine_maps`].
        limit (`int`, *optional*): evaluate only the first images.
        batch_size (`int`): number of images in one forward pass.
        progress (`bool`): whether the first process shows a progress bar.

    Returns:
        [`EvaluationResult`].

    Raises:
        `ValueError`, `TypeError`, `FileNotFoundError`: an option or a file is not as described.
    """
    start = time.perf_counter()
    state = partial_state("eval")
    if measures is None:
        measures = [name for name in TASKS["interpretability"] if name != "stuff_contrast" or dataset.stuff]
    measures = [measure if isinstance(measure, Measure) else make_measure(measure) for measure in measures]
    size = image_size or next((measure.image_size for measure in measures if measure.image_size), None)
    run = EvaluationRun(model, dataset, methods, size, templates, refine, limit, batch_size, state)
    for measure in measures:
        measure.prepare(run)
    protocol = run.protocol() | dict(itertools.chain(*(measure.protocol().items() for measure in measures)))
    run.measure(measures, progress and state.is_main_process)

    gathered, *others = gather_object([[measure.totals for measure in measures]])  # alike on every process
    for measure, totals in zip(measures, gathered):
        measure.totals = totals
    for other in others:
        for measure, totals in zip(measures, other):
            for method, of_method in measure.totals.items():
                of_method.merge(totals[method])
    results, rows, columns = zip(*(_report(measures, method, dataset) for method in run.methods))
    presence, *_ = [reported.pop("presence", {}) for reported in results]  # the same for all methods
    return EvaluationResult(
        protocol=protocol,
        results=dict(zip(run.methods, results)),
        presence=presence,
        per_class=dict(zip(run.methods, rows)),
        timing={
            "seconds": time.perf_counter() - start,
            "seconds_in_model": run.seconds_in_model,
            "images": len(run.indices),
        },
        columns=dict(zip(run.methods, columns)),
    )


def _report(measures: list[Measure], method: str, dataset: SegmentationDataset) -> tuple[dict, list[dict], dict]:
    """Returns the scores of a method, a row for each class, and the cells of its row in the table by heading."""
    reported, cells, left_out, by_class = {}, {}, {}, {}
    for measure in measures:
        found, rows = measure.report(method if measure.by_method else None)
        if "left_out" in found:
            left_out[measure.name] = found.pop("left_out")
        cells |= dict(zip((heading for heading, _ in measure.scores.values()), measure.cells(found)))
        reported |= found
        for label, row in rows.items():
            by_class.setdefault(label, {}).update(row)
    names = dict(zip(dataset.labels, dataset.class_names)) | ({0: "background"} if 0 in by_class else {})
    empty = dict.fromkeys(itertools.chain(*by_class.values()))
    table = [{"id": label, "name": names[label], **empty, **by_class.get(label, {})} for label in sorted(names)]
    return {**reported, "left_out": left_out}, table, cells


class EvaluationRun:
    """What the measures of an evaluation share: methods, encoded texts, and the images of this process. Parameters: [`evaluate`]."""

    def __init__(self, model, dataset, methods, image_size, templates, refine, limit, batch_size, state):
        self.model, self.dataset, self.methods = load(model), dataset, list(dict.fromkeys(methods))
        self.explainers = {method: make_explainer(self.model, method) for method in self.methods}
        self.templates = check_templates(dataset.templates if templates is None else templates)
        size = {"height": image_size, "width": image_size} if isinstance(image_size, int) else image_size
        self.size = {} if size is None else {"size": size}
        self.refine, self.batch_size = refine, batch_size
        self.count = min(len(dataset), limit or len(dataset))  # of all processes
        self.indices = range(state.process_index, self.count, state.num_processes)  # of this one
        self.seconds_in_model = 0.0

    @cached_property
    def texts(self) -> ICLIPTextFeatures:
        """The encoded class names, `(K, P)`, on the device of the model."""
        return self.model.encode_texts(self.dataset.class_names, self.templates)

    def measure(self, measures: Sequence[Measure], progress: bool) -> None:
        """Adds all images of this process to the totals. Threads decode and count while this thread runs the model."""
        needs = frozenset().union(*(measure.needs for measure in measures))

        def count(image: EvaluatedImage) -> list[tuple]:
            """Returns measure, method and counts."""
            counts, heatmaps = [(m, None, m.count(image, None, None)) for m in measures if not m.by_method], None
            for method, explainer in self.explainers.items():
                if "maps" in needs:
                    heatmaps = resize_and_normalize(image.raw_maps[method], image.sample.size, explainer.reversed)
                counts += [(m, method, m.count(image, method, heatmaps)) for m in measures if m.by_method]
            return counts

        bar = tqdm(total=len(self.indices), unit="image", disable=not progress)
        with ThreadPoolExecutor(spare_processors()) as pool, bar:
            images = prefetch_map(pool, self._prepared, self.indices, 2 * self.batch_size)
            images = self._forward(images, measures, needs)
            for counts in prefetch_map(pool, count, images, 2 * self.batch_size):
                for measure, method, of_image in counts:
                    for part in of_image:
                        measure.totals[method].add_counts(*part)
                bar.update()

    def _prepared(self, index: int) -> EvaluatedImage:
        sample = self.dataset[index]
        return EvaluatedImage(index, sample, self.model.processor(images=[sample.image], **self.size)["pixel_values"])

    def _forward(
        self, images: Iterator[EvaluatedImage], measures: Sequence[Measure], needs: frozenset[str]
    ) -> Iterator[EvaluatedImage]:
        """Yields the images after the model has run."""

        def forward(images: list[EvaluatedImage]) -> list[EvaluatedImage]:
            if needs:
                self._draw(images, needs)
            for measure in measures:
                for image, found in zip(images, measure.forward(images)):
                    image.outputs[measure.name] = found
            return images

        while batch := list(itertools.islice(images, self.batch_size)):
            began = time.perf_counter()
            batch = map_groups(forward, batch, [image.pixel_values.shape for image in batch])
            self.seconds_in_model += time.perf_counter() - began
            yield from batch

    def _draw(self, images: list[EvaluatedImage], needs: frozenset[str]) -> None:
        """Adds scores, presence and raw maps to images of one shape."""
        # One forward pass gives the similarity map, its reversal, and the scores of all classes. Every other method needs its own.
        pixel_values = torch.cat([image.pixel_values for image in images])
        rows = [image.sample.labels and [label - 1 for label in image.sample.labels] for image in images]
        own, others = Engine(self.model, self.model.processor, refine=self.refine), self.explainers
        maps = {}
        if "scores" in needs:
            shown, features = own.raw_maps(pixel_values, self.texts, rows=rows)
            scores = cosines(features.image_embeds, self.texts.text_embeds)
            presence = self.model.presence(scores)
            for index, image in enumerate(images):
                image.scores = scores[index].cpu()
                image.presence = None if presence is None else presence[index].cpu()
            maps = dict.fromkeys(("itsm", "reversed_itsm"), shown)  # reversed once they are stretched to [0, 1]
            others = {name: explainer for name, explainer in self.explainers.items() if name not in maps}
        if "maps" in needs:
            for name, other in others.items():
                engine = Engine(self.model, self.model.processor, other, refine=self.refine)
                maps[name] = engine.raw_maps(pixel_values, self.texts, rows=rows)[0]
            for method in self.methods:
                for image, of_image in zip(images, maps[method].cpu()):
                    image.raw_maps[method] = of_image[: len(image.sample.labels)]

    def map_functions(self, image: EvaluatedImage) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """
        Returns for each method a function from prepared images `(N, 3, H, W)` to raw maps for the classes that `image` shows,
        `(N, T, h, w)`.
        """
        rows = [label - 1 for label in image.sample.labels]

        def explain(explainer: Explainer, pixel_values: torch.Tensor) -> torch.Tensor:
            engine = Engine(self.model, self.model.processor, explainer)
            return engine.raw_maps(pixel_values, self.texts, rows=[rows] * len(pixel_values))[0]

        return {method: partial(explain, explainer) for method, explainer in self.explainers.items()}

    def protocol(self) -> dict:
        """Returns what is needed to repeat an evaluation of these images."""
        dataset = self.dataset
        return {
            **self.model.identity,
            "dataset": {
                "name": dataset.name,
                "split": dataset.split,
                "images": self.count,
                "images_in_split": dataset.images_in_split,
                "fingerprint": dataset.fingerprint(),
            },
            "image_size": self.size.get("size") or dict(self.model.processor.image_processor.size),
            "resize": "whole image, no crop",
            "templates": self.templates,
            "class_names": list(dataset.class_names),
            "refine": self.refine,
            "versions": {name: version(name).split("+")[0] for name in ("iclip-hf", "torch", "transformers")},
            "python": platform.python_version(),
        }
