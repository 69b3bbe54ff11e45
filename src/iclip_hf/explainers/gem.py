"""GEM (Bousselham et al. 2024): an ensemble of self-self attentions."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .recording import AttentionRecord
from .self_self import SelfSelfAttention, similar


class GEM(SelfSelfAttention):
    """
    Queries, keys and values each attend to themselves, `iterations` times with their unit vectors, so that similar tokens
    gather; the three attentions that result are averaged on the values. The sharpness adapts to the mean norm of the tokens
    that the layer sees.

    Args:
        model, processor, depth: see [`SelfSelfAttention`].
        iterations (`int`): rounds of gathering, at least 0.
    """

    def __init__(self, model, processor, depth: int = 7, iterations: int = 1):
        super().__init__(model, processor, depth)
        if iterations < 0:
            raise ValueError(f"Expected a number of iterations of at least 0, got {iterations}: correct it.")
        self.iterations = iterations

    def mix(self, layer: AttentionRecord) -> torch.Tensor:
        norm = layer.tokens.float().norm(dim=-1).mean(-1)
        scale = (norm * layer.value.shape[-1] ** -0.5)[:, None, None, None]
        attentions = []
        for tokens in (layer.query, layer.key, layer.value):
            for _ in range(self.iterations):
                tokens = F.normalize(tokens, dim=-1)
                tokens = similar(tokens, scale) @ tokens
            attentions.append(similar(F.normalize(tokens, dim=-1), scale))
        return torch.stack(attentions).mean(0) @ layer.value
