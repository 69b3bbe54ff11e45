"""Bi-modal relevance (Chefer et al. 2021a) for the image tower of a contrastive model."""

from __future__ import annotations

import torch

from ..backends.recording import AttentionRecord
from .gradients import GradientExplainer


class BiModal(GradientExplainer):
    """
    The relevance A of a layer is the positive part of the attention times its gradient, averaged over the heads. It is
    accumulated as R <- R + A R over the layers from `layer` on. The default is the last layer alone, as in the
    authors' notebook for CLIP. The map is the class token's row of R. A pooling head (SigLIP, ResNets) is the last
    layer, and its query replaces the class token. If the score depends on several tokens, the map is the sum of the
    rows of all tokens.
    """

    needs_attention = True
    needs_weights = True

    def differentiated(self, records: list[AttentionRecord]) -> list[torch.Tensor]:
        return [record.weights for record in records]

    def weigh(
        self, records: list[AttentionRecord], gradients: tuple[torch.Tensor, ...], num_patches: int
    ) -> torch.Tensor:
        # One tensor (B, Q, L) for each layer
        relevances = [(record.weights * grad).float().relu().mean(1) for record, grad in zip(records, gradients)]
        # The sum of the rows of R = (I + A_n) ... (I + A_1) for the tokens that the score depends on. It is computed
        # from the left, so that each layer multiplies a vector by a matrix.
        read_tokens = slice(0, None if self.model.pools_patches else 1)
        row = relevances[-1][:, read_tokens].sum(1, keepdim=True)
        if self.model.layers[-1].residual:  # the identity I, which a pooling head does not have
            row[..., read_tokens] += 1
        for relevance in reversed(relevances[:-1]):
            row = row + row @ relevance
        return row[:, 0, -num_patches:]
