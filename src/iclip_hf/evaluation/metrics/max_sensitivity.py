"""Max-sensitivity: how much a map changes under small noise on the image."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...model.similarity import min_max_normalize
from .metric import EvaluatedImage, MeasuredClassMeans


SAMPLES = 10  # number of noisy images
RADIUS = 0.02  # radius of the noise: captum's default, about one of 255 grey levels


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
        radius (`float`), samples (`int`), seed (`int`): of the noise.

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
