import itertools
import json
import math

import pytest
import torch
from conftest import TEXT, VISION, save, tiny_inputs, tiny_model
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    pipeline,
)

from iclip_hf import ICLIPModel
from iclip_hf.backends.loading import load_pretrained
from iclip_hf.model.towers import LayerExchange


POOLINGS = ["masked_max", "max", "average", "class_token"]
GRID = (4, 6)  # of the 32x48 images below: never square


@torch.no_grad()
def run(model, **changes):
    return model(**{**tiny_inputs(size=(32, 48)), **changes}, output_similarity_maps=True)


@pytest.mark.parametrize(("vision", "text"), list(zip(VISION, itertools.cycle(TEXT))))
def test_every_tower_runs_and_survives_saving(vision, text, tmp_path):
    model = tiny_model(vision, text)
    before = run(model)
    assert before.similarity_maps.shape == (2, 3, *GRID)
    assert before.logits_per_image.shape == (2, 3) and before.patch_embeds.shape == (2, *GRID, 16)
    assert all(torch.isfinite(before[name]).all() for name in ("logits_per_image", "similarity_maps", "attention"))
    model.save_pretrained(tmp_path)
    for auto_class in (ICLIPModel, AutoModel, AutoModelForZeroShotImageClassification):
        after = run(auto_class.from_pretrained(tmp_path))
        torch.testing.assert_close(after.logits_per_image, before.logits_per_image)
        torch.testing.assert_close(after.similarity_maps, before.similarity_maps)


@pytest.mark.parametrize("vision", VISION)
def test_attention_is_the_class_tokens_row_of_the_last_layer(vision, tmp_path):
    """The row that comes with fused attention, against eager attention of the same weights."""
    model = tiny_model(vision)
    model.save_pretrained(tmp_path)
    eager = ICLIPModel.from_pretrained(tmp_path, attn_implementation="eager")
    pixel_values = tiny_inputs(size=(32, 48))["pixel_values"]
    with torch.no_grad():
        tokens, reference = model.encode_image(pixel_values), eager.encode_image(pixel_values)
    registers = VISION[vision].get("num_register_tokens", 0)
    attentions = reference.tower_output.attentions
    assert len(attentions) == 2 and attentions[-1].shape == (2, 4, 25 + registers, 25 + registers)
    row = attentions[-1][:, :, 0, 1 + registers :].mean(1)
    torch.testing.assert_close(tokens.raw_attention, row, atol=1e-6, rtol=0)
    torch.testing.assert_close(tokens.patch_tokens, reference.patch_tokens, atol=1e-5, rtol=0)


@pytest.mark.parametrize("vision", VISION)
def test_value_share_mixes_what_the_last_layers_gives_a_patch_with_its_own_value(vision):
    model = tiny_model(vision)
    attention = [module for module in model.vision_model.modules() if hasattr(module, "v_proj")][-1]
    project = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
    mixed, values = [], []
    project.register_forward_pre_hook(lambda module, inputs: mixed.append(inputs[0]))
    attention.v_proj.register_forward_hook(lambda module, inputs, output: values.append(output))
    pixel_values = tiny_inputs(size=(32, 48))["pixel_values"]
    outputs = []
    for share in (0.0, 0.25, 1.0):
        model.config.value_share = share
        with torch.no_grad():
            outputs.append(model.encode_image(pixel_values))
    torch.testing.assert_close(mixed[1][:, 1:], 0.75 * mixed[0][:, 1:] + 0.25 * values[0][:, 1:])
    torch.testing.assert_close(mixed[2][:, 1:], values[0][:, 1:])
    for changed in outputs[1:]:
        torch.testing.assert_close(changed.class_token, outputs[0].class_token)
        torch.testing.assert_close(changed.raw_attention, outputs[0].raw_attention)
        assert (changed.patch_tokens - outputs[0].patch_tokens).abs().max() > 1e-3


def test_eager_attention_is_refused_where_it_would_ignore_value_share():
    model = tiny_model(value_share=0.5)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="value_share=0.5"):
        run(model)


def test_tokens_of_clip_carry_its_final_norm():
    """CLIP returns its class token normed and its patch tokens not; the package norms both alike."""
    model = tiny_model("clip_vision_model")
    with torch.no_grad():
        tokens = model.encode_image(tiny_inputs()["pixel_values"])
    torch.testing.assert_close(tokens.class_token, tokens.tower_output.pooler_output)
    norm = model.vision_model.post_layernorm
    standardised = (tokens.patch_tokens - norm.bias) / norm.weight
    torch.testing.assert_close(standardised.mean(-1), torch.zeros(2, 16), atol=1e-4, rtol=0)


# An independent implementation of Eq. 9-13, in plain loops over Python numbers.


def slow_unit(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def slow_linear(layer, vector):
    return [sum(w * x for w, x in zip(row, vector)) for row in layer.weight.tolist()]


def slow_cosines(branch, images, texts):
    images = [slow_unit(slow_linear(branch.visual_projection, image)) for image in images]
    texts = [slow_unit(slow_linear(branch.text_projection, text)) for text in texts]
    return [[sum(a * b for a, b in zip(image, text)) for text in texts] for image in images]


def slow_loss(logits):
    def cross_entropy(rows):
        return sum(math.log(sum(math.exp(x) for x in row)) - row[i] for i, row in enumerate(rows)) / len(rows)

    return (cross_entropy(logits) + cross_entropy([list(column) for column in zip(*logits)])) / 2


def slow_pool(tokens, class_token, attention, mode):
    if mode == "class_token":
        return class_token
    channels = list(zip(*tokens))
    if mode == "average":
        return [sum(channel) / len(channel) for channel in channels]
    if mode == "max":
        return [max(channel) for channel in channels]
    return [max(x * a for x, a in zip(channel, attention)) for channel in channels]


@pytest.mark.parametrize(
    ("pooling", "dual", "recognition"),
    [*itertools.product(POOLINGS, [True, False], ["class_token"]), ("masked_max", True, "class_and_average")],
)
def test_model_equals_a_slow_implementation_of_equations_9_to_13(pooling, dual, recognition):
    options = {"dual_projection": dual, "recognition_pooling": recognition}
    model = tiny_model(pooling=pooling, map_attention="similarity", **options)
    with torch.no_grad():
        model.recognition.logit_scale.fill_(9.0)  # above the limit of a factor of 100
        model.map_branch.logit_scale.fill_(2.1)
    inputs = tiny_inputs(batch=3, texts=3, size=(32, 48))
    pixels = {"pixel_values": inputs["pixel_values"], "interpolate_pos_encoding": True}
    with torch.no_grad():
        outputs, with_loss = model(**inputs, output_similarity_maps=True), model(**inputs, return_loss=True)
        tower = model.vision_model(**pixels)
        assert outputs.vision_model_output.hidden_states is None  # of which nobody asked
        hidden = tower.last_hidden_state.tolist()
        text_hidden = model.text_model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        model.set_attn_implementation("eager")
        rows = model.vision_model(**pixels, output_attentions=True).attentions[-1][:, :, 0, 1:]
        torch.testing.assert_close(model(**inputs).logits_per_image, outputs.logits_per_image, atol=1e-3, rtol=0)

    attention = []
    for heads in rows.tolist():
        mean = [sum(head[n] for head in heads) / len(heads) for n in range(24)]  # Eq. 9
        attention.append([(a - min(mean)) / (max(mean) - min(mean)) for a in mean])  # Eq. 10
    texts = []
    for tokens, mask in zip(text_hidden.tolist(), inputs["attention_mask"].tolist()):
        kept = [token for token, m in zip(tokens, mask) if m]
        texts.append([sum(channel) / len(kept) for channel in zip(*kept)])
    pooled = [slow_pool(h[1:], h[0], a, pooling) for h, a in zip(hidden, attention)]  # Eq. 11
    recognised = [h[0] for h in hidden] if dual else pooled
    if recognition == "class_and_average":
        recognised = [h[0] + slow_pool(h[1:], h[0], None, "average") for h in hidden]

    recognition = slow_cosines(model.recognition, recognised, texts)  # Eq. 12
    scale = min(100, math.exp(model.recognition.logit_scale.item()))
    logits = [[scale * cosine for cosine in row] for row in recognition]
    torch.testing.assert_close(outputs.logits_per_image, torch.tensor(logits), atol=1e-3, rtol=0)
    loss = slow_loss(logits)
    if dual:
        explained = slow_cosines(model.interpretability, pooled, texts)
        map_scale = math.exp(model.interpretability.logit_scale.item())
        loss = (loss + slow_loss([[map_scale * cosine for cosine in row] for row in explained])) / 2  # Eq. 13
    assert with_loss.loss.item() == pytest.approx(loss, abs=1e-3)
    torch.testing.assert_close(with_loss.logits_per_image, outputs.logits_per_image)

    for image in range(3):
        cosines = slow_cosines(model.map_branch, hidden[image][1:], texts)
        expected = [[cosines[n][t] * attention[image][n] for n in range(24)] for t in range(3)]
        actual = outputs.similarity_maps[image].flatten(1)
        torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-5, rtol=0)


def test_signed_attention_raises_objects_and_lowers_the_background():
    """
    The formula by hand. What a cosine has above the mean, of 1 / 20 at most, is added once more with the stretched
    attention times the text's weight in [-1, 1]; what is below counts a tenth.
    """
    model = tiny_model(map_attention="signed")
    with torch.no_grad():
        texts = run(model).map_text_embeds
        # so that the weights of the three texts are 3 (limited to 1), -0.5 and 0
        model.attention_direction.copy_(torch.linalg.pinv(texts) @ torch.tensor([3.0, -0.5, 0.0]) / 20)
    signed = run(model)
    model.config.map_attention = "none"
    plain = run(model)
    lit = plain.attention.view(2, 1, *GRID)
    low, high = lit.amin((2, 3), keepdim=True), lit.amax((2, 3), keepdim=True)
    added = (lit - low) / (high - low) * torch.tensor([1.0, -0.5, 0.0]).view(3, 1, 1)
    for found, cosines, attention in zip(
        signed.similarity_maps.flatten(0, 1), plain.similarity_maps.flatten(0, 1), added.flatten(0, 1), strict=True
    ):
        mean = cosines.mean()
        for position in itertools.product(*map(range, GRID)):
            value = cosines[position]
            raised = value + attention[position] * min(value - mean, 1 / 20)
            expected = raised if value > mean else mean - (mean - value) / 10
            assert found[position].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("map_attention", ["additive", "signed"])
def test_a_constant_map_stays_exactly_constant(map_attention):
    """Whatever the attention: otherwise the rounding of the mean would be stretched to [0, 1]."""
    model = tiny_model(map_attention=map_attention)
    output = run(model, pixel_values=tiny_inputs(size=(224, 224))["pixel_values"])
    image = output.vision_model_output
    image.patch_embeds = image.patch_embeds[:, :1, :1].expand_as(image.patch_embeds).contiguous()
    with torch.no_grad():
        maps = model.similarity_maps(image, output.text_model_output)
    assert torch.equal(maps.amin((2, 3)), maps.amax((2, 3)))


def slow_average(tokens, attention, affinity, patches):
    """By patch the averages of token and attention over the patches that are similar to it."""
    units, averages = [slow_unit(token) for token in tokens], {}
    for patch in patches:
        weights = [math.exp(affinity * sum(a * b for a, b in zip(units[patch], other))) for other in units]
        token = [sum(w * x for w, x in zip(weights, channel)) / sum(weights) for channel in zip(*tokens)]
        averages[patch] = token, sum(w * a for w, a in zip(weights, attention)) / sum(weights)
    return averages


def test_the_loss_over_similarities_equals_a_slow_implementation():
    model = tiny_model(max_over="similarity", center_tokens=True, map_affinity=3.0, map_attention="additive")
    inputs = tiny_inputs(batch=3, texts=3, size=(32, 48))
    with torch.no_grad():
        model.token_mean.copy_(torch.linspace(-0.5, 0.5, len(model.token_mean)))
    outputs = run(model, **inputs)
    branch, texts, similarities = model.interpretability, outputs.map_text_embeds.tolist(), []
    for image in range(3):
        tokens = (outputs.vision_model_output.patch_tokens[image] - model.token_mean).tolist()
        averages = slow_average(tokens, outputs.attention[image].tolist(), 3.0, range(24)).values()
        embeds = [slow_unit(slow_linear(branch.visual_projection, token)) for token, _ in averages]
        cosines = [[sum(a * b for a, b in zip(embed, text)) for embed in embeds] for text in texts]
        lit = [attention for _, attention in averages]
        similarities.append(
            [math.log(sum(a / sum(lit) * math.exp(10 * c) for a, c in zip(lit, row))) / 10 for row in cosines]
        )
        stretched = [(a - min(lit)) / (max(lit) - min(lit)) for a in lit]
        means = [sum(row) / len(row) for row in cosines]
        expected = [
            [c + a * min(c - mean, 1 / 20) if c > mean else mean - (mean - c) / 10 for a, c in zip(stretched, row)]
            for mean, row in zip(means, cosines)
        ]
        torch.testing.assert_close(
            outputs.similarity_maps[image].flatten(1), torch.tensor(expected), atol=1e-5, rtol=0
        )
    scale = branch.logit_scale.exp().item()
    loss = (
        slow_loss(outputs.logits_per_image.tolist()) + slow_loss([[scale * s for s in row] for row in similarities])
    ) / 2
    with torch.no_grad():
        model.config.map_tokens = 24  # all patches
        assert model(**inputs, return_loss=True).loss.item() == pytest.approx(loss, abs=1e-4)


def test_texts_of_each_image_equal_shared_texts_run_alone():
    model, inputs = tiny_model(), tiny_inputs(batch=2, texts=6, size=(32, 48))
    per_image = {name: inputs[name].view(2, 3, -1) for name in ("input_ids", "attention_mask")}
    together = run(model, pixel_values=inputs["pixel_values"], **per_image)
    assert together.logits_per_image.shape == (2, 3)
    for i in range(2):
        alone = run(
            model,
            pixel_values=inputs["pixel_values"][i : i + 1],
            input_ids=per_image["input_ids"][i],
            attention_mask=per_image["attention_mask"][i],
        )
        torch.testing.assert_close(alone.similarity_maps[0], together.similarity_maps[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.logits_per_image[0], together.logits_per_image[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("given", [("pixel_values",), ("pixel_values", "text_features")])
def test_a_side_that_is_missing_is_named(given):
    """The loss needs texts to learn from, instead of encoded ones."""
    model = tiny_model()
    inputs = tiny_inputs() | {"text_features": model.get_text_features(tiny_inputs()["input_ids"])}
    with pytest.raises(ValueError, match="pixel_values and input_ids"):
        model(**{name: inputs[name] for name in given}, return_loss="text_features" in given)


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_the_loss_without_nouns_needs_one_text_of_each_image(shape):
    """
    Two captions of each image in one list would be taken for those of other images. CLIP's tower would flatten a list
    for each image.
    """
    inputs, count = tiny_inputs(batch=2, texts=math.prod(shape)), math.prod(shape)
    with pytest.raises(ValueError, match=f"2 images .*, not {count}"):
        tiny_model(text="clip_text_model")(
            inputs["input_ids"].view(*shape, -1), inputs["pixel_values"], return_loss=True
        )


def test_features_follow_the_getters_of_transformers():
    model, inputs = tiny_model(), tiny_inputs()
    with torch.no_grad():
        image, text = model.get_image_features(inputs["pixel_values"]), model.get_text_features(inputs["input_ids"])
        class_token = model.vision_model(inputs["pixel_values"]).last_hidden_state[:, 0]
    torch.testing.assert_close(image.pooler_output, model.recognition.visual_projection(class_token))
    torch.testing.assert_close(image.image_embeds, F.normalize(image.pooler_output, dim=-1))
    assert text.pooler_output.shape == (3, 16) and text.last_hidden_state.shape == (3, 7, 24)


@pytest.mark.parametrize("lock", [True, False])
def test_locked_tower_stays_locked_after_loading_and_training(lock, tmp_path):
    tiny_model(lock_vision=lock).save_pretrained(tmp_path)
    model = ICLIPModel.from_pretrained(tmp_path).train()
    assert model.vision_model.training is (not lock) and model.text_model.training
    model.text_model.requires_grad_(False)
    assert not model.train().text_model.training  # no dropout
    model.text_model.requires_grad_(True)
    assert all(parameter.requires_grad is (not lock) for parameter in model.vision_model.parameters())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**tiny_inputs(batch=3, texts=3), return_loss=True).loss.backward()
    optimizer.step()
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"text_model", "recognition", "interpretability"} | (set() if lock else {"vision_model"})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_is_close_and_finite(dtype, tolerance):
    model = tiny_model()
    full = run(model)
    half = run(model.to(dtype), pixel_values=tiny_inputs(size=(32, 48))["pixel_values"].to(dtype))
    assert half.similarity_maps.dtype == torch.float32
    torch.testing.assert_close(half.similarity_maps.float(), full.similarity_maps, atol=tolerance, rtol=0)
    torch.testing.assert_close(half.image_embeds.float(), full.image_embeds, atol=tolerance, rtol=0)


def test_float16_survives_large_features():
    """Squares and attention logits of such features are beyond float16's 65504."""
    model = tiny_model("dinov2").half()
    with torch.no_grad():
        model.vision_model.layernorm.weight.fill_(3e3)
        for name, weight in model.vision_model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(300)
    outputs = run(model, pixel_values=tiny_inputs(size=(32, 48))["pixel_values"].half())
    assert all(torch.isfinite(outputs[name]).all() for name in ("logits_per_image", "similarity_maps", "attention"))
    norms = outputs.patch_embeds.float().norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-2, rtol=0)


def test_compiles_without_a_graph_break():
    model = tiny_model("dinov2")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        outputs = compiled(**tiny_inputs(size=(32, 48)), output_similarity_maps=True)
    torch.testing.assert_close(outputs.similarity_maps, run(model).similarity_maps)


def test_both_sides_of_a_two_tower_checkpoint_are_taken(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    clip = CLIPModel(CLIPConfig(vision_config=VISION["clip_vision_model"], text_config=TEXT["clip_text_model"]))
    clip.eval().save_pretrained(tmp_path)
    model = ICLIPModel.from_vision_text_pretrained(str(tmp_path), str(tmp_path), pooling="max")
    assert (model.config.pooling, model.config.text_pooling, model.training) == ("max", "eos", False)
    inputs = tiny_inputs()
    with torch.no_grad():
        text = clip.text_model(inputs["input_ids"], inputs["attention_mask"]).pooler_output
        image = clip.vision_model(inputs["pixel_values"]).pooler_output
        torch.testing.assert_close(model.encode_text(inputs["input_ids"], inputs["attention_mask"])[0], text)
        torch.testing.assert_close(model.encode_image(inputs["pixel_values"]).class_token, image)


def test_autocast_rounds_no_logit_and_no_loss():
    """bfloat16 has steps of a half where scaled cosines are: only what the towers and projections say may differ."""
    model, inputs = tiny_model(), tiny_inputs(batch=3, texts=3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs, return_loss=True)
    logits = model.recognition(outputs.image_embeds.float() @ outputs.text_embeds.float().T)
    torch.testing.assert_close(outputs.logits_per_image, logits, atol=1e-4, rtol=0)
    assert outputs.loss.dtype == torch.float32
    assert model.train()(**inputs, return_loss=True).logits_per_image is None  # of all prompts, which no loss reads


def test_autocast_rounds_no_logit_of_the_attention():
    """bfloat16 has steps of a half where logits are above 64, before they are scaled."""
    query, key, value = (4 * torch.randn(3, 2, 4, 25, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    exchange, layer = LayerExchange(0.0), torch.nn.Module()
    layer.is_last_attention = True
    with torch.autocast("cpu", torch.bfloat16):
        AttentionInterface()["sdpa_class_row"](layer, query, key, value, None, layer_exchange=exchange)
    expected = (query[:, :, :1].double() @ key.double().mT * 8**-0.5).softmax(-1)
    torch.testing.assert_close(exchange.class_row, expected.float())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")  # has another name in the newest transformers
@pytest.mark.parametrize(("lock_vision", "options"), [(True, None), (False, None), (False, {"use_reentrant": True})])
def test_gradient_checkpointing_of_the_towers_that_learn_changes_no_gradient(lock_vision, options):
    """Also of an image tower whose attention learns by masked max, whatever checkpoints are asked for."""
    inputs = tiny_inputs(batch=3, texts=3)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(lock_vision=lock_vision).train()
        if checkpointing:
            model.gradient_checkpointing_enable(options)
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.text_model.modules())
        torch.manual_seed(0)
        model(**inputs, return_loss=True).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and any("text_model" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def lacking(part):
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def holding(part, value):
    return lambda weights: {name: w.fill_(value) if part in name else w for name, w in weights.items()}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lacking("_projection"), "4 weights .*interpretability.text_projection.weight"),
        (holding("token_mean", torch.nan), "token_mean"),
        (holding("text_model.encoder.layer.1", -torch.inf), "text_model.encoder.layer.1"),
    ],
    ids=["missing", "NaN in a buffer", "infinity"],
)
def test_missing_weights_and_nan_are_refused_by_every_door(tmp_path, tiny_processor, damage, says):
    model = tiny_model(max_over="similarity", center_tokens=True).half()
    model.save_pretrained(tmp_path, state_dict=damage(model.state_dict()))
    tiny_processor.save_pretrained(tmp_path)
    for load in (ICLIPModel.from_pretrained, AutoModel.from_pretrained, load_pretrained):
        with pytest.raises(ValueError, match=f"^{tmp_path}: .*{says}"):
            load(tmp_path)
    with pytest.raises(ValueError, match=says):
        pipeline("image-text-similarity-map", model=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "without", "weight"),
    [
        # The model would have no presence.
        ({"logit_bias_init_value": -2.0}, {"logit_bias_init_value": None}, "recognition.logit_bias"),
        ({"max_over": "similarity", "center_tokens": True}, {"center_tokens": False}, "token_mean"),
    ],
)
def test_weights_of_a_part_that_the_configuration_lacks_are_refused(
    tmp_path, tiny_processor, options, without, weight
):
    save(tmp_path, tiny_model(**options), tiny_processor)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | without))
    for load in (ICLIPModel.from_pretrained, load_pretrained):
        with pytest.raises(ValueError, match=f"^{tmp_path}: .*config.json.*{weight}"):
            load(tmp_path)


def test_the_mean_of_a_siglip_text_leaves_out_its_padding():
    """SigLIP's tokenizer ends a text with its padding token, and returns no mask."""
    model, ids = tiny_model(text="siglip_text_model", text_pooling="mean"), torch.tensor([[5, 9, 12, 1], [7, 1, 1, 1]])
    with torch.no_grad():
        found, tower = model.encode_text(ids)
        assert tower.last_hidden_state.shape[1] == 77
        for row, count in ((0, 3), (1, 1)):
            torch.testing.assert_close(found[row], tower.last_hidden_state[row, :count].mean(0))
        padded, _ = model.encode_text(F.pad(ids, (0, 70), value=1))  # as SigLIP was trained
        torch.testing.assert_close(padded, found)


def test_maps_of_both_branches_and_presence_equal_a_slow_implementation(tmp_path):
    """
    Hidden layers beside the projections, the share of the recognition branch in the map, and the presence, patch by
    patch.
    """
    share = 0.3
    options = {
        "max_over": "similarity",
        "center_tokens": True,
        "recognition_pooling": "class_and_average",
        "map_attention": "none",
        "image_hidden_size": 5,
        "text_hidden_size": 7,
        "logit_bias_init_value": -2.0,
        "presence_bias": 0.5,
    }
    model = tiny_model(**options, recognition_share=share)
    with torch.no_grad():
        for branch in (model.recognition, model.interpretability):
            for projection in (branch.visual_projection, branch.text_projection):
                if projection.hidden is not None:
                    projection.hidden[-1].weight.normal_()
        model.token_mean.normal_()
    assert model.interpretability.visual_projection.hidden is None  # of the recognition branch alone
    outputs, inputs = run(model), tiny_inputs(size=(32, 48))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(run(ICLIPModel.from_pretrained(tmp_path)).similarity_maps, outputs.similarity_maps)

    def project(projection, vector):
        found = projection.weight @ vector
        if projection.hidden is not None:
            first, _, last = projection.hidden
            found = found + last.weight @ F.gelu(first.weight @ vector + first.bias)
        return found / found.norm()

    with torch.no_grad():
        image = model.encode_image(inputs["pixel_values"])
        texts = model.encode_text(inputs["input_ids"], inputs["attention_mask"])[0]
        average = model.recognition.visual_projection.weight[:, 32:]
        for i, tokens in enumerate(image.patch_tokens):
            vector = project(model.recognition.visual_projection, torch.cat([image.class_token[i], tokens.mean(0)]))
            for j, text in enumerate(texts):
                own = project(model.recognition.text_projection, text)
                cosine = vector @ own
                scale, bias = model.recognition.logit_scale.exp().squeeze(), model.recognition.logit_bias.squeeze()
                torch.testing.assert_close(outputs.logits_per_image[i, j], scale * cosine + bias, atol=1e-4, rtol=1e-4)
                presence = model.presence(cosine)
                torch.testing.assert_close(presence, 1 / (1 + (-(scale * cosine + bias + 0.5)).exp()))
                for n, token in enumerate(tokens):
                    map_patch = project(model.interpretability.visual_projection, token - model.token_mean)
                    seen = F.normalize(average @ token, dim=0) @ own
                    expected = (1 - share) * map_patch @ project(
                        model.interpretability.text_projection, text
                    ) + share * seen
                    torch.testing.assert_close(
                        outputs.similarity_maps[i, j].flatten()[n], expected, atol=1e-5, rtol=1e-4
                    )


def test_a_share_of_the_recognition_branch_in_the_map_leaves_the_loss():
    model = tiny_model(max_over="similarity", recognition_pooling="class_and_average")
    inputs, losses = tiny_inputs(batch=3, texts=3), []
    for model.config.recognition_share in (0.0, 0.6):
        with torch.no_grad():
            losses.append(model(**inputs, return_loss=True).loss)
    torch.testing.assert_close(losses[1], losses[0])
