"""Grad-ECLIP (Zhao et al. 2024): channel importance and spatial importance of the last layer's values."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..backends.recording import AttentionRecord, merge_heads
from ..model.similarity import stretch
from .gradients import GradientExplainer


class GradECLIP(GradientExplainer):
    """
    The map is the product of two factors. The first is the positive part of a sum over the channels of the patch's
    value. The weights of the channels are the gradient of the logit with respect to the class token's output of the
    last attention layer. The second factor is the cosine of the patch's key and the class token's query, stretched
    to [0, 1]. A pooling head (SigLIP, ResNets) is the last layer, and its query replaces the class token.

    If the score depends on several tokens, the map is the sum over these tokens, and the second factor is the
    attention weight.
    """

    needs_attention = True

    def __init__(self, model):
        super().__init__(model)
        self.needs_weights = self.model.pools_patches

    def differentiated(self, records: list[AttentionRecord]) -> list[torch.Tensor]:
        return [records[-1].mixed]

    def weigh(
        self, records: list[AttentionRecord], gradients: tuple[torch.Tensor, ...], num_patches: int
    ) -> torch.Tensor:
        (record,), (gradient,) = records, gradients
        if not self.model.pools_patches:
            key, value = record.key[:, :, -num_patches:], record.value[:, :, -num_patches:]
            return _one_query_relevance(record.query[:, :, :1], key, value, gradient[:, :, :1])
        # The positive part of sum_c g_c a v_c for each query, summed over the queries.
        relevance = ((gradient @ record.value.mT) * record.weights).float().sum(1).relu().sum(1)
        return relevance[:, -num_patches:]


def _one_query_relevance(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """Computes ReLU(sum_c g_c v_c) minmax(cos(q, k)) of N patches for one query, `(B, N)` float32."""
    query, key, value, gradient = (merge_heads(heads).float() for heads in (query, key, value, gradient))
    cosines = F.cosine_similarity(query, key, dim=-1)  # (B, N)
    channel_sum = (gradient @ value.mT)[:, 0].relu()
    low, high = torch.aminmax(cosines, dim=-1, keepdim=True)
    return channel_sum * torch.where(high > low, stretch(cosines, low, high), 1)  # 1 if all cosines are equal
