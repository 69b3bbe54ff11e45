"""Presence: whether a text is in an image at all. A map, which is stretched to [0, 1], does not tell this."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


# Nouns of what photographs show. Their matches with an image estimate the distribution of chance matches.
REFERENCE_NOUNS = tuple(
    noun.strip()
    for noun in """
    person, child, crowd, face, hand, hair, dog, cat, horse, cow, sheep, bird, duck, fish, shark, snake, frog,
    turtle, insect, butterfly, spider, bear, monkey, elephant, lion, rabbit, mouse, flower, tree, leaf, grass, bush,
    mushroom, mountain, rock, cliff, beach, sand, desert, water, sea, river, waterfall, snow, ice, sky, cloud, fog,
    fire, smoke, street, road, bridge, railway, stairs, building, house, church, castle, tower, tent, fence, wall,
    window, door, roof, room, kitchen, bathroom, office, shop, stadium, playground, garden, field, machine, car,
    truck, bus, train, bicycle, motorcycle, boat, ship, airplane, wheel, engine, clothes, shirt, dress, shoe, hat,
    helmet, glasses, jewelry, bag, food, bread, cake, fruit, apple, vegetable, meat, soup, coffee, bottle, cup,
    plate, knife, table, chair, bed, sofa, lamp, carpet, curtain, book, newspaper, sign, painting, statue, flag,
    toy, ball, balloon, guitar, drum, camera, telephone, computer, screen, clock, tool, hammer, rope, ladder, box,
    basket, barrel, umbrella
    """.split(",")
)
# Here the share of present texts minus the share of absent texts above it is within half a point of its maximum, for the nouns of
# Flickr8k's dev captions and the embedded model.
MIN_PRESENCE = 0.8
# From here on, where about one in ten absent texts ranks, a text counts as present; between the two it is unsure.
PRESENT = 0.9
# Presence as words, see `presence_word`.
ABSENT, UNSURE, SURE = "absent", "unsure", "present"


def presence(model, image, texts, references) -> torch.Tensor:
    """
    Estimates the share of unrelated texts that would match the image less, with a normal distribution fitted to the matches of
    [`REFERENCE_NOUNS`]. It is a rank, not a probability: some absent texts rank high by chance, see docs/results.md. The page in the
    browser computes the same in `numerics.js`.

    Args:
        model ([`ICLIPModel`] or [`ExplainableModel`]): its `match` scores images and texts. Scale and offset do not matter.
        image ([`ICLIPImageFeatures`]), texts ([`ICLIPTextFeatures`]): of B images, and of T texts `(T, P)` or `(B, T, P)`.
        references ([`ICLIPTextFeatures`]): of [`REFERENCE_NOUNS`] in the templates of the texts, `(K, P)`.

    Returns:
        `torch.Tensor` of shape `(B, T)`, float32, in [0, 1].
    """
    import torch  # not above, because commands take `MIN_PRESENCE` before they load it

    std, mean = torch.std_mean(model.match(image, references), dim=-1, keepdim=True)
    return torch.special.ndtr((model.match(image, texts) - mean) / std)


def presence_word(value: float, min_presence: float = MIN_PRESENCE) -> str:
    """Returns `"absent"` for a presence below `min_presence`, `"present"` from 0.9 on, and otherwise `"unsure"`."""
    if not value >= min_presence:  # also NaN
        return ABSENT
    return SURE if value >= PRESENT else UNSURE
