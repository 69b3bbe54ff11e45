import math

import numpy as np
import pytest
import torch
from families import FAMILIES

from iclip_hf.backends.loading import load
from iclip_hf.model.presence import at_prior, presence_text, presence_word


@pytest.mark.parametrize("family", FAMILIES)
def test_only_a_model_trained_with_a_sigmoid_has_a_presence(made, family):
    """SigLIP by its own scale and bias."""
    model, processor, _ = made(family)
    scores = torch.tensor([[0.1, -0.2, 0.05]])
    with torch.no_grad():
        found = load((model, processor)).presence(scores)
    if not family.startswith("siglip"):
        assert found is None
        return
    scale, bias = model.logit_scale.exp().item(), model.logit_bias.item()
    expected = [1 / (1 + math.exp(-(scale * score + bias))) for score in scores[0].tolist()]
    assert found.tolist()[0] == pytest.approx(expected, abs=1e-5)
    # Scores may be on another device than the weights.
    assert load((model, processor)).presence(scores.to("meta")).device.type == "meta"


def test_the_prior_changes_the_odds_by_its_own():
    assert at_prior(0.5, 0.5) == 0.5
    assert at_prior(0.8, 0.2) == pytest.approx(0.5)  # odds of 4 to 1, times 1 to 4
    assert at_prior(np.array([0.0, 1.0]), 0.1).tolist() == [0, 1]


def test_words_of_presence():
    assert [presence_word(value) for value in (0.0, 0.49, 0.5, 0.79, 0.8, math.nan, None)] == [
        "absent", "absent", "unsure", "unsure", "present", "absent", None
    ]  # fmt: skip
    assert presence_word(0.5, min_presence=0.6) == "absent"
    assert presence_text(0.5996, min_presence=0.6) == "absent 0.59"  # and not 0.60
    assert [presence_text(value) for value in (0.29, 0.4985, 0.5, 0.7999, 0.8, 0.8585, math.nan, None)] == [
        "absent 0.29", "absent 0.49", "unsure 0.50", "unsure 0.79", "present 0.80", "present 0.86", "absent nan", ""
    ]  # fmt: skip
