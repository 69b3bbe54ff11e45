"""Projections of a branch into the shared space of images and texts, and operations on the unit vectors there."""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_iclip import ICLIPConfig


class Projection(nn.Module):
    """
    Linear projection of features `(..., in_features)`, plus an MLP with one hidden layer if `hidden_size` is not 0:
    W x + W2 GELU(W1 x + b1). W2 starts at zero, so that training starts from the linear projection.

    A projection is not an `nn.Linear`, because libraries replace such layers to quantize them or to add adapters. The
    MLP would be lost.
    """

    def __init__(self, in_features: int, out_features: int, hidden_size: int = 0):
        super().__init__()
        self.weight = nn.Linear(in_features, out_features, bias=False).weight
        self.hidden = None
        if hidden_size:
            layers = nn.Linear(in_features, hidden_size), nn.GELU(), nn.Linear(hidden_size, out_features, bias=False)
            self.hidden = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor, linear: bool = False) -> torch.Tensor:
        """
        Projects features. With `linear`, the MLP is left out, and `features` may hold only the last of the
        `in_features` numbers. The others then count as zero.
        """
        if linear:
            return F.linear(features, self.weight[:, -features.shape[-1] :])
        projected = F.linear(features, self.weight)
        return projected if self.hidden is None else projected + self.hidden(features)


class ICLIPBranch(nn.Module):
    """
    An image and a text projection into a shared space (Eq. 12), with a logit scale and, for training with a sigmoid, a
    logit bias.

    `logit_scale` is the logarithm of the scale. Scale and bias have the shape (1,), because FSDP cannot shard scalars.
    """

    def __init__(self, config: ICLIPConfig, image_dim: int, text_dim: int, recognises: bool = False):
        super().__init__()
        self.visual_projection = Projection(
            image_dim, config.projection_dim, config.image_hidden_size if recognises else 0
        )
        self.text_projection = Projection(text_dim, config.projection_dim, config.text_hidden_size)
        self.logit_scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init_value)))
        self.logit_bias = None
        if recognises and config.logit_bias_init_value is not None:
            self.logit_bias = nn.Parameter(torch.full((1,), float(config.logit_bias_init_value)))

    def embed_image(self, features: torch.Tensor) -> torch.Tensor:
        """Projects features of images or patches `(..., D)` to unit vectors `(..., P)`, float32 (Eq. 12)."""
        return normalize(self.visual_projection(features).float())

    def embed_text(self, features: torch.Tensor) -> torch.Tensor:
        """Projects features of texts `(..., Dt)` to unit vectors `(..., P)`, float32 (Eq. 12)."""
        return normalize(self.text_projection(features).float())

    def forward(self, cosines: torch.Tensor) -> torch.Tensor:
        """Returns the logits: cosines times the scale, which is at most 100 as in CLIP, plus the bias if any."""
        logits = cosines * self.logit_scale.exp().clamp(max=100).squeeze().to(cosines.device)
        return logits if self.logit_bias is None else logits + self.logit_bias.squeeze().to(cosines.device)


def normalize(features: torch.Tensor) -> torch.Tensor:
    """Scales vectors `(..., D)` to unit length, computed in float32. A zero vector stays zero. The dtype is kept."""
    return F.normalize(features.float(), dim=-1).to(features.dtype)


def join_branches(map_embeds: torch.Tensor, recognition_embeds: torch.Tensor, weight: float) -> torch.Tensor:
    """
    Joins unit vectors `(..., P)` of both branches to unit vectors `(..., 2 P)`. The product of two joined vectors is
    (1 - weight) times the product in the map branch plus weight times the product in the recognition branch.
    """
    return torch.cat([(1 - weight) ** 0.5 * map_embeds, weight**0.5 * recognition_embeds], -1)


def average_prompts(embeds: torch.Tensor, num_templates: int) -> torch.Tensor:
    """
    Averages the unit vectors of the prompts of each label, `(..., T * num_templates, P)`. Returns unit vectors
    `(..., T, P)`.
    """
    return embeds if num_templates == 1 else normalize(embeds.unflatten(-2, (-1, num_templates)).mean(-2))
