"""Base class of methods that differentiate the logits of images and texts."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch

from ..backends.recording import AttentionRecord
from ..model.batches import select_texts
from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.similarity import cosines
from .explainer import Explainer


class GradientExplainer(Explainer):
    """
    Runs one forward pass for all images, with a graph from attention layer `layer` on, and one backward pass through
    this graph for each text.

    Args:
        layer (`int`): index of an attention layer of the image tower; -1 is the last.
    """

    needs_weights = False  # whether the attention weights are recorded
    needs_image_tower = True  # whether the score must depend on the attention layers

    def __init__(self, model, layer: int = -1):
        super().__init__(model)
        if self.needs_image_tower and self.model.reads_features:
            raise ValueError(
                "The score of this model reads its feature tower alone, so it has no gradient in the image tower: use "
                "grad_cam, which differentiates with respect to the feature map."
            )
        num_layers = len(self.model.layers)
        if not -num_layers <= layer < num_layers:
            raise ValueError(
                f"layer is an index of the {num_layers} attention layers, from {-num_layers} to {num_layers - 1}, not "
                f"{layer!r}."
            )
        self.layer_index = range(num_layers)[layer]

    def forward(
        self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures, text_indices: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        texts = texts if text_indices is None else select_texts(texts, text_indices)
        features, records = self.model.trace(pixel_values, self.layer_index, grad=True, weights=self.needs_weights)
        inputs = self.differentiated(records)
        num_texts = texts.text_embeds.shape[1]
        maps = []
        with torch.inference_mode(False), torch.enable_grad():
            # The embeddings are cloned, because a tensor from inference mode cannot be part of a graph.
            logits = self.model.logits(cosines(features.image_embeds, texts.text_embeds.clone()))
            for text_index in range(num_texts):
                # Images are independent, so the gradient of their sum contains the gradient of each.
                retain_graph = text_index < num_texts - 1
                gradients = torch.autograd.grad(logits[:, text_index].sum(), inputs, retain_graph=retain_graph)
                with torch.no_grad():
                    maps.append(self.weigh(records, gradients, math.prod(features.grid)))
        return torch.stack(maps, 1).unflatten(-1, features.grid), features

    @abstractmethod
    def differentiated(self, records: list[AttentionRecord]) -> list[torch.Tensor]:
        """Returns the tensors that the logits are differentiated with respect to."""

    @abstractmethod
    def weigh(
        self, records: list[AttentionRecord], gradients: tuple[torch.Tensor, ...], num_patches: int
    ) -> torch.Tensor:
        """
        Computes the relevance `(B, N)` of the N patches to one text, from the gradients with respect to the tensors of
        `differentiated`.
        """
