"""LeGrad (Bousselham et al. 2025): gradients with respect to the attention weights of the last blocks."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.func import functional_call

from ..backends.explainable import unit
from ..backends.recording import AttentionRecord, private_copy
from ..model.batches import select_texts
from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.similarity import cosines
from .explainer import Explainer


class LeGrad(Explainer):
    """
    Each of the last blocks has a score: the cosine of the text and the projected mean token of the block. The map is
    the positive part of the gradient of this score with respect to the attention weights of the block, averaged over
    heads and queries, and summed over the blocks.

    Args:
        depth (`int`): number of last blocks; all if the tower has fewer.
    """

    def __init__(self, model, depth: int = 2):
        super().__init__(model)
        self.layer_indices = self.model.self_attentions("LeGrad", depth)
        self._mean_mlps = {index: _mean_mlp(self.model.layers[index].mlp) for index in self.layer_indices}

    def forward(
        self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures, text_indices: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        texts = texts if text_indices is None else select_texts(texts, text_indices)
        features, records = self.model.trace(pixel_values, self.layer_indices[0])
        with torch.inference_mode(False), torch.enable_grad():
            # The embeddings are cloned, because a tensor from inference mode cannot be part of a graph.
            embeds = texts.map_text_embeds.clone()
            traced = zip(self.layer_indices, records)
            maps = sum(self._relevance(index, record, features, embeds) for index, record in traced)
        return maps[..., -math.prod(features.grid) :].unflatten(-1, features.grid), features

    def _relevance(
        self, index: int, record: AttentionRecord, features: ICLIPImageFeatures, text_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Computes the relevance of all tokens in one block, `(B, T, L)`."""
        layer = self.model.layers[index]
        mixed = record.mixed.detach().requires_grad_()
        stream = record.stream + layer.output(mixed)
        # The MLP's weights are passed at each call, because a metric may have randomised them.
        mlp_mean = functional_call(self._mean_mlps[index], dict(layer.mlp.named_parameters()), stream)
        mean_token = self.model.join_features(stream.mean(1, keepdim=True) + mlp_mean, features)
        scores = cosines(unit(self.model.project(mean_token))[:, 0], text_embeds)
        relevances = []
        for text_index in range(scores.shape[1]):
            (gradient,) = torch.autograd.grad(scores[:, text_index].sum(), mixed, retain_graph=True)
            # The attention weight (i, j) of a head multiplies value j in the output of query i.
            relevances.append((gradient @ record.value.mT).float().relu().mean((1, 2)))
        return torch.stack(relevances, 1)


def _mean_mlp(mlp: nn.Module) -> nn.Module:
    """
    Returns a copy of an MLP that returns the mean over the tokens, `(B, L, D)` -> `(B, 1, D)`. The mean is computed
    before the last layer, which is linear. This halves the cost of each backward pass. If a norm ends the MLP, the
    mean is computed after the norm.
    """
    copied = private_copy(mlp)
    if isinstance([*mlp.children()][-1], nn.LayerNorm):  # as in EVA02-E
        copied.register_forward_hook(lambda module, args, output: output.mean(1, keepdim=True))
        return copied
    last_linear = ""
    for name, module in copied.named_modules():
        # A layer with an adapter of PEFT is linear as a whole, and contains other linear layers.
        if hasattr(module, "out_features") and not name.startswith(f"{last_linear}."):
            last_linear = name
    copied.get_submodule(last_linear).register_forward_pre_hook(lambda module, args: (args[0].mean(1, keepdim=True),))
    return copied
