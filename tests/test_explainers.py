"""
Explainers against slow independent implementations, on tiny random models of every family; images are never square.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
import torchvision
from conftest import explain, tiny_model
from families import (
    CONVOLUTIONAL,
    FAMILIES,
    GRID,
    ICLIP,
    LABELS,
    PAIRS,
    REFUSED,
    cosine_map,
    drawn,
    images,
    maps_by,
    pixels,
    raw_maps,
)
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import Siglip2ImageProcessor

from iclip_hf.backends.embedded import vocabulary
from iclip_hf.backends.loading import load
from iclip_hf.explainers import METHODS, make_explainer
from iclip_hf.explainers.replaced_attention import ReplacedAttention
from iclip_hf.model.batches import for_images
from iclip_hf.model.engine import Engine
from iclip_hf.model.outputs import ICLIPTextFeatures
from iclip_hf.model.similarity import cosines, min_max_normalize


# What every method keeps, for every family


def snapshot(model):
    modules = [
        (name, type(one), one.training, len(one._forward_hooks), len(one._forward_pre_hooks), set(vars(one)))
        for name, one in model.named_modules()
    ]
    tensors = [
        (name, tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.grad)
        for name, tensor in model.named_parameters()
    ]
    return modules, tensors, copy.deepcopy(model.config.to_dict()) if hasattr(model, "config") else None


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_batch_order_and_texts_do_not_matter_and_the_model_stays_as_it_was(made, family, method):
    model, processor, size = made(family)
    model.train()
    given = snapshot(model)
    explainer = make_explainer((model, processor), method)
    texts, pixel_values = explainer.model.encode_texts(LABELS, ["{}"]), pixels(size)
    before = pixel_values.clone()
    with pytest.raises((ValueError, RuntimeError)):  # after which nothing is left of what was being recorded
        raw_maps(explainer, torch.zeros(1, 4, *size), texts)
    maps, scores = raw_maps(explainer, pixel_values, texts)
    assert maps.dtype == scores.dtype == torch.float32 and not maps.requires_grad and not scores.requires_grad
    assert maps.shape[:2] == scores.shape == (2, 3) and scores.abs().max() <= 1 + 1e-6
    assert maps.std() > 0  # a live map, or comparing would prove nothing
    assert (maps != maps[:, :1]).any() == explainer.sees_text and not torch.equal(maps[0], maps[1])
    assert torch.equal(pixel_values, before)

    for index in range(2):
        single, score = raw_maps(explainer, pixel_values[index : index + 1], texts)
        torch.testing.assert_close(single[0], maps[index], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(score[0], scores[index], atol=1e-5, rtol=1e-4)

    order = [2, 0, 1]  # of the texts of the second image
    own = ICLIPTextFeatures(
        text_embeds=torch.stack([texts.text_embeds, texts.text_embeds[order]]),
        map_text_embeds=torch.stack([texts.map_text_embeds, texts.map_text_embeds[order]]),
    )
    different, score = raw_maps(explainer, pixel_values, own)
    torch.testing.assert_close(different, torch.stack([maps[0], maps[1, order]]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(score, torch.stack([scores[0], scores[1, order]]), atol=1e-5, rtol=1e-4)

    assert snapshot(model) == given
    of_evaluation = make_explainer((model.eval(), processor), method)
    torch.testing.assert_close(raw_maps(of_evaluation, pixel_values, texts)[0], maps)


# One method that encodes the image, one that records its layers, and one that differentiates.
@pytest.mark.parametrize(
    ("family", "method"), [pair for pair in PAIRS if pair[1] in ("itsm", "attention", "bi_modal")]
)
def test_scores_are_the_models_own(made, family, method):
    model, processor, size = made(family)
    explainer = make_explainer((model, processor), method)
    pixel_values = pixels(size)
    texts = [f"a photo of the {label}" for label in LABELS]
    with torch.no_grad():
        if family.startswith("open_clip"):
            image, text = model.encode_image(pixel_values), model.encode_text(processor(texts))
        else:
            padding = {"padding": "max_length", "max_length": 77} if "siglip" in family else {"padding": True}
            tokens = processor.tokenizer(texts, return_tensors="pt", **padding)
            if "siglip" in family:
                del tokens["attention_mask"]
            text = model.get_text_features(**tokens).pooler_output
            if family == "siglip2":
                patches, mask, shapes = naflex(pixel_values)
                image = model.get_image_features(patches, mask, shapes).pooler_output
            else:
                options = {} if family in (*ICLIP, "aimv2") else {"interpolate_pos_encoding": True}
                image = model.get_image_features(pixel_values, **options).pooler_output
        expected = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    scores = raw_maps(explainer, pixel_values, explainer.model.encode_texts(LABELS, ["a photo of the {}"]))[1]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["iclip", "clip", "siglip", "tipsv2", "aimv2", "dual_encoder"])
def test_logits_are_the_models_own(made, family):
    """With their scale, which the probabilities of deletion and insertion depend on."""
    model, processor, size = made(family)
    padding = {"padding": "max_length", "max_length": 77} if family == "siglip" else {"padding": True}
    tokens = processor.tokenizer(LABELS, return_tensors="pt", **padding)
    own = {} if family in ("iclip", "tipsv2", "aimv2", "dual_encoder") else {"interpolate_pos_encoding": True}
    if family == "aimv2":
        model = copy.deepcopy(model)
        model.logit_scale.data.fill_(5.0)  # above its limit
    with torch.no_grad():
        size = (32, 32) if family == "dual_encoder" else size
        outputs = model(pixel_values=pixels(size), **tokens, **own)
        embeds = [F.normalize(outputs[name], dim=-1) for name in ("image_embeds", "text_embeds")]
    logits = load((model, processor)).logits(embeds[0] @ embeds[1].T).detach()
    torch.testing.assert_close(logits, outputs.logits_per_image, atol=1e-4, rtol=1e-4)


def naflex(pixel_values):
    """Patches as Siglip2ImageProcessor cuts them, which wants the images one by one and pads."""
    processor = Siglip2ImageProcessor(
        patch_size=8, max_num_patches=24, do_resize=False, do_rescale=False, do_normalize=False
    )
    batch = processor(list(pixel_values), return_tensors="pt")
    return batch["pixel_values"], batch["pixel_attention_mask"], batch["spatial_shapes"]


# Each method against a slow implementation of its own


@pytest.mark.parametrize("vision", ["vit", "dinov2_with_registers", "dinov3_vit"])
def test_itsm_of_iclip_is_the_models_map(vision, tiny_processor):
    model = tiny_model(vision, value_share=0.5)
    explainer = make_explainer((model, tiny_processor))
    texts = tiny_processor(labels=LABELS)
    maps, scores = raw_maps(explainer, pixels(), explainer.model.encode_texts(LABELS))
    with torch.no_grad():
        outputs = model(pixel_values=pixels(), **texts, output_similarity_maps=True)
    torch.testing.assert_close(maps, outputs.similarity_maps)
    recorded, _ = explainer.model.trace(pixels(), weights=True)
    torch.testing.assert_close(recorded.patch_embeds, outputs.patch_embeds)
    torch.testing.assert_close(scores, outputs.image_embeds @ outputs.text_embeds.T)


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_itsm_of_siglip_is_the_head_on_each_patch_alone(made, family):
    model, processor, explainer, texts, maps = drawn(made, family)
    with torch.no_grad():
        if family == "siglip":
            tokens = model.vision_model(pixels(), interpolate_pos_encoding=True).last_hidden_state
        else:
            tokens = model.vision_model(*naflex(pixels())).last_hidden_state
        patches = torch.stack([model.vision_model.head(tokens[:, n : n + 1]) for n in range(24)], 1)
    torch.testing.assert_close(maps, cosine_map(patches, texts.text_embeds, GRID), atol=1e-5, rtol=0)


def eager(model):
    """A copy whose every attention returns its weights, within the graph."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return model


def test_attention_of_clip_is_the_class_tokens_row(made):
    model, processor, explainer, texts, maps = drawn(made, "clip", "attention")
    with torch.no_grad():
        outputs = eager(model).vision_model(pixels(), interpolate_pos_encoding=True, output_attentions=True)
    expected = outputs.attentions[-1].mean(1)[:, 0, 1:].unflatten(-1, GRID)
    torch.testing.assert_close(maps, expected[:, None].expand(2, 3, *GRID), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "attention"), [("attention", "attention"), ("attention_affinity", "map_attention")]
)
def test_attention_of_iclip_is_its_own(method, attention, tiny_processor):
    model = tiny_model(attention_norm="quantile", map_affinity=3.0)
    _, _, maps = maps_by((model, tiny_processor), method)
    with torch.no_grad():
        expected = model.get_image_features(pixels())[attention].unflatten(-1, GRID)
    torch.testing.assert_close(maps, expected[:, None].expand(-1, len(LABELS), -1, -1), atol=1e-5, rtol=0)


def test_grad_cam_of_a_resnet_weighs_its_last_feature_map(made):
    model, tokenizer, size = made("open_clip_resnet")
    model = copy.deepcopy(model).double()  # its channels cancel to a fraction of their size
    _, texts, maps = maps_by((model, tokenizer), "grad_cam", size)
    visual = model.visual
    features = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels(size).double())))))
    logits = model.logit_scale.exp() * F.normalize(visual.attnpool(features), dim=-1) @ texts.text_embeds.T.double()
    for text in range(3):
        (gradient,) = torch.autograd.grad(logits[:, text].sum(), features, retain_graph=True)
        expected = (features * gradient.mean((2, 3), keepdim=True)).sum(1).relu()
        torch.testing.assert_close(maps[:, text].double(), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "one_row"),
    [
        ({"pooling": "average", "dual_projection": False}, False),
        ({"pooling": "class_token", "dual_projection": False}, True),
        ({"recognition_pooling": "class_and_average"}, False),
        ({}, True),
    ],
)
def test_bi_modal_adds_the_rows_of_all_tokens_that_the_score_reads(options, one_row, tiny_processor):
    """On transformers' own eager attention; the score is made from the tower's output here."""
    model = tiny_model(**options)
    _, texts, maps = maps_by((model, tiny_processor), "bi_modal")
    reference = eager(model)
    reference.vision_model.requires_grad_(True)
    outputs = reference.vision_model(pixels()[:1], interpolate_pos_encoding=True, output_attentions=True)
    class_token, average = outputs.last_hidden_state[:, 0], outputs.last_hidden_state[:, 1:].mean(1)
    pooled = average if options.get("pooling") == "average" else class_token
    pooled = torch.cat([class_token, average], 1) if "recognition_pooling" in options else pooled
    embed = F.normalize(reference.recognition.visual_projection(pooled)[0], dim=-1)
    logit = reference.recognition(embed @ texts.text_embeds[0])
    attention = outputs.attentions[-1]
    (gradient,) = torch.autograd.grad(logit, attention)
    relevance = torch.eye(25) + (attention * gradient)[0].clamp(min=0).mean(0)
    expected = relevance[0] if one_row else relevance.sum(0)
    torch.testing.assert_close(maps[0, 0].flatten(), expected[1:], atol=1e-5, rtol=1e-3)


def test_bi_modal_of_a_pooling_head_follows_finite_differences(made):
    """The head alone in float64, its weights moved one by one."""
    model, processor, size = made("siglip")
    _, texts, maps = maps_by((model, processor), "bi_modal", size, 1, labels=LABELS[:1])
    text = texts.text_embeds[0].double()
    with torch.no_grad():
        head = copy.deepcopy(model.vision_model.head).double()
        tokens = model.vision_model(pixels(size, 1), interpolate_pos_encoding=True).last_hidden_state.double()
        attention = head.attention
        weights = attention(head.probe, tokens, tokens, average_attn_weights=False)[1][0, :, 0]  # (heads, L)
        value = F.linear(tokens[0], *(p.chunk(3)[2] for p in (attention.in_proj_weight, attention.in_proj_bias)))

        def logit(weights):
            pooled = attention.out_proj(torch.cat([w @ v for w, v in zip(weights, value.chunk(len(weights), dim=1))]))
            embed = pooled + head.mlp(head.layernorm(pooled))
            return model.logit_scale.exp().double() * F.cosine_similarity(embed, text, dim=0)

        relevance = torch.zeros_like(weights)
        for place in itertools.product(*map(range, weights.shape)):
            step = torch.zeros_like(weights)
            step[place] = 1e-6
            gradient = (logit(weights + step) - logit(weights - step)) / 2e-6
            relevance[place] = max(0.0, gradient * weights[place])
    torch.testing.assert_close(maps.flatten().double(), relevance.mean(0), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", ["iclip", "clip"])
def test_competing_itsm_against_one_text_at_a_time(made, family, tiny_processor):
    """Each noun lowers the map by its presence at its prior, or fully in a model without presence."""
    share = 0.3 if family == "iclip" else 0.0  # of the map's peak in the score
    if family == "iclip":
        options = {"map_attention": "signed", "max_over": "similarity", "logit_bias_init_value": -0.3}
        given = tiny_model(**options, presence_bias=0.2, peak_share=share), tiny_processor
        nn.init.normal_(given[0].attention_direction, generator=torch.Generator().manual_seed(0))
    else:
        given = made("clip")[:2]
    priors = {"cat": 0.1, "tree": 0.9, "dog": 0.8}
    explainer, texts, maps = maps_by(given, "competing_itsm", rivals=priors)
    model = explainer.model
    nouns, image = model.encode_texts([*priors]), model.get_image_features(pixels())
    (own, others) = (cosine_map(image.patch_embeds.flatten(1, 2), one.map_text_embeds, GRID) for one in (texts, nouns))
    scale = (model.logits(torch.ones(1)) - model.logits(torch.zeros(1))).item()
    cosine = cosines(image.image_embeds, nouns.text_embeds)
    shown = model.presence(cosine + share * (others.amax((-2, -1)) - cosine))
    mean = model.encode_texts([*vocabulary()]).text_embeds.mean(0)
    expected, left_out = own.clone(), 0
    for batch, text in itertools.product(range(2), range(3)):
        total = (scale * own[batch, text]).exp()
        for noun, prior in enumerate(priors.values()):
            if F.cosine_similarity(texts.text_embeds[text] - mean, nouns.text_embeds[noun] - mean, 0) >= 0.5:
                left_out += 1
                continue
            weight = 1.0
            if shown is not None:
                odds = shown[batch, noun] / (1 - shown[batch, noun]) * prior / (1 - prior)
                weight = odds / (1 + odds)
            total = total + weight * (scale * others[batch, noun]).exp()
        expected[batch, text] -= total.log() / (4 * scale)
    assert (shown is not None) == (family == "iclip") and 2 <= left_out < 18  # "dog" is a rival of other texts only
    expected = model.weigh_maps(expected, image, for_images(texts, 2))
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(maps, model.similarity_maps(image, texts), atol=1e-2)


DEFAULTS = dict.fromkeys(FAMILIES, "naclip") | dict.fromkeys(ICLIP, "itsm") | {"tipsv2": "maskclip"}
DEFAULTS |= dict.fromkeys([*CONVOLUTIONAL, "open_clip_avg", "open_clip_vitamin"], "itsm")
DEFAULTS["open_clip_resnet"] = "maskclip"


@pytest.mark.parametrize(("family", "method"), DEFAULTS.items())
def test_a_family_has_the_method_that_shows_where_a_text_is(made, family, method):
    """`itsm` is still the model's own map."""
    given = load(made(family)[:2])
    found, own = (explain(given, images()[0], LABELS, name) for name in (None, "itsm"))
    expected = explain(given, images()[0], LABELS, method)
    torch.testing.assert_close(found.raw_maps, expected.raw_maps, atol=1e-5, rtol=1e-4)
    assert found.method == found.to_dict()["method"] == method and own.method == "itsm"
    pixel_values = given.processor(images=images()[:1])["pixel_values"]
    of_model = given.similarity_maps(given.get_image_features(pixel_values), given.encode_texts(LABELS))[0]
    torch.testing.assert_close(own.raw_maps, of_model.detach(), atol=1e-5, rtol=1e-4)
    assert torch.allclose(found.raw_maps, own.raw_maps, atol=1e-3) == (method == "itsm")


@pytest.mark.parametrize(
    ("templates", "empty"),
    [(["a photo of the {}"], ["a photo of the "]), (["a {} ball", "{}"], ["a  ball", "a photo of"])],
)
@pytest.mark.parametrize("signed", [False, True])  # a signed model also has a weight of the attention for each text
def test_clip_surgery_subtracts_the_empty_text_in_the_same_templates_from_a_single_text(
    made, tiny_processor, templates, empty, signed
):
    given = (tiny_model(map_attention="signed"), tiny_processor) if signed else made("clip")[:2]
    explainer = make_explainer(given, "clip_surgery", depth=1)
    dog, nothing = explainer.model.encode_texts(["dog"], templates), explainer.model.encode_texts(empty, ["{}"])
    maps, _ = Engine(explainer.model, explainer.model.processor, explainer, templates).raw_maps(pixels(), dog)

    embeds = torch.cat([dog.map_text_embeds, F.normalize(nothing.map_text_embeds.mean(0, keepdim=True), dim=-1)])
    both = for_images(ICLIPTextFeatures(text_embeds=embeds, map_text_embeds=embeds), 2)
    cosines_of_both, _ = ReplacedAttention.forward(explainer, pixels(), both)
    torch.testing.assert_close(maps, cosines_of_both[:, :1] - cosines_of_both[:, 1:], atol=1e-5, rtol=1e-3)


# explain: the short form


@pytest.mark.parametrize("family", ["iclip", "open_clip"])
def test_templates_are_averaged_as_unit_vectors(made, monkeypatch, family):
    monkeypatch.setattr("iclip_hf.model.engine.PROMPT_BATCH", 4)  # so that the labels come in parts
    templates, model = ["a photo of the {}", "the {} ."], load(made(family)[:2])
    texts = model.encode_texts(LABELS, templates)
    for name in ("text_embeds", "map_text_embeds"):
        each = [getattr(model.encode_texts(LABELS, [template]), name) for template in templates]
        torch.testing.assert_close(getattr(texts, name), F.normalize(sum(each), dim=-1), atol=1e-5, rtol=0)
    one = explain(model, images()[0], LABELS, templates=["the {} ."])
    verbatim = explain(model, images()[0], [f"the {x} ." for x in LABELS], templates=["{}"])
    torch.testing.assert_close(one.raw_maps, verbatim.raw_maps)


# Where it runs


@pytest.mark.parametrize("method", METHODS)
def test_any_gradient_mode_of_the_caller(made, method):
    given = made("iclip")[:2]
    expected = explain(given, images()[0], LABELS, method)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(explain(given, images()[0], LABELS, method).raw_maps, expected.raw_maps)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method, tiny_processor):
    model = tiny_model()
    exact = explain((model, tiny_processor), images(), LABELS, method)
    half = explain((model.bfloat16(), tiny_processor), images(), LABELS, method)
    for one, other in zip(half, exact):
        assert one.raw_maps.dtype == torch.float32
        difference = (min_max_normalize(one.raw_maps) - min_max_normalize(other.raw_maps)).abs().mean()
        # In half precision, SC-CLIP can repair another patch.
        assert difference < (0.3 if method == "sc_clip" else 0.1)


def test_the_copy_shares_the_weights(tiny_processor):
    model = tiny_model(lock_vision=False).train()
    explainer = make_explainer((model, tiny_processor))
    pairs = list(zip(explainer.model.network.parameters(), model.parameters(), strict=True))
    assert all(own.data_ptr() == given.data_ptr() and own is not given for own, given in pairs if given.requires_grad)
    assert not any(own.requires_grad for own, _ in pairs)
    texts = explainer.model.encode_texts(LABELS)
    before = raw_maps(explainer, pixels(), texts)[0]
    with torch.no_grad():
        model.interpretability.visual_projection.weight.neg_()  # as an optimizer steps
    torch.testing.assert_close(raw_maps(explainer, pixels(), texts)[0], -before)


# What is refused


@pytest.mark.parametrize(
    ("family", "method"), sorted(pair for pair in REFUSED if pair[0] in ["open_clip_resnet", *CONVOLUTIONAL])
)
def test_a_tower_without_blocks_or_attention_is_named(made, family, method):
    model, tokenizer, _ = made(family)
    with pytest.raises(ValueError, match="transformer blocks|tower with attention|only ICLIP"):
        make_explainer((model, tokenizer), method)


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("grad_cam", "activations", "x"),
        ("bi_modal", "layer", -3),  # of two layers
        ("gem", "depth", 0),
        ("competing_itsm", "rivals", []),
    ],
)
def test_a_value_of_an_option_that_is_not_allowed_is_named(made, method, option, value):
    with pytest.raises(ValueError, match=option):
        explain(made("clip")[:2], images()[:1], LABELS, method, **{option: value})


def test_images_of_open_clip_are_prepared_as_its_configuration_says(made):
    model, tokenizer, _ = made("open_clip")
    image, options = images()[0], model.visual.preprocess_cfg
    resized = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    expected = torch.from_numpy((resized - options["mean"]) / options["std"]).permute(2, 0, 1).float()
    found = load((model, tokenizer)).processor(image)["pixel_values"][0]
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)  # of about two levels of 255


def test_open_clip_needs_its_tokenizer(made):
    model, _, _ = made("open_clip")
    preprocess = torchvision.transforms.Compose([torchvision.transforms.ToTensor()])
    with pytest.raises(TypeError, match=r"open_clip\.get_tokenizer"):
        make_explainer((model, preprocess))
