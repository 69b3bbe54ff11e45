import pytest
import torch
from conftest import noise, tiny_model

from iclip_hf.training import pictures


def test_pictures_show_the_maps_of_the_images_own_captions(tiny_processor, tmp_path, monkeypatch):
    model, drawn, sheets = tiny_model(), [], []
    overlay, grid = pictures.overlay, pictures.picture_grid
    monkeypatch.setattr(pictures, "overlay", lambda *args: drawn.append(args) or overlay(*args))
    monkeypatch.setattr(pictures, "picture_grid", lambda *args: sheets.append(args[1:]) or grid(*args))
    pairs = [
        {"image": noise(size), "caption": caption}
        for size, caption in (((60, 40), "a red ball"), ((30, 50), "the sky"), ((20, 20), "a dog"))
    ]
    captions = ["a red ball", "the sky"]
    pictures.draw_examples(model.train(), tiny_processor, pairs, 2, tmp_path / "pictures", 0)
    assert sheets.pop() == (["", "step 0", "", ""], 2, captions) and model.training
    before, drawn[:] = list(drawn), []
    for (image, heatmap), pair in zip(before, pairs):
        with torch.no_grad():
            inputs = tiny_processor(pair["image"], text=[pair["caption"]])
            maps = model.eval()(**inputs, output_similarity_maps=True).similarity_maps
        (expected,) = tiny_processor.post_process_similarity_maps(maps, [(image.height, image.width)])
        assert image is pair["image"] and heatmap == pytest.approx(expected[0].numpy(), abs=1e-5)
    assert len(before) == 2

    trained = tiny_model(seed=1)
    pictures.draw_examples(trained, tiny_processor, pairs, 2, tmp_path / "pictures", 7)
    assert sheets.pop() == (["", "before", "step 7", "", "", ""], 3, captions)
    for (image, heatmap), (first, now) in zip(before, (drawn[:2], drawn[2:])):
        assert first[0] is now[0] is image and first[1] == pytest.approx(heatmap, abs=1e-3)  # kept as float16
        assert abs(now[1] - heatmap).max() > 0.01
    written = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert written == ["0000000.png", "0000007.png", "before.npz"]
