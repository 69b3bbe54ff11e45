"""
Faithfulness of maps: deletion and insertion (whether the score of a text falls when the pixels that its map marks are
deleted, and rises when they are inserted), max-sensitivity (how much a map changes under small noise on the image),
and cascading randomisation (whether maps depend on what the model has learned). [`deletion_insertion`] and
[`max_sensitivity`] work with any model and any maps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from ...backends.explainable import ExplainableModel, recordable
from ...model.outputs import ICLIPTextFeatures
from ...model.similarity import min_max_normalize, resize_maps
from .metric import CannotMeasure, EvaluatedImage, MeasuredClassMeans


STEPS = 10  # number of steps of deletion, and of insertion
SAMPLES = 10  # number of noisy images of max-sensitivity
RADIUS = 0.02  # radius of the noise: captum's default, about one of 255 grey levels


def scorer(model: ExplainableModel, texts: ICLIPTextFeatures) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function from images `(B, 3, H, W)` to score and probability of each text, `(B, T, 2)`."""

    @torch.no_grad()
    def score(pixel_values: torch.Tensor) -> torch.Tensor:
        scores = model.scores(model.get_image_features(pixel_values), texts)
        return torch.stack([scores, model.logits(scores).softmax(-1)], -1)

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
    Deletes and inserts the pixels of an image in the order of maps, highest first, and scores the image after each
    step (Petsiuk et al. 2018; order, steps and fill as in Grad-ECLIP, Zhao et al. 2024).

    Step s changes the first s / (2 * steps) of the pixels. Deletion replaces pixels by values from a standard normal
    distribution; insertion starts from zeros, the mean colour. Pixels of equal value are in random order.

    Args:
        score: function from at most `batch_size` images `(B, C, H, W)` to scores `(B, ...)`.
        pixel_values (`torch.Tensor` of shape `(C, H, W)`): a prepared image.
        maps (`torch.Tensor` of shape `(num_maps, h, w)`): maps of any size. They are resized to the size of the image
            (bicubic).

    Returns:
        `tuple`: the scores of deletion and of insertion, each `(num_maps, steps + 1, ...)`, before the first step
            and after each step.
    """
    size, device = pixel_values.shape[-2:], pixel_values.device
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(pixel_values.shape, generator=generator).to(pixel_values)
    shuffled = torch.randperm(size.numel(), generator=generator).to(device)
    values = resize_maps(maps.to(device), size).flatten(1)[:, shuffled]
    order = shuffled[values.argsort(dim=-1, descending=True, stable=True)]
    ranks = order.argsort(-1).unflatten(1, size)  # (num_maps, H, W): 0 is the highest pixel
    counts = [round(size.numel() * step / (2 * steps)) for step in range(1, steps + 1)]
    starts = torch.stack([pixel_values, torch.zeros_like(pixel_values)])

    def changed_images() -> Iterator[torch.Tensor]:
        for map_ranks in ranks:
            for start, fill in zip(starts, (noise, pixel_values)):  # deletion, then insertion
                for count in counts:
                    yield torch.where(map_ranks < count, fill, start)

    images = changed_images()
    scores = [score(batch) for batch in starts.split(batch_size)]
    while batch := list(itertools.islice(images, batch_size)):
        scores.append(score(torch.stack(batch)))
    start_scores, step_scores = torch.cat(scores).tensor_split((2,))
    start_of_curves = start_scores[None, :, None].expand(len(maps), -1, -1, *start_scores.shape[1:])
    curves = torch.cat([start_of_curves, step_scores.unflatten(0, (len(maps), 2, steps))], 2)
    return curves[:, 0], curves[:, 1]


def area_under(curves: torch.Tensor) -> torch.Tensor:
    """
    Returns the areas `(num_maps, ...)` under curves `(num_maps, num_points, ...)` by trapezoids. The axis has length
    1, so an area is a mean score.
    """
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


class DeletionInsertion(MeasuredClassMeans):
    """
    The areas under the curves of deletion and insertion, and their difference, insertion minus deletion. The curves
    are of the cosine of a class, and of its probability among all classes.

    Args:
        steps (`int`): number of steps of deletion, and of insertion.
        seed (`int`): seed of the random values, which are the same in every run and with any number of processes.
    """

    name = "deletion_insertion"
    columns = {
        f"{curve}_{score}": (curve + suffix, 4)
        for score, suffix in (("probability", ""), ("cosine", ", cosine"))
        for curve in ("insertion", "deletion", "difference")
    }
    legend = (
        "Insertion, deletion: mean probability (or cosine) of the class while pixels are shown, or replaced by "
        "noise, in the order of the map. High is better for insertion and for the difference, low for deletion."
    )
    names = ("deletion_cosine", "deletion_probability", "insertion_cosine", "insertion_probability")
    definition = (
        "pixels by the map, highest first, in steps of 1 / (2 * steps) of the image; deletion fills with normal "
        "noise, insertion starts from zeros; probability among the class names"
    )

    def __init__(self, steps: int = STEPS, seed: int = 0):
        super().__init__()
        self.steps, self.seed = steps, seed

    def prepare(self, run) -> None:
        super().prepare(run)
        self.score = scorer(run.model, run.texts)

    def measure(self, image: EvaluatedImage) -> dict[str, torch.Tensor]:
        prepared, maps_of_methods = image.prepared, []
        # The image is explained alone: in a batch, rounding would order equal pixels in another way.
        for method, compute_maps in self.run.map_functions(image).items():
            maps = compute_maps(prepared.pixel_values)[0]
            sees_text = self.run.engines[method].method.sees_text
            maps_of_methods.append(maps if sees_text else maps[:1])  # one map for all texts is measured once
        # Scores come from the whole image at the model's own size.
        pixel_values = prepared.score_pixel_values
        if pixel_values is None:
            pixel_values = self.run.engine.tiling.views(prepared.pixel_values)[0]
        curves = deletion_insertion(
            self.score,
            pixel_values[0].to(self.run.texts.text_embeds.device),
            torch.cat(maps_of_methods),
            steps=self.steps,
            seed=self.seed + image.index,
            batch_size=self.run.batch_size,
        )
        areas = torch.cat([area_under(curve) for curve in curves], -1)  # (maps, classes of the data set, 4)
        areas_of_methods = areas.split([len(maps) for maps in maps_of_methods])
        class_indices = torch.tensor(image.sample.class_ids) - 1
        num_shown = len(class_indices)
        # Of each map, only the areas of its own class count.
        return {
            method: method_areas.expand(num_shown, -1, -1)[torch.arange(num_shown), class_indices]
            for method, method_areas in zip(self.run.engines, areas_of_methods)
        }

    def named(self, values) -> dict:
        named = super().named(values)
        for score in ("cosine", "probability"):
            insertion, deletion = named[f"insertion_{score}"], named[f"deletion_{score}"]
            named[f"difference_{score}"] = None if insertion is None else insertion - deletion
        return named


@torch.no_grad()
def max_sensitivity(
    compute_maps: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    *,
    radius: float = RADIUS,
    samples: int = SAMPLES,
    seed: int = 0,
) -> torch.Tensor:
    """
    Computes max-sensitivity (Yeh et al. 2019), the largest relative change of a map under small noise on the image:
    max ||M(x + n) - M(x)|| / ||M(x)|| over samples of uniform noise n in [-radius, radius].

    Args:
        compute_maps: function from images `(B, C, H, W)` to maps `(B, T, h, w)`, which are then stretched to [0, 1].
        pixel_values (`torch.Tensor` of shape `(C, H, W)`): a prepared image.

    Returns:
        `torch.Tensor` of shape `(T,)`: NaN for a constant map.
    """
    noise = torch.rand((samples, *pixel_values.shape), generator=torch.Generator().manual_seed(seed))
    noisy = pixel_values + ((2 * noise - 1) * radius).to(pixel_values)
    maps = min_max_normalize(compute_maps(pixel_values[None])).flatten(2)
    changes = min_max_normalize(compute_maps(noisy)).flatten(2) - maps
    norm = maps.norm(dim=2)
    return (changes.norm(dim=2) / norm.where(norm > 0, torch.nan)).amax(0)


class MaxSensitivity(MeasuredClassMeans):
    """The largest relative change of a map under small noise, see [`max_sensitivity`]. `seed` is for the noise."""

    name = "max_sensitivity"
    columns = {"max_sensitivity": ("max-sensitivity", 3)}
    legend = "Max-sensitivity: largest relative change of the map under noise of one grey level. 0 is stable."
    definition = f"noise of radius {RADIUS}, {SAMPLES} samples; maps stretched to [0, 1] on their own grid"

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = seed

    def measure(self, image: EvaluatedImage) -> dict[str, torch.Tensor]:
        pixel_values, seed = image.prepared.pixel_values[0], self.seed + image.index
        return {
            method: max_sensitivity(compute_maps, pixel_values, seed=seed)[:, None]
            for method, compute_maps in self.run.map_functions(image).items()
        }


class LayerRandomization:
    """
    The sanity check of cascading randomisation (Adebayo et al. 2018). Maps that hardly change when the weights of the
    image tower are randomised do not explain the model.

    The layers are those of `RecordableModel.layers`, the last first. Each weight tensor of a layer is replaced by
    values from a normal distribution with the mean and standard deviation of the tensor. `correlations` restores the
    weights after every call.
    """

    def __init__(self, model: ExplainableModel, seed: int = 0):
        model = recordable(model, "randomization")
        generator = torch.Generator().manual_seed(seed)
        self._layers: list[list[tuple[nn.Module, str, nn.Parameter]]] = []
        for block in (layer.block for layer in reversed(model.layers)):
            replacements = []
            for path, weight in block.named_parameters():
                std, mean = torch.std_mean(weight.float(), correction=0)
                sampled = torch.randn(weight.shape, generator=generator).to(weight.device) * std + mean
                sampled = nn.Parameter(sampled.to(weight.dtype), requires_grad=False)
                parent, _, name = path.rpartition(".")
                replacements.append((block.get_submodule(parent), name, sampled))
            self._layers.append(replacements)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def correlations(
        self, compute_maps: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor
    ) -> torch.Tensor:
        """
        Computes the [`rank_correlation`] `(num_layers, B, T)` between maps before and after the last 1, ...,
        num_layers layers are randomised. `compute_maps` is a function from images `(B, C, H, W)` to raw maps
        `(B, T, h, w)` of this model.
        """
        maps, correlations, originals = compute_maps(pixel_values), [], []
        try:
            for replacements in self._layers:
                for module, name, sampled in replacements:
                    originals.append((module, name, getattr(module, name)))
                    setattr(module, name, sampled)
                correlations.append(rank_correlation(maps, compute_maps(pixel_values)))
        finally:
            for module, name, original in originals:
                setattr(module, name, original)
        return torch.stack(correlations)


def rank_correlation(maps: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Returns Spearman's correlation `(...)` of maps `(..., h, w)`, on the CPU; NaN for a constant map."""
    ranks = []
    for values in (maps.flatten(-2).contiguous().cpu(), others.flatten(-2).contiguous().cpu()):
        ordered = values.sort(-1).values
        num_below, num_up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
        ranks.append((num_below + num_up_to).double())  # a linear function of the rank, which equal values share
    first, second = (map_ranks - map_ranks.mean(-1, keepdim=True) for map_ranks in ranks)
    return (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))


class Randomization(MeasuredClassMeans):
    """
    Rank correlations between maps before and after the last 1, 2, ... layers of the image tower are randomised, see
    [`LayerRandomization`]. `seed` is the seed of the random weights.
    """

    name = "randomization"
    columns = {"first": ("rank correlation, last layer random", 2), "all": ("all layers random", 2)}
    legend = (
        "Rank correlation of the map with the map after layers were made random. Near 1, the map does not depend on "
        "what the layers learned."
    )
    definition = (
        "normal weights of each weight's mean and standard deviation, last layer first; Spearman's correlation on "
        "the grid of the maps"
    )

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = seed

    def prepare(self, run) -> None:
        super().prepare(run)
        try:
            self.layers = LayerRandomization(run.model, self.seed)
        except ValueError as error:
            raise CannotMeasure(str(error)) from error
        self.names = tuple(range(len(self.layers)))

    def measure(self, image: EvaluatedImage) -> dict[str, torch.Tensor]:
        return {
            method: self.layers.correlations(compute_maps, image.prepared.pixel_values)[:, 0].T
            for method, compute_maps in self.run.map_functions(image).items()
        }

    def named(self, values) -> dict:
        return {self.name: list(super().named(values).values())}

    def compute(self) -> dict:
        """
        Returns the scores of [`ClassMeans`]. `randomization` is a list with one correlation for each number of
        randomised layers. A class has only the correlation with all layers randomised.
        """
        scores = super().compute()
        last = {class_id: {self.name: named[self.name][-1]} for class_id, named in scores["per_class"].items()}
        return scores | {"per_class": last}

    def table_scores(self, scores: Mapping) -> list:
        return [scores[self.name][layer] for layer in (0, -1)]
