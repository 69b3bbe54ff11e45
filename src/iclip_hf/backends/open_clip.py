"""Models of the open_clip library with its own image towers: transformers, CoCa and ResNets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from PIL.Image import Resampling
from torch import nn
from torch.nn import functional as F
from transformers.feature_extraction_utils import BatchFeature

from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.processing_iclip import ICLIPProcessor
from ..model.prompts import check_text
from .explainable import RecordableModel, block_mlp, check_side, label_features, unit
from .families import square_processor
from .recording import attend, input_weights, merge_heads, split_heads


class _OpenCLIPProcessor(ICLIPProcessor):
    """A processor for a tokenizer of open_clip, which is a function."""

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
    """
    A transformer that pools by a class token or the mean of the patches. Images must have the size of its position
    embeddings.
    """

    default_method = "naclip"

    def __init__(self, model: nn.Module, tokenizer):
        try:
            tokens = tokenizer(["dog"])
        except Exception:  # an object that does not accept texts
            tokens = None
        if not isinstance(tokens, torch.Tensor):
            raise TypeError(
                "An open_clip model comes with the result of open_clip.get_tokenizer, not a "
                f"{type(tokenizer).__name__}."
            )
        preprocessing, size = model.visual.preprocess_cfg, model.visual.image_size
        patch_size = self._patch_size(model.visual)
        # Rounded down to whole patches: to 378 for SigLIP So400m, which has images of 384 and patches of 14 pixels.
        self.side = (size[0] if isinstance(size, tuple) else size) // patch_size * patch_size
        resample = Resampling[preprocessing["interpolation"].upper()]
        image_processor = square_processor(self.side, preprocessing["mean"], preprocessing["std"], resample)
        super().__init__(model, _OpenCLIPProcessor(image_processor, tokenizer, patch_size))
        self._given = model, tokenizer  # `identity` reads from the model how images are prepared
        self.pools_patches = self._pools_patches()
        if self.pools_patches:
            self.default_method = "itsm"

    @staticmethod
    def _patch_size(visual: nn.Module) -> int:
        return visual.patch_size[0]

    def _pools_patches(self) -> bool:
        return self.network.visual.pool_type == "avg"

    def _prepare_layers(self) -> None:
        self.network.visual.set_grad_checkpointing(False)  # it would run blocks again in a backward pass
        for block in self.network.visual.transformer.resblocks:
            mlp = block_mlp(block.ln_2, block.mlp, block.ls_2)
            self._add_layer(block, block.attn, block.attn.out_proj, block.ls_1, mlp)

    def get_text_features(self, input_ids: torch.Tensor, num_templates: int = 1, **inputs) -> ICLIPTextFeatures:
        return label_features(self.network.encode_text(input_ids), num_templates)

    def _encode_images(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        check_side(pixel_values, self.side)
        output = self.network.visual.forward_intermediates(pixel_values, indices=1)  # of the last block
        (stream,) = output["image_intermediates"]  # (B, D, h, w)
        return ICLIPImageFeatures(
            image_embeds=unit(output["image_features"]),
            patch_embeds=unit(self.project(stream.flatten(2).mT)).unflatten(1, stream.shape[2:]),
        )

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self.network.visual.ln_post(stream) @ self.network.visual.proj


class ExplainableCoCa(ExplainableOpenCLIP):
    """
    CoCa. It pools by attention with learned queries; the first query gives the score. The projection of a patch is the
    output of the pooling with all attention on this patch: value and output projection.
    """

    def _prepare_layers(self) -> None:
        super()._prepare_layers()
        pool = self.network.visual.attn_pool
        self._add_layer(pool, pool.attn, pool.attn.out_proj)

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        pool = self.network.visual.attn_pool
        _, _, value_weight = input_weights(pool.attn)
        _, _, value_bias = pool.attn.in_proj_bias.chunk(3)
        value = F.linear(pool.ln_k(stream), value_weight, value_bias)
        return super().project(pool.attn.out_proj(value))


class ExplainableOpenCLIPResNet(ExplainableOpenCLIP):
    """
    A ResNet. Its only attention layer is the pooling at its end. The mean of the positions is the query that pools the
    image. The positions are queries too, and their outputs are the patch embeddings.
    """

    default_method = "maskclip"

    @staticmethod
    def _patch_size(visual: nn.Module) -> int:
        return 32  # pixels for each position

    def _pools_patches(self) -> bool:
        return False

    def _prepare_layers(self) -> None:
        pool = self.network.visual.attnpool
        pool.forward = partial(_attention_pool, pool)
        self._add_layer(pool, pool, nn.Identity())

    def _encode_images(self, pixel_values: torch.Tensor) -> ICLIPImageFeatures:
        check_side(pixel_values, self.side)
        image_embeds, patch_embeds = unit(self.network.visual(pixel_values)).tensor_split([1], 1)
        patch_embeds = patch_embeds.unflatten(1, self._grid(pixel_values))
        return ICLIPImageFeatures(image_embeds=image_embeds[:, 0], patch_embeds=patch_embeds)

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        return self.network.visual.attnpool.c_proj(stream)


def _attention_pool(pool: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """
    Computes the attention pool of the tokens `(B, L, D)` of a feature map, and records its attention. Returns the
    outputs `(B, 1 + L, P)`: first of the mean token, which stands for the image, then of each token.
    """
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.positional_embedding
    heads = (split_heads(linear(tokens), pool.num_heads) for linear in (pool.q_proj, pool.k_proj, pool.v_proj))
    return pool.c_proj(merge_heads(attend(*heads)))
