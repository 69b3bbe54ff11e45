import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iclip_hf.evaluation import analysis
from iclip_hf.evaluation.analysis import channel_matches, foreground_tokens, match_channels, relation, semantic_shift
from iclip_hf.modeling_iclip import ICLIPImageFeatures
from iclip_hf.models.explainable import Pooling


class Sample:
    """A sample in memory: `index` holds a class id a pixel, 0 background, 255 void."""

    void = 255

    def __init__(self, index, image=None):
        self.index = np.asarray(index, np.uint8)
        self.size = self.index.shape
        self.labels = tuple(sorted(set(self.index.ravel().tolist()) - {0, 255}))
        self.image = image

    def mask(self, label):
        return np.where(self.index == label, label, np.where(self.index == 255, 255, 0)).astype(np.uint8)


@pytest.fixture
def by_hand(monkeypatch):
    """Models are given by what they say of each image: patches and class token, on a grid of 1x3 patches."""

    def load(model):
        def get_image_features(image):
            patches, class_token = image
            return ICLIPImageFeatures(image_embeds=torch.tensor([class_token]), patch_embeds=torch.tensor([[patches]]))

        if not isinstance(model, str):  # loaded already
            return model
        return SimpleNamespace(
            processor=lambda images: {"pixel_values": images[0]},
            get_image_features=get_image_features,
            map_pooling=Pooling.PATCHES if model == "max" else Pooling.ONE_QUERY,
        )

    monkeypatch.setattr(analysis, "load", load)


# Three patches of four channels. Per channel the greatest is of patch 0, 0, 1, 2.
PATCHES = [[9.0, 8.0, 1.0, 0.0], [5.0, 2.0, 7.0, 1.0], [1.0, 0.0, 2.0, 6.0]]
# The class token is nearest to patch 1, 0, 2, 2.
CLASS_TOKEN = [4.0, 9.0, 2.5, 5.0]


def test_channels_by_hand(by_hand):
    matches = channel_matches("model", (PATCHES, CLASS_TOKEN))
    assert matches["max"].tokens.tolist() == [0, 0, 1, 2] and matches["max"].values.tolist() == [9, 8, 7, 6]
    assert matches["class_token"].tokens.tolist() == [1, 0, 2, 2]
    # The mean is (5, 3.33, 3.33, 2.33): nearest are 5, 2, 2, 1.
    assert matches["average"].tokens.tolist() == [1, 1, 2, 1]
    assert matches["own"].values.tolist() == CLASS_TOKEN and matches["max"].grid == (1, 3)
    assert "class_token" not in channel_matches("max", (PATCHES, CLASS_TOKEN))


def test_semantic_shift_by_hand(by_hand):
    image = (PATCHES, CLASS_TOKEN)
    samples = [
        # Foreground is patch 0, a third of the image: channel 0 leaves it, channel 1 stays on it, the others off it.
        Sample([[1, 0, 0]], image),
        # Foreground is patch 1 of two labelled ones, of two classes: channel 0 comes to it, channel 2 leaves it.
        Sample([[0, 2, 255], [0, 3, 255]], image),
        # Foreground is patch 2, in 2 of 13 labelled pixels: channel 2 comes to it.
        Sample([[0, 0, 0, 0, 5, 5], [0, 0, 0, 0, 255, 255], [0, 0, 255, 0, 255, 255]], image),
        # No foreground, and only void: left out. All foreground: nothing can leave.
        Sample([[0, 0, 0]], image),
        Sample([[255, 255, 0]], image),
        Sample([[4, 4, 4]], image),
    ]
    shift = semantic_shift("model", iter(samples), after="class_token")
    few, half, most, all_ = shift.rows
    assert (few.low, few.high, all_.low, all_.high) == (0, 0.25, 0, 1)
    assert (few.images, few.b2f, few.f2b, few.same) == (1, 1, 0, 3)
    assert (half.images, half.b2f, half.f2b, half.same) == (2, 0.5, 1, 2.5)
    assert (most.images, most.b2f, most.f2b, most.same) == (1, 0, 0, 4)
    assert (all_.images, all_.b2f, all_.f2b, all_.same) == (4, 0.5, 0.5, 3)
    assert (shift.images, shift.left_out) == (4, 2)
    # On the foreground of the four images: by maximum 2, 1, 1, 4 channels, by class token 1, 1, 2, 4, by mean 0, 3, 1, 4.
    assert shift.foreground_channels == {"class_token": 2, "average": 2, "max": 2, "own": 2}

    assert shift.table().splitlines()[2:] == [
        "| (0, 0.25] | 1 | 1.0 | 0.0 | 3.0 |",
        "| (0.25, 0.75] | 2 | 0.5 | 1.0 | 2.5 |",
        "| (0.75, 1] | 1 | 0.0 | 0.0 | 4.0 |",
        "| (0, 1] | 4 | 0.5 | 0.5 | 3.0 |",
        "",
        "| pooling | channels on the foreground |",
        "|---|---|",
        *(f"| {pooling} | 2.0 |" for pooling in ("class_token", "average", "max", "own")),
    ]

    back = semantic_shift("model", samples, before="class_token", after="max").rows
    assert [(row.b2f, row.f2b) for row in back] == [(row.f2b, row.b2f) for row in shift.rows]


def test_what_cannot_be_counted(by_hand):
    shift = semantic_shift("model", [])
    assert shift.images == 0 and shift.foreground_channels == {} and all(row.same is None for row in shift.rows)
    with pytest.raises(ValueError, match=r"one of \['average', 'max', 'own'\], got 'class_token'"):
        semantic_shift("max", [Sample([[1, 0, 0]], (PATCHES, CLASS_TOKEN))], after="class_token")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_foreground_tokens_are_a_majority_of_labelled_pixels(seed, h, w, tall, wide):
    index = np.random.default_rng(seed).choice([0, 1, 255], (h * tall, w * wide))
    tokens = foreground_tokens(index == 1, index != 255, (h, w)).reshape(h, w)
    for row in range(h):
        for column in range(w):
            patch = index[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
            assert tokens[row, column] == ((patch == 1).sum() > (patch == 0).sum())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 6))
def test_matches_are_the_nearest_patches(seed, patches, channels):
    generator = np.random.default_rng(seed)
    tokens, pooled = generator.integers(-3, 4, (patches, channels)), generator.integers(-3, 4, channels)
    found = match_channels(torch.from_numpy(pooled), torch.from_numpy(tokens))
    for channel in range(channels):
        distances = [abs(int(value) - int(pooled[channel])) for value in tokens[:, channel]]
        assert found[channel] == distances.index(min(distances))


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("pooling", ["masked_max", "class_token"])
def test_a_models_own_vectors_are_matched(dual, pooling, tiny_processor):
    """
    On a real model and an image that is not square, against the model's own output. The class token is that of the branch that
    draws: the recognition vector of a dual model is in another space than the patches.
    """
    model = tiny_model("dinov2", dual_projection=dual, pooling=pooling)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    matches = channel_matches((model, tiny_processor), image)
    with torch.no_grad():
        features = model.get_image_features(tiny_processor(images=[image])["pixel_values"])
    patches = features.patch_embeds[0].flatten(0, 1)
    vectors = {
        "average": patches.mean(0),
        "max": patches.max(0).values,
        "own": features.map_image_embeds[0],
    } | ({"class_token": features.map_image_embeds[0]} if pooling == "class_token" else {})
    assert set(matches) == set(vectors)
    for name, vector in vectors.items():
        np.testing.assert_allclose(matches[name].values, vector, atol=1e-5)
        nearest = (patches - vector).abs().min(0).values
        chosen = patches[matches[name].tokens, np.arange(16)]
        torch.testing.assert_close((chosen - vector).abs(), nearest, atol=1e-5, rtol=0)
    samples = [Sample([[0, 0, 1, 1]] * 2, image), Sample([[1, 1, 1, 0]] * 2, image)]
    shift = semantic_shift((model, tiny_processor), samples, after="own")
    expected = []
    for left, right in ((2, 4), (0, 3)):  # the columns of patches that are foreground
        before, after = (np.isin(matches[name].tokens % 4, range(left, right)) for name in ("max", "own"))
        expected.append([np.sum(~before & after), np.sum(before & ~after)])
    assert [shift.rows[-1].b2f, shift.rows[-1].f2b] == np.mean(expected, 0).tolist()


def test_relation_by_hand():
    found = relation(
        {"dog": 0.9, "cat": 0.5, "car": 0.1, "bus": math.nan, "sky": 1.0}, {"cat": 2, "dog": 1, "car": 3, "bus": 1}
    )
    assert found.names == ["dog", "cat", "car"]
    assert found.recognition.tolist() == [0.9, 0.5, 0.1] and found.interpretability.tolist() == [1, 2, 3]
    assert found.correlation == pytest.approx(-1)
    x, y = [1.0, 2.0, 4.0, 4.0], [1.0, 0.0, 3.0, 2.0]
    # deviations -1.75 -.75 1.25 1.25 and -.5 -1.5 1.5 .5: 4.5 / sqrt(6.75 * 5)
    some = relation(dict(enumerate(x)), dict(enumerate(y)))
    assert some.correlation == pytest.approx(4.5 / math.sqrt(6.75 * 5))


@pytest.mark.parametrize("scores", [{}, {"dog": 1.0}, {"dog": 1.0, "cat": 1.0}])
def test_a_relation_needs_two_different_scores(scores):
    assert math.isnan(relation(scores, {"dog": 0.2, "cat": 0.3}).correlation)
