"""Models of the open_clip library: its transformers with a class token, and its ResNets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from PIL.Image import Resampling
from torch import nn
from transformers.feature_extraction_utils import BatchFeature

from ..model.modeling_iclip import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.processing_iclip import ICLIPProcessor
from ..model.prompts import check_text
from .explainable import RecordableModel, block_mlp, text_features, unit
from .families import square_processor
from .recording import attend, merge_heads


class _OpenCLIPProcessor(ICLIPProcessor):
    """A processor whose tokenizer is a function, as those of open_clip are."""

    def __init__(self, image_processor, tokenize: Callable[[list[str]], torch.Tensor], patch_size: int):
        super().__init__(image_processor, patch_size=patch_size)
        self.tokenize = tokenize

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor"]

    def __call__(self, images=None, labels=None, templates=("{}",), **kwargs) -> BatchFeature:
        if labels is None:
            return super().__call__(images, **kwargs)
        prompts = [template.replace("{}", check_text(label)) for label in labels for template in templates]
        return BatchFeature({"input_ids": self.tokenize(prompts), "num_templates": len(templates)})


class ExplainableOpenCLIP(RecordableModel):
    """A transformer with a class token. Images must have the size of its position embeddings."""

    default_method = "naclip"

    def __init__(self, model: nn.Module, tokenizer):
        try:
            tokens = tokenizer(["dog"])
        except Exception:  # of an object that does not accept texts
            tokens = None
        if not isinstance(tokens, torch.Tensor):
            raise TypeError(
                "An open_clip model comes with the result of open_clip.get_tokenizer, not a "
                f"{type(tokenizer).__name__}."
            )
        options, size = model.visual.preprocess_cfg, model.visual.image_size
        self.side = size[0] if isinstance(size, tuple) else size
        resample = Resampling[options["interpolation"].upper()]
        image_processor = square_processor(self.side, options["mean"], options["std"], resample)
        patch_size, *_ = getattr(model.visual, "patch_size", [32])  # a ResNet has a position for every 32 pixels
        super().__init__(model, _OpenCLIPProcessor(image_processor, tokenizer, patch_size))
        self._given = model, tokenizer  # its configuration tells how images are prepared
        self.pools_patches = getattr(model.visual, "pool_type", "tok") != "tok"

    def _prepare_layers(self) -> None:
        for block in self.network.visual.transformer.resblocks:
            mlp = block_mlp(block.ln_2, block.mlp, block.ls_2)
            self._add_layer(block, block.attn, block.attn.out_proj, block.ls_1, mlp)

    def get_text_features(self, input_ids: torch.Tensor, num_templates: int = 1, **inputs) -> ICLIPTextFeatures:
        return text_features(self.network.encode_text(input_ids), num_templates)

    def _encode_images(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        if pixel_values.shape[2:] != (self.side, self.side):
            raise ValueError(
                f"This model takes images of {self.side}x{self.side} pixels, not {tuple(pixel_values.shape)}."
            )
        output = self.network.visual.forward_intermediates(pixel_values, indices=1)
        (stream,) = output["image_intermediates"]  # (B, D, h, w)
        return ICLIPImageFeatures(
            image_embeds=unit(output["image_features"]),
            patch_embeds=unit(self.project(stream.flatten(2).mT)).unflatten(1, stream.shape[2:]),
        )

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self.network.visual.ln_post(stream) @ self.network.visual.proj


class ExplainableOpenCLIPResNet(ExplainableOpenCLIP):
    """
    A ResNet, whose only attention layer is the pooling at its end. A position is projected into the space of the texts
    as the pooling does with all attention on this position: by value and output projection.
    """

    default_method = "reversed_itsm"

    def _prepare_layers(self) -> None:
        pool = self.network.visual.attnpool
        pool.forward = partial(_attention_pool, pool)
        self._add_layer(pool, pool, pool.c_proj)

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        pool = self.network.visual.attnpool
        return pool.c_proj(pool.v_proj(stream + pool.positional_embedding[1:]))


def _attention_pool(pool: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Pools the tokens `(B, L, D)` of a feature map by attention with their mean as the query, and records it."""
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.positional_embedding
    query, key, value = (
        projection(x).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        for projection, x in ((pool.q_proj, tokens[:, :1]), (pool.k_proj, tokens), (pool.v_proj, tokens))
    )
    return pool.c_proj(merge_heads(attend(query, key, value)))[:, 0]
