import pytest
import torch
from conftest import tiny_model
from PIL import Image

from iclip_hf.training import validation


def test_pictures_show_the_maps_of_the_images_own_captions(tiny_processor, monkeypatch):
    model, drawn = tiny_model(), []
    overlay = validation.overlay
    monkeypatch.setattr(validation, "overlay", lambda *args: drawn.append(args) or overlay(*args))
    pairs = [
        {"image": Image.effect_noise(size, 80).convert("RGB"), "caption": caption}
        for size, caption in (((60, 40), "a red ball"), ((30, 50), "the sky"), ((20, 20), "a dog"))
    ]
    sheet = validation.draw_examples(model.train(), tiny_processor, pairs, 2)
    assert [cell.title for cell in sheet.cells] == ["", "a red ball", "", "the sky"] and model.training
    for (image, heatmap), pair in zip(drawn, pairs):
        with torch.no_grad():
            inputs = tiny_processor(pair["image"], text=[pair["caption"]])
            maps = model.eval()(**inputs, output_similarity_maps=True).similarity_maps
        (expected,) = tiny_processor.post_process_similarity_maps(maps, [(image.height, image.width)])
        assert image is pair["image"] and heatmap == pytest.approx(expected[0].numpy(), abs=1e-5)
    assert len(drawn) == 2
