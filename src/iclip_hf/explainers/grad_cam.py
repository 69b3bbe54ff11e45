"""Grad-CAM (Selvaraju et al. 2017) with the image-text similarity as the logit."""

from __future__ import annotations

import torch

from .gradients import GradientExplainer
from .recording import AttentionRecord


class GradCAM(GradientExplainer):
    """
    Activations weighted by their channels' mean gradient, positive part. The activations are the patch tokens that enter
    attention layer `layer`: by default the last block, or the pooling head of SigLIP and of ResNets, which see the last
    feature map.
    """

    def differentiated(self, layers: list[AttentionRecord]) -> list[torch.Tensor]:
        return [layers[0].stream]

    def weigh(self, inputs: list[torch.Tensor], gradients: tuple[torch.Tensor, ...], patches: int) -> torch.Tensor:
        (activations,), (gradient,) = inputs, gradients
        if activations.ndim == 4:  # a ResNet's feature map
            activations, gradient = activations.flatten(2).mT, gradient.flatten(2).mT
        weights = gradient[:, -patches:].mean(1, keepdim=True)  # (B, 1, D)
        return (activations[:, -patches:] * weights).sum(-1).relu()
