"""ProxyCLIP (Lan et al. 2024): the last block attends by the similarities of a DINO tower's patches."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor

from ..backends.explainable import unit
from ..backends.families import ExplainableICLIP
from ..backends.towers import embedded_towers
from ..model.configuration_iclip import patch_side
from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.similarity import cosine_similarity_map
from ..model.tower_loading import load_tower, tower_config
from ..model.towers import VISION_TOWERS
from ..utils.errors import loading_errors
from .explainer import Explainer


class ProxyCLIP(Explainer):
    """
    In the last block, the values of the patches are mixed by softmax(gamma (S - beta mean(S))), where S are the
    cosines of the proxy's patch tokens. Entries with a logit below 0 are masked. There is no residual connection and
    no MLP. The proxy sees the same pixels, resized to the nearest multiple of its patch size. The values are
    interpolated to the grid of the proxy, and maps have this grid.

    Args:
        proxy (`str`, *optional*): folder or Hub id, with an image processor, of an image tower such as DINO, DINOv2 or
            DINOv3, or of a two-tower model, whose image tower is used. By default, an ICLIP model is its own proxy,
            and other models use the ViT of the embedded model, which is not a DINO.
        beta (`float`): threshold, as a multiple of the mean similarity.
        gamma (`float`): sharpness of the softmax.
        holes (`bool`): whether a patch without any logit above 0 is NaN in the maps, as in the authors' code.
            Otherwise, it keeps its own value.
    """

    def __init__(self, model, proxy: str | None = None, beta: float = 1.2, gamma: float = 3.0, holes: bool = False):
        super().__init__(model)
        self.has_holes = holes
        (self.layer_index,) = self.model.self_attentions("ProxyCLIP", 1)
        self.beta, self.gamma = beta, gamma
        self.proxy = None
        if proxy is None and not isinstance(self.model, ExplainableICLIP):
            proxy = str(embedded_towers()[0])
        if proxy is not None:
            with loading_errors(proxy):
                config = tower_config(proxy, "vision_config")
            if config.model_type not in VISION_TOWERS:
                raise ValueError(f"{proxy}: a proxy is one of {sorted(VISION_TOWERS)}, not {config.model_type!r}.")
            weight = next(self.model.network.parameters())
            self.proxy = load_tower(config, proxy).eval().to(weight.device, weight.dtype)
            self.proxy_processor = AutoImageProcessor.from_pretrained(proxy, trust_remote_code=False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, texts: ICLIPTextFeatures) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        features, (record, *_) = self.model.trace(pixel_values, self.layer_index)
        if self.proxy is None:
            width = record.stream.shape[-1]  # features of a feature tower may follow
            tokens = features.patch_tokens[..., :width].unflatten(1, features.grid)
        else:
            tokens = self._proxy_tokens(pixel_values)
        grid = tokens.shape[1:3]
        value = record.value[:, :, -math.prod(features.grid) :]
        if grid != features.grid:
            value_map = value.flatten(0, 1).mT.unflatten(-1, features.grid)  # (B * heads, D / heads, h, w)
            value = F.interpolate(value_map, grid, mode="bilinear").flatten(2).mT.unflatten(0, value.shape[:2])
        weights = proxy_weights(unit(tokens.flatten(1, 2)), self.beta, self.gamma, self.has_holes)
        mixed = weights.to(value) @ value
        patch_stream = self.model.join_features(self.model.layers[self.layer_index].output(mixed), features, grid)
        patch_embeds = unit(self.model.project(patch_stream)).unflatten(1, grid)
        return cosine_similarity_map(patch_embeds, texts.map_text_embeds), features

    def _proxy_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns the proxy's patch tokens `(B, h, w, D)`."""
        config, weight = self.proxy.config, next(self.proxy.parameters())
        model_processor, proxy_processor = self.model.processor.image_processor, self.proxy_processor
        pixels = pixel_values.to(weight)
        if model_processor.do_normalize:  # undone, because the proxy has its own normalisation
            mean, std = _statistics(model_processor, weight)
            pixels = pixels * std + mean
        if proxy_processor.do_normalize:
            mean, std = _statistics(proxy_processor, weight)
            pixels = (pixels - mean) / std
        patch = patch_side(config)
        grid = [max(1, round(side / patch)) for side in pixels.shape[2:]]
        size = [side * patch for side in grid]
        if pixels.shape[2:] != torch.Size(size):
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
        kwargs = {"interpolate_pos_encoding": True} if VISION_TOWERS[config.model_type].interpolates else {}
        return self.proxy(pixels, **kwargs).last_hidden_state[:, -math.prod(grid) :].unflatten(1, grid)


def proxy_weights(tokens: torch.Tensor, beta: float, gamma: float, holes: bool = False) -> torch.Tensor:
    """Computes attention weights `(B, 1, N, N)` from unit vectors `(B, N, D)`, see [`ProxyCLIP`]."""
    similarity = tokens @ tokens.mT
    logits = gamma * (similarity - beta * similarity.mean((1, 2), keepdim=True))
    masked = logits < 0
    if not holes:  # a patch always attends to itself, so that not all of its logits are masked
        masked &= ~torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    return logits.masked_fill(masked, -torch.inf).softmax(-1).unsqueeze(1)


def _statistics(image_processor, like: torch.Tensor) -> torch.Tensor:
    """Returns mean and standard deviation of the channels, `(2, 3, 1, 1)`, with the dtype and device of `like`."""
    return torch.tensor([image_processor.image_mean, image_processor.image_std]).to(like).view(2, 3, 1, 1)
