"""Words of a text, by leaving each out."""

import json

import pytest
import torch
from conftest import iclip
from families import pixels
from PIL import Image

from iclip_hf import explain
from iclip_hf.model.words import without_each_word


@pytest.mark.parametrize(
    ("text", "words", "shorter"),
    [
        ("a red ball.", ["a", "red", "ball", "."], ["red ball.", "a ball.", "a red .", "a red ball"]),
        ("dog's toy, well-made", ["dog's", "toy", ",", "well-made"], None),
        ("ball  ball", ["ball", "ball"], ["ball", "ball"]),
        ("狗和球", ["狗", "和", "球"], ["和球", "狗 球", "狗和"]),
        ("chien à l\u2019eau", ["chien", "à", "l\u2019eau"], None),
        ("été", ["été"], [""]),
    ],
)
def test_words_are_those_of_the_string(text, words, shorter):
    found, texts = without_each_word(text)
    assert found == words and (shorter is None or texts == shorter) and len(texts) == len(words)


@pytest.mark.parametrize(
    "family", ["clip", "siglip", "altclip", "chinese_clip", "open_clip", "open_clip_coca", "iclip"]
)
@pytest.mark.parametrize("refine", [False, True])
def test_a_word_is_what_the_text_loses_without_it(made, family, refine):
    model, processor, _ = made(family)
    images = [Image.fromarray(image) for image in (pixels()[:2].movedim(1, -1).sigmoid() * 255).byte().numpy()]
    for templates in (["{}"], ["a {}.", "the {}."]):
        settings = {"method": "itsm", "templates": templates, "refine": refine, "image_size": None}
        for one in explain((model, processor), images, "dog red ball", words=True, **settings):
            assert one.labels == ["dog", "red", "ball"] and one.presence is None
            texts = ["dog red ball", "red ball", "dog ball", "dog red"]
            whole, *others = explain((model, processor), one.image, texts, **settings).scores
            torch.testing.assert_close(one.scores, whole - torch.stack(others), atol=1e-5, rtol=1e-4)
            raw = explain((model, processor), one.image, texts, **settings).raw_maps
            torch.testing.assert_close(one.raw_maps, raw[:1] - raw[1:], atol=1e-4, rtol=1e-3)
            assert (one.unrefined_maps is not None) == refine and [
                row["text"] for row in one.to_dict()["texts"]
            ] == one.labels


@pytest.mark.parametrize("texts", [["dog", "ball"], None, {"dog": 0.5}, " "])
def test_only_a_sentence_has_words(made, texts):
    model, processor, _ = made("clip")
    with pytest.raises(ValueError, match="A text "):
        explain((model, processor), Image.new("RGB", (32, 32)), texts, words=True)


def test_the_command_explains_words(world, tmp_path, capsys):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    command = ["explain", tmp_path / "photo.png", "--model", world.folder / "model", "--words"]
    output = tmp_path / "words.png"
    assert iclip(*command, "--text", "dog red ball", "--output", output, "--json") == 0
    assert [row["text"] for row in json.loads(capsys.readouterr().out)["texts"]] == ["dog", "red", "ball"]
    assert output.exists()
    assert iclip(*command, "--text", "dog, ball") == 2 and "--words takes one --text" in capsys.readouterr().err
