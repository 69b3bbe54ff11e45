"""Models of all families: the projection of their patches, their blocks, their texts, and what is refused."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import VISION, tiny_model
from families import CONVOLUTIONAL, FAMILIES, ICLIP, build, liven, pixels, raw_maps, tiny_timm
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    CLIPSegConfig,
    CLIPSegModel,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from iclip_hf import explain, load
from iclip_hf.backends import MODEL_TYPES, check_model_name
from iclip_hf.explainers import METHODS, make_explainer
from iclip_hf.explainers.legrad import _mean_mlp
from iclip_hf.model.outputs import ICLIPTextFeatures


def unit_texts(width):
    embeds = F.normalize(torch.randn(3, width, generator=torch.Generator().manual_seed(3)), dim=-1)
    return ICLIPTextFeatures(text_embeds=embeds, map_text_embeds=embeds)


# Not of ICLIP, whose maps have another projection, and of ResNets, whose attention pool adds positions.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (*ICLIP, "open_clip_resnet")])
def test_a_patch_is_projected_as_the_image(made, family):
    """If all tokens that leave the last block are equal, so are the embeddings of the image and of all patches."""
    given, tokenizer, size = made(family)
    model = load((given, tokenizer))
    blocks = [layer.block for layer in model.layers if layer.residual]
    last = [*model.trunk.children()][-2] if family in CONVOLUTIONAL else blocks[-1]
    token = []

    def constant(module, args, output):
        token.append(output[..., -1, -1] if output.ndim == 4 else output[:, -1])
        return token[0][..., None, None].expand_as(output) if output.ndim == 4 else token[0][:, None].expand_as(output)

    last.register_forward_hook(constant)
    with torch.no_grad():
        image = model.get_image_features(pixels(size))
        projected = F.normalize(model.project(token[0][:, None]), dim=-1)
    expected = image.image_embeds[:, None, None].expand_as(image.patch_embeds)
    torch.testing.assert_close(image.patch_embeds, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(projected[:, 0], image.image_embeds, atol=1e-5, rtol=0)
    assert (image.image_embeds[0] - image.image_embeds[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", [*(family for family in FAMILIES if family not in CONVOLUTIONAL), *VISION])
def test_recorded_blocks_rebuild_their_output(made, tiny_processor, family):
    """Of each family, and of ICLIP with each image tower."""
    *pair, size = (tiny_model(family), tiny_processor, (32, 48)) if family in VISION else made(family)
    model, outputs = load(tuple(pair)), []
    for layer in model.layers:
        layer.block.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        image, records = model.trace(pixels(size), 0, weights=True)
        for layer, record, output in zip(model.layers, records, outputs[: len(records)], strict=True):
            torch.testing.assert_close(record.weights.sum(-1), torch.ones(record.weights.shape[:-1]))
            added = layer.output(record.weights @ record.value)
            if layer.residual:
                stream = record.stream + added
                torch.testing.assert_close(stream + layer.mlp(stream), output, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family not in [*CONVOLUTIONAL, "open_clip_resnet"]]
)
def test_legrads_mean_token_is_that_of_the_blocks(made, family):
    """Also where a norm follows the last linear layer of an MLP, as in EVA02-E."""
    with torch.no_grad():
        for mlp in (layer.mlp for layer in load(made(family)[:2]).layers if layer.residual):
            stream = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
            expected = mlp(stream).mean(1, keepdim=True)
            torch.testing.assert_close(_mean_mlp(mlp)(stream), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["altclip", "chinese_clip", "aimv2", "dual_encoder_vit"])
def test_a_folder_names_its_family(made, family, tmp_path):
    model, parts, size = made(family)
    names = {"altclip": "AltCLIP", "chinese_clip": "ChineseCLIP", "aimv2": "CLIP"}
    processor = getattr(transformers, f"{names.get(family, 'VisionTextDualEncoder')}Processor")
    model.save_pretrained(tmp_path)
    processor(image_processor=parts.image_processor, tokenizer=parts.tokenizer).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = load((model, parts)).get_image_features(pixels(size))
        loaded = load(tmp_path, device="cpu")
        found = loaded.get_image_features(pixels(size))
    templates = ["{}"] if family == "chinese_clip" else ["a photo of the {}"]
    assert loaded.processor.templates == templates  # the default is English
    torch.testing.assert_close(found.patch_embeds, expected.patch_embeds, atol=1e-6, rtol=0)


def test_maps_of_siglip_are_the_same_by_either_library(tiny_processor):
    model, tokenizer, _ = tiny_timm("siglip", tiny_processor.tokenizer)
    own = model.visual.trunk.state_dict()
    weights = {
        "embeddings.patch_embedding.weight": own["patch_embed.proj.weight"],
        "embeddings.patch_embedding.bias": own["patch_embed.proj.bias"],
        "embeddings.position_embedding.weight": own["pos_embed"][0],
        "head.probe": own["attn_pool.latent"],
    }
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for kind in ("weight", "bias"):
        for layer in range(2):
            block, target = f"blocks.{layer}.", f"encoder.layers.{layer}."
            for letter, part in zip("qkv", own[f"{block}attn.qkv.{kind}"].chunk(3)):
                weights[f"{target}self_attn.{letter}_proj.{kind}"] = part
            weights |= {f"{target}{new}.{kind}": own[f"{block}{old}.{kind}"] for old, new in names.items()}
        weights[f"post_layernorm.{kind}"] = own[f"norm.{kind}"]
        query_key_value = [own[f"attn_pool.{name}.{kind}"] for name in ("q", "kv")]
        weights[f"head.attention.in_proj_{kind}"] = torch.cat(query_key_value)
        of_head = {"proj": "attention.out_proj", "norm": "layernorm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        weights |= {f"head.{new}.{kind}": own[f"attn_pool.{old}.{kind}"] for old, new in of_head.items()}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "intermediate_size": 128, "image_size": 32, "patch_size": 8, "hidden_act": "gelu"}
    text = {**sizes, "intermediate_size": 32, "vocab_size": 64, "projection_size": 32}
    other = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
    other.vision_model.load_state_dict(weights)
    other.logit_scale.data, other.logit_bias.data = model.logit_scale.data[None], torch.tensor([-3.0])
    model.logit_bias = nn.Parameter(torch.tensor(-3.0))
    processor = SimpleNamespace(image_processor=SiglipImageProcessor(), tokenizer=tiny_processor.tokenizer)
    pair, texts = [load((model, tokenizer)), load((other, processor))], unit_texts(32)
    torch.testing.assert_close(*(one.presence(torch.tensor([0.1, 0.3])) for one in pair), atol=1e-6, rtol=0)
    assert [one.min_presence for one in pair] == [0, 0]  # the prior of their training hides no mask
    for method in sorted({*METHODS} - {"attention_affinity", "competing_itsm", "proxyclip"}):
        found, expected = (raw_maps(make_explainer(one, method), pixels((32, 32)), texts) for one in pair)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_attention_of_a_mean_is_the_mean_attention_of_the_patches(made):
    model, tokenizer, size = made("open_clip_avg")
    reference, entered = copy.deepcopy(model), []
    block = reference.visual.transformer.resblocks[-1]
    block.ln_1.register_forward_hook(lambda module, args, output: entered.append(output))
    with torch.no_grad():
        reference.encode_image(pixels(size))
        _, weights = block.attn(*entered * 3, need_weights=True)  # the mean of the heads
    maps, _ = raw_maps(make_explainer((model, tokenizer), "attention"), pixels(size), unit_texts(16))
    torch.testing.assert_close(maps[:, 0].flatten(1), weights[:, 1:, 1:].mean(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_the_side_is_a_multiple_of_the_patch(tiny_processor, library):
    """As SigLIP So400m at 384 pixels has patches of 14 pixels, whose convolution skips the last six."""
    if library == "open_clip":
        given = tiny_timm("siglip", tiny_processor.tokenizer, img_size=36)[:2]
        given[0].visual.image_size = (36, 36)
    else:
        model, processor, _ = build("siglip", tiny_processor)
        config = copy.deepcopy(model.config)
        config.vision_config.image_size = 36
        given = liven(SiglipModel(config)), processor
    model = load(given)
    image = torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = explain(model, image, ["dog", "ball"], refine=False)
    assert model.processor.image_processor.size["height"] == 32 and found.raw_maps.shape[1:] == (4, 4)


@pytest.mark.parametrize(("family", "side"), [("aimv2", 32), ("open_clip", 32), ("open_clip_convnext", 96)])
def test_a_model_of_one_size_says_so(made, family, side):
    with pytest.raises(ValueError, match=f"images of {side}x{side} pixels"):
        load(made(family)[:2]).get_image_features(pixels((side, side + 32)))


@pytest.mark.parametrize(
    ("name", "default", "side", "patch"),
    [
        ("ViT-B-16-quickgelu", "naclip", 224, 16),
        ("RN50", "maskclip", 224, 32),
        ("ViT-SO400M-14-SigLIP-384", "naclip", 378, 14),
        ("PE-Core-T-16-384", "naclip", 384, 16),
        ("EVA02-B-16", "naclip", 224, 16),
        ("MobileCLIP2-S3", "itsm", 256, 64),
        ("ViTamin-S", "itsm", 224, 16),
        ("convnext_base_w_320", "itsm", 320, 32),
    ],
)
def test_configurations_of_open_clip(name, default, side, patch):
    """Without weights."""
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")
    config = open_clip.get_model_config(name)
    text = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 4, "layers": 1}
    with torch.device("meta"):
        model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text)
    preprocessing = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
    open_clip.set_model_preprocess_cfg(model, preprocessing)
    loaded = load((model, lambda texts: torch.zeros(len(texts), 12, dtype=torch.long)))
    found = loaded.default_method, loaded.processor.image_processor.size["height"], loaded.processor.patch_size
    assert found == (default, side, patch)


# Texts


def gemma_tokenizer(folder, **options):
    """A tokenizer as SigLIP2's folders have it, with two words in lower and in upper case."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary = {word: index for index, word in enumerate([*words, *sorted({*"EiffelTower.eiffeltower▁"})])}
    merges = []
    for word in ("Eiffel", "Tower", "eiffel", "tower"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens(words)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    settings = {"add_bos_token": False, "add_eos_token": True, "model_max_length": 64, **tokens, **options}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


@pytest.mark.parametrize(
    ("kind", "declared", "saved_again"),
    [("siglip", "GemmaTokenizer", True), ("siglip2", "GemmaTokenizer", False), ("siglip2", "Siglip2Tokenizer", True)],
)
def test_texts_of_siglip_are_the_same_by_either_library(tmp_path, kind, declared, saved_again):
    """Whatever tokenizer a folder names, and with the left padding and the mask that it has when it is saved again."""
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")
    of_training = {"padding_side": "right", "model_input_names": ["input_ids"]}
    size = gemma_tokenizer(tmp_path / "open_clip", tokenizer_class="GemmaTokenizer", **of_training)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": size, "max_position_embeddings": 12, "projection_size": 24}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    if kind == "siglip":
        vision = {**sizes, "image_size": 32, "patch_size": 8}
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
        image_processor = SiglipImageProcessor()
    else:
        vision = {**sizes, "num_patches": 16, "patch_size": 8}
        model = Siglip2Model(Siglip2Config(vision_config=vision, text_config=text))
        image_processor = Siglip2ImageProcessor(patch_size=8)
    folder = tmp_path / "transformers"
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    processor = {"siglip": "SiglipProcessor", "siglip2": "Siglip2Processor"}[kind]
    options = {"tokenizer_class": declared, "processor_class": processor}
    gemma_tokenizer(folder, **options, **({} if saved_again else of_training))

    texts = ["Eiffel Tower.", "the  TOWER, eiffel"]
    inputs = load(folder, device="cpu").processor(labels=texts, templates=["{}"])
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path / "open_clip"), context_length=12, clean="canonicalize")
    assert inputs["input_ids"].tolist() == tokenizer(texts).tolist() and "attention_mask" not in inputs


def test_a_text_tower_like_roberta_counts_its_positions_from_the_padding(tiny_processor, caplog):
    """A text of 20 tokens is cut to the 18 that remain of 20 positions."""
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 64, "max_position_embeddings": 20, "pad_token_id": 1, "project_dim": 24}
    model, processor, _ = build("clip", tiny_processor)
    config = AltCLIPConfig(vision_config=model.config.vision_config.to_dict(), text_config=text, projection_dim=16)
    loaded = load((AltCLIPModel(config).eval(), processor))
    assert loaded.encode_texts(["dog " * 30]).text_embeds.isfinite().all() and "18 tokens" in caplog.text


# What is refused


def test_models_that_cannot_be_explained_say_why(tmp_path, tiny_processor):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 1}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = CLIPSegModel(CLIPSegConfig(text_config=text, vision_config=vision, extract_layers=[0]))
    with pytest.raises(TypeError, match="CLIPSegModel .*openai/clip-vit-base-patch16"):
        load((model, tiny_processor))
    model.save_pretrained(tmp_path)
    for types in (MODEL_TYPES, ("iclip",)):
        with pytest.raises(ValueError, match="type clipseg"):
            check_model_name(str(tmp_path), types)


@pytest.mark.parametrize("part", ["gamma_1", "gate"])
def test_blocks_of_timm_that_cannot_be_recorded_are_refused(tiny_processor, part):
    model, tokenizer, _ = tiny_timm("eva02", tiny_processor.tokenizer)
    block = model.visual.trunk.blocks[-1]
    setattr(block if part == "gamma_1" else block.attn, part, nn.Parameter(torch.ones(32)))
    with pytest.raises(TypeError, match="EvaBlock of timm"):
        load((model, tokenizer))
