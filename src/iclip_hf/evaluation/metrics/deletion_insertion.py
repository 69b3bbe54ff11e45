"""
Deletion and insertion: whether the score of a text falls when the pixels that its map marks are deleted, and rises
when these pixels are inserted. [`deletion_insertion`] works with any model and any maps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from ...backends.explainable import ExplainableModel
from ...model.outputs import ICLIPTextFeatures
from ...model.similarity import resize_maps
from .metric import EvaluatedImage, MeasuredClassMeans


STEPS = 10  # number of steps of deletion, and of insertion


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
