"""Grad-CAM (Selvaraju et al. 2017) with the image-text similarity as the logit."""

from __future__ import annotations

import torch

from ..backends.recording import AttentionRecord
from ..model.batches import select_texts
from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.similarity import cosines
from .gradients import GradientExplainer


class GradCAM(GradientExplainer):
    """
    The activations of the patches are weighted by the mean gradient of each channel and summed over the channels. The
    map is the positive part of this sum. The default activations are the patch tokens after the first norm of the last
    block, as is usual with pytorch-grad-cam. For a pooling head (SigLIP, ResNets), they are its input, the last
    feature map. If the score of an ICLIP model depends on its feature tower alone, they are the last feature map of
    that tower, on the grid of patches.

    Args:
        activations (`str`): `"norm"`, after the first norm of the block, or `"block"`, the input of the block.
    """

    needs_image_tower = False

    def __init__(self, model, layer: int = -1, activations: str = "norm"):
        if activations not in ("norm", "block"):
            raise ValueError(f"activations is 'norm' or 'block', not {activations!r}.")
        super().__init__(model, layer)
        self.normed = activations == "norm" and self.model.layers[layer].residual

    def forward(
        self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures, text_indices: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        if not self.model.reads_features:
            return super().forward(pixel_values, texts, text_indices)
        texts = texts if text_indices is None else select_texts(texts, text_indices)
        features = self.model.get_image_features(pixel_values)
        return self._feature_tower_maps(features, texts), features

    def _feature_tower_maps(self, features: ICLIPImageFeatures, texts: ICLIPTextFeatures) -> torch.Tensor:
        """Computes the maps `(B, T, h, w)` of a model whose score depends on its feature tower alone."""
        network = self.model.network
        reduced = features.patch_tokens[..., -features.feature_average.shape[-1] :]
        maps = []
        with torch.inference_mode(False), torch.enable_grad():
            # All patches have the gradient of their mean. The product of a feature f and its gradient equals the
            # product of its reduction W f, without the bias, and the gradient with respect to this reduction.
            without_bias = reduced - network.feature_reduction.bias.to(reduced)
            average = features.feature_average.clone().requires_grad_()
            logits = self.model.logits(cosines(network.recognition.embed_image(average), texts.text_embeds.clone()))
            for text_index in range(logits.shape[1]):
                (gradient,) = torch.autograd.grad(logits[:, text_index].sum(), average, retain_graph=True)
                maps.append((without_bias @ gradient.unsqueeze(-1)).squeeze(-1).relu())
        return torch.stack(maps, 1).detach().unflatten(-1, features.grid)

    def differentiated(self, records: list[AttentionRecord]) -> list[torch.Tensor]:
        return [records[0].tokens if self.normed else records[0].stream]

    def weigh(
        self, records: list[AttentionRecord], gradients: tuple[torch.Tensor, ...], num_patches: int
    ) -> torch.Tensor:
        (activations,), (gradient,) = self.differentiated(records), gradients
        weights = gradient[:, -num_patches:].mean(1, keepdim=True)  # (B, 1, D)
        return (activations[:, -num_patches:] * weights).sum(-1).relu()
