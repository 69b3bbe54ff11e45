"""Shared ground of the methods that differentiate the similarity."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch

from ..modeling_iclip import ICLIPImageFeatures, ICLIPTextFeatures, cosines
from .explainer import Explainer
from .recording import AttentionRecord


class GradientExplainer(Explainer):
    """
    One forward for all texts, with a graph from attention layer `layer` on; then for each text one backward through it,
    of all images at once.

    Args:
        model, processor: see [`Explainer`].
        layer (`int`): index among the attention layers of the image tower; -1 is the last.
    """

    backward_per_text = True
    needs_weights = False

    def __init__(self, model, processor, layer: int = -1):
        super().__init__(model, processor)
        self.layer = layer
        depth = len(self.family.layers)
        if not -depth <= layer < depth:
            raise ValueError(
                f"Expected layer to be one of the {depth} attention layers, got {layer}: choose one of them."
            )

    def forward(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        image, layers = self.family.trace(pixel_values, self.layer, grad=True, weights=self.needs_weights)
        inputs = self.differentiated(layers)
        maps, patches, count = [], math.prod(image.grid), texts.text_embeds.shape[-2]
        with torch.inference_mode(False), torch.enable_grad():
            # The clone: an embedding made under inference mode could not take part in a backward.
            logits = self.family.logit_scale() * cosines(image.image_embeds, texts.text_embeds.clone())
            for text in range(count):
                # Images do not mix, so that the gradient of their sum has each image's own.
                gradients = torch.autograd.grad(logits[:, text].sum(), inputs, retain_graph=text < count - 1)
                with torch.no_grad():
                    maps.append(self.weigh(layers, gradients, patches))
        detached = ICLIPImageFeatures(**{name: value.detach() for name, value in image.items()})
        return torch.stack(maps, 1).unflatten(-1, image.grid).float(), detached

    @abstractmethod
    def differentiated(self, layers: list[AttentionRecord]) -> list[torch.Tensor]:
        """Returns the tensors whose gradients are taken."""

    @abstractmethod
    def weigh(self, layers: list[AttentionRecord], gradients: tuple[torch.Tensor, ...], patches: int) -> torch.Tensor:
        """Computes the relevance of the patches to one text, `(B, N)`, from the gradients of those tensors."""
