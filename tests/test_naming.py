"""One text for one thing, by hand."""

import pytest
import torch

from iclip_hf.model.naming import best_texts
from iclip_hf.model.outputs import ICLIPTextFeatures


LEFT, RIGHT, MOST, ROOF = (torch.zeros(8, 8) for _ in range(4))
LEFT[:, :4] = RIGHT[:, 4:] = MOST[:, :5] = ROOF[:2] = 1  # LEFT and MOST overlap by 4 / 5


def choose(presence, maps, embeds, priors=None, weights=None, count=8, min_presence=0.5, allowed=None, labels="abcd"):
    """The texts of one image that are selected, and those whose maps were asked for."""
    texts = ICLIPTextFeatures(
        text_embeds=torch.nn.functional.normalize(torch.tensor(embeds), dim=-1)[None],
        map_text_embeds=torch.arange(len(embeds)).view(1, -1, 1).float(),
        attention_weights=None if weights is None else torch.tensor([weights]),
    )
    asked = []

    def map_texts(some):
        asked.extend(some.map_text_embeds.flatten().int().tolist())
        return torch.stack([maps[text] for text in asked])[None]

    presence = torch.tensor([presence])
    priors = None if priors is None else torch.tensor(priors)
    allowed = [range(len(embeds)) if allowed is None else allowed]
    ranked = [labels], presence - 2, presence, priors
    (selected,) = best_texts(*ranked, texts, allowed, map_texts, count, min_presence)
    return selected, asked


UNLIKE = torch.eye(4).tolist()


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        ([LEFT, MOST, RIGHT, ROOF], [0, 2, 3]),
        ([LEFT, ROOF, RIGHT, MOST], [0, 1, 2]),
        ([LEFT, RIGHT, LEFT, RIGHT], [0, 1]),
    ],
)
def test_texts_of_one_place_name_one_thing(maps, expected):
    assert choose([0.9, 0.8, 0.7, 0.6], maps, UNLIKE)[0] == expected


def test_the_frequent_name_of_a_thing_is_preferred():
    maps = [LEFT, MOST, RIGHT, ROOF]
    assert choose([0.9, 0.8, 0.7, 0.6], maps, UNLIKE, [0.02, 0.07, 0.07, 0.07])[0] == [1, 2, 3]
    assert choose([0.99, 0.8, 0.7, 0.6], maps, UNLIKE, [0.02, 0.07, 0.07, 0.07])[0] == [0, 2, 3]


def test_a_sure_name_is_preferred_to_a_longer_one():
    maps, labels = [LEFT, MOST, RIGHT, ROOF], ["clock tower", "tower", "sky", "bedroom"]
    assert choose([0.9, 0.81, 0.7, 0.6], maps, UNLIKE, labels=labels)[0] == [1, 2, 3]
    assert choose([0.9, 0.79, 0.7, 0.6], maps, UNLIKE, labels=labels)[0] == [0, 2, 3]  # unsure
    assert choose([0.9, 0.81, 0.7, 0.6], maps, UNLIKE, labels=["owl", "l", "sky", "sea"])[0] == [0, 2, 3]
    assert choose([0.9, 0.81, 0.7, 0.6], [LEFT, RIGHT, ROOF, torch.eye(8)], UNLIKE, labels=labels)[0] == [0, 1, 2, 3]


def test_things_come_before_backgrounds_of_the_same_presence():
    presence, maps = [0.8, 0.8, 0.9, 0.8], [LEFT, RIGHT, ROOF, torch.eye(8)]
    assert choose(presence, maps, UNLIKE)[0] == [2, 0, 1, 3]
    assert choose(presence, maps, UNLIKE, weights=[-1.0, 1.0, -1.0, 0.0], count=3)[0] == [1, 3, 2]


def test_people_come_first_unless_something_else_is_much_likelier():
    maps, labels = [LEFT, RIGHT, ROOF, torch.eye(8)], ["racket", "tennis player", "person", "cassette player"]
    assert choose([0.9, 0.7, 0.6, 0.8], maps, UNLIKE, labels=labels)[0] == [1, 2, 0, 3]
    assert choose([0.99, 0.7, 0.6, 0.8], maps, UNLIKE, labels=labels)[0] == [0, 1, 2, 3]  # 4.6 > 0.85 + 3


def test_texts_of_the_same_meaning_are_alike_from_a_cosine_of_085():
    embeds = [[cosine, (1 - cosine**2) ** 0.5] for cosine in (1.0, 0.87, 0.83)]
    texts = ICLIPTextFeatures(text_embeds=torch.tensor([embeds]), map_text_embeds=torch.zeros(1, 3, 1))
    scores = torch.tensor([[0.3, 0.2, 0.1]])
    assert best_texts(["abc"], scores, None, None, texts, [range(3)], None, 2, 0.0) == [[0, 2]]
    assert best_texts(["abc"], scores, None, None, texts, [[]], None, 2, 0.0) == [[]]


def test_only_the_best_text_may_have_a_lower_presence():
    maps = [LEFT, RIGHT, ROOF, RIGHT]
    assert choose([0.71, 0.69, 0.9, 0.0], maps, UNLIKE, min_presence=0.7) == ([2, 0], [2, 0])
    assert choose([0.1, 0.0, 0.2, 0.3], maps, UNLIKE, min_presence=0.7) == ([3], [3])
    assert choose([0.1, 0.0, 0.2, 0.3], maps, UNLIKE, allowed=[1, 2]) == ([2], [2])
