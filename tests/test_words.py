"""Words of a text, by leaving each out."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import iclip
from families import pixels
from PIL import Image

from iclip_hf import draw, explain
from iclip_hf.model.explanation import Explanation
from iclip_hf.model.words import find_words, without_each_word


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
    assert [word.group() for word in find_words(text)] == words
    whole, *texts = without_each_word(text)
    assert whole == text and (shorter is None or texts == shorter) and len(texts) == len(words)


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
    entry = json.loads(capsys.readouterr().out)
    assert entry["sentence"] == "dog red ball" and [row["text"] for row in entry["texts"]] == ["dog", "red", "ball"]
    assert output.exists()
    assert iclip(*command, "--text", "dog red ball", "--report", tmp_path / "report") == 0
    data = json.loads((tmp_path / "report" / "data.js").read_text().removeprefix("const REPORT = ").rstrip(";\n"))
    assert data["texts"] == ["dog", "red", "ball"] and len(data["rows"]) == 3
    assert iclip(*command, "--text", "dog, ball") == 2 and "--words takes one --text" in capsys.readouterr().err


def test_the_picture_has_the_sentence_in_the_colours_of_the_scores():
    image, scores = Image.new("RGB", (60, 40), "gray"), torch.tensor([0.2, -0.2, 0.1, 0.0])
    words = Explanation(["dog", "red", "red", "ball"], scores, None, torch.rand(4, 2, 3), (40, 60), image=image)
    sentence = draw(replace(words, sentence="dog red,  red ball"))
    plain = draw(words)
    top = np.asarray(sentence)[: sentence.height - plain.height].astype(int)
    np.testing.assert_array_equal(np.asarray(sentence)[len(top) :], plain)
    # In the row below the letters' tops, the colours of the words from left to right.
    row = [tuple(color) for color in top[20]]
    colors = [color for color, before in zip(row[1:], row) if color != before]
    orange, half_orange, blue = (0xE6, 0x9F, 0x00), (242, 207, 127), (0x56, 0xB4, 0xE9)
    places = [row.index(color) for color in (orange, blue, half_orange)]
    assert places == sorted(places) and colors
    one = np.asarray(draw(replace(words["ball"], sentence="dog red,  red ball")))[: len(top)]
    assert (one == one[..., :1]).mean() > 0.9  # no word is coloured
    narrow = draw(replace(words, sentence="dog " * 40), columns=1)
    assert narrow.height - draw(words, columns=1).height > 3 * len(top) / 2  # several lines
