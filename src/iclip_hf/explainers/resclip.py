"""ResCLIP (Yang et al. 2025): the last block attends by the attention of earlier blocks, and by a first label map."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..backends.explainable import unit
from ..backends.recording import AttentionRecord
from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.refinement import neighbour_weights, propagate
from ..model.similarity import cosine_similarity_map
from .explainer import Explainer
from .last_block import gaussian_window


PAMR_DILATIONS = (8, 16)
LOGIT_SCALE = 40.0


class ResCLIP(Explainer):
    """
    NACLIP whose attention weights A become 2 ((1 - `rcs`) A + `rcs` C), where C is the model's own mean attention in
    the blocks 6 to 9. These are the blocks of the authors' code for 12 and for 24 blocks. Of another number of
    blocks, those for 12 are scaled and rounded down.

    With `sfr`, the maps of the texts label the patches, and the last block attends a second time. Its logits L become
    `scale` ((1 - `share`) L + `share` S) before the window is added, where S is high for patches of one label. Then a
    map depends on the other texts, and the first text is the background.

    Args:
        rcs (`float`): share of the attention of earlier blocks.
        sfr (`tuple[float, float, float]`, *optional*): `scale`, `share` and `threshold`. Pixels whose best text has a
            lower probability than `threshold` get the label of the first text. The authors' values for VOC21 are
            (2.2, 0.7, 0.5).
        sigma (`float`): width of the window in patches, as for NACLIP.
    """

    def __init__(self, model, rcs: float = 0.3, sfr: tuple[float, float, float] | None = None, sigma: float = 5.0):
        super().__init__(model)
        indices = self.model.self_attentions("ResCLIP", len(self.model.layers))
        count = 12 if len(indices) == 24 else len(indices)
        start, stop = 5 * count // 12, 9 * count // 12
        self.blocks, self.last = indices[start : max(stop, start + 1)], indices[-1]
        self.rcs, self.sfr, self.sigma = rcs, sfr, sigma

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        features, records = self.model.trace(pixel_values, self.blocks[0], weights=True)
        earlier = sum(record.weights for record in records[: len(self.blocks)]) / len(self.blocks)
        last = records[self.last - self.blocks[0]]
        maps = self._maps(last, earlier, features, texts)
        if self.sfr is None:
            return maps, features
        labels = patch_labels(maps, pixel_values.to(maps), self.sfr[2])
        feedback = torch.stack([label_affinity(image_labels, self.sigma) for image_labels in labels])
        return self._maps(last, earlier, features, texts, feedback), features

    def _maps(
        self,
        last: AttentionRecord,
        earlier: torch.Tensor,
        features: ICLIPImageFeatures,
        texts: ICLIPTextFeatures,
        feedback: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes the raw maps by the attention of the last block, `feedback` is S of `sfr`, `(B, N, N)`."""
        logits = last.key @ last.key.mT / last.key.shape[-1] ** 0.5
        num_others = logits.shape[-1] - features.grid[0] * features.grid[1]
        if feedback is not None:
            scale, share, _ = self.sfr
            feedback = (share * feedback).to(logits)[:, None]  # rounded to float16 again, as in the authors' code
            logits = scale * ((1 - share) * logits + F.pad(feedback, (num_others, 0, num_others, 0)))
        window = gaussian_window(features.grid, self.sigma, logits.shape[-1]).to(logits)
        weights = 2 * ((1 - self.rcs) * (logits + window).softmax(-1) + self.rcs * earlier)
        stream = self.model.layers[self.last].output(weights @ last.value)[:, num_others:]
        patch_embeds = unit(self.model.project(self.model.join_features(stream, features)))
        return cosine_similarity_map(patch_embeds.unflatten(1, features.grid), texts.map_text_embeds)


def patch_labels(maps: torch.Tensor, pixel_values: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    Labels each patch by its most frequent text, `(B, h, w)`. Maps `(B, T, h, w)` are enlarged to the prepared images,
    refined by PAMR, and labelled by the highest probability, or 0 below `threshold`.
    """
    height, width = maps.shape[2:]
    large = F.interpolate(maps, pixel_values.shape[2:], mode="bilinear")
    weights = neighbour_weights(pixel_values, PAMR_DILATIONS, spread=0.1, centers=len(PAMR_DILATIONS))
    confidence, labels = (LOGIT_SCALE * propagate(large, weights, PAMR_DILATIONS)).softmax(1).max(1)
    labels = labels.masked_fill(confidence < threshold, 0)
    rows, columns = labels.shape[1] // height, labels.shape[2] // width
    patches = labels.unfold(1, rows, rows)[:, :height].unfold(2, columns, columns)[:, :, :width]
    return patches.flatten(3).mode(-1).values


def label_affinity(labels: torch.Tensor, sigma: float) -> torch.Tensor:
    """
    Computes S `(N, N)` of patches with labels `(h, w)`: 1 for patches of one label, and exp(-d / d_max) if the line
    between them leaves this label, where d is the larger distance of rows and columns. Rows are smoothed along the
    order of the patches, made to sum to 1, divided by the highest entry, and rounded to float16, as in the authors'
    code. In that code, a line ends after d of d_max steps that would reach the other patch.
    """
    height, width = labels.shape
    grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    points = torch.stack(grid, -1).flatten(0, 1).to(labels)  # (N, 2)
    distances = (points[:, None] - points).abs().amax(-1)
    longest = max(int(distances.max()), 1)
    same = labels.flatten()[:, None] == labels.flatten()
    leaves = torch.zeros_like(same)
    for step, way in enumerate(torch.linspace(0, 1, longest + 1, device=labels.device)):
        rows, columns = (points[:, None] * (1 - way) + points * way).round().long().unbind(-1)
        leaves |= (labels[rows, columns] != labels.flatten()[:, None]) & (step <= distances)
    affinity = same * torch.where(leaves, (-distances / longest).exp(), 1.0)
    size = min(len(points), int(6 * sigma + 1)) // 2 * 2 + 1
    offsets = torch.arange(size, device=labels.device) - size // 2
    kernel = (-offsets.square() / (2 * sigma**2)).exp()
    smooth = F.conv1d(affinity[:, None], (kernel / kernel.sum())[None, None], padding=size // 2)[:, 0]
    smooth = smooth / (smooth.sum(1, keepdim=True) + 1e-8)
    return (smooth / smooth.max()).half()
