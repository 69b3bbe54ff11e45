"""Targets that are no text: sums of texts, and images, as encoded texts of `explain`."""

import pytest
import torch
from conftest import tiny_model
from families import PAIRS, images
from torch.nn import functional as F

from iclip_hf import explain, load
from iclip_hf.model.outputs import ICLIPTextFeatures


# Whose map is linear in the text.
LINEAR = ["itsm", "reversed_itsm", "gem", "maskclip", "sclip", "clearclip", "naclip", "proxyclip"]


@pytest.mark.parametrize(("family", "method"), [pair for pair in PAIRS if pair[0] in ("iclip", "clip")])
def test_every_method_takes_sums_of_texts_and_images(made, family, method):
    model, processor, (height, width) = made(family)
    model, image = load((model, processor)), images()[0]
    texts = model.encode_texts(["dog", "red ball"])
    sums = {
        "difference": {name: values[:1] - values[1:] for name, values in texts.items()},
        "mean": {name: values.mean(0, keepdim=True) for name, values in texts.items()},
    }
    options = {"method": method, "refine": False, "image_size": {"height": height, "width": width}}
    both = explain(model, image, texts, **options)
    assert both.labels == ["0", "1"]
    for kind, embeds in sums.items():
        found = explain(model, image, ICLIPTextFeatures(**embeds), **options)
        scores, maps = (
            values[:1] - values[1:] if kind == "difference" else values.mean(0, keepdim=True)
            for values in (both.scores, both.raw_maps)
        )
        torch.testing.assert_close(found.scores, scores, atol=1e-5, rtol=0)
        if method in LINEAR:
            torch.testing.assert_close(found.raw_maps, maps, atol=1e-5, rtol=0)
        assert found.raw_maps.isfinite().all() and found.map("0").shape == (image.height, image.width)

    features = model.get_image_features(processor_pixels(model, image.crop((5, 5, 40, 35))))
    query = ICLIPTextFeatures(text_embeds=features.image_embeds, map_text_embeds=features.image_embeds)
    found = explain(model, image, query, **options)
    whole = model.get_image_features(processor_pixels(model, image))
    torch.testing.assert_close(found.scores, (whole.image_embeds @ features.image_embeds.T)[0], atol=1e-5, rtol=0)
    assert found.raw_maps.std() > 0


def processor_pixels(model, image):
    return model.processor(images=[image])["pixel_values"]


def test_a_target_without_weights_of_the_attention_counts_as_an_object(tiny_processor):
    """A model with `map_attention="signed"` has such weights for texts, and none for images."""
    model = tiny_model(map_attention="signed")
    texts = load((model, tiny_processor)).encode_texts(["dog"])
    image = model.get_image_features(tiny_processor(images=images()[:1])["pixel_values"])
    query = F.normalize(image.patch_embeds.mean((1, 2)), dim=-1)
    maps = [
        model.similarity_maps(image, ICLIPTextFeatures(text_embeds=query, map_text_embeds=query, **weights))
        for weights in ({}, {"attention_weights": torch.ones(1)}, {"attention_weights": texts.attention_weights})
    ]
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])
