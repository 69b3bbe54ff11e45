"""Methods on the last blocks beyond the maps of `test_golden_maps.py`: their options, proxies and towers."""

import copy

import pytest
import torch
from conftest import VISION, save, tiny_model
from families import GRID, LABELS, cosine_map, drawn, maps_by, pixels, raw_maps
from torch.nn import functional as F
from transformers import AutoConfig, BitImageProcessor
from transformers.modeling_layers import GradientCheckpointingLayer

from iclip_hf.explainers import make_explainer
from iclip_hf.explainers.legrad import _mean_mlp
from iclip_hf.explainers.proxyclip import proxy_weights
from iclip_hf.model.engine import Engine
from iclip_hf.model.tower_loading import load_tower


@pytest.mark.parametrize("method", ["maskclip", "sclip", "clearclip", "naclip"])
def test_the_rest_of_the_block_is_kept_if_asked_for(made, method):
    """The golden maps have only some methods both ways."""
    kept, replaced = (drawn(made, "clip", method, residual=residual)[-1] for residual in (True, False))
    assert (kept - replaced).abs().max() > 0.1


# ProxyCLIP


@pytest.mark.parametrize("vision", ["vit", "dinov2_with_registers", "dinov3_vit"])
def test_the_proxy_sees_pixels_as_in_its_own_training(made, vision, tmp_path):
    """Those of CLIP with the normalisation of the proxy, which is asked for CLIP's grid."""
    model, processor, _ = made("clip")
    proxy, imagenet = tiny_model(vision).vision_model, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    save(tmp_path, proxy, BitImageProcessor(image_mean=imagenet[0], image_std=imagenet[1]))
    explainer = make_explainer((model, processor), "proxyclip", proxy=str(tmp_path))
    clip = processor.image_processor.image_mean, processor.image_processor.image_std
    (mean, std), (own_mean, own_std) = (torch.tensor(one).view(2, 3, 1, 1) for one in (clip, imagenet))
    options = {"interpolate_pos_encoding": True} if vision == "vit" else {}
    with torch.no_grad():
        tokens = proxy((pixels() * std + mean - own_mean) / own_std, **options).last_hidden_state[:, -24:]
    found = explainer._proxy_tokens(pixels())
    torch.testing.assert_close(found, tokens.unflatten(1, GRID), atol=1e-5, rtol=1e-4)


def test_proxyclip_of_iclip_is_guided_by_its_own_tower(made):
    model, processor, _ = made("iclip")
    explainer = make_explainer((model, processor), "proxyclip")
    texts = explainer.model.encode_texts(LABELS)
    with torch.no_grad():
        image, (record,) = explainer.model.trace(pixels(), -1)
        maps = raw_maps(explainer, pixels(), texts)[0]
        weights = proxy_weights(F.normalize(image.patch_tokens, dim=-1), explainer.beta, explainer.gamma)
        mixed = explainer.model.layers[-1].output(weights @ record.value[:, :, -24:])
    expected = cosine_map(explainer.model.project(mixed), texts.map_text_embeds, GRID)
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("num_patches", [1, 5])
def test_a_patch_attends_to_itself_alone_if_all_patches_are_alike(num_patches):
    """All similarities are then below 1.2 times their mean, so that without the patch itself no weight is left."""
    weights = proxy_weights(torch.tensor([0.6, 0.8]).expand(1, num_patches, 2), 1.2, 3.0)
    torch.testing.assert_close(weights, torch.eye(num_patches)[None, None])


@pytest.mark.parametrize("family", ["clip", "iclip"])
@pytest.mark.parametrize("multi_scale", [False, True])
def test_maps_of_proxyclip_have_the_grid_of_the_proxy(made, multi_scale, family):
    """Of patches of 5 pixels in images of 32x48; patches that are all alike keep their own values."""
    model, processor, _ = made(family)
    proxy, seen = copy.deepcopy(tiny_model("dinov2").vision_model), []
    explainer = make_explainer((model, processor), "proxyclip")
    explainer.proxy, explainer.proxy_processor = proxy, processor.image_processor
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
            _, (record,) = explainer.model.trace(pixels())
            own = record.value[:, :, -24:].transpose(2, 3).flatten(1, 2).unflatten(-1, GRID)
            mixed = F.interpolate(own, (6, 10), mode="bilinear").flatten(2).mT.unflatten(-1, (4, -1)).transpose(1, 2)
            patches = explainer.model.project(explainer.model.layers[-1].output(mixed))
        expected = cosine_map(patches, texts.map_text_embeds, (6, 10))
        torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-4)


def test_the_proxy_is_an_image_tower_or_that_of_a_two_tower_model(made, tmp_path):
    model, processor, _ = made("clip")
    proxies = {"one": model.vision_model, "both": model}
    tower, own = (
        maps_by((model, processor), "proxyclip", proxy=str(save(tmp_path / name, proxy, processor.image_processor)))[2]
        for name, proxy in proxies.items()
    )
    torch.testing.assert_close(tower, own)
    save(tmp_path / "text", model.text_model)
    save(tmp_path / "siglip", made("siglip")[0])
    for name in ("text", "siglip"):
        with pytest.raises(ValueError, match=f"{name}: a proxy is one of .*dinov2.*, not '"):
            make_explainer((model, processor), "proxyclip", proxy=str(tmp_path / name))
    with pytest.raises(OSError, match=f"^{tmp_path}/absent: "):
        make_explainer((model, processor), "proxyclip", proxy=str(tmp_path / "absent"))


# LeGrad and Grad-ECLIP


@pytest.mark.parametrize(("vision", "option"), [("dinov2", "use_swiglu_ffn"), ("dinov3_vit", "use_gated_mlp")])
def test_legrads_mean_token_of_a_gated_mlp(vision, option):
    """Its last layer is linear too, and the mean may come before it. `test_families.py` has the other towers."""
    tower = load_tower(AutoConfig.for_model(**VISION[vision], **{option: True}))
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
    features, (record,) = explainer.model.trace(pixels(batch=1), -1, grad=True)
    logit = explainer.model.logits(features.image_embeds[0] @ texts.text_embeds[0])
    (gradient,) = torch.autograd.grad(logit, record.mixed)
    expected = torch.zeros(25)
    for query in range(25):
        for token in range(25):
            given = 0.0
            for head in range(4):
                weight = (record.query[0, head, query] @ record.key[0, head].T / 8**0.5).softmax(-1)[token]
                if query > 0:
                    weight = (1 - share) * weight + share * (token == query)
                given += weight * (gradient[0, head, query] @ record.value[0, head, token])
            expected[token] += max(0.0, given.item())
    torch.testing.assert_close(maps[0, 0].flatten(), expected[1:], atol=1e-5, rtol=1e-3)
