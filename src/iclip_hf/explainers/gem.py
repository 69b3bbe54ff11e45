"""GEM (Bousselham et al. 2024): an ensemble of self-self attentions."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..backends.recording import AttentionRecord
from ..model.outputs import ICLIPImageFeatures
from .replaced_attention import ReplacedAttention


class GEM(ReplacedAttention):
    """
    Queries, keys and values, as unit vectors, each attend to themselves `iterations` times, so that similar tokens
    form clusters. Each of the three results then attends to itself, which mixes the values, and the three outputs are
    averaged. The sharpness is proportional to the mean norm of the tokens that enter the attention.

    Args:
        depth (`int`): number of last blocks. The authors' `depth=7` means six blocks.
        iterations (`int`): number of iterations, at least 0.
    """

    def __init__(self, model, depth: int = 6, iterations: int = 1):
        super().__init__(model, depth)
        self.iterations = iterations

    def mix(self, record: AttentionRecord, features: ICLIPImageFeatures, pixel_values: torch.Tensor) -> torch.Tensor:
        mean_norm = record.tokens.float().norm(dim=-1).mean(-1)
        scale = (mean_norm * record.value.shape[-1] ** -0.5)[:, None, None, None].to(record.value.dtype)

        def self_attend(heads: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(heads * scale, heads, values, scale=1.0)

        mixed = []
        for heads in (record.query, record.key, record.value):
            for _ in range(self.iterations):
                heads = F.normalize(heads, dim=-1)
                heads = self_attend(heads, heads)
            mixed.append(self_attend(F.normalize(heads, dim=-1), record.value))
        return torch.stack(mixed).mean(0)
