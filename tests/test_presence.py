import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_model

from iclip_hf.model.presence import RANK_ALONE, RANK_AND_PATCHES, at_prior, patch_evidence, presence, presence_word
from iclip_hf.model.reference_nouns import REFERENCE_NOUNS
from iclip_hf.training.nouns import NounPrompts


ROOT = Path(__file__).parents[1]


def units(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def probability(logit):
    return 1 / (1 + math.exp(-logit))


def test_the_evidence_of_patches_by_loops():
    """The third noun is like the first text and does not compete with it."""
    patches, texts, nouns = units(2, 3, 4, 16), units(3, 16, seed=1), units(5, 16, seed=2)
    nouns[2] = texts[0]
    expected = np.empty((2, 3))
    for image in range(2):
        for t, text in enumerate(texts.tolist()):
            beaten = []
            for patch in patches[image].flatten(0, 1).tolist():
                total = sum(math.exp(20 * np.dot(patch, noun)) for noun in nouns.tolist() if np.dot(text, noun) <= 0.6)
                beaten.append(np.dot(patch, text) - math.log(total) / 20)
            expected[image, t] = np.mean(sorted(beaten)[-8:])
    np.testing.assert_allclose(patch_evidence(patches, texts, nouns), expected, atol=1e-5)
    own = texts.expand(2, -1, -1)  # a list of texts for each image
    np.testing.assert_allclose(patch_evidence(patches, own, nouns), expected, atol=1e-5)
    with_competitor = patch_evidence(patches, texts, torch.cat([nouns[:2], nouns[3:]]))
    np.testing.assert_allclose(with_competitor[:, 0], expected[:, 0], atol=1e-5)
    assert (with_competitor[:, 1:] > torch.from_numpy(expected[:, 1:])).all()


@pytest.mark.parametrize("matches_patches", [True, False])
def test_presence_by_hand(matches_patches):
    image = SimpleNamespace(image_embeds=units(2, 16), patch_embeds=units(2, 2, 2, 16, seed=1))
    texts = SimpleNamespace(text_embeds=units(3, 16, seed=2), map_text_embeds=units(3, 16, seed=3))
    nouns = SimpleNamespace(text_embeds=units(9, 16, seed=4), map_text_embeds=units(9, 16, seed=5))
    found = presence(SimpleNamespace(matches_patches=matches_patches), image, texts, nouns)
    for i, t in np.ndindex(2, 3):
        chance = [(image.image_embeds[i] @ noun).item() for noun in nouns.text_embeds]
        rank = ((image.image_embeds[i] @ texts.text_embeds[t]).item() - np.mean(chance)) / np.std(chance, ddof=1)
        if matches_patches:
            evidence = patch_evidence(image.patch_embeds, texts.map_text_embeds, nouns.map_text_embeds)[i, t].item()
            logit = RANK_AND_PATCHES[0] * rank + RANK_AND_PATCHES[1] * evidence + RANK_AND_PATCHES[2]
        else:
            logit = RANK_ALONE[0] * rank + RANK_ALONE[1]
        assert found[i, t].item() == pytest.approx(probability(logit), abs=1e-5)


@pytest.mark.parametrize(("max_over", "expected"), [("similarity", True), ("channels", False)])
def test_patches_tell_of_presence_where_the_loss_compares_them_with_texts(max_over, expected):
    assert tiny_model(max_over=max_over).matches_patches is expected


def test_the_prior_changes_the_odds_by_its_own():
    assert at_prior(0.5, 0.5) == 0.5
    assert at_prior(0.8, 0.2) == pytest.approx(0.5)  # odds of 4 to 1, times 1 to 4
    assert at_prior(np.array([0.0, 1.0]), 0.1).tolist() == [0, 1]


def test_words_of_presence():
    assert [presence_word(value) for value in (0.0, 0.49, 0.5, 0.79, 0.8, math.nan)] == [
        "absent", "absent", "unsure", "unsure", "present", "absent"
    ]  # fmt: skip
    assert presence_word(0.5, min_presence=0.6) == "absent"


def test_the_reference_nouns_are_every_fourth_of_the_vocabulary():
    vocabulary = NounPrompts.from_file(ROOT / "hub_configs" / "iclip-dinov2-s14-minilm" / "nouns.txt")
    assert sorted(vocabulary.nouns)[::4] == list(REFERENCE_NOUNS)
