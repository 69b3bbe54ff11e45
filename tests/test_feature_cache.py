"""The cache of features of images and texts."""

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_model, write_pairs
from training_runs import accelerator, write_table

from iclip_hf import ICLIPProcessor
from iclip_hf.data.nouns import NounPrompts
from iclip_hf.data.pairs import load_pairs
from iclip_hf.training.data import CachedPairs, TrainingPairs, load_datasets
from iclip_hf.training.features import FeatureCache, FeatureShards, unpack_inputs
from iclip_hf.training.inputs import Inputs, check_run
from iclip_hf.training.settings import Settings


TOKENS = {"max_over": "similarity", "center_tokens": True, "map_affinity": 3.0}
POOLED = [
    {"pooling": "masked_max", "attention_norm": "quantile"},
    {"pooling": "max"},
    {"pooling": "average", "dual_projection": False},
    {"pooling": "class_token", "dual_projection": False},
    {"pooling": "masked_max", "recognition_pooling": "class_and_average"},
    TOKENS,
    {**TOKENS, "recognition_pooling": "class_and_average"},
    {"recognition_pooling": "class_and_average", "average_layers": 2},
    {**TOKENS, "recognition_pooling": "class_and_average", "average_layers": 2},
]


@pytest.mark.parametrize("options", POOLED)
def test_any_pooling_comes_from_one_cache(hub, tmp_path_factory, tiny_processor, options):
    folder = tmp_path_factory.getbasetemp() / "one-cache"
    model, pairs = tiny_model(**options), load_pairs(str(hub / "pairs.tar"))
    model.vision_model.load_state_dict(tiny_model().vision_model.state_dict())
    first = FeatureCache(folder, tiny_model(), tiny_processor, accelerator()).images(pairs)
    dataset = CachedPairs(pairs, FeatureCache(folder, model, tiny_processor, accelerator()))
    assert (dataset.features.folder == first.folder) == (not {"max_over", "average_layers"} & options.keys())
    cached = dataset.__getitems__([5, 60])["image_inputs"]
    pixel_values = tiny_processor(images=[pairs.read(index)["image"] for index in (5, 60)])["pixel_values"]
    with torch.no_grad():
        image = model.encode_image(pixel_values)
        expected = model.image_inputs(image)
    for one, other in zip(cached, expected):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)  # float16


def test_filling_a_cache_goes_on_where_it_stopped(hub, tmp_path, tiny_processor, monkeypatch):
    write_pairs(tmp_path / "many.tar", 600)
    pairs, model = load_pairs(str(tmp_path / "many.tar")), tiny_model()
    whole = FeatureCache(tmp_path / "whole", model, tiny_processor, accelerator()).images(pairs)
    assert whole.num_shards == 3

    calls, encode_image = [], model.encode_image

    def stops_after_six(pixel_values):
        calls.append(len(pixel_values))
        if len(calls) == 7:
            raise KeyboardInterrupt
        return encode_image(pixel_values)

    monkeypatch.setattr(model, "encode_image", stops_after_six)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path / "stopped", model, tiny_processor, accelerator()).images(pairs)
    resumed = FeatureCache(tmp_path / "stopped", model, tiny_processor, accelerator()).images(pairs)
    assert sum(calls) == 600 + (6 + 1) * 64 - 256  # the first shard was kept
    rows = np.random.default_rng(0).integers(0, 600, 50)
    assert np.array_equal(resumed[rows], whole[rows]) and resumed.usable() == whole.usable() == [True] * 600
    assert not list(tmp_path.rglob("*.partial"))


def test_other_features_have_a_folder_of_their_own(hub, tmp_path, tiny_processor):
    def fill(model=None, name="pairs.tar", processor=tiny_processor, precision="no", **options):
        model, place = model or tiny_model(), accelerator()
        place.state._mixed_precision = precision
        return FeatureCache(tmp_path, model, processor, place).images(load_pairs(str(hub / name)), **options).folder

    other_mean = copy.deepcopy(tiny_processor)
    other_mean.image_processor.image_mean = [0.1, 0.2, 0.3]
    other_norm = tiny_model()
    other_norm.vision_model.config.layer_norm_eps = 1e-3
    folders = [fill(), fill(tiny_model(seed=1)), fill(other_norm), fill(tiny_model(attention_quantile=0.5))]
    folders += [fill(name="held_out.tar"), fill(processor=other_mean), fill(precision="bf16")]
    tokens = tiny_model(max_over="similarity")
    folders += [fill(tokens), fill(tokens, earlier_mean=[0.5])]
    folders += [
        fill(tiny_model(max_over="similarity", **{option: 5})) for option in ("map_tokens", "known_competition")
    ]
    folders += [fill(tiny_model(max_over="similarity", map_affinity=2.0))]
    assert len(set(folders)) == len(folders) and fill(tiny_model(pooling="max", map_affinity=2.0)) == folders[0]


def test_held_out_features_belong_to_the_mean_of_the_training_images(tmp_path, tiny_processor):
    held_out = load_pairs(write_table(tmp_path / "held_out", 3, seed=9))

    def load(training: str, center_tokens: bool = True) -> list[CachedPairs]:
        settings = Settings(model="m", data=["d"], cache_features=str(tmp_path / "cache"), num_workers=0)
        model = tiny_model(max_over="similarity", center_tokens=center_tokens)
        inputs = Inputs(load_pairs(tmp_path / training / "pairs.csv"), held_out, None, None)
        return load_datasets(settings, inputs, model, tiny_processor, accelerator())

    for seed, name in enumerate(("one", "other")):
        write_table(tmp_path / name, 4, seed=seed)
    first, other = load("one"), load("other")
    assert [one.features.folder for one in load("one")] == [one.features.folder for one in first]
    rows = np.arange(3)
    assert not np.allclose(first[1].features[rows], other[1].features[rows], atol=1e-3)
    plain = [load(name, center_tokens=False)[1].features.folder for name in ("one", "other")]
    assert plain[0] == plain[1]  # without a mean, both share them


def test_a_cache_that_cannot_be_written_is_only_read(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *place: False)  # whoever runs the test
    places = {"output_dir": str(tmp_path / "new"), "cache_features": str(tmp_path / "cache")}
    settings = Settings(model="embedded", data=["d"], report_to="none", **places)
    with pytest.raises(PermissionError, match="cache.* is not a folder that can be written"):
        check_run(settings)
    (tmp_path / "cache" / "training").mkdir(parents=True)
    check_run(settings)


def test_cached_texts_know_tokenizer_and_tower_but_not_their_use(tmp_path, tiny_processor):
    texts, model = ["a dog", "the red car"], tiny_model()

    def fill(texts=texts, model=model, processor=tiny_processor):
        return FeatureCache(tmp_path, model, processor, accelerator()).texts(texts)

    kept = fill()
    (file,) = tmp_path.rglob("00000.npy")
    written = file.stat().st_mtime_ns
    tiny_processor(text="a cat", padding="max_length", max_length=50)
    assert torch.equal(fill()[texts[:1]], kept[texts][:1]) and file.stat().st_mtime_ns == written
    shorter = ICLIPProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, max_text_length=20)
    fill(processor=shorter)
    fill(model=tiny_model(seed=1))
    fill(texts=["a dog", "a red car"])
    assert len([*tmp_path.rglob("00000.npy")]) == 4


def test_texts_and_repeated_sources_cost_no_features(tmp_path, tiny_processor, monkeypatch):
    """Captions and labels are those of today's files, and a shard that is named three times counts three times."""
    write_pairs(tmp_path / "a.tar", 5)
    write_pairs(tmp_path / "b.tar", 7, seed=1)
    sources, model, calls = [str(tmp_path / f"{name}.tar") for name in "baab"], tiny_model(), []
    monkeypatch.setattr(
        model, "encode_image", lambda images, of=model.encode_image: calls.append(len(images)) or of(images)
    )
    cache = FeatureCache(tmp_path / "cache", model, tiny_processor, accelerator())
    once, often = CachedPairs(load_pairs(sources[:2]), cache), CachedPairs(load_pairs(sources), cache)
    assert calls == [12] and len(once) == 12 and len(often) == 24 and often.features.folder == once.features.folder
    expected = once.__getitems__([*range(12)])["image_inputs"].recognition
    for rows in ([*range(12)], [*range(17, 24), *range(12, 17)]):
        assert torch.equal(often.__getitems__(rows)["image_inputs"].recognition, expected)
    write_pairs(tmp_path / "a.tar", 5, captions=["a red dog"])
    changed = CachedPairs(load_pairs(sources[:2]), cache)
    assert calls == [12] and changed.sampled_captions()[7:] == ["a red dog"] * 5


def test_bad_pairs_are_left_out_of_the_cache(tmp_path, tiny_processor, caplog):
    write_pairs(tmp_path / "pairs.tar", 40, broken=(0, 7))
    pairs, model = load_pairs(str(tmp_path / "pairs.tar")), tiny_model()
    model.config.pooling, model.config.dual_projection = "max", False
    cache = FeatureCache(tmp_path, model, tiny_processor, accelerator())
    with pytest.raises(ValueError, match="max_bad_share: 2 of 40"):
        CachedPairs(load_pairs(str(tmp_path / "pairs.tar"), max_bad_share=0.01), cache)
    caplog.clear()
    dataset = CachedPairs(pairs, cache, lock_text=True)
    images = cache.images(pairs)
    assert len(dataset) == 38
    (said,) = caplog.messages  # by every run, although the images are not read again
    assert said.startswith("2 of 40 pairs are left out") and str(images.folder) in said
    for index, row in ((0, 1), (6, 8), (37, 39)):  # rows of the data without the bad ones
        batch = dataset.collate(dataset.__getitems__([index]))
        captions = tiny_processor(text=pairs.captions(row))
        both = model.encode_text(**captions)[0]
        distance = (both - batch["text_inputs"]).abs().amax(1)
        assert distance.min() < 2e-3
        expected = unpack_inputs(torch.from_numpy(images[np.array([row])]).float(), model.config)
        assert torch.equal(batch["image_inputs"].pooled, expected.pooled)


@pytest.mark.parametrize("nouns", [None, NounPrompts(["dog", "cat"])])
def test_pairs_and_their_features_have_the_same_captions(tmp_path, tiny_processor, nouns):
    """Sampled by the epoch and the place of the pair, in whatever order, and whether or not another pair is bad."""
    captions = ["a photo of a dog", *(f"it runs, {number}" for number in range(4))]
    write_pairs(tmp_path / "pairs.tar", 40, broken=(3,), captions=captions)
    source = load_pairs([str(tmp_path / "pairs.tar")] * 2, max_bad_share=0.1)
    cache = FeatureCache(tmp_path / "cache", tiny_model(), tiny_processor, accelerator())
    cached = CachedPairs(source, cache, 7, nouns)
    pairs = TrainingPairs(source, lambda image: image, tiny_processor, 7, nouns)
    kept, epochs = [place for place in range(80) if place % 40 != 3], []
    assert cached.image_digests() == [pairs.image_digests()[place] for place in kept]
    for epoch in (0, 1, 0):
        pairs.set_epoch(epoch)
        cached.set_epoch(epoch)
        epochs.append(cached.sampled_captions())
        assert epochs[-1] == [pairs[place]["caption"] for place in kept]
        assert epochs[-1][5::-2] == cached.__getitems__([5, 3, 1])["caption"]
    assert epochs[0] == epochs[2] != epochs[1] and epochs[0][:39] != epochs[0][39:]
    assert {*epochs[0]} == {*captions[nouns is not None :]}  # a noun prompt is no caption if there is another


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_damaged_shard_is_named(tmp_path, suffix):
    FeatureShards(tmp_path, 300).write(0, np.zeros((256, 2), np.float16), [True] * 256)
    FeatureShards(tmp_path, 300).write(1, np.ones((44, 2), np.float16), [False] * 44)
    assert FeatureShards(tmp_path, 300)[np.array([299, 0])].tolist() == [[1, 1], [0, 0]]
    assert sum(FeatureShards(tmp_path, 300).usable()) == 256
    file, other = (tmp_path / f"{shard:05d}{suffix}" for shard in (1, 0))
    content = file.read_bytes()
    for damaged in (b"", content[:-20], other.read_bytes()):  # the last has other rows
        file.write_bytes(damaged)
        shards = FeatureShards(tmp_path, 300)
        with pytest.raises(ValueError, match=f"{file.name}: this file of the feature cache is damaged; delete"):
            shards[np.array([0])] if suffix == ".npy" else shards.usable()
