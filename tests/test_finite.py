"""
Gradients are finite, whatever options, towers and parts that learn come together; a model that gives NaN is refused.
"""

import pytest
import torch
from conftest import VISION, iclip, noise, save, tiny_inputs, tiny_model
from pairwise import pairwise

from iclip_hf import ImageTextSimilarityMapPipeline, ZeroShotImageSegmentationPipeline
from iclip_hf.model.pooling import normalize_attention, pool_similarities


POOLED = [
    {"pooling": "masked_max"},
    {"pooling": "masked_max", "dual_projection": False},
    {"pooling": "max", "recognition_pooling": "class_and_average"},
    {"pooling": "average", "dual_projection": False},
    {"pooling": "class_token"},
    {"max_over": "similarity"},
    {"max_over": "similarity", "center_tokens": True, "recognition_pooling": "class_and_average"},
    {"max_over": "similarity", "pooling": "max"},
    {"max_over": "similarity", "max_sharpness": 1000},
]
LEARNS = {
    "projections": (True, True),  # whether the image tower and the text tower are locked
    "text": (True, False),
    "everything": (False, False),
}
FACTORS = {
    "vision": [*VISION],
    "text": [("bert", "mean"), ("clip_text_model", "eos"), ("siglip_text_model", "mean")],
    "pooled": POOLED,
    "learns": [*LEARNS],
    "map_affinity": [0, 4.0],
    "map_attention": ["similarity", "additive", "signed"],
    "attention_norm": ["minmax", "quantile"],
    "value_share": [0, 0.5],
    "map_tokens": [5, 20],
    "known_competition": [0, 0.5],
    "chunk_size": [2, 256],
    "autocast": [False, True],
    "nouns": [False, True],
}


def name(row: dict) -> str:
    return "-".join(
        "+".join(map(str, value.values() if isinstance(value, dict) else [value])) for value in row.values()
    )


@pytest.mark.parametrize("row", pairwise(FACTORS), ids=name)
def test_the_gradient_of_everything_that_learns_is_finite(row):
    options = {key: row[key] for key in FACTORS if key in ("map_affinity", "map_attention", "attention_norm")}
    options |= {key: row[key] for key in ("value_share", "map_tokens")} | row["pooled"]
    if options.get("max_over") == "similarity":
        options["known_competition"] = row["known_competition"]
    text, text_pooling = row["text"]
    options["lock_vision"], lock_text = LEARNS[row["learns"]]
    model = tiny_model(row["vision"], text, text_pooling=text_pooling, noun_competition=0.5, **options)
    if lock_text:
        model.text_model.requires_grad_(False)
    batch = tiny_inputs(batch=3, texts=6 if row["nouns"] else 3)
    if row["nouns"]:
        marks = {"is_background": torch.tensor([False, True, True]), "place": torch.tensor([0, 1, 1])}
        labels = torch.tensor([[1, -1], [-1, 1], [0, 0]])
        batch["nouns"] = {"noun_ids": torch.tensor([0, 1, 1]), "noun_labels": labels, **marks}
    with torch.autocast("cpu", torch.bfloat16, enabled=row["autocast"]):
        loss = model(**batch, return_loss=True, chunk_size=row["chunk_size"]).loss
    loss.backward()
    learning = {name: one for name, one in model.named_parameters() if one.requires_grad}
    gradients = {name: one.grad for name, one in learning.items() if one.grad is not None}
    assert loss.isfinite() and not [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    taught = {name.split(".")[0] for name, gradient in gradients.items() if gradient.any()}
    expected = {name.split(".")[0] for name in learning}  # towers, branches, and from nouns the attention's direction
    assert taught == (expected if row["nouns"] else expected - {"attention_direction"})


@pytest.mark.parametrize("sharpness", [10.0, 1000.0])
def test_the_gradient_of_attention_is_that_of_the_formula(sharpness):
    """Of an image tower that learns. One patch of each image has no attention, and one image has none at all."""
    draws = torch.Generator().manual_seed(0)
    attention, similarities = torch.rand(3, 5, generator=draws), 0.1 * torch.rand(3, 4, 5, generator=draws)
    attention[2] = 0.25
    learned, weights = attention.clone().requires_grad_(), attention.double().requires_grad_()
    pooled = pool_similarities(similarities.mT, torch.eye(4), normalize_attention(learned, "minmax", 0.9), sharpness)
    low, high = weights[:2].amin(1, keepdim=True), weights[:2].amax(1, keepdim=True)
    prior = torch.cat([(weights[:2] - low) / (high - low), torch.ones(1, 5)])
    prior = prior / prior.sum(1, keepdim=True)
    expected = (prior.unsqueeze(1) * (sharpness * similarities.double()).exp()).sum(-1).log() / sharpness
    torch.testing.assert_close(pooled.double(), expected, atol=1e-5, rtol=1e-5)
    factors = torch.randn(3, 4, generator=draws)
    (found,) = torch.autograd.grad((pooled * factors).sum(), learned)
    (gradient,) = torch.autograd.grad((expected * factors).sum(), weights)
    torch.testing.assert_close(found.double(), gradient, atol=1e-5, rtol=1e-4)


def test_a_model_that_gives_nan_is_refused_by_every_command(tiny_processor, tmp_path, capsys):
    """Its weights are finite, but their products are not."""
    model = tiny_model()
    with torch.no_grad():
        for layer in (
            model.vision_model.layernorm,
            *(branch.visual_projection for branch in model.children() if hasattr(branch, "visual_projection")),
        ):
            layer.weight.fill_(1e20)
    save(tmp_path / "model", model, tiny_processor)
    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos" / "a.png"
    noise((60, 40)).save(photo)
    sentence = "The model gives NaN or infinity"
    for command, image in (("explain", photo), ("segment", photo), ("compare", photo), ("explain", photo.parent)):
        output = tmp_path / f"{command}-{image.stem}{image.suffix}"
        arguments = [command, image, "--text", "dog", "--model", tmp_path / "model", "--output", output]
        assert iclip(*arguments) == 2, command
        out, err = capsys.readouterr()
        assert "nan" not in out.lower() and err.splitlines()[-1].startswith(f"iclip {command}: {sentence}")
        assert not [path for path in (output, *output.glob("[!.]*")) if path.is_file()]
    for pipeline in (ImageTextSimilarityMapPipeline, ZeroShotImageSegmentationPipeline):
        with pytest.raises(ValueError, match=sentence):
            pipeline(model=model, processor=tiny_processor, device="cpu")(str(photo), ["dog"])
