"""Random maps, a baseline without information about the image or the text."""

from __future__ import annotations

import hashlib

import torch

from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from .explainer import Explainer


class RandomMap(Explainer):
    """
    Independent uniform values in [0, 1) on the patch grid, the same map for every text. The seed is a digest of the
    prepared image, so that an image has the same map in every run and every batch.
    """

    sees_text = False
    needs_layers = False

    @torch.no_grad()
    def forward(
        self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures, features: ICLIPImageFeatures
    ) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        generators = map(_generator, pixel_values)
        maps = [torch.rand(features.grid, dtype=torch.float32, generator=generator) for generator in generators]
        maps = torch.stack(maps).to(features.image_embeds.device).unsqueeze(1)
        return maps.expand(-1, texts.text_embeds.shape[1], -1, -1), features


def _generator(pixel_values: torch.Tensor) -> torch.Generator:
    content = pixel_values.detach().float().cpu().contiguous().numpy().tobytes()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True))
