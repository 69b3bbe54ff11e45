"""The cache of features of images and texts."""

import copy
import os

import numpy as np
import pytest
import torch
from conftest import FEATURES, tiny_model, write_pairs
from processes import run_script

from iclip_hf import ICLIPProcessor
from iclip_hf.data.nouns import NounPrompts
from iclip_hf.data.pairs import load_pairs
from iclip_hf.training import CachedPairs, FeatureCache, PairCollator
from iclip_hf.training.features import FeatureStore


TOKENS = {"max_over": "similarity", "center_tokens": True, "map_affinity": 3.0}
POOLED = [
    {"pooling": "masked_max", "attention_norm": "quantile"},
    {"pooling": "max"},
    {"pooling": "average", "dual_projection": False},
    {"pooling": "class_token", "dual_projection": False},
    {"recognition_pooling": "class_and_average"},
    TOKENS,
    {**TOKENS, "recognition_pooling": "class_and_average", **FEATURES},
]


def size_of_batch(*inputs, **options) -> int:
    return len(next(iter([*inputs, *options.values()])))


@pytest.mark.parametrize("options", POOLED)
def test_any_pooling_comes_from_one_cache(hub, tmp_path_factory, tiny_processor, recorded, options):
    folder = tmp_path_factory.getbasetemp() / "one-cache"
    model, pairs = tiny_model(**options), load_pairs(str(hub / "pairs.tar"))
    model.vision_model.load_state_dict(tiny_model().vision_model.state_dict())
    FeatureCache(tiny_model(), tiny_processor, folder).fill_images(pairs)
    calls = recorded(model, "encode_image", size_of_batch)
    cache = FeatureCache(model, tiny_processor, folder)
    places = cache.fill_images(pairs)
    assert not calls or {"max_over", "feature_dim"} & options.keys()
    rows = [{"features": record, "captions": ["a dog"], "nouns": None} for record in cache.features(places[[5, 60]])]
    features = PairCollator(tiny_processor)(rows)["image_features"]
    cached = model.loss_inputs({name: of_images.float() for name, of_images in features.items()})
    pixel_values = tiny_processor(images=[pairs.read(index)["image"] for index in (5, 60)])["pixel_values"]
    with torch.no_grad():
        expected = model.image_inputs(model.encode_image(pixel_values))
    for one, other in zip(cached, expected):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)  # float16


def test_one_image_more_computes_one_image_more(tmp_path, tiny_processor, recorded):
    """Also in another data set, in another order, with other captions, or named twice."""
    write_pairs(tmp_path / "a.tar", 70)
    write_pairs(tmp_path / "b.tar", 1, seed=1)
    model = tiny_model()
    calls = recorded(model, "encode_image", size_of_batch)

    def cached(*names):
        pairs = load_pairs([str(tmp_path / f"{name}.tar") for name in names])
        return CachedPairs(
            pairs, FeatureCache(model, tiny_processor, tmp_path / "cache"), PairCollator(tiny_processor)
        )

    first = cached("a")
    assert calls == [64, 6]
    second = cached("b", "a", "b")
    assert calls == [64, 6, 1] and len(second) == 72
    assert second[1]["features"] == first[0]["features"]
    assert second[0]["features"] == second[71]["features"]
    write_pairs(tmp_path / "a.tar", 70, captions=["a red dog"])
    assert cached("a").captions(0) == ["a red dog"] and len(calls) == 3


def test_what_is_added_moves_nothing(tmp_path):
    """As held-out pairs after those to train on; the files of a folder are in no order of time."""
    store, places = FeatureStore(tmp_path), []
    for number in range(120):
        keys = [bytes([number, row] * 16) for row in range(3)]
        store.add(keys, {"a": np.full((3, 2, 4), number), "b": np.eye(3)})
        store.reload()
        places.append(store.find(keys)[1])
    records = store[np.array(places)]
    assert records["a"][:, 1, 3].tolist() == [*range(120)] and records["b"][17].tolist() == [0, 1, 0]
    # As of a million images, for which a process has 1024 descriptors.
    open_files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert sum(file.startswith(str(tmp_path)) for file in open_files) <= 100


def test_filling_a_cache_goes_on_where_it_stopped(tmp_path, tiny_processor, monkeypatch):
    monkeypatch.setattr("iclip_hf.training.features._BYTES_OF_FILE", 1)
    write_pairs(tmp_path / "many.tar", 300)
    pairs, model = load_pairs(str(tmp_path / "many.tar")), tiny_model()
    whole = FeatureCache(model, tiny_processor, tmp_path / "whole")
    expected = whole.features(whole.fill_images(pairs))
    calls, encode_image = [], model.encode_image

    def stops_at_the_third(pixel_values):
        calls.append(len(pixel_values))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_image(pixel_values)

    monkeypatch.setattr(model, "encode_image", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(model, tiny_processor, tmp_path / "stopped").fill_images(pairs)
    resumed = FeatureCache(model, tiny_processor, tmp_path / "stopped")
    found = resumed.features(resumed.fill_images(pairs))
    assert calls == [64, 64, 64, 64, 64, 44]  # the third twice
    for name in expected.dtype.names:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-3, rtol=2e-3)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(("part", "size"), [("keys", 0), ("records", -1)])
def test_a_file_that_lost_its_end_is_named(tmp_path, part, size):
    """After a loss of power, an interrupted copy or a full disk."""
    store = FeatureStore(tmp_path)
    store.add([bytes([number]) * 32 for number in range(1, 9)], {"text": np.ones((8, 16), np.float32)})
    (path,) = tmp_path.glob(f"*.{part}.npy")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(OSError, match=f"{path.name.partition('.')[0]}.* not complete; delete"):
        store.reload()


ANOTHER_RUN = """
import sys
from pathlib import Path

import torch
from iclip_hf.training.features import FeatureStore
from iclip_hf.utils.distributed import partial_state

state = partial_state("train")
store, keys = FeatureStore(Path(sys.argv[1])), [bytes([number]) * 32 for number in range(10)]
reload = store.reload

def with_another_run():
    store.reload = reload
    if state.process_index:
        reload()
    state.wait_for_everyone()
    if state.is_main_process:
        FeatureStore(store.folder).add(keys[:5], {"number": torch.arange(5).numpy()})
        reload()

store.reload = with_another_run
items = [None if number == 7 else number for number in range(10)]
places = store.fill(items, keys, lambda numbers: {"number": torch.tensor(numbers)}, 1)
found = store[places[places >= 0]]["number"].astype(int).tolist()
print(places[7], found)
"""


@pytest.mark.slow
def test_two_processes_fill_what_another_run_fills_too(tmp_path):
    """It adds features after the second has looked, and before the first has."""
    for done in run_script(ANOTHER_RUN, tmp_path, processes=2):
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip() == "-1 [0, 1, 2, 3, 4, 5, 6, 8, 9]"


def test_other_features_have_a_folder_of_their_own(hub, tmp_path, tiny_processor):
    def fill(model=None, processor=tiny_processor, precision="no"):
        cache = FeatureCache(model or tiny_model(), processor, tmp_path, precision)
        cache.fill_images(load_pairs(str(hub / "held_out.tar")))
        return len([*(tmp_path / "images").iterdir()])

    other_mean = copy.deepcopy(tiny_processor)
    other_mean.image_processor.image_mean = [0.1, 0.2, 0.3]
    other_norm, centered = tiny_model(), tiny_model(max_over="similarity", center_tokens=True)
    joined = tiny_model(**FEATURES)
    other_norm.vision_model.config.layer_norm_eps = 1e-3
    assert fill() == 1 and fill(tiny_model(pooling="max", map_affinity=2.0)) == 1  # of one kind
    kinds = [fill(tiny_model(seed=1)), fill(other_norm), fill(tiny_model(attention_quantile=0.5))]
    kinds += [fill(processor=other_mean), fill(precision="bf16"), fill(tiny_model(max_over="similarity"))]
    kinds += [fill(tiny_model(max_over="similarity", **{name: 5})) for name in ("map_tokens", "known_competition")]
    kinds += [fill(centered), fill(joined)]
    centered.token_mean.fill_(0.5)
    joined.feature_reduction.bias.data.fill_(0.5)
    kinds += [fill(centered), fill(joined), fill(tiny_model(vision_downsampling=2))]
    joined.feature_model.timm_model.bn2.running_mean.fill_(0.5)
    kinds.append(fill(joined))
    joined.config.recognition_pooling = "feature_average"
    assert [*kinds, fill(joined)] == [*range(2, 17)]


def test_cached_texts_know_tokenizer_and_tower_but_not_their_use(tmp_path, tiny_processor, recorded):
    texts, model = ["a dog", "the red car"], tiny_model()
    calls = recorded(model, "encode_text", size_of_batch)

    def fill(texts=texts, model=model, processor=tiny_processor):
        cache = FeatureCache(model, processor, tmp_path)
        cache.fill_texts(texts)
        return cache(texts)

    kept = fill()
    expected, _ = tiny_model().encode_text(**tiny_processor(text=texts))
    torch.testing.assert_close(kept, expected.detach(), atol=2e-3, rtol=2e-3)
    tiny_processor(text="a cat", padding="max_length", max_length=50)
    assert torch.equal(fill(texts[::-1]), kept.flip(0)) and calls == [2]
    fill(["a dog", "a red car"])
    assert calls == [2, 1]  # the tower is asked for one text more
    fill(processor=ICLIPProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, max_text_length=20))
    assert calls == [2, 1, 2] and not torch.equal(fill(model=tiny_model(seed=1)), kept)


def test_bad_pairs_are_left_out_of_the_cache(tmp_path, tiny_processor, caplog):
    write_pairs(tmp_path / "pairs.tar", 40, broken=(0, 7))
    pairs, collator = load_pairs(str(tmp_path / "pairs.tar")), PairCollator(tiny_processor)
    cache = FeatureCache(tiny_model(), tiny_processor, tmp_path)
    with pytest.raises(ValueError, match="max_bad_share: 2 of 40"):
        CachedPairs(load_pairs(str(tmp_path / "pairs.tar"), max_bad_share=0.01), cache, collator)
    dataset = CachedPairs(pairs, cache, collator)
    assert len(dataset) == 38 and "2 of 40 pairs are left out" in caplog.text
    assert dataset.indices.tolist() == [index for index in range(40) if index not in (0, 7)]
    assert [*map(dataset.captions, range(38))] == [pairs.captions(index) for index in dataset.indices]


@pytest.mark.parametrize("cached_texts", [False, True])
def test_cached_features_make_the_batch_of_their_pairs(tmp_path, tiny_processor, cached_texts):
    """Captions, noun prompts and labels too, in each epoch, in any order, whether or not another pair is bad."""
    captions = ["a photo of a dog", *(f"it runs, {number}" for number in range(4))]
    labels = {"labels": ["cat"], "complete": ["cat", "ball"]}
    write_pairs(tmp_path / "pairs.tar", 40, broken=(3,), captions=captions, **labels)
    source = load_pairs([str(tmp_path / "pairs.tar")] * 2, max_bad_share=0.1)
    nouns, model = NounPrompts(["dog", "cat", "ball"]), tiny_model()
    cache, plain = FeatureCache(model, tiny_processor, tmp_path / "cache"), PairCollator(tiny_processor, nouns)
    collator = PairCollator(tiny_processor, nouns, text_features=cache if cached_texts else None)
    cached = CachedPairs(source, cache, collator)
    cache.fill_texts(nouns.all_prompts())
    places, seen = [5, 44, 70], []
    for epoch in (0, 1, 0):
        source.set_epoch(epoch)
        cached.set_epoch(epoch)
        expected = plain([source[cached.indices[place]] for place in places])
        batch = collator(cached.__getitems__(places))
        assert all(torch.equal(batch["nouns"][name], of_nouns) for name, of_nouns in expected["nouns"].items())
        assert (expected["nouns"]["noun_labels"].sum(0) != 0).all()
        if cached_texts:
            texts, _ = model.encode_text(expected["input_ids"], expected["attention_mask"])
            torch.testing.assert_close(batch["text_inputs"], texts.detach(), atol=2e-3, rtol=2e-3)
        else:
            assert torch.equal(batch["input_ids"], expected["input_ids"])
        seen.append(expected["input_ids"].tolist())
    assert seen[0] == seen[2] != seen[1]
