"""
Faithfulness: whether maps show what the model's score depends on, and whether they depend on the model.

The functions take the model as a function, so they work with any model and any maps. [`scorer`] creates it from a loaded model:

```python
>>> explainer = make_explainer(model, "gem")
>>> texts = model.encode_texts(["dog", "ball"])
>>> pixel_values = model.processor(images=[image])["pixel_values"]
>>> maps, _ = explainer.raw_maps(pixel_values, texts)
>>> deletion, insertion = deletion_insertion(scorer(model, texts), pixel_values[0], maps[0])
>>> area_under(insertion) - area_under(deletion)  # (maps, texts, 2): of the cosine and of the probability
```
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..data.segmentation import SegmentationDataset, SegmentationSample
from ..explainers import Explainer, make_explainer
from ..modeling_iclip import ICLIPTextFeatures, cosines
from ..models.explainable import ExplainableModel, recordable
from ..models.loading import load
from ..prompts import check_templates
from ..similarity import min_max_normalize, resize_and_normalize, resize_maps, reverse
from ..utils.distributed import this_process
from ..utils.extras import require_extra
from ..utils.names import MEASURES
from ..utils.prefetch import prefetch_map
from .evaluate import Plan, maps_of
from .metrics import ClassMeans, pointing_shares
from .results import Result, markdown, measured, rounded


with require_extra("eval"):
    from accelerate.utils import gather_object


STEPS = 10  # of deletion and of insertion
SAMPLES = 10  # noisy images of max-sensitivity
RADIUS = 0.02  # of their noise: captum's default, about one of 255 levels


def scorer(model: ExplainableModel, texts: ICLIPTextFeatures) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    Creates the score function for deletion and insertion.

    Args:
        model: the model, in PyTorch.
        texts ([`ICLIPTextFeatures`]): T encoded texts.

    Returns:
        A function from images `(N, 3, H, W)` to `(N, T, 2)`: the cosine with each text, and the probability of each text among all
        of them, the softmax of the model's logits.
    """

    model = recordable(model, "deletion and insertion")

    @torch.no_grad()
    def score(pixel_values: torch.Tensor) -> torch.Tensor:
        cosine = cosines(model.encode_images(pixel_values).image_embeds, texts.text_embeds)
        logits = cosine * model.logit_scale().to(cosine)
        return torch.stack([cosine, logits.softmax(-1)], -1)

    return score


@torch.no_grad()
def deletion_insertion(
    score: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    maps: torch.Tensor,
    *,
    steps: int = STEPS,
    seed: int = 0,
    batch_size: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Deletes and inserts the pixels of an image in the order of maps, highest first, and scores the image after each step
    (Petsiuk et al. 2018; order, steps and fill as in Grad-ECLIP, Zhao et al. 2024).

    Step s changes the first s / (2 * steps) of the pixels, so the last step changes half of them. Deletion replaces pixels by values
    from a standard normal distribution, because prepared images have mean 0 and standard deviation 1. Insertion starts from zeros,
    the mean colour. Pixels of equal value are in random order.

    Args:
        score: function from images `(N, C, H, W)` to figures `(N, ...)`.
        pixel_values (`torch.Tensor` of shape `(C, H, W)`): a prepared image.
        maps (`torch.Tensor` of shape `(M, h, w)`): of any size; they are enlarged to the size of the image (bicubic).
        steps (`int`): number of steps, at least 1.
        seed (`int`): seed of the values and of the order of equal pixels. They are the same for all maps.
        batch_size (`int`): largest number of images in one call of `score`. There are 2 + 2 * M * steps images.

    Returns:
        `tuple`: deletion and insertion, each `(M, steps + 1, ...)`, from the start without a change to the last step.

    Raises:
        `ValueError`: a shape is not as described, the maps hold NaN, or `steps` or `batch_size` is below 1.
    """
    _check_positive(steps=steps, batch_size=batch_size)
    _check_image(pixel_values)
    if maps.ndim != 3 or 0 in maps.shape or maps.isnan().any():
        raise ValueError(
            f"Expected maps (M, h, w) of numbers, got {tuple(maps.shape)}, NaN: {bool(maps.isnan().any())}: "
            "pass finite maps of one image."
        )
    size, device = pixel_values.shape[-2:], pixel_values.device
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(pixel_values.shape, generator=generator).to(pixel_values)
    shuffled = torch.randperm(size.numel(), generator=generator).to(device)
    values = resize_maps(maps.to(device), size).flatten(1)[:, shuffled]
    order = shuffled[values.argsort(dim=-1, descending=True, stable=True)]
    ranks = order.argsort(-1).unflatten(1, size)  # (M, H, W): 0 is the highest pixel
    counts = [round(size.numel() * step / (2 * steps)) for step in range(1, steps + 1)]
    starts = torch.stack([pixel_values, torch.zeros_like(pixel_values)])
    changed = (
        torch.where(rank < count, fill, start)
        for rank in ranks
        for start, fill in zip(starts, (noise, pixel_values))
        for count in counts
    )
    parts = [score(starts)]
    while batch := list(itertools.islice(changed, batch_size)):
        parts.append(score(torch.stack(batch)))
    first, later = torch.cat(parts).tensor_split((2,))
    curves = later.unflatten(0, (len(maps), 2, steps))
    curves = torch.cat([first[None, :, None].expand(len(maps), -1, -1, *first.shape[1:]), curves], 2)
    return curves[:, 0], curves[:, 1]


def area_under(curves: torch.Tensor) -> torch.Tensor:
    """Returns the area under curves `(M, S, ...)` by trapezoids, on an axis of length 1: `(M, ...)`, a mean score."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


@torch.no_grad()
def max_sensitivity(
    explain: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    *,
    radius: float = RADIUS,
    samples: int = SAMPLES,
    seed: int = 0,
) -> torch.Tensor:
    """
    Max-sensitivity (Yeh et al. 2019): the largest relative change of a map under small noise on the image,
    max ||M(x + n) - M(x)|| / ||M(x)|| over samples of uniform noise n in [-radius, radius], for maps stretched to [0, 1].

    Args:
        explain: function from images `(N, C, H, W)` to raw maps `(N, M, h, w)`; called twice.
        pixel_values (`torch.Tensor` of shape `(C, H, W)`): a prepared image.
        radius (`float`): in the units of prepared images, whose standard deviation is about 1.
        samples (`int`): number of noisy images, at least 1.
        seed (`int`): seed of the noise.

    Returns:
        `torch.Tensor` of shape `(M,)`; NaN for a constant map.

    Raises:
        `ValueError`: `pixel_values` has another shape, or `samples` is below 1.
    """
    _check_positive(samples=samples)
    _check_image(pixel_values)
    noise = torch.rand((samples, *pixel_values.shape), generator=torch.Generator().manual_seed(seed))
    noisy = pixel_values + ((2 * noise - 1) * radius).to(pixel_values)
    own = min_max_normalize(explain(pixel_values[None])).flatten(2)
    changes = min_max_normalize(explain(noisy)).flatten(2) - own
    return (changes.norm(dim=2) / own.norm(dim=2)).amax(0)


class LayerRandomization:
    """
    The sanity check of cascading randomisation (Adebayo et al. 2018). Maps that hardly change when the weights of the image tower
    are randomised do not explain the model.

    The layers are those of `RecordableModel.blocks`, the last first. Each weight tensor of a layer is replaced by values from a
    normal distribution with its mean and standard deviation. The weights are restored after every call, also after an exception.

    Args:
        model: the model that the explainers work on.
        seed (`int`): seed of the random weights.

    Raises:
        `ValueError`: the weights of the model cannot be replaced, because it is an ONNX model.
    """

    def __init__(self, model: ExplainableModel, seed: int = 0):
        model = recordable(model, "randomization")
        generator = torch.Generator().manual_seed(seed)
        self._layers: list[list[tuple[nn.Module, str, nn.Parameter]]] = []
        for block in reversed(model.blocks):
            replacements = []
            for path, weight in block.named_parameters():
                std, mean = torch.std_mean(weight.float(), correction=0)
                drawn = torch.randn(weight.shape, generator=generator).to(weight.device) * std + mean
                drawn = nn.Parameter(drawn.to(weight.dtype), requires_grad=False)
                parent, _, name = path.rpartition(".")
                replacements.append((block.get_submodule(parent), name, drawn))
            self._layers.append(replacements)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def correlations(
        self, explain: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor
    ) -> torch.Tensor:
        """
        Computes the rank correlation of maps with those after the last 1, 2, ... layers are randomised.

        Args:
            explain: function from images `(N, C, H, W)` to raw maps `(N, M, h, w)` of this model.
            pixel_values (`torch.Tensor` of shape `(N, C, H, W)`): prepared images.

        Returns:
            `torch.Tensor` of shape `(L, N, M)`: the [`rank_correlation`] for 1, ..., L randomised layers.
        """
        own, found, kept = explain(pixel_values), [], []
        try:
            for replacements in self._layers:
                for module, name, drawn in replacements:
                    kept.append((module, name, getattr(module, name)))
                    setattr(module, name, drawn)
                found.append(rank_correlation(own, explain(pixel_values)))
        finally:
            for module, name, weight in kept:
                setattr(module, name, weight)
        return torch.stack(found)


def rank_correlation(maps: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Returns Spearman's correlation of maps `(..., h, w)`, in [-1, 1]. Equal values have their mean rank. NaN for a constant map."""
    ranks = []
    for values in (maps.flatten(-2).contiguous(), others.flatten(-2).contiguous()):
        ordered = values.sort(-1).values
        below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
        ranks.append((below + up_to).double())
    one, other = (rank - rank.mean(-1, keepdim=True) for rank in ranks)
    return (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))


# The scores of each measure. `randomization` has one rank correlation for each layer.
_SCORES = {
    "deletion_insertion": ("deletion_cosine", "deletion_probability", "insertion_cosine", "insertion_probability"),
    "max_sensitivity": ("max_sensitivity",),
    "randomization": (),
    "pointing_game": ("pointing_game", "energy_pointing_game", "foreground"),
}
_HEADINGS = {
    "insertion_probability": ("insertion", 4),
    "deletion_probability": ("deletion", 4),
    "difference_probability": ("difference", 4),
    "insertion_cosine": ("insertion, cosine", 4),
    "deletion_cosine": ("deletion, cosine", 4),
    "difference_cosine": ("difference, cosine", 4),
    "max_sensitivity": ("max-sensitivity", 3),
    "randomization_first": ("rank correlation, last layer random", 2),
    "randomization_all": ("all layers random", 2),
    "pointing_game": ("pointing game %", 1),
    "energy_pointing_game": ("energy-based %", 1),
    "foreground": ("a constant map %", 1),
}


@dataclass
class FaithfulnessResult(Result):
    """
    Result of [`evaluate_faithfulness`]. Attributes besides those of [`Result`]:

    Attributes:
        results (`dict`): for each method, the scores of the measures:

            - `deletion_cosine`, `insertion_cosine`, `deletion_probability`, `insertion_probability`: areas under the curves, and
              `difference_cosine`, `difference_probability`: insertion minus deletion;
            - `max_sensitivity`;
            - `randomization`: rank correlations with the maps after the last 1, 2, ... layers are randomised;
            - `pointing_game`, `energy_pointing_game` and `foreground`, the score of a constant map in both, in percent;
            - `pairs`, the number of pairs of an image and a class, and `left_out`, for each score the number of pairs without it.
        per_class (`dict`): for each method, a list with one `dict` for each class: id, name and the same scores; `randomization` is
            the rank correlation with all layers randomised.
        timing (`dict`): also `forwards`, the number of images that passed through the image tower.
    """

    def table(self) -> str:
        """Returns the scores as a Markdown table."""
        rows = []
        for scores in self.results.values():
            ends = scores.get("randomization", [])
            rows.append(scores | ({"randomization_first": ends[0], "randomization_all": ends[-1]} if ends else {}))
        names = [name for name in _HEADINGS if name in rows[0]]
        return markdown(
            ["method", *(_HEADINGS[name][0] for name in names)],
            [
                [method, *(rounded(scores[name], _HEADINGS[name][1]) for name in names)]
                for method, scores in zip(self.results, rows)
            ],
        )


def evaluate_faithfulness(
    model,
    dataset: SegmentationDataset,
    methods: Sequence[str] = ("itsm",),
    *,
    measures: Sequence[str] = MEASURES,
    image_size: int | None = None,
    templates: Sequence[str] | None = None,
    steps: int = STEPS,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    progress: bool = True,
) -> FaithfulnessResult:
    """
    Measures the faithfulness of maps over a data set: deletion and insertion, max-sensitivity, cascading randomisation of the image
    tower, and the pointing game. All scores are means over the images of a class, then over the classes.

    Maps are computed for the classes that the image shows. The probability of a class is that among all classes of the data set.
    Under `accelerate launch`, the processes share the images, and every process returns the same result.

    Args:
        model, dataset, methods, image_size, templates, limit, num_workers, progress: as for [`evaluate`]. The
            progress bar counts images that pass through the image tower.
        measures: names of `MEASURES`.
        steps (`int`): number of steps of deletion and of insertion.
        seed (`int`): seed of all random values, which are the same in every run and with any number of processes.
        batch_size (`int`): largest number of images in one forward pass of deletion and insertion.

    Returns:
        [`FaithfulnessResult`].

    Raises:
        `ValueError`, `TypeError`, `FileNotFoundError`: an option or a file is not as described.
    """
    start = time.perf_counter()
    state = this_process("eval")
    templates = check_templates(dataset.templates if templates is None else templates)
    if not measures or not methods or not set(measures) <= set(MEASURES):
        raise ValueError(
            f"Expected methods, and measures of {list(MEASURES)}, got {methods!r} and {measures!r}: name at least one of each."
        )
    model = load(model)
    explainers = {method: make_explainer(model, method) for method in dict.fromkeys(methods)}
    plan = Plan.make(state, dataset, model.processor, image_size, limit, batch_size, num_workers)
    texts = model.encode_texts(dataset.class_names, templates)
    examiner = _Examiner(model, explainers, texts, measures, steps, seed, batch_size)
    means = {method: ClassMeans() for method in explainers}
    with ThreadPoolExecutor(plan.num_workers) as pool:
        shown = [len(labels) for labels in prefetch_map(pool, _labels, map(dataset.__getitem__, plan.indices), 32)]
        bar = tqdm(
            total=sum(map(examiner.forwards, shown)),
            desc="image tower",
            unit="image",
            disable=not (progress and state.is_main_process),
        )
        with bar:
            loaded = prefetch_map(pool, plan.load, plan.indices, 8)
            examined = examiner.examine(zip(plan.indices, loaded), bar)
            for labels, figures in prefetch_map(pool, examiner.point, examined, 8):
                for method, of_method in figures.items():
                    for label, of_pair in zip(labels, of_method):
                        means[method].update(of_pair, label)
    everything, *others = gather_object([means])  # alike on every process
    for other in others:
        for method, of_method in everything.items():
            of_method.merge(other[method])
    reports = {method: _report(one.compute(), dataset, examiner.columns) for method, one in everything.items()}
    return FaithfulnessResult(
        protocol={
            "task": "faithfulness",
            **model.identity,
            **plan.protocol(),
            "templates": templates,
            "measures": list(examiner.measures),
            "steps": steps,
            "seed": seed,
            "deletion_insertion": "pixels by the map, highest first, in steps of 1 / (2 * steps) of the image; deletion fills with "
            "normal noise, insertion starts from zeros; probability among the class names",
            "max_sensitivity": {"radius": RADIUS, "samples": SAMPLES, "maps": "stretched to [0, 1] on the patch grid"},
            "randomization": "normal weights of each weight's mean and standard deviation, last layer first; Spearman's "
            "correlation on the patch grid",
        },
        results={method: summary for method, (summary, _) in reports.items()},
        per_class={method: rows for method, (_, rows) in reports.items()},
        timing={
            "seconds": time.perf_counter() - start,
            "seconds_in_model": examiner.seconds_in_model,
            "images": len(plan.indices),
            "forwards": bar.total,
        },
    )


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"Expected {name} to be at least 1, got {number}: correct it.")


def _check_image(pixel_values: torch.Tensor) -> None:
    if pixel_values.ndim != 3 or 0 in pixel_values.shape:
        raise ValueError(
            f"Expected pixel_values (C, H, W) of one image, got {tuple(pixel_values.shape)}: pass one image."
        )


def _labels(sample: SegmentationSample) -> tuple[int, ...]:
    return sample.labels


class _Examiner:
    """
    Measures the images of one process.

    Attributes:
        columns (`list[str]`): names of the F figures of a pair; those of randomised layers include the number of layers.
        seconds_in_model (`float`): time spent in the model so far.
    """

    def __init__(
        self,
        model: ExplainableModel,
        explainers: dict[str, Explainer],
        texts: ICLIPTextFeatures,
        measures: Sequence[str],
        steps: int,
        seed: int,
        batch_size: int,
    ):
        _check_positive(steps=steps)
        self.explainers = explainers
        self.texts = texts
        self.measures = [name for name in MEASURES if name in measures]
        self.steps = steps
        self.seed = seed
        self.batch_size = batch_size
        self.layers = LayerRandomization(model, seed) if "randomization" in measures else []
        self.score = self._timed(scorer(model, texts)) if "deletion_insertion" in measures else None
        self.columns = [name for measure in self.measures for name in _SCORES[measure]]
        at = self.columns.index("pointing_game") if "pointing_game" in measures else len(self.columns)
        self.columns[at:at] = [f"randomization {depth + 1}" for depth in range(len(self.layers))]
        self.seconds_in_model = 0.0

    def forwards(self, pairs: int) -> int:
        """Returns how many images pass through the image tower for an image that shows `pairs` classes."""
        if not pairs:
            return 0
        draws, changed = 1, 0
        if "max_sensitivity" in self.measures:
            draws += 1 + SAMPLES
        if self.layers:
            draws += 1 + len(self.layers)
        if "deletion_insertion" in self.measures:
            followed = sum(pairs if explainer.sees_text else 1 for explainer in self.explainers.values())
            changed = 2 + 2 * self.steps * followed
        return draws * len(self.explainers) + changed

    def examine(self, loaded: Iterator[tuple[int, tuple]], bar: tqdm) -> Iterator[tuple]:
        """Yields sample, raw maps and figures `(K, F)` by method of each image that shows a class."""
        for index, (sample, pixel_values) in loaded:
            if sample.labels:
                yield sample, *self._examine(pixel_values.to(self.texts.text_embeds.device), sample.labels, index)
                bar.update(self.forwards(len(sample.labels)))

    def _examine(self, pixel_values: torch.Tensor, labels: Sequence[int], index: int) -> tuple[dict, dict]:
        rows = torch.tensor(labels) - 1
        seed = self.seed + index

        def draw(images: torch.Tensor) -> torch.Tensor:
            """Computes the maps of all methods, one after the other in the second dimension."""
            of_images = rows.expand(len(images), -1)
            return torch.cat([maps_of(one, images, self.texts, of_images) for one in self.explainers.values()], 1)

        draw = self._timed(draw)
        raw = draw(pixel_values)[0].unflatten(0, (len(self.explainers), len(rows)))  # (methods, K, h, w)
        raw_maps = dict(zip(self.explainers, raw))
        parts: list[torch.Tensor] = []  # (methods, K, figures)
        if "deletion_insertion" in self.measures:
            parts.append(self._areas(pixel_values[0], raw_maps, rows, seed))
        if "max_sensitivity" in self.measures:
            sensitivity = max_sensitivity(draw, pixel_values[0], seed=seed)
            parts.append(sensitivity.unflatten(0, raw.shape[:2]).unsqueeze(-1))
        if self.layers:
            correlations = self.layers.correlations(draw, pixel_values)[:, 0]
            parts.append(correlations.T.unflatten(0, raw.shape[:2]))
        figures = torch.cat([raw.new_zeros(*raw.shape[:2], 0), *parts], -1).double().cpu().numpy()
        return {method: maps.cpu() for method, maps in raw_maps.items()}, dict(zip(self.explainers, figures))

    def _areas(self, image: torch.Tensor, raw_maps: dict, rows: torch.Tensor, seed: int) -> torch.Tensor:
        """Returns the areas under the curves of deletion and insertion by method and class, `(methods, K, 4)`."""
        followed = []
        for method, explainer in self.explainers.items():
            maps = -raw_maps[method] if explainer.reversed else raw_maps[method]
            followed.append(maps if explainer.sees_text else maps[:1])  # one map for all texts is measured once
        curves = deletion_insertion(
            self.score, image, torch.cat(followed), steps=self.steps, seed=seed, batch_size=self.batch_size
        )
        areas = torch.cat([area_under(curve) for curve in curves], -1)  # (maps, classes of the data set, 4)
        own = torch.arange(len(rows)), rows  # the score of each map's own text
        parts = areas.split([len(maps) for maps in followed])
        return torch.stack([part.expand(len(rows), -1, -1)[own] for part in parts])

    def point(self, item: tuple) -> tuple[Sequence[int], dict[str, np.ndarray]]:
        """Returns labels, and figures `(K, F)` by method with those of the pointing game. Can run in any thread."""
        sample, raw_maps, figures = item
        if "pointing_game" in self.measures:
            masks = [sample.mask(label) for label in sample.labels]
            for method, raw in raw_maps.items():
                heatmaps = resize_and_normalize(raw, sample.size)
                heatmaps = reverse(heatmaps) if self.explainers[method].reversed else heatmaps
                shares = [pointing_shares(*one) for one in zip(heatmaps, masks, sample.labels)]
                figures[method] = np.concatenate([figures[method], 100 * np.array(shares)], 1)
        return sample.labels, figures

    def _timed(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Wraps a function so that its time is added to `seconds_in_model`."""

        def timed(images: torch.Tensor) -> torch.Tensor:
            began = time.perf_counter()
            result = function(images)
            if result.is_cuda:
                torch.cuda.synchronize()
            self.seconds_in_model += time.perf_counter() - began
            return result

        return timed


def _report(means: dict, dataset: SegmentationDataset, columns: list[str]) -> tuple[dict, list[dict]]:
    """Returns the summary, and one row for each class."""
    layers = sum(name.startswith("randomization") for name in columns)

    def named(values: np.ndarray | None) -> dict:
        values = [None] * len(columns) if values is None else map(measured, values)
        figures = dict(zip(columns, values))
        for kind in ("cosine", "probability"):
            if f"insertion_{kind}" in figures:
                insertion, deletion = figures[f"insertion_{kind}"], figures[f"deletion_{kind}"]
                figures[f"difference_{kind}"] = None if insertion is None else insertion - deletion
        if layers:
            figures["randomization"] = [figures.pop(f"randomization {depth + 1}") for depth in range(layers)]
        return figures

    left_out = [0] * len(columns) if means["left_out"] is None else means["left_out"].tolist()
    left_out = {name.partition(" ")[0]: number for name, number in zip(columns, left_out)}
    summary = named(means["means"]) | {"pairs": means["pairs"], "left_out": left_out}
    rows = []
    for label, name in zip(dataset.labels, dataset.class_names):
        scores = named(means["per_class"].get(label))
        if layers:
            scores["randomization"] = scores["randomization"][-1]
        rows.append({"id": label, "name": name, **scores})
    return summary, rows
