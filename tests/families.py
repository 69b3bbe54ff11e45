"""Tiny random models of every family that explainers support, for their tests; images are never square."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLIP_TOKENS, TRANSFORMER, VIT, tiny_model
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from iclip_hf.explainers import METHODS, make_explainer
from iclip_hf.model.engine import Engine, for_images
from iclip_hf.model.similarity import cosines


LABELS = ["dog", "red ball", "blue car"]
SIZES = [(40, 50), (33, 32), (64, 20)]  # height, width
WIDE = {"height": 32, "width": 48}
GRID = (4, 6)


def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def pixels(size=(32, 48), batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def liven(model: nn.Module) -> nn.Module:
    """At the usual initial scale all tokens would be nearly equal."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)
        elif "bn" in name:
            parameter.fill_(1)  # a ResNet starts with its blocks' last norm at 0
    return model.eval()


def tiny_open_clip(tokenizer, **vision):
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")
    text = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic"}
    open_clip.set_model_preprocess_cfg(model, cfg)

    def tokenize(texts):
        return tokenizer(texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt")["input_ids"]

    return liven(model), tokenize


def build(family: str, processor):
    """A model of the family, its processor, and the (height, width) of its input in the tests."""
    torch.manual_seed(5)
    text = {**TRANSFORMER, **CLIP_TOKENS, "eos_token_id": processor.tokenizer.sep_token_id}
    if family == "iclip":
        return tiny_model("dinov2_with_registers"), processor, (32, 48)
    if family == "clip":
        model = CLIPModel(CLIPConfig(vision_config=VIT, text_config=text, projection_dim=16))
        image_processor = CLIPImageProcessor()
    if family == "metaclip_2":
        metaclip = pytest.importorskip("transformers.models.metaclip_2", reason="needs transformers with MetaCLIP 2")
        config = metaclip.MetaClip2Config(vision_config=VIT, text_config=text, projection_dim=16)
        model, image_processor = metaclip.MetaClip2Model(config), CLIPImageProcessor()
    if family == "tipsv2":
        tipsv2 = pytest.importorskip("transformers.models.tipsv2", reason="needs transformers with TIPSv2")
        sides = {name: value for name, value in VIT.items() if name != "intermediate_size"}
        model = tipsv2.Tipsv2Model(tipsv2.Tipsv2Config(vision_config=sides, text_config={**text, "hidden_size": 32}))
        image_processor = tipsv2.Tipsv2ImageProcessor()
    if family == "siglip":
        model = SiglipModel(SiglipConfig(vision_config=VIT, text_config={**text, "projection_size": 32}))
        image_processor = SiglipImageProcessor()
    if family == "siglip2":
        vision = {name: value for name, value in VIT.items() if name != "image_size"} | {"num_patches": 16}
        model = Siglip2Model(Siglip2Config(vision_config=vision, text_config={**text, "projection_size": 32}))
        image_processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=24)
    if family == "open_clip":
        vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8}
        return *tiny_open_clip(processor.tokenizer, **vision), (32, 32)
    if family == "open_clip_resnet":
        return *tiny_open_clip(processor.tokenizer, image_size=96, layers=[1] * 4, width=4, head_width=32), (96, 96)
    return liven(model), SimpleNamespace(image_processor=image_processor, tokenizer=processor.tokenizer), (32, 48)


FAMILIES = ["iclip", "clip", "metaclip_2", "siglip", "siglip2", "tipsv2", "open_clip", "open_clip_resnet"]
NEED_BLOCKS = ["clip_surgery", "gem", "maskclip", "sclip", "clearclip", "naclip", "proxyclip", "legrad"]
OF_POOL = ["clip_surgery", "maskclip"]  # which also replace the attention pool of a ResNet
REFUSED = {("open_clip_resnet", method) for method in NEED_BLOCKS if method not in OF_POOL}
REFUSED |= {(family, "attention_affinity") for family in FAMILIES if family != "iclip"}
PAIRS = [(family, method) for family in FAMILIES for method in METHODS if (family, method) not in REFUSED]


def cosine_map(patches, texts, grid):
    return torch.einsum("bnp,tp->btn", F.normalize(patches, dim=-1), F.normalize(texts, dim=-1)).unflatten(-1, grid)


def raw_maps(explainer, pixel_values, texts):
    """Raw maps of a method, `(B, T, h, w)`, and scores `(B, T)`, at one size of images."""
    texts = for_images(texts, len(pixel_values))
    maps, (image,) = Engine(explainer.model, explainer.model.processor, explainer).raw_maps(pixel_values, texts)
    return maps, cosines(image.image_embeds, texts.text_embeds)


def maps_by(given, method="itsm", size=(32, 48), batch=2, *, labels=LABELS, templates=None, **options):
    """An explainer of a model with its processor, encoded labels, and their raw maps in images of noise."""
    explainer = make_explainer(given, method, **options)
    texts = explainer.model.encode_texts(labels, templates)
    return explainer, texts, raw_maps(explainer, pixels(size, batch), texts)[0]


def drawn(made, family, method="itsm", **options):
    """Model and processor of the family, and what `maps_by` returns for them."""
    model, processor, size = made(family)
    return model, processor, *maps_by((model, processor), method, size, **options)
