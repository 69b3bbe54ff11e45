"""Models of the open_clip library with an image tower of timm, such as SigLIP, PE, EVA, MobileCLIP and ConvNeXt."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from ..model.outputs import ICLIPImageFeatures
from .explainable import block_mlp, check_side, each_alone, unit
from .open_clip import ExplainableOpenCLIP


# Classes of the blocks that can be recorded.
_BLOCKS = ("Block", "RelPosBlock", "EvaBlock", "EvaBlockPostNorm")


class ExplainableTimm(ExplainableOpenCLIP):
    """
    A transformer that pools by a class token, the mean of the patches, or an attention with a learned query. The
    projection of a patch is the output of the head for a sequence of copies of this patch.
    """

    @property
    def trunk(self) -> nn.Module:
        return self.network.visual.trunk

    @staticmethod
    def _patch_size(visual: nn.Module) -> int:
        return visual.trunk.feature_info[-1]["reduction"]

    def _pools_patches(self) -> bool:
        return self.trunk.global_pool not in ("token", "map")

    def _prepare_layers(self) -> None:
        self.network.visual.set_grad_checkpointing(False)
        if self.side not in self.trunk.patch_embed.img_size:
            self.trunk.set_input_size((self.side, self.side))
        for block in self.trunk.blocks:
            has_scale = getattr(block, "gamma_1", None) is not None
            has_gate = getattr(block.attn, "gate", None) is not None
            if type(block).__name__ not in _BLOCKS or has_scale or has_gate:
                raise TypeError(f"A {type(block).__name__} of timm with these options cannot be recorded.")
            projection = nn.Sequential(getattr(block.attn, "norm", nn.Identity()), block.attn.proj)
            if type(block).__name__ == "EvaBlockPostNorm":  # its norms are where other blocks have a layer scale
                scale, mlp = block.norm1, nn.Sequential(block.mlp, block.norm2)
            else:
                scale = getattr(block, "ls1", None)
                mlp = block_mlp(block.norm2, block.mlp, getattr(block, "ls2", None))
            self._add_attention(block, block.attn, projection, scale, mlp)
        if (pool := getattr(self.trunk, "attn_pool", None)) is not None:
            self._add_attention(pool, pool, pool.proj)

    def _add_attention(self, block: nn.Module, attention: nn.Module, *parts: nn.Module | None) -> None:
        attention.fused_attn = True
        self._add_layer(block, attention, *parts, calls_sdpa=True)

    def _encode_images(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        check_side(pixel_values, self.side)
        tokens = self.trunk.forward_features(pixel_values)
        image_embeds = unit(self._head(tokens))
        if tokens.ndim == 4:  # a feature map
            tokens = tokens.flatten(2).mT
        grid = self._grid(pixel_values)
        patch_embeds = unit(self._project_output(tokens[:, -math.prod(grid) :])).unflatten(1, grid)
        return ICLIPImageFeatures(image_embeds=image_embeds, patch_embeds=patch_embeds)

    def _head(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.network.visual.head(self.trunk.forward_head(tokens))

    def _project_output(self, tokens: torch.Tensor) -> torch.Tensor:
        """Projects tokens that leave the final norm."""
        return each_alone(self._head, tokens, 1 + getattr(self.trunk, "num_prefix_tokens", 0))

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self._project_output(self.trunk.norm(stream))


class ExplainableTimmMap(ExplainableTimm):
    """
    A convolutional tower, which pools a feature map by its mean. Its head is recorded like a pooling head, and gets
    the positions of the map as tokens.
    """

    has_attention = False

    def _pools_patches(self) -> bool:
        return True

    def _prepare_layers(self) -> None:
        head = self.trunk.head
        head.forward = partial(_head_on_tokens, head)
        self._add_layer(head, head, nn.Identity())

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self._project_output(stream)


def _head_on_tokens(head: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Applies a head to the positions `(B, L, D)` of a feature map. Their order does not change their mean."""
    return type(head).forward(head, tokens.mT.unsqueeze(-1))
