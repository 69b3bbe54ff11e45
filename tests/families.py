"""Tiny random models of every family that explainers support, for their tests; images are never square."""

import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLIP_TOKENS, FEATURES, TRANSFORMER, VIT, liven, tiny_model
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import (
    Aimv2Config,
    Aimv2Model,
    AltCLIPConfig,
    AltCLIPModel,
    BertConfig,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

from iclip_hf.explainers import METHODS, make_explainer
from iclip_hf.model.batches import for_images
from iclip_hf.model.engine import Engine
from iclip_hf.model.similarity import cosines


LABELS = ["dog", "red ball", "blue car"]
SIZES = [(40, 50), (33, 32), (64, 20)]  # height, width
GRID = (4, 6)


def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def pixels(size=(32, 48), batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def tiny_open_clip(tokenizer, embed_dim=16, **vision):
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")
    text = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}
    if "attentional_pool" in vision:
        text |= {"context_length": 11, "embed_cls": True, "output_tokens": True}
        decoder = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 4, "layers": 1}
        model = open_clip.CoCa(embed_dim, decoder, text, vision)
    else:
        model = open_clip.CLIP(embed_dim=embed_dim, vision_cfg=vision, text_cfg=text)
    cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic"}
    open_clip.set_model_preprocess_cfg(model, cfg)

    def tokenize(texts):
        options = {"padding": "max_length", "max_length": text["context_length"], "truncation": True}
        return tokenizer(texts, return_tensors="pt", **options)["input_ids"]

    return liven(model), tokenize


def tiny_timm(tower: str, tokenizer, **changes):
    """
    A tower of timm of each kind that open_clip's configurations name, in a model of open_clip, and its side in pixels.
    """
    pytest.importorskip("open_clip", reason="needs open_clip_torch")
    from timm.layers import HybridEmbed
    from timm.models import convnext, eva, fastvit, register_model, vision_transformer_relpos, vitamin
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_hybrid import ConvStem

    side = 64 if tower in ("vitamin", "fastvit") else 96 if tower == "convnext" else 32
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": side, "patch_size": 8, **changes}
    rotary = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
    if tower == "siglip":
        build, pool, projection = partial(VisionTransformer, class_token=False, **sizes), "map", "none"
    if tower == "mobileclip":  # with a stem of convolutions, and what the options of timm's blocks may add
        layers = {"channels": (8, 8, 32), "stride": (4, 2, 1), "kernel_size": (4, 2, 1), "padding": 0}
        stem = ConvStem(in_chans=3, act_layer=nn.GELU, **layers)
        options = {"init_values": 0.5, "qk_norm": True, "scale_attn_norm": True, "no_embed_class": True}
        embed = partial(HybridEmbed, backbone=stem, proj=False)
        build = partial(VisionTransformer, embed_layer=embed, **{**sizes, "patch_size": 1}, **options)
        pool, projection = "token", None
    if tower == "eva02":
        options = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, **rotary}
        build, pool, projection = partial(eva.Eva, **sizes, **options), "token", None
    if tower == "eva02_e":
        build, pool, projection = partial(eva.Eva, use_post_norm=True, **sizes), "token", None
    if tower == "pe":
        options = {"attn_type": "rope", "use_pre_transformer_norm": True, "attn_pool_num_heads": 2, **rotary}
        options |= {"attn_pool_mlp_ratio": 4.0, "rope_grid_offset": 1.0, "rope_grid_indexing": "xy"}
        build, pool, projection = partial(eva.Eva, **sizes, **options), "map", None
    if tower == "vitamin":
        layers = vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
        options = {"stem_width": 8, "conv_cfg": layers, "head_type": "1d"}
        stages = vitamin.MbConvStages(vitamin.VitCfg(embed_dim=(8, 16, 32), depths=(1, 1, 2), **options))
        embed = partial(HybridEmbed, backbone=stages, proj=False)
        options = {"mlp_ratio": 2.0, "mlp_layer": vitamin.GeGluMlp, "class_token": False, "pos_embed": "none"}
        build = partial(
            VisionTransformer, embed_layer=embed, global_pool="avg", **{**sizes, "patch_size": 1}, **options
        )
        pool, projection = "", "linear"
    if tower == "relpos":
        options = {"class_token": True, "rel_pos_type": "mlp", "global_pool": "token"}
        build = partial(vision_transformer_relpos.VisionTransformerRelPos, **sizes, **options)
        pool, projection = "", "linear"
    if tower == "convnext":
        build = partial(convnext.ConvNeXt, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
        pool, projection = "", "mlp"
    if tower == "fastvit":
        build = partial(fastvit.FastVit, layers=(1, 1, 1, 1), embed_dims=(8, 16, 32, 64), layer_scale_init_value=0.5)
        pool, projection = "avg", None

    def entry(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options):
        built = build(**options)
        built.default_cfg = built.pretrained_cfg = {"input_size": (3, side, side), "pool_size": None}
        return built

    entry.__name__, entry.__module__ = f"tiny_{tower}", __name__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a second entry of this name
        register_model(entry)
    vision = {"timm_model_name": entry.__name__, "timm_pool": pool, "timm_proj": projection, "image_size": side}
    return *tiny_open_clip(tokenizer, 32 if projection == "none" else 16, **vision), (side, side)


def build(family: str, processor):
    """A model of the family, its processor, and the (height, width) of its input in the tests."""
    torch.manual_seed(5)
    text = {**TRANSFORMER, **CLIP_TOKENS, "eos_token_id": processor.tokenizer.sep_token_id}
    if family == "iclip":
        return tiny_model("dinov2_with_registers"), processor, (32, 48)
    if family == "iclip_features":
        pooled = {"recognition_pooling": "class_and_average", "recognition_share": 0.3}
        return tiny_model("dinov2", **FEATURES, **pooled, map_affinity=3.0), processor, (32, 48)
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
    bert = {**TRANSFORMER, "vocab_size": 64, "pad_token_id": processor.tokenizer.pad_token_id}
    if family == "altclip":
        config = AltCLIPConfig(vision_config=VIT, text_config={**bert, "project_dim": 20}, projection_dim=16)
        model, image_processor = AltCLIPModel(config), CLIPImageProcessor()
    if family == "chinese_clip":
        config = ChineseCLIPConfig(vision_config=VIT, text_config=bert, projection_dim=16)
        model, image_processor = ChineseCLIPModel(config), CLIPImageProcessor()
    if family == "aimv2":
        model = Aimv2Model(Aimv2Config(vision_config=VIT, text_config=text, projection_dim=16))
        model, image_processor = liven(model), CLIPImageProcessor()
        return model, SimpleNamespace(image_processor=image_processor, tokenizer=processor.tokenizer), (32, 32)
    if family.startswith("dual_encoder"):
        vision = ViTConfig(**VIT) if family == "dual_encoder_vit" else CLIPVisionConfig(**VIT)
        sides = vision, BertConfig(**bert)
        config = VisionTextDualEncoderConfig.from_vision_text_configs(*sides, projection_dim=16)
        model, image_processor = VisionTextDualEncoderModel(config), CLIPImageProcessor()
    if family == "open_clip_resnet":
        return *tiny_open_clip(processor.tokenizer, image_size=96, layers=[1] * 4, width=4, head_width=32), (96, 96)
    if family in ("open_clip", "open_clip_avg", "open_clip_coca"):
        vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8}
        if family == "open_clip_avg":
            vision |= {"pool_type": "avg", "final_ln_after_pool": True}
        if family == "open_clip_coca":
            vision |= {
                "attentional_pool": True,
                "attn_pooler_heads": 4,
                "attn_pooler_queries": 5,
                "output_tokens": True,
            }
        return *tiny_open_clip(processor.tokenizer, **vision), (32, 32)
    if family.startswith("open_clip_"):
        return tiny_timm(family.removeprefix("open_clip_"), processor.tokenizer)
    return liven(model), SimpleNamespace(image_processor=image_processor, tokenizer=processor.tokenizer), (32, 48)


ICLIP = ["iclip", "iclip_features"]
FAMILIES = [*ICLIP, "clip", "metaclip_2", "siglip", "siglip2", "tipsv2", "altclip", "chinese_clip", "aimv2"]
FAMILIES += ["dual_encoder", "dual_encoder_vit", "open_clip", "open_clip_avg", "open_clip_coca", "open_clip_resnet"]
CONVOLUTIONAL = ["open_clip_convnext", "open_clip_fastvit"]
FAMILIES += [f"open_clip_{tower}" for tower in ("siglip", "mobileclip", "eva02", "eva02_e", "pe", "vitamin", "relpos")]
FAMILIES += CONVOLUTIONAL
NEED_BLOCKS = ["clip_surgery", "gem", "maskclip", "sclip", "clearclip", "naclip", "proxyclip", "legrad"]
NEED_BLOCKS += ["sc_clip", "resclip"]
NEED_ATTENTION = ["attention", "grad_eclip", "bi_modal"]
OF_POOL = ["clip_surgery", "maskclip"]  # which also replace the attention pool of a ResNet
REFUSED = {("open_clip_resnet", method) for method in NEED_BLOCKS if method not in OF_POOL}
REFUSED |= {(family, method) for family in CONVOLUTIONAL for method in NEED_BLOCKS + NEED_ATTENTION}
REFUSED |= {(family, "attention_affinity") for family in FAMILIES if family not in ICLIP}
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
