"""A second, locked image tower, whose features are joined to the patch tokens."""

import json

import numpy as np
import pytest
import timm
import torch
from conftest import (
    FEATURES,
    TIMM,
    VISION,
    bilinear,
    noise,
    save,
    save_towers,
    tiny_image_processor,
    tiny_inputs,
    tiny_model,
)
from torch.nn import functional as F
from training_runs import run, weights
from transformers import TimmWrapperConfig, TimmWrapperModel

from iclip_hf import ICLIPModel, explain, load
from iclip_hf.backends.identity import digest
from iclip_hf.explainers import make_explainer
from iclip_hf.hub.folders import init_model
from iclip_hf.model.outputs import ICLIPTextFeatures
from iclip_hf.model.pooling import even_patches, representative_patches
from iclip_hf.training.statistics import set_statistics


CLIP_STD = (0.26862954, 0.26130258, 0.27577711)  # of the image processor
MEAN, STD = [0.5, 0.0, -0.5], [2.0, 1.0, 0.5]
WHOLE = {
    **FEATURES,
    "feature_image_mean": MEAN,
    "feature_image_std": STD,
    "vision_downsampling": 2,
    "recognition_pooling": "class_and_average",
    "recognition_share": 0.3,
    "max_over": "similarity",
    "center_tokens": True,
    "map_affinity": 3.0,
    "map_attention": "none",
    "known_competition": 1.0,
    "map_tokens": 6,
}
FEATURES_ALONE = {"recognition_pooling": "feature_average"}
GRID = (4, 6)  # of the images of 64x96 pixels below


def joined_model(**options):
    model = tiny_model(**{**WHOLE, **options})
    if model.config.center_tokens:
        model.token_mean.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return model


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@torch.no_grad()
def slow(model, pixel_values, grid=GRID):
    """Recognition vectors of each image, and vectors on a grid, from the towers themselves, by plain loops."""
    backbone = timm.create_model("test_efficientnet", num_classes=0, pad_type="same").eval()
    backbone.load_state_dict(model.feature_model.timm_model.state_dict())
    weights = {name: weight.double().numpy() for name, weight in model.state_dict().items()}
    recognition = weights["recognition.visual_projection.weight"]
    of_map = weights["interpretability.visual_projection.weight"]
    images, patches = [], []
    for image in pixel_values:
        squares = image.unflatten(1, (32, 2)).unflatten(3, (48, 2)).mean((2, 4))
        last = model.vision_model(squares[None], interpolate_pos_encoding=True).last_hidden_state[0].double().numpy()
        matrix = weights["feature_reduction.weight"]
        raw, small = (
            backbone.forward_features(torch.stack([(c - m) / s for c, m, s in zip(view, MEAN, STD)])[None])[0]
            for view in (image, squares)
        )
        raw, small = raw.double().numpy(), small.double().numpy()
        average = (raw.mean((1, 2)) + small.mean((1, 2))) / 2 @ matrix.T + weights["feature_reduction.bias"]
        features = bilinear(raw, grid).reshape(len(raw), -1).T @ matrix.T + weights["feature_reduction.bias"]
        own = bilinear(last[1:].T.reshape(-1, *GRID), grid).reshape(32, -1).T
        tokens = np.concatenate([own, features], 1)
        assert tokens.shape == (grid[0] * grid[1], 32 + 6)
        if alone := model.config.recognition_pooling == "feature_average":
            images.append(recognition @ average)
        else:
            images.append(recognition @ np.concatenate([last[0], tokens.mean(0)]))
        centered, mean = tokens - weights["token_mean"], weights["token_mean"]
        likeness = np.exp(3.0 * unit(centered[:, :32]) @ unit(centered[:, :32]).T)
        shared = (likeness / likeness.sum(1, keepdims=True)) @ centered
        recognised = (shared + mean)[:, -6 if alone else -38 :]
        by_recognition = unit(recognised @ recognition[:, -recognised.shape[1] :].T)
        patches.append(np.concatenate([0.7**0.5 * unit(shared @ of_map.T), 0.3**0.5 * by_recognition], 1))
    return unit(np.stack(images)), np.stack(patches)


@pytest.mark.parametrize("options", [{}, FEATURES_ALONE])
def test_scores_and_maps_are_of_joined_tokens(options):
    model, inputs = joined_model(**options), tiny_inputs(size=(64, 96))
    with torch.no_grad():
        outputs = model(**inputs, output_similarity_maps=True)
    images, patches = slow(model, inputs["pixel_values"])
    np.testing.assert_allclose(outputs.image_embeds, images, atol=1e-5)
    np.testing.assert_allclose(outputs.patch_embeds.flatten(1, 2), patches, atol=1e-5)
    maps = np.einsum("bnp,tp->btn", patches, outputs.map_text_embeds.double().numpy())
    np.testing.assert_allclose(outputs.similarity_maps.flatten(2), maps, atol=1e-5)


def test_maps_have_finer_cells_than_patches_while_scores_read_patches():
    """As without cells: the peak of scores, and methods that read the image tower."""
    options = {**FEATURES_ALONE, "peak_share": 0.4, "attention_norm": "quantile", "map_attention": "additive"}
    model, finer = joined_model(**options), joined_model(**options, map_cell_size=10)
    inputs = tiny_inputs(size=(64, 96))
    with torch.no_grad():
        images = [one.get_image_features(inputs["pixel_values"]) for one in (model, finer)]
        texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        cosines = images[1].cell_embeds @ texts.map_text_embeds.T
        maps = finer.similarity_maps(images[1], texts)
    assert images[0].cell_embeds is None and torch.equal(images[0].patch_embeds, images[1].patch_embeds)
    assert torch.equal(model.scores(images[0], texts), finer.scores(images[1], texts))
    _, cells = slow(finer, inputs["pixel_values"], (6, 9))
    np.testing.assert_allclose(images[1].cell_embeds.flatten(1, 2), cells, atol=1e-5)
    for image in range(2):
        attention = bilinear(images[0].attention[image].reshape(1, *GRID).numpy(), (6, 9))
        tokens = model.encode_image(inputs["pixel_values"]).patch_tokens[image, :, :32] - model.token_mean[:32]
        own = unit(bilinear(tokens.detach().T.reshape(-1, *GRID).numpy(), (6, 9)).reshape(32, -1).T)
        likeness = np.exp(3.0 * own @ own.T)
        expected = likeness @ attention.ravel() / likeness.sum(1)
        np.testing.assert_allclose(images[1].map_attention[image], expected, atol=1e-5)
    weighed = finer.weigh_maps(cosines.permute(0, 3, 1, 2), images[1], texts)
    torch.testing.assert_close(maps, weighed, atol=1e-6, rtol=1e-5)
    assert maps.shape[2:] == (6, 9)


@pytest.mark.parametrize("method", ["itsm", "competing_itsm", "attention_affinity", "sclip"])
def test_methods_of_features_have_the_finer_cells(method, tiny_processor):
    loaded = joined_model(map_cell_size=8), tiny_processor
    explanation = explain(loaded, noise((96, 64)), ["dog"], method, refine=False, image_size=64)
    assert explanation.raw_maps.shape[1:] == ((4, 4) if method == "sclip" else (8, 8))


def test_grad_cam_weighs_the_feature_map_that_the_score_reads(tiny_processor):
    model, inputs = joined_model(**FEATURES_ALONE, image_hidden_size=5), tiny_inputs(size=(64, 96))
    model.recognition.visual_projection.hidden[-1].weight.data.normal_(generator=torch.Generator().manual_seed(1))
    loaded = model.eval(), tiny_processor
    with torch.no_grad():
        texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        of_images = ICLIPTextFeatures(text_embeds=texts.text_embeds.expand(2, -1, -1))
        maps, _ = make_explainer(loaded, "grad_cam").forward(inputs["pixel_values"], of_images)
    for image in range(2):
        pixel_values = inputs["pixel_values"][image : image + 1]
        features = model.feature_map(pixel_values).detach().requires_grad_()
        average = (features.mean((2, 3)) + model.feature_map(F.avg_pool2d(pixel_values, 2)).mean((2, 3))) / 2
        reduced = model.feature_reduction(average)
        scores = model.recognition(model.recognition.embed_image(reduced) @ texts.text_embeds.T)[0]
        for text, score in enumerate(scores):
            (gradient,) = torch.autograd.grad(score, features, retain_graph=True)
            on_grid = F.interpolate(features, GRID, mode="bilinear")
            expected = (gradient.mean((2, 3), keepdim=True) * on_grid).sum(1).relu()[0]
            places = features.shape[2] * features.shape[3]  # whose mean is half of what the score reads
            torch.testing.assert_close(maps[image, text], 2 * places * expected, atol=1e-4, rtol=1e-3)
        assert expected.any()
    with pytest.raises(ValueError, match="reads its feature tower alone"):
        make_explainer(loaded, "grad_eclip")


def test_the_loss_reads_patches_that_the_image_tower_chooses():
    model, pixel_values = joined_model(), tiny_inputs(size=(64, 96))["pixel_values"]
    with torch.no_grad():
        image, all_patches = model.encode_image(pixel_values), model.get_image_features(pixel_values)
        inputs = model.image_inputs(image)
        own = model.centered_tokens(image.patch_tokens)[..., :32]
        chosen = representative_patches(own, model.normalized_attention(image), GRID, 6)
        model.config.recognition_share = 0.0
        of_all = model.get_image_features(pixel_values).patch_embeds.flatten(1, 2)
    even = even_patches(GRID).expand(2, -1)
    for patches, places in ((inputs.representative_tokens, chosen), (inputs.even_tokens, even)):
        assert patches.shape == (2, places.shape[1], 38)
        expected = of_all.take_along_dim(places.unsqueeze(-1), 1)
        torch.testing.assert_close(model.map_branch.embed_image(patches), expected, atol=1e-5, rtol=1e-4)
    assert all_patches.patch_tokens.shape == (2, 24, 38)


@pytest.mark.parametrize("options", [FEATURES_ALONE, {**FEATURES_ALONE, "peak_share": 1.0, "map_affinity": 0.0}])
def test_pixels_have_the_gradient_of_the_whole_score(options):
    """Through both towers, unless the model locks its image tower."""
    model, inputs = joined_model(lock_vision=False, **options).double(), tiny_inputs(size=(64, 96))
    with torch.no_grad():
        texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])

    def score(pixel_values):
        return model.scores(model.get_image_features(pixel_values), texts).sum()

    pixel_values = inputs["pixel_values"].double().requires_grad_()
    (gradient,) = torch.autograd.grad(score(pixel_values), pixel_values)
    (to_features,) = torch.autograd.grad(model.feature_map(pixel_values).square().sum(), pixel_values)
    step = 1e-2 * to_features.sign()  # which changes the features most
    with torch.no_grad():
        difference = score(pixel_values + step) - score(pixel_values - step)
    torch.testing.assert_close(2 * (gradient * step).sum(), difference.double(), rtol=0.01, atol=0)
    model.config.lock_vision = True
    assert torch.autograd.grad(score(pixel_values), pixel_values, allow_unused=True) == (None,)


def test_the_feature_tower_is_locked_and_survives_saving(tmp_path):
    model = joined_model(map_attention="signed", lock_vision=False)
    model.save_pretrained(tmp_path)
    loaded = ICLIPModel.from_pretrained(tmp_path).train()
    assert digest(loaded.config) == digest(model.config)
    fixed = {name: value.clone() for name, value in loaded.state_dict().items() if name.startswith("feature_")}
    assert {*fixed} > {"feature_reduction.weight", "feature_model.timm_model.bn1.running_mean"}
    inputs = tiny_inputs(2, 2, size=(64, 96))
    with torch.no_grad():
        before, after = (one.eval()(**inputs, output_similarity_maps=True) for one in (model, loaded))
    torch.testing.assert_close(after.similarity_maps, before.similarity_maps)
    torch.testing.assert_close(after.logits_per_image, before.logits_per_image)
    loaded.train()
    optimizer = torch.optim.SGD((p for p in loaded.parameters() if p.requires_grad), lr=1.0)
    loaded(**inputs, return_loss=True).loss.backward()
    optimizer.step()
    assert loaded.vision_model.training and not loaded.feature_model.training
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in fixed.items())
    assert loaded.vision_model.layernorm.weight.grad.any() and loaded.recognition.visual_projection.weight.grad.any()


@pytest.mark.parametrize("padding", ["same", ""])  # TensorFlow's and PyTorch's
def test_batch_norms_are_folded_into_convolutions(padding, monkeypatch):
    tower = joined_model(feature_config={**TIMM, "model_args": {"pad_type": padding}}).feature_model
    pixel_values = tiny_inputs(size=(64, 97))["pixel_values"]
    generator = torch.Generator().manual_seed(0)
    for norm in tower.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                values.data.uniform_(0.5, 1.5, generator=generator)
    before = {name: value.clone() for name, value in tower.state_dict().items()}

    def check():
        plain = TimmWrapperModel.forward(tower, pixel_values, do_pooling=False).last_hidden_state
        with monkeypatch.context() as context:
            context.setattr(F, "batch_norm", None)
            context.setattr(F, "pad", None)
            folded = tower(pixel_values, do_pooling=False).last_hidden_state
        assert plain.std() > 0.01
        torch.testing.assert_close(folded, plain, atol=1e-5, rtol=1e-4)

    with torch.no_grad():
        check()
        assert tower.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
        tower.timm_model.bn1.running_mean.add_(1.0)  # the weights may change
        check()
        tower.double()
        check()
        seen = []
        tower.timm_model.bn1.register_forward_hook(lambda *arguments: seen.append(arguments))
        tower(pixel_values, do_pooling=False)
        assert len(seen) == 1


@pytest.mark.parametrize(("options", "views"), [({"vision_downsampling": 1}, 1), (FEATURES_ALONE, 2)])
def test_statistics_of_training_images_whiten_the_features(options, views, tiny_processor, recorded):
    model = tiny_model(**{**WHOLE, **options})
    for weight in model.feature_reduction.parameters():
        weight.data.zero_()
    rows = [{"image": noise((40, 40), seed=seed, spread=20 + seed)} for seed in range(70)]
    images = recorded(model.feature_model, "forward", lambda pixel_values, **options: len(pixel_values))
    set_statistics(model, tiny_processor, rows)
    assert images == [1] * 70 * (views + 1)  # one at a time, on a CPU; for the tokens, and for the whitening
    with torch.no_grad():
        pixel_values = tiny_processor(images=[row["image"] for row in rows])["pixel_values"]
        tokens = model.encode_image(pixel_values).patch_tokens
        everything = model.feature_map(pixel_values).movedim(1, -1).flatten(0, 2).double()
        features = model.feature_reduction(everything.float())
    torch.testing.assert_close(features.mean(0), torch.zeros(6), atol=1e-2, rtol=0)
    torch.testing.assert_close(features.T.cov(correction=0), 16 * torch.eye(6), atol=0.16, rtol=0)
    # In single precision, a bias of the reduction of about 900 is rounded to 6e-5.
    torch.testing.assert_close(model.token_mean, tokens.mean((0, 1)), atol=5e-4, rtol=1e-4)
    # Of all linear maps to six numbers, it keeps the most of the variance.
    singular = torch.linalg.svdvals(everything - everything.mean(0)).square()
    solution = torch.linalg.lstsq(F.pad(features.double(), (0, 1), value=1), everything).solution
    left = (everything - F.pad(features.double(), (0, 1), value=1) @ solution).square().sum()
    torch.testing.assert_close(left, singular[6:].sum(), rtol=1e-2, atol=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    set_statistics(model, tiny_processor, rows[:1])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.fixture
def towers(tmp_path, tiny_processor):
    """Folders of an image, a text and a feature tower with its own mean and standard deviation."""
    training = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    config = TimmWrapperConfig(architecture="test_efficientnet", num_labels=0, pretrained_cfg=training)
    features = save(tmp_path / "features", TimmWrapperModel(config))
    return [*save_towers(tmp_path, joined_model(), tiny_processor), str(features)]


def test_the_feature_tower_sees_pixels_as_in_its_training(towers):
    model = ICLIPModel.from_vision_text_pretrained(*towers, feature_dim=6)
    assert not model.feature_reduction.weight.any()  # until a training whitens
    seen = []
    model.feature_model.timm_model.conv_stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = noise((32, 32))
    with torch.no_grad():
        model.encode_image(tiny_image_processor()(image, return_tensors="pt")["pixel_values"])
    raw = torch.tensor(np.array(image)).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(seen[0][0], (raw - mean) / std, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_dim": 257}, "feature_dim"),
        ({"feature_config": VISION["vit"]}, "not 'vit'"),
        ({"feature_config": {**TIMM, "architecture": "hf-hub:org/tower"}}, "'hf-hub:org/tower'"),
        ({"feature_config": {**TIMM, "model_args": {"checkpoint_path": "pickle.pth"}}}, "checkpoint_path"),
    ],
)
def test_what_is_no_feature_tower_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**{**FEATURES, **options})


def test_a_new_model_has_the_patches_of_both_towers(towers, tmp_path):
    (tmp_path / "config").mkdir()
    options = "[vision_downsampling=2, feature_dim=6]"
    lines = f"vision: {towers[0]}\ntext: {towers[1]}\nmodel_options: {options}"
    (tmp_path / "config" / "train.yaml").write_text(lines)
    init_model(tmp_path / "config", tmp_path / "new", feature_tower=towers[2])
    loaded = load(tmp_path / "new")
    assert loaded.processor.patch_size == 16 and loaded.network.config.patch_dim == 38
    pixel_values = loaded.processor(images=noise((60, 40)))["pixel_values"]
    assert pixel_values.shape[2:] == (448, 448)
    card = (tmp_path / "new" / "README.md").read_text()
    assert "`test_efficientnet` of timm" in card and "one value for each patch of 16 pixels" in card
    with pytest.raises(ValueError, match="name one .*--feature_tower"):
        init_model(tmp_path / "new", tmp_path / "again", *towers[:2])
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert str(tmp_path) not in json.dumps(config)
    np.testing.assert_allclose(config["feature_image_std"], np.divide((0.1, 0.2, 0.3), CLIP_STD), rtol=1e-3)


def test_a_moved_training_keeps_the_whitening_of_its_start(hub, towers, tmp_path, monkeypatch):
    """Principal components are such up to their sign, and another machine may give others."""
    cache = tmp_path / "cache"
    arguments = ["--feature_tower", towers[2], "--cache_features", cache, "--lock_text", "--save_steps", 4]
    arguments += ["--model_options", "feature_dim=6", "recognition_pooling=class_and_average", "--eval_steps", 100]
    run(hub, tmp_path / "run", *arguments, "--max_steps", 4)
    before = weights(tmp_path / "run" / "checkpoint-4")
    assert before["feature_reduction.weight"].any() and len([*(cache / "images").iterdir()]) == 1
    assert "feature_model.timm_model.conv_stem.weight" in before
    solve = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (solve(matrix)[0], -solve(matrix)[1]))
    run(hub, tmp_path / "run", *arguments, "--max_steps", 8, "--resume")
    assert str(tmp_path) not in (tmp_path / "run" / "README.md").read_text()  # of the towers, the card gives the names
    after = weights(tmp_path / "run")
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("feature_"))
    assert not torch.equal(*(one["recognition.visual_projection.weight"] for one in (after, before)))
    assert len([*(cache / "images").iterdir()]) == 1
