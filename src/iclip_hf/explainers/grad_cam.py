"""Grad-CAM (Selvaraju et al. 2017) with the image-text similarity as the logit."""

from __future__ import annotations

import torch

from ..backends.recording import AttentionRecord
from .gradients import GradientExplainer


class GradCAM(GradientExplainer):
    """
    The positive part of the activations of the patches, weighted by the mean gradient of each channel and summed over
    the channels. The default activations are the patch tokens after the first norm of the last block, as is usual with
    pytorch-grad-cam. For a pooling head (SigLIP, ResNets), they are its input, the last feature map.

    Args:
        activations (`str`): `"norm"`, after the first norm of the block, or `"block"`, the input of the block.
    """

    def __init__(self, model, layer: int = -1, activations: str = "norm"):
        if activations not in ("norm", "block"):
            raise ValueError(f"activations is 'norm' or 'block', not {activations!r}.")
        super().__init__(model, layer)
        self.normed = activations == "norm" and self.model.layers[layer].residual

    def differentiated(self, layers: list[AttentionRecord]) -> list[torch.Tensor]:
        return [layers[0].tokens if self.normed else layers[0].stream]

    def weigh(self, layers: list[AttentionRecord], gradients: tuple[torch.Tensor, ...], patches: int) -> torch.Tensor:
        (activations,), (gradient,) = self.differentiated(layers), gradients
        weights = gradient[:, -patches:].mean(1, keepdim=True)  # (B, 1, D)
        return (activations[:, -patches:] * weights).sum(-1).relu()
