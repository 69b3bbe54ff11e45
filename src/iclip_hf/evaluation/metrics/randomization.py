"""Cascading randomisation: whether maps depend on what the model has learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from ...backends.explainable import ExplainableModel, recordable
from .metric import CannotMeasure, EvaluatedImage, MeasuredClassMeans


class _Weight(NamedTuple):
    """A parameter of a module, and a value for it."""

    module: nn.Module
    name: str
    value: nn.Parameter


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
        self._layers: list[list[_Weight]] = []
        for block in (layer.block for layer in reversed(model.layers)):
            replacements = []
            for path, weight in block.named_parameters():
                std, mean = torch.std_mean(weight.float(), correction=0)
                sampled = torch.randn(weight.shape, generator=generator).to(weight.device) * std + mean
                sampled = nn.Parameter(sampled.to(weight.dtype), requires_grad=False)
                parent, _, name = path.rpartition(".")
                replacements.append(_Weight(block.get_submodule(parent), name, sampled))
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
        maps = compute_maps(pixel_values)
        correlations = []
        originals = []
        try:
            for replacements in self._layers:
                for module, name, sampled in replacements:
                    originals.append(_Weight(module, name, getattr(module, name)))
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
