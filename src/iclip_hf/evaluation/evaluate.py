"""From a segmentation data set and a model to mAP, mMIoU and mFMB of every method (the paper's Tables 1, 4, 5 and 8)."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..data.segmentation import SegmentationDataset, SegmentationSample
from ..explainers import identity, make_explainer, select_texts
from ..explainers.gradients import GradientExplainer
from ..localization.localizer import Localizer
from ..presence import MIN_PRESENCE
from ..processing_iclip import check_templates
from ..similarity import resize_and_normalize, reverse
from ..utils.distributed import this_process
from ..utils.extras import require_extra
from ..utils.files import atomic_write
from ..utils.prefetch import prefetch_map, spare_processors
from .metrics import MeanForegroundMinusBackground, MeanMaxIoU, MultiLabelAveragePrecision


with require_extra("eval"):
    from accelerate.utils import gather_object


@dataclass
class EvaluationResult:
    """
    What was measured, and how.

    Attributes:
        protocol (`dict`): model, data set with its fingerprint, resolution, prompts, aggregation, software versions.
        results (`dict`): for each method `mAP`, `mMIoU` and `floor` in percent and `mFMB` in [-1, 1]; `floor` is the mMIoU of
            calling every pixel foreground.
        presence (`dict`): what the gate of `min_presence` does: the share of the shown classes whose presence reaches it, `kept`, and
            of the others, `passed`, both in percent of all images and classes.
        per_class (`dict`): for each method a list of one `dict` a class: id, name, AP, IoU in percent, its best threshold,
            and FMB; None where no image has the class.
        timing (`dict`): seconds in all, seconds in the model's forward, images.
    """

    protocol: dict
    results: dict[str, dict[str, float]]
    presence: dict[str, float]
    per_class: dict[str, list[dict]]
    timing: dict[str, float]

    def table(self) -> str:
        """The scores as a Markdown table, and a line on presence."""
        lines = ["| method | mAP % | mMIoU % | mFMB | floor % |", "|---|---|---|---|---|"]
        lines += [
            f"| {method} | {r['mAP']:.2f} | {r['mMIoU']:.2f} | {r['mFMB']:.4f} | {r['floor']:.2f} |"
            for method, r in self.results.items()
        ]
        gate = self.presence
        kept, passed = (
            f"{gate['kept']:.1f} % of the classes that an image shows",
            f"{gate['passed']:.1f} % of the others",
        )
        return "\n".join([*lines, "", f"presence of at least {gate['min_presence']}: {kept}, {passed}"])

    def to_json(self) -> str:
        """Everything, as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def per_class_csv(self) -> str:
        """One row a method and class, as CSV text."""
        text = io.StringIO()
        rows = [{"method": method, **row} for method, rows in self.per_class.items() for row in rows]
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def save(self, path: str | Path) -> None:
        """Writes `path` (JSON) and, beside it, the per-class scores as `.csv`; each appears whole or not at all."""
        for target, text in ((Path(path), self.to_json()), (Path(path).with_suffix(".csv"), self.per_class_csv())):
            with atomic_write(target) as partial:
                partial.write_text(text, encoding="utf-8")


@dataclass
class _Scores:
    """The metrics of one method's maps."""

    miou: MeanMaxIoU
    mfmb: MeanForegroundMinusBackground

    def add_counts(self, counts: list[tuple[int, np.ndarray, np.ndarray]]) -> None:
        for label, threshold_counts, region_means in counts:
            self.miou.add_counts(threshold_counts, label)
            self.mfmb.add_counts(region_means, label)

    def merge(self, other: _Scores) -> None:
        self.miou.merge(other.miou)
        self.mfmb.merge(other.mfmb)

    def compute(self, dataset: SegmentationDataset, ap: dict) -> tuple[dict, list[dict]]:
        """The summary, and one row a class."""
        miou, mfmb = self.miou.compute(), self.mfmb.compute()
        summary = {
            "mAP": ap["map"],
            "mMIoU": miou["mmiou"],
            "mFMB": mfmb["mfmb"],
            "floor": miou["floor"],
            "pairs": miou["pairs"],
            "left_out": {"mMIoU": miou["left_out"], "mFMB": mfmb["left_out"], "mAP": ap["left_out"]},
        }
        rows = [
            {
                "id": label,
                "name": name,
                "AP": ap["per_class"].get(label),
                "MIoU": miou["per_class"].get(label),
                "threshold": miou["thresholds"].get(label),
                "FMB": mfmb["per_class"].get(label),
            }
            for label, name in zip(dataset.labels, dataset.class_names)
        ]
        return summary, rows


def evaluate(
    model,
    processor,
    dataset: SegmentationDataset,
    methods: Sequence[str] = ("itsm",),
    *,
    image_size: int | None = None,
    templates: Sequence[str] | None = None,
    aggregate: str = "image",
    limit: int | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """
    Measures recognition and interpretability of a model over a data set.

    Every image is resized as a whole, without a crop. Its maps are drawn for the classes it shows, enlarged to its own size,
    stretched to [0, 1] and compared with its masks; its scores of all classes rank it for mAP. Under `accelerate launch`
    the images are shared out over the processes, and every process returns the same result.

    Args:
        model, processor: an ICLIP model or any other that [`make_explainer`] takes, on its device.
        dataset ([`SegmentationDataset`]): from `load_segmentation`.
        methods: names of explainers.
        image_size (`int`, *optional*): side in pixels of the square that images are resized to; the processor's size if not
            given.
        templates: prompts for the class names; the data set's if not given.
        aggregate (`str`): `"image"` or `"pixel"`, see [`MeanMaxIoU`].
        limit (`int`, *optional*): evaluate only the first images.
        batch_size (`int`): images in one forward.
        num_workers (`int`, *optional*): threads that decode images and masks and count pixels beside the model;
            `spare_processors` if not given.
        progress (`bool`): show a bar, in the first process.

    Returns:
        [`EvaluationResult`].

    Raises:
        `ValueError`, `TypeError`, `FileNotFoundError`: for options or files that are not as described; files are named.
    """
    for name, number in (("limit", limit), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"Expected {name} to be at least 1, got {number}.")
    start = time.perf_counter()
    state = this_process("eval")
    rank, world = state.process_index, state.num_processes
    templates = check_templates(dataset.templates if templates is None else templates)
    drawer = MapMaker(model, processor, methods, dataset.class_names, templates)
    scores = {method: _Scores(MeanMaxIoU(aggregate), MeanForegroundMinusBackground(aggregate)) for method in methods}
    average_precision = MultiLabelAveragePrecision()
    gate = np.zeros((2, 2), np.int64)  # absent and shown classes: all of them, and those whose presence is enough

    prepare = drawer.itsm.processor
    size = {} if image_size is None else {"size": {"height": image_size, "width": image_size}}
    count = min(len(dataset), limit or len(dataset))
    indices = range(rank, count, world)
    seconds_in_model = 0.0

    def load(index: int) -> tuple[SegmentationSample, np.ndarray, torch.Tensor]:
        sample = dataset[index]
        shown = np.isin(dataset.labels, sample.labels)
        return sample, shown, prepare(images=[sample.image], **size)["pixel_values"]

    def forward() -> Iterator[tuple[SegmentationSample, dict[str, torch.Tensor]]]:
        """The model's part, in this thread: for each image by method the raw maps of the classes it shows."""
        nonlocal seconds_in_model
        loaded = prefetch_map(pool, load, indices, 2 * batch_size)
        while batch := list(itertools.islice(loaded, batch_size)):
            samples, shown, pixels = zip(*batch)
            began = time.perf_counter()
            cosines, enough, drawn = drawer.draw(torch.cat(pixels), [sample.labels for sample in samples])
            seconds_in_model += time.perf_counter() - began
            shown = np.stack(shown)
            average_precision.update(cosines, shown)
            gate[:] += [[(shown == which).sum(), (enough & (shown == which)).sum()] for which in (False, True)]
            for sample, *maps in zip(samples, *drawn.values()):
                yield sample, dict(zip(drawn, maps))
            bar.update(len(batch))

    bar = tqdm(total=len(indices), unit="image", disable=not progress or rank > 0)
    with ThreadPoolExecutor(num_workers or spare_processors()) as pool, bar:
        for counts in prefetch_map(pool, _count, forward(), 2 * batch_size):
            for method, of_classes in counts.items():
                scores[method].add_counts(of_classes)

    # Alike on every process.
    (scores, average_precision, gate), *others = gather_object([(scores, average_precision, gate)])
    for other_scores, other_precision, other_gate in others:
        average_precision.merge(other_precision)
        gate = gate + other_gate
        for method, other in other_scores.items():
            scores[method].merge(other)
    protocol = {
        **identity(model),
        "dataset": {
            "name": dataset.name,
            "split": dataset.split,
            "images": count,
            "fingerprint": dataset.fingerprint(),
        },
        "image_size": size.get("size") or dict(prepare.image_processor.size),
        "resize": "whole image, no crop",
        "templates": templates,
        "class_names": list(dataset.class_names),
        "maps": "bicubic to the image's size, then min-max; foreground is M > t for t in 0, 0.01, ..., 1",
        "aggregate": aggregate,
        "versions": {name: version(name).split("+")[0] for name in ("iclip-hf", "torch", "transformers")},
        "python": platform.python_version(),
    }
    recognition = average_precision.compute()
    computed = {method: one.compute(dataset, recognition) for method, one in scores.items()}
    return EvaluationResult(
        protocol=protocol,
        results={method: summary for method, (summary, _) in computed.items()},
        presence={"min_presence": MIN_PRESENCE, **dict(zip(("passed", "kept"), _percent(gate)))},
        per_class={method: rows for method, (_, rows) in computed.items()},
        timing={
            "seconds": time.perf_counter() - start,
            "seconds_in_model": seconds_in_model,
            "images": len(indices),
        },
    )


class MapMaker:
    """
    The maps of several methods with few passes through the model: the similarity map, its reversal, and scores and presence of
    all classes come from one; every other method takes one of its own.
    """

    def __init__(self, model, processor, methods: Sequence[str], class_names: Sequence[str], templates: list[str]):
        self.methods = list(dict.fromkeys(methods))
        self.localizer = Localizer(model, processor, class_names, templates=templates)
        self.itsm = self.localizer.explainer
        self.others = {
            method: make_explainer(model, processor, method)
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
            `tuple`: cosines of all classes `(B, K)`, whether their presence is enough `(B, K)`, and for each method raw maps
            `(B, T, h, w)`: of each image those of its labels and then, up to the longest list of the batch, of any class; for
            the reversal those that are to be reversed.
        """
        rows = pad_sequence([torch.tensor(one or (1,)) - 1 for one in labels], batch_first=True)  # (B, T)
        shown = torch.arange(len(rows))[:, None], rows
        texts = self.localizer.encoded
        maps, cosines, presence = self.localizer.explain_batch(pixel_values, texts)
        enough = (presence >= MIN_PRESENCE).numpy()
        drawn = dict.fromkeys(("itsm", "reversed_itsm"), maps[shown])  # reversed once they are stretched to [0, 1]
        for method, explainer in self.others.items():
            if isinstance(explainer, GradientExplainer):  # a backward a text: not for the absent classes
                drawn[method] = explainer.raw_maps(pixel_values, select_texts(texts, rows))[0]
            else:  # almost free, and clip_surgery compares a text with all others
                drawn[method] = explainer.raw_maps(pixel_values, texts)[0][shown]
        return cosines, enough, {method: drawn[method].cpu() for method in self.methods}


def _percent(counts: np.ndarray) -> list[float]:
    """Rows of (all, some) -> percentages; NaN of nothing."""
    return [100 * some / all_ if all_ else math.nan for all_, some in counts.tolist()]


def _count(item: tuple[SegmentationSample, dict[str, torch.Tensor]]) -> dict[str, list[tuple]]:
    """
    One image's raw maps by method, first those of its classes -> by method for each class its id and the pixel counts of mMIoU
    and mFMB.
    """
    sample, raw_maps = item
    counts = {method: [] for method in raw_maps}
    for index, label in enumerate(sample.labels):
        mask = sample.mask(label)
        for method, raw in raw_maps.items():
            heatmap = resize_and_normalize(raw[index : index + 1], sample.size)[0]
            if method == "reversed_itsm":
                heatmap = reverse(heatmap)  # not the negative stretched anew, which rounds otherwise
            pair = heatmap, mask, label
            counts[method].append((label, MeanMaxIoU.count(*pair), MeanForegroundMinusBackground.count(*pair)))
    return counts
