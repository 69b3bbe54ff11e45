"""Shared ground of the training-free methods in which tokens attend to tokens that are like themselves."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch

from ..modeling_iclip import ICLIPImageFeatures, ICLIPTextFeatures
from ..similarity import cosine_similarity_map
from .adapters import unit
from .explainer import Explainer
from .recording import AttentionRecord


class SelfSelfAttention(Explainer):
    """
    Beside the model's own stream of tokens a second one leaves it `depth` layers before the end. Each of these layers adds
    to it what self-self attention makes of the values that the layer has in the first stream, and no MLP. The maps are
    the cosines of its projected patch tokens with the texts.

    Args:
        model, processor: see [`Explainer`].
        depth (`int`): the number of last layers; all where the tower has fewer.
    """

    def __init__(self, model, processor, depth: int):
        super().__init__(model, processor)
        if depth < 1:
            raise ValueError(f"Expected a depth of at least one layer, got {depth}: correct it.")
        self.blocks = [index for index, layer in enumerate(self.family.layers) if layer.residual][-depth:]
        if not self.blocks:
            raise ValueError(
                f"{type(self).__name__} replaces the self-attention in a transformer's blocks, and this image tower has "
                "none: use itsm, grad_cam, bi_modal or attention."
            )

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        image, layers = self.family.trace(pixel_values, self.blocks[0])
        stream = layers[0].stream
        for index, layer in zip(self.blocks, layers):
            stream = stream + self.family.layers[index].output(self.mix(layer))
        patch_embeds = unit(self.family.project(stream[:, -math.prod(image.grid) :])).unflatten(1, image.grid)
        return cosine_similarity_map(patch_embeds, texts.map_text_embeds.float()), image

    @abstractmethod
    def mix(self, layer: AttentionRecord) -> torch.Tensor:
        """Mixes the values of a layer by self-self attention, `(B, H, L, D / H)`."""


def similar(tokens: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Computes the attention of tokens `(B, H, L, D / H)` to each other by their scaled products, `(B, H, L, L)`."""
    return ((tokens.float() @ tokens.float().mT) * scale).softmax(-1).to(tokens.dtype)
