"""SC-CLIP (Bai et al. 2024): outlier tokens repaired, and the last block calibrated by features of earlier blocks."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from ..backends.explainable import unit
from ..backends.recording import AttentionRecord, record
from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.similarity import cosine_similarity_map
from .explainer import Explainer
from .proxyclip import proxy_weights


NEIGHBOURS = 30  # of the local outlier factor
OUTLIERS = 0.05  # share of the patches


class SCCLIP(Explainer):
    """
    The patches that are outliers before the last block become the mean of their neighbours on the grid. The other
    steps use the similarities of the patches after a middle block, M, and after an early one, E. Rows of M average the
    patches, the last block mixes its values by the mean of its K-K attention and the softmax of 3 (M - mean(M)), and
    rows of E average the result. The sum of the patches after several blocks goes the same way, and both are added.
    There is no residual connection and no MLP, but a share of the class token is added.

    | blocks | M after block | E after block | summed blocks | `class_token` |
    |---|---|---|---|---|
    | 12 | 9 | 4 | 4 to 10 | 0.3 |
    | 24 | 17 | 7 | 9 to 19 | 0.1 |

    These are the authors' numbers for ViT-B/16 and ViT-L/14. For another number of blocks, the numbers for 12 are
    scaled and rounded down.

    Args:
        beta (`float`): similarities below are 0 where M and E average patches.
        class_token (`float`, *optional*): share of the class token that is added, see the table.
    """

    def __init__(self, model, beta: float = 0.4, class_token: float | None = None):
        super().__init__(model)
        indices = self.model.self_attentions("SC-CLIP", len(self.model.layers))
        self.first, self.last, count = indices[0], indices[-1], len(indices)
        if count == 24:
            self.middle, self.early, self.levels, share = 17, 7, range(9, 20), 0.1
        else:
            self.middle, self.early, start, stop = (number * count // 12 for number in (9, 4, 4, 11))
            self.levels, share = range(start, max(stop, start + 1)), 0.3
        self.beta, self.class_token = beta, share if class_token is None else class_token

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        features, records = self.model.trace(pixel_values, self.first)
        streams = [record.stream for record in records]  # entry i leaves block i, counted from 1
        num_patches, grid = math.prod(features.grid), features.grid
        last = records[self.last - self.first]
        outliers = outlier_patches(last.stream[:, -num_patches:].float())
        middle = unit(_repaired(streams[self.middle][:, -num_patches:], outliers, grid))
        early = unit(streams[self.early][:, -num_patches:])
        late = _repaired(last.stream[:, -num_patches:], outliers, grid)
        late = self._average(late, middle)
        prefix = last.stream[:, :-num_patches]  # the class token comes first
        outputs = self._attend(last, torch.cat([prefix, late], 1), prefix, middle)
        levels = sum(streams[level] for level in self.levels)
        outputs = self._average(outputs, early)
        outputs = outputs + self._average(self._attend(last, levels, levels[:, :-num_patches], middle), early)
        patch_embeds = unit(self.model.project(self.model.join_features(outputs, features))).unflatten(1, grid)
        return cosine_similarity_map(patch_embeds, texts.map_text_embeds), features

    def _average(self, tokens: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """Averages patches `(B, N, D)` by the similarities of unit vectors that are at least `beta`."""
        similarity = units @ units.mT
        weights = similarity.masked_fill(similarity < self.beta, 0.0)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
        return (weights @ tokens.float()).to(tokens)

    def _attend(
        self, last: AttentionRecord, stream: torch.Tensor, prefix: torch.Tensor, units: torch.Tensor
    ) -> torch.Tensor:
        """Computes the calibrated attention of the last block on another stream `(B, L, D)`. Returns the patches."""
        _, (again,) = record(lambda: last.run_again(stream), self.last, grad=False, weights=False)
        num_patches = units.shape[1]
        key, value = again.key[:, :, -num_patches:], again.value[:, :, -num_patches:]
        own = (key @ key.mT / key.shape[-1] ** 0.5).softmax(-1)
        weights = (own + proxy_weights(units, beta=1.0, gamma=3.0).to(own)) / 2
        output = self.model.layers[self.last].output(weights @ value)
        return output + self.class_token * prefix[:, :1] if prefix.shape[1] else output


def outlier_patches(tokens: torch.Tensor) -> torch.Tensor:
    """
    Finds the patches `(B, N, D)` whose local outlier factor is in the highest 5 %. Returns a mask `(B, N)`. As in the
    authors' code, the factor is the squared distance d to the 30th neighbour, times the mean of 1 / d of the 30. Of up
    to 30 patches, where that code fails, half are neighbours.
    """
    distances = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist").square()
    # Among few patches, each farthest pair would have two equal factors.
    count = NEIGHBOURS if tokens.shape[1] > NEIGHBOURS else tokens.shape[1] // 2
    nearest = distances.topk(count + 1, largest=False)
    farthest = nearest.values[..., -1]
    of_neighbours = farthest[:, None].expand_as(distances).gather(2, nearest.indices[..., 1:])
    factors = farthest * of_neighbours.reciprocal().mean(-1)
    return factors > factors.quantile(1 - OUTLIERS, -1, keepdim=True)  # of equal patches, NaN: none


def _repaired(tokens: torch.Tensor, outliers: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Replaces outliers among the patches `(B, N, D)` by the mean of their neighbours that are none, if there are."""
    kept = (~outliers).to(tokens)[:, None].unflatten(2, grid)
    # The mean over 3x3 patches. The patch in the middle does not count, because it is an outlier.
    count = F.avg_pool2d(kept, 3, 1, 1)
    mean = F.avg_pool2d(tokens.mT.unflatten(2, grid) * kept, 3, 1, 1) / count
    replaced = (kept == 0) & (count > 0)
    return torch.where(replaced.flatten(2).mT, mean.flatten(2).mT, tokens)
