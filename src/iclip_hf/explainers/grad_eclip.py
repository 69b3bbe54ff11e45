"""Grad-ECLIP (Zhao et al. 2024): channel importance and spatial importance of the last layer's values."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .gradients import GradientExplainer
from .recording import AttentionRecord, merge_heads


class GradECLIP(GradientExplainer):
    """
    The gradient of the similarity by what the attention of the last layer gives the class token is the importance of the
    channels; with it the channels of each patch's value are summed, positive part. The importance of a patch is the cosine
    of its key with the class token's query, stretched to [0, 1]. The map is the product. A pooling head (SigLIP, ResNets) is
    the last layer, and its query takes the class token's place. Where a model's score pools the patch tokens, the
    products of all queries are summed.
    """

    def __init__(self, model, processor):
        super().__init__(model, processor)

    def differentiated(self, layers: list[AttentionRecord]) -> list[torch.Tensor]:
        return [layers[-1].mixed]

    def weigh(self, layers: list[AttentionRecord], gradients: tuple[torch.Tensor, ...], patches: int) -> torch.Tensor:
        (layer,), (gradient,) = layers, gradients
        queries = slice(1 if self.family.reads_one_query else None)
        key, value = layer.key[:, :, -patches:], layer.value[:, :, -patches:]
        return eclip_relevance(layer.query[:, :, queries], key, value, gradient[:, :, queries])


def eclip_relevance(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gradient: torch.Tensor,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Computes the relevance of tokens: for each query ReLU(sum_c g_c v_c) minmax(cos(q, k)), summed over the queries.

    Args:
        query, gradient (`torch.Tensor` of shape `(B, H, Q, D / H)`): queries, and gradients by what they are given.
        key, value (`torch.Tensor` of shape `(B, H, N, D / H)`): of the tokens.
        known (`torch.Tensor` of shape `(B, N)`, boolean, *optional*): tokens that count; all if not given.

    Returns:
        `torch.Tensor` of shape `(B, N)`, float32.
    """
    query, key, value, gradient = (merge_heads(heads).float() for heads in (query, key, value, gradient))
    cosines = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT  # (B, Q, N)
    channels = (gradient @ value.mT).relu()
    known = torch.ones_like(cosines, dtype=torch.bool) if known is None else known.unsqueeze(1)
    low = cosines.masked_fill(~known, torch.inf).amin(-1, keepdim=True)
    span = cosines.masked_fill(~known, -torch.inf).amax(-1, keepdim=True) - low
    spatial = torch.where(span > 0, (cosines - low) / span, 1)  # a single token counts whole
    return (channels * spatial * known).sum(1)
