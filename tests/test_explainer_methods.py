"""Methods on the last blocks against loops over tokens and heads, and what they have in common."""

import copy
import math

import pytest
import torch
from conftest import VISION, tiny_model
from families import GRID, LABELS, cosine_map, drawn, maps_by, pixels, raw_maps
from torch.nn import functional as F
from transformers import AutoConfig, BitImageProcessor
from transformers.modeling_layers import GradientCheckpointingLayer

from iclip_hf.explainers import make_explainer
from iclip_hf.explainers.legrad import _mean_mlp
from iclip_hf.model.engine import Engine
from iclip_hf.model.tower_loading import load_tower


@torch.no_grad()
def mixed_in_last_block(model, image, weights, keep_block=False):
    """
    Unit vectors of the patches of CLIP, where token i of each head of the last block gets sum_j w_ij v_j.

    Args:
        weights: function of one head's queries, keys and values `(L, D / H)` and the tokens i and j; i gives all w_ij.
    """
    hidden = model.vision_model(image, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-2][0]
    layer = model.vision_model.encoder.layers[-1]
    attention, seen = layer.self_attn, layer.layer_norm1(hidden)
    heads = []
    for q, k, v in zip(*(p(seen).chunk(4, -1) for p in (attention.q_proj, attention.k_proj, attention.v_proj))):
        rows = [sum(w * v[j] for j, w in enumerate(weights(q, k, v, i))) for i in range(len(v))]
        heads.append(torch.stack(rows))
    stream = attention.out_proj(torch.cat(heads, -1))
    if keep_block:
        stream = hidden + stream
        stream = stream + layer.mlp(layer.layer_norm2(stream))
    return F.normalize(model.visual_projection(model.vision_model.post_layernorm(stream[1:])), dim=-1)


def softmax(logits):
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def self_self(tokens, i, raised=lambda i, j: 0.0):
    return softmax([(tokens[i] @ other / 8**0.5).item() + raised(i, j) for j, other in enumerate(tokens)])


def near(i, j, sigma):
    """The window of NACLIP. Token 0 is the class token."""
    if 0 in (i, j):
        return 0.0
    (y, x), (v, u) = divmod(i - 1, GRID[1]), divmod(j - 1, GRID[1])
    return math.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * sigma**2))


def maskclip(q, k, v, i):
    return [float(i == j) for j in range(len(v))]


def sclip(q, k, v, i):
    return [a + b for a, b in zip(self_self(q, i), self_self(k, i))]


def clearclip(q, k, v, i):
    return self_self(q, i)


def keys(q, k, v, i):
    return self_self(k, i)


def naclip(q, k, v, i):
    return self_self(k, i, lambda i, j: near(i, j, 1.5))


@pytest.mark.parametrize(
    ("method", "weights", "options", "kept"),
    [
        ("maskclip", maskclip, {}, True),
        ("maskclip", maskclip, {"residual": False}, False),
        ("sclip", sclip, {}, True),
        ("sclip", sclip, {"residual": False}, False),
        ("clearclip", clearclip, {}, False),
        ("clearclip", keys, {"tokens": "key"}, False),
        ("naclip", naclip, {"sigma": 1.5}, False),
        ("naclip", keys, {"sigma": None}, False),
    ],
)
def test_the_last_block_token_by_token(made, method, weights, options, kept):
    model, processor, _ = made("clip")
    _, texts, maps = maps_by((model, processor), method, templates=["{}"], **options)
    for image in range(2):
        expected = texts.text_embeds @ mixed_in_last_block(model, pixels()[image, None], weights, kept).T
        torch.testing.assert_close(maps[image].flatten(1), expected, atol=1e-5, rtol=1e-3)


# ProxyCLIP


def proxy_weights(tokens, beta=1.2, gamma=3.0):
    """Row i: softmax over the patches j with gamma (s_ij - beta mean) of at least 0."""
    tokens = F.normalize(tokens, dim=-1)
    similarity = [[(a @ b).item() for b in tokens] for a in tokens]
    mean = sum(map(sum, similarity)) / len(tokens) ** 2
    rows = []
    for i, row in enumerate(similarity):
        logits = [gamma * (s - beta * mean) for s in row]
        kept = [math.exp(logit) if logit >= 0 or i == j else 0.0 for j, logit in enumerate(logits)]
        rows.append([0.0] + [one / sum(kept) for one in kept])  # nothing of the class token
    return rows


def proxied(model, texts, image, rows):
    patches = mixed_in_last_block(model, image, lambda q, k, v, i: rows[i - 1] if i else [0.0] * len(v))
    return (texts @ patches.T).unflatten(-1, GRID)


@pytest.mark.parametrize("vision", ["vit", "dinov2_with_registers", "dinov3_vit"])
def test_proxyclip_patch_by_patch(made, vision, tmp_path):
    """A DINO tower with its own normalisation and patch size guides CLIP: it is asked for CLIP's grid."""
    model, processor, _ = made("clip")
    proxy = tiny_model(vision).vision_model
    proxy.save_pretrained(tmp_path)
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    BitImageProcessor(image_mean=imagenet[0], image_std=imagenet[1]).save_pretrained(tmp_path)
    _, texts, maps = maps_by((model, processor), "proxyclip", templates=["{}"], proxy=str(tmp_path))
    statistics = processor.image_processor
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (statistics.image_mean, statistics.image_std))
    imagenet = [torch.tensor(x).view(3, 1, 1) for x in imagenet]
    for index in range(2):
        photo = pixels()[index, None] * std + mean
        with torch.no_grad():
            options = {"interpolate_pos_encoding": True} if vision == "vit" else {}
            tokens = proxy((photo - imagenet[0]) / imagenet[1], **options).last_hidden_state[0, -24:]
        expected = proxied(model, texts.text_embeds, pixels()[index, None], proxy_weights(tokens))
        torch.testing.assert_close(maps[index], expected, atol=1e-5, rtol=1e-3)


def test_proxyclip_of_iclip_is_guided_by_its_own_tower(made):
    model, processor, _ = made("iclip")
    explainer = make_explainer((model, processor), "proxyclip")
    texts = explainer.model.encode_texts(LABELS)
    with torch.no_grad():
        image, (layer,) = explainer.model.trace(pixels(), -1)
        maps = raw_maps(explainer, pixels(), texts)[0]
        for index in range(2):
            rows = torch.tensor(proxy_weights(image.patch_tokens[index]))[:, 1:]
            mixed = explainer.model.layers[-1].output(rows[None] @ layer.value[index, None, :, -24:])
            expected = cosine_map(explainer.model.project(mixed), texts.map_text_embeds, GRID)
            torch.testing.assert_close(maps[index, None], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("multi_scale", [False, True])
def test_maps_of_proxyclip_have_the_grid_of_the_proxy(made, multi_scale):
    """Of patches of 5 pixels in images of 32x48; patches that are all alike keep their own values."""
    model, processor, _ = made("clip")
    proxy, seen = copy.deepcopy(tiny_model("dinov2").vision_model), []
    explainer = make_explainer((model, processor), "proxyclip")
    explainer.proxy = proxy
    proxy.config.patch_size = 5

    def forward(pixel_values):
        seen.append(tuple(pixel_values.shape))
        tokens = torch.eye(61).expand(len(pixel_values), -1, -1)  # none resembles another
        return type("Output", (), {"last_hidden_state": tokens})

    proxy.forward = forward
    texts = explainer.model.encode_texts(LABELS, ["{}"])
    engine = Engine(explainer.model, explainer.model.processor, explainer, multi_scale=multi_scale)
    maps, _ = engine.raw_maps(pixels((64, 96) if multi_scale else (32, 48)), texts)
    assert {*seen} == {(2, 3, 30, 50)} and maps.shape[2:] == ((8, 12) if multi_scale else (6, 10))
    if not multi_scale:
        with torch.no_grad():
            _, (layer,) = explainer.model.trace(pixels())
            own = layer.value[:, :, 1:].transpose(2, 3).flatten(1, 2).unflatten(-1, GRID)
            mixed = F.interpolate(own, (6, 10), mode="bilinear").flatten(2).mT.unflatten(-1, (4, -1)).transpose(1, 2)
            patches = explainer.model.project(explainer.model.layers[-1].output(mixed))
        expected = cosine_map(patches, texts.text_embeds, (6, 10))
        torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-4)


def test_the_proxy_is_an_image_tower_or_that_of_a_two_tower_model(made, tmp_path):
    model, processor, _ = made("clip")
    model.save_pretrained(tmp_path / "both")
    model.vision_model.save_pretrained(tmp_path / "one")
    for name in ("both", "one"):
        processor.image_processor.save_pretrained(tmp_path / name)
    tower, own = (maps_by((model, processor), "proxyclip", proxy=str(tmp_path / name))[2] for name in ("one", "both"))
    torch.testing.assert_close(tower, own)
    model.text_model.save_pretrained(tmp_path / "text")
    made("siglip")[0].save_pretrained(tmp_path / "siglip")
    for name in ("text", "siglip"):
        with pytest.raises(ValueError, match=f"{name}: a proxy is one of .*dinov2.*, not '"):
            make_explainer((model, processor), "proxyclip", proxy=str(tmp_path / name))


# LeGrad and Grad-ECLIP


@pytest.mark.parametrize("depth", [1, 2])
def test_legrad_on_transformers_eager_attention(made, depth):
    """An image, a text and a block at a time, by the attention weights that transformers itself returns."""
    model, processor, explainer, texts, maps = drawn(made, "clip", "legrad", depth=depth, templates=["{}"])
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    for image in range(2):
        outputs = reference.vision_model(
            pixels()[image, None], interpolate_pos_encoding=True, output_attentions=True, output_hidden_states=True
        )
        for text in range(3):
            expected = torch.zeros(24)
            for tokens, weights in list(zip(outputs.hidden_states[1:], outputs.attentions))[-depth:]:
                token = reference.vision_model.post_layernorm(tokens[0].mean(0))
                score = F.cosine_similarity(reference.visual_projection(token), texts.text_embeds[text], dim=0)
                (gradient,) = torch.autograd.grad(score, weights, retain_graph=True)  # (1, heads, L, L)
                for head in range(4):
                    for query in range(25):
                        expected += gradient[0, head, query, 1:].clamp(min=0) / 100
            torch.testing.assert_close(maps[image, text].flatten(), expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("vision", ["vit", "dinov2", "dinov3_vit", "clip_vision_model"])
@pytest.mark.parametrize("gated", [False, True])
def test_legrads_mean_token_is_that_of_the_block(vision, gated):
    """Also of gated MLPs: their last layer is linear too, and the mean may come before it."""
    if gated and not vision.startswith("dino"):
        pytest.skip("has no gated MLP")
    tower = load_tower(AutoConfig.for_model(**{**VISION[vision], "use_swiglu_ffn": gated, "use_gated_mlp": gated}))
    block = [module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer)][-1]
    stream = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = torch.stack([block.mlp(stream[:, n]) for n in range(5)]).mean(0)
        torch.testing.assert_close(_mean_mlp(block.mlp)(stream)[:, 0], expected, atol=1e-6, rtol=1e-5)
        assert block.mlp(stream).shape == stream.shape


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank adapter, as PEFT builds it."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.base_layer = layer
        self.lora_A = torch.nn.Linear(layer.in_features, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, layer.out_features, bias=False)

    def forward(self, tokens):
        return self.base_layer(tokens) + self.lora_B(self.lora_A(tokens))


@torch.no_grad()
@pytest.mark.parametrize("names", [["fc1"], ["fc2"], ["fc1", "fc2"]])
def test_legrads_mean_token_with_adapters(names):
    torch.manual_seed(0)
    mlp = load_tower(AutoConfig.for_model(**VISION["clip_vision_model"])).encoder.layers[0].mlp
    for name in names:
        setattr(mlp, name, Adapted(getattr(mlp, name)))
    stream = torch.randn(2, 5, 32)
    torch.testing.assert_close(_mean_mlp(mlp)(stream), mlp(stream).mean(1, keepdim=True), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["clip", "metaclip_2", "iclip"])
def test_grad_eclip_channel_by_channel(made, family):
    model, processor, explainer, texts, maps = drawn(made, family, "grad_eclip", templates=["{}"])
    adapter = explainer.model
    for image in range(2):
        features, (layer,) = adapter.trace(pixels()[image, None], -1, grad=True)
        for text in range(3):
            logit = adapter.logits(features.image_embeds[0] @ texts.text_embeds[text])
            (gradient,) = torch.autograd.grad(logit, layer.mixed, retain_graph=True)
            # all of the class token, its channels head by head
            importance, query = (one[0, :, 0].flatten() for one in (gradient, layer.query))
            spatial = [F.cosine_similarity(query, layer.key[0, :, n].flatten(), dim=0).item() for n in range(-24, 0)]
            low, high = min(spatial), max(spatial)
            expected = [
                max(0.0, (importance @ layer.value[0, :, n].flatten()).item()) * (spatial[n] - low) / (high - low)
                for n in range(-24, 0)
            ]
            torch.testing.assert_close(maps[image, text].flatten(), torch.tensor(expected), atol=1e-5, rtol=1e-3)
            if family != "iclip":  # the score reads the class token alone
                assert gradient[0, :, 1:].abs().max() == 0


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"pooling": "average", "dual_projection": False}, 0.0),
        ({"recognition_pooling": "class_and_average", "value_share": 0.25}, 0.25),
    ],
)
def test_grad_eclip_sums_over_the_patches_that_a_score_pools(tiny_processor, options, share):
    model = tiny_model(**options)
    explainer, texts, maps = maps_by((model, tiny_processor), "grad_eclip", batch=1)
    features, (layer,) = explainer.model.trace(pixels(batch=1), -1, grad=True)
    logit = explainer.model.logits(features.image_embeds[0] @ texts.text_embeds[0])
    (gradient,) = torch.autograd.grad(logit, layer.mixed)
    expected = torch.zeros(25)
    for query in range(25):
        for token in range(25):
            given = 0.0
            for head in range(4):
                weight = (layer.query[0, head, query] @ layer.key[0, head].T / 8**0.5).softmax(-1)[token]
                if query > 0:
                    weight = (1 - share) * weight + share * (token == query)
                given += weight * (gradient[0, head, query] @ layer.value[0, head, token])
            expected[token] += max(0.0, given.item())
    torch.testing.assert_close(maps[0, 0].flatten(), expected[1:], atol=1e-5, rtol=1e-3)
