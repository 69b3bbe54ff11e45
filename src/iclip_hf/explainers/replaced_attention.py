"""Base class of training-free methods that replace the self-attention of the last blocks."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch

from ..backends.explainable import unit
from ..backends.open_clip import ExplainableOpenCLIPResNet
from ..backends.recording import AttentionRecord
from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.similarity import cosine_similarity_map
from .explainer import Explainer


class ReplacedAttention(Explainer):
    """
    Computes a second residual stream. It starts as a copy of the model's own stream, `depth` blocks before the end. In
    each of these blocks, another attention mixes the values that the block computes from the model's stream. The maps
    are the cosines of texts and projected patch tokens of the second stream.

    If `replaces_pool`, the method also replaces the attention pool of a ResNet, which counts as a block without
    residual connection and MLP.

    Args:
        depth (`int`): number of last blocks; all if the tower has fewer.
        residual (`bool`): whether the output of the attention is added to the stream; otherwise it replaces the
            stream.
        mlp (`bool`): whether the MLPs of the blocks are applied.
    """

    replaces_pool = False

    def __init__(self, model, depth: int, residual: bool = True, mlp: bool = False):
        super().__init__(model)
        self.is_pool = self.replaces_pool and isinstance(self.model, ExplainableOpenCLIPResNet)
        if self.is_pool:
            self.layer_indices, self.residual, self.mlp = [0], False, False
        else:
            self.layer_indices = self.model.self_attentions(type(self).__name__, depth)
            self.residual, self.mlp = residual, mlp

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        features, records = self.model.trace(pixel_values, self.layer_indices[0])
        stream = records[0].stream
        for index, record in zip(self.layer_indices, records):
            layer = self.model.layers[index]
            output = layer.output(self.mix(record, features, pixel_values))
            stream = stream + output if self.residual else output
            if self.mlp:
                stream = stream + layer.mlp(stream)
        patch_stream = self.model.join_features(stream[:, -math.prod(features.grid) :], features)
        patch_embeds = unit(self.model.project(patch_stream)).unflatten(1, features.grid)
        return cosine_similarity_map(patch_embeds, texts.map_text_embeds), features

    @abstractmethod
    def mix(self, record: AttentionRecord, features: ICLIPImageFeatures, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Mixes the values of a block. Returns the mixed values of all tokens, `(B, heads, L, D / heads)`, or, without
        residual connections, at least those of the patches.
        """
