"""The training system: small runs on tiny random towers, and its parts against slow or direct computation."""

import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import TEXT, VISION, WORDS, tiny_inputs, tiny_model
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from timm.scheduler import CosineLRScheduler
from torch.utils.data import IterableDataset

from iclip_hf import ICLIPConfig, ICLIPModel, ICLIPProcessor, cli
from iclip_hf.data.pairs import DroppedConnectionError, load_pairs
from iclip_hf.losses import contrastive_loss
from iclip_hf.training import loss as loss_module
from iclip_hf.training import run as program
from iclip_hf.training.data import (
    AugmentedImage,
    BatchLoader,
    GlobalBatches,
    TrainingPairs,
    TrainingStream,
    WholeImage,
    seeded,
)
from iclip_hf.training.feature_cache import CachedPairs, FeatureShards, cache_images, cache_texts
from iclip_hf.training.interrupts import Interrupts
from iclip_hf.training.loss import PairModel, salient_tokens, set_token_mean
from iclip_hf.training.low_rank import add_low_rank, merge_low_rank
from iclip_hf.training.nouns import NounPrompts
from iclip_hf.training.run import train
from iclip_hf.training.schedule import cosine_schedule, parameter_groups
from iclip_hf.training.settings import parse_settings, read_settings
from iclip_hf.utils.files import folder_lock


ROOT = Path(__file__).parents[1]


def write_pairs(path: Path, count: int, broken: tuple[int, ...] = (), seed: int = 0) -> None:
    """A webdataset shard of noise images with two captions each."""
    draws = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            image = io.BytesIO()
            Image.fromarray(draws.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(image, "JPEG")
            words = [WORDS[j] for j in draws.integers(0, 12, 5)]
            captions = json.dumps({"captions": [" ".join(words), " ".join(words[::-1]) + f" {i}"]})
            data = b"no image" if i in broken else image.getvalue()
            for suffix, content in ((".jpg", data), (".json", captions.encode())):
                member = tarfile.TarInfo(f"{i:05d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_processor) -> Path:
    """Tiny towers, pairs, and a folder as in hub_configs: 64 pairs in 4 steps an epoch, 12 steps in all."""
    folder = tmp_path_factory.mktemp("hub")
    model = tiny_model()
    model.vision_model.save_pretrained(folder / "vision")
    model.text_model.save_pretrained(folder / "text")
    model.config.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    tiny_processor.tokenizer.save_pretrained(folder / "text")
    write_pairs(folder / "pairs.tar", 64)
    write_pairs(folder / "held_out.tar", 17, seed=1)
    (folder / "train.yaml").write_text(
        f"""
        vision: {folder}/vision
        text: {folder}/text
        data: [{folder}/pairs.tar]
        image_size: 32
        batch_size: 16
        epochs: 3
        warmup_epochs: 1
        learning_rate: 0.05
        num_workers: 0
        eval_steps: 5
        checkpoint_steps: 5
        report_to: none
        """
    )
    return folder


def run(hub: Path, output_dir: Path, *arguments) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    command = ["--config", hub / "train.yaml", "--output_dir", output_dir, *arguments]
    return train(parse_settings([str(argument) for argument in command]))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path, **tolerance) -> None:
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(tolerance or {"rtol": 0, "atol": 0}))


def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


# --------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(("total", "warmup"), [(12, 4), (12, 0), (5, 4), (100, 7)])
def test_schedule_is_that_of_groupvit(total, warmup):
    """timm's, as GroupViT calls it; the cosine runs from the first step on, under the warm-up too."""
    learning = torch.nn.Parameter(torch.zeros(1))
    theirs = CosineLRScheduler(
        torch.optim.AdamW([learning], lr=1.0),
        t_initial=total,
        lr_min=0.1,
        warmup_t=warmup,
        warmup_lr_init=0.2 if warmup else 0,
        cycle_limit=1,
        t_in_epochs=False,
    )
    rates = [cosine_schedule(step, total, warmup, peak=1.0, start=0.2, end=0.1) for step in range(total)]
    assert rates == pytest.approx([theirs._get_lr(step)[0] for step in range(total)])
    slowly = [0.2 + 0.8 * step / warmup for step in range(warmup)]
    slowly += [0.1 + 0.9 * np.cos(np.pi * step / total / 2) ** 2 for step in range(warmup, total)]
    assert rates == pytest.approx(slowly)


def test_what_decays():
    pair_model = PairModel(tiny_model(projection_bias=True))
    decaying, others = parameter_groups(pair_model, 0.05)
    names = {id(parameter): name for name, parameter in pair_model.named_parameters()}
    assert decaying["weight_decay"] == 0.05 and others["weight_decay"] == 0
    assert {names[id(p)].rsplit(".")[-1] for p in others["params"]} >= {"bias", "logit_scale"}
    assert all(p.ndim > 1 for p in decaying["params"]) and all(p.ndim <= 1 for p in others["params"])
    listed = {names[id(p)] for group in (decaying, others) for p in group["params"]}
    assert listed == {name for name in names.values() if "vision_model" not in name}


@given(
    rows=st.integers(1, 40),
    share=st.integers(1, 5),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
    data=st.data(),
)
def test_batches_are_the_same_for_any_number_of_processes(rows, share, world_size, epoch, data):
    batch_size = share * world_size

    def batches(world_size, first=0):
        of_rank = []
        for rank in range(world_size):
            sampler = GlobalBatches(rows, batch_size, seed=3, rank=rank, world_size=world_size)
            sampler.epoch, sampler.first = epoch, first
            of_rank.append(list(sampler))
        return [[index for part in parts for index in part] for parts in zip(*of_rank)]

    whole = batches(1)
    assert batches(world_size) == whole
    seen = [index for batch in whole for index in batch]
    assert len(seen) == len(set(seen)) == rows // batch_size * batch_size and set(seen) <= set(range(rows))
    first = data.draw(st.integers(0, len(whole)))
    assert batches(world_size, first) == whole[first:]


class Stream(IterableDataset):
    """Seven pairs, in an order of its epoch."""

    collate = staticmethod(torch.tensor)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(np.random.default_rng(self.epoch).permutation(7).tolist())


def test_a_stream_goes_on_with_an_order_of_its_own():
    """Five steps of two pairs an epoch, from passes of three."""
    loader = BatchLoader(Stream(), accelerator(), 2, pairs_per_epoch=10)

    def seen(epoch, first=0):
        return torch.stack(list(loader.epoch(epoch, first))).tolist()

    def orders(*steps):
        return [np.random.default_rng(step).permutation(7)[:6].reshape(3, 2).tolist() for step in steps]

    first, second = orders(0, 3)
    assert seen(0) == first + second[:2]
    assert seen(1) == [*orders(5)[0], *orders(8)[0]][:5]
    assert seen(1, 4) == orders(9)[0][:1] != seen(1)[:1]  # not the beginning of the epoch again
    with pytest.raises(ValueError, match="a whole batch .* lower batch_size"):
        list(BatchLoader(Stream(), accelerator(), 8, pairs_per_epoch=10).epoch(0))


class Dropping(Stream):
    """A stream whose connection is lost after three pairs, as often as it is told."""

    drops = 0

    def __iter__(self):
        for number, item in enumerate(super().__iter__()):
            if number == 3 and self.drops:
                self.drops -= 1
                raise DroppedConnectionError("reset by peer")
            yield item


def test_a_stream_goes_on_after_a_lost_connection(monkeypatch):
    """With the next pass of its own order; retries end where no batch comes between them."""
    waits = []
    monkeypatch.setattr("iclip_hf.training.data.time.sleep", waits.append)
    loader = BatchLoader(Dropping(), accelerator(), 2, pairs_per_epoch=10)
    loader.dataset.drops = 2
    assert len(list(loader.epoch(0))) == 5 and waits == [2, 2]
    loader = BatchLoader(Dropping(), accelerator(), 4, pairs_per_epoch=16)
    loader.dataset.drops = 5
    assert len(list(loader.epoch(0))) == 4 and waits[2:] == [2, 4, 8, 16, 32]
    loader.dataset.drops = 6
    with pytest.raises(ConnectionError, match=r"lost, also after 5 retries \(reset by peer\): see to the network"):
        list(loader.epoch(0))
    with pytest.raises(ConnectionError, match=r"also after 5 retries \(reset by peer\)"):  # through a worker too
        loader = BatchLoader(Dropping(), accelerator(), 4, pairs_per_epoch=16, num_workers=1)
        loader.dataset.drops = 1  # each worker starts with it
        list(loader.epoch(0))


class Deadly(torch.utils.data.Dataset):
    """Kills the process that reads it."""

    collate = staticmethod(torch.tensor)

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return 8

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_loader_that_dies_is_told_apart(hub):
    loader = BatchLoader(Deadly(), accelerator(), 4, num_workers=1)
    with pytest.raises(OSError, match="A process that loads pairs broke off .* for want of memory: lower num_workers"):
        list(loader.epoch(0))


def test_seeded_leaves_the_other_random_numbers_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    with seeded("a"):
        outer = draw()
        with seeded("b", 1):
            inner = draw()
        after = draw()
    with seeded("a"):
        assert draw() == outer and draw() == after
    with seeded("b", 1):
        assert draw() == inner != outer


def test_augmentation_depends_on_seed_epoch_and_pair_alone(hub, tiny_processor):
    pairs = load_pairs(str(hub / "pairs.tar"))
    dataset = TrainingPairs(pairs, AugmentedImage(tiny_processor), tiny_processor, seed=1)
    first, other = dataset[3]["image"], dataset[4]["image"]
    assert first.shape == other.shape == (3, 32, 32) and not torch.equal(first, other)
    assert torch.equal(dataset[3]["image"], first)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[3]["image"], first)


# ---------------------------------------------------------------------------------------------------------------- loss


def gradients(pair_model: PairModel, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    pair_model.zero_grad()
    torch.manual_seed(0)  # dropout
    loss = pair_model(**batch)["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in pair_model.named_parameters() if p.grad is not None}


OF_ITS_OWN = [
    {},
    {"dual_projection": False, "pooling": "max"},
    {"logit_scales": "shared"},
    {"recognition_pooling": "class_and_average"},
    {"max_over": "similarity", "center_tokens": True, "map_affinity": 4.0},
    {"max_over": "similarity", "pooling": "max"},
]


@pytest.mark.parametrize("options", OF_ITS_OWN)
def test_loss_is_the_models_own(options):
    model, inputs = tiny_model(**options), tiny_inputs(batch=6, texts=6)
    if "center_tokens" in options:
        set_token_mean(model, inputs["pixel_values"])
    outputs = PairModel(model).eval()(**inputs)
    torch.testing.assert_close(outputs["loss"], model(**inputs, return_loss=True).loss, atol=1e-5, rtol=0)
    assert outputs["losses"].shape == (2 if model.config.dual_projection else 1,)


def test_salient_tokens_by_hand():
    """Most attention first, then what is attended and unlike what was taken, and each with the patches like it."""
    tokens = torch.tensor([[[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.0, 3.0], [-1.0, 0.0]]])
    attention = torch.tensor([[0.9, 1.0, 0.5, 0.2, 0.3]])
    taken, weights = salient_tokens(tokens, attention, 3, affinity=0)
    # 1 has most; then 0.35 * 2 of its opposite and 0.55 * 0.95 of the upright one; then that one
    assert taken[0].tolist() == [tokens[0, place].tolist() for place in (1, 4, 2)]
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.3, 0.5]]))
    shared, weights = salient_tokens(tokens, attention, 3, affinity=50.0)  # no other patch but those that point alike
    upright = [math.exp(50 * cosine) for cosine in (0, 0.1 / math.hypot(2, 0.1), 1, 1, 0)]
    columns = [*tokens[0].T.tolist(), attention[0].tolist()]
    mean = [sum(w * x for w, x in zip(upright, column)) / sum(upright) for column in columns]
    torch.testing.assert_close(shared[0, 2], torch.tensor(mean[:2]), atol=1e-5, rtol=0)
    assert weights[0, 2].item() == pytest.approx(mean[2], abs=1e-5)
    everything = salient_tokens(tokens, attention, 5, affinity=0)
    assert torch.equal(everything[0], tokens) and torch.equal(everything[1], attention)


def test_nouns_reach_the_branches_that_are_named():
    model, batch = tiny_model(max_over="similarity"), tiny_inputs(3, 9)
    noun_ids, has_noun = torch.tensor([0, 1, 1, 1, 3, 2]), torch.tensor([[1, 1, 0, 0]] * 3, dtype=torch.uint8)
    losses = {}
    for branches in ((), ("recognition",), ("interpretability",)):
        pair_model = PairModel(model, noun_branches=branches).eval()
        losses[branches] = pair_model(**batch, noun_ids=noun_ids, has_noun=has_noun)["losses"]
    assert (losses[("recognition",)] != losses[()]).tolist() == [True, False]
    assert (losses[("interpretability",)] != losses[()]).tolist() == [False, True]


def test_the_token_mean_is_that_of_the_images_and_stays():
    model, inputs = tiny_model(max_over="similarity", center_tokens=True), tiny_inputs(4, 4)
    set_token_mean(model, inputs["pixel_values"])
    with torch.no_grad():
        tokens = model.encode_image(inputs["pixel_values"]).patch_tokens
    torch.testing.assert_close(model.token_mean, tokens.mean((0, 1)))
    before = model.token_mean.clone()
    set_token_mean(model, inputs["pixel_values"][:1])
    assert torch.equal(model.token_mean, before)


@pytest.mark.parametrize("lock_vision", [True, False])
def test_chunks_give_the_gradient_of_the_whole_batch(lock_vision):
    """More negatives, not the same few: cached gradients, with both towers in several chunks, the last one smaller."""
    pair_model, batch = PairModel(tiny_model(lock_vision=lock_vision), chunk_size=100).eval(), tiny_inputs(7, 7)
    loss, whole = gradients(pair_model, batch)
    pair_model.chunk_size = 3
    chunked_loss, chunked = gradients(pair_model, batch)
    assert abs(chunked_loss - loss) < 1e-5
    assert whole.keys() == chunked.keys() and any("vision_model" in name for name in whole) != lock_vision
    for name in whole:
        torch.testing.assert_close(chunked[name], whole[name], atol=1e-5, rtol=1e-4)


def test_chunks_are_computed_again_with_the_same_dropout(monkeypatch):
    pair_model, batch = PairModel(tiny_model(), chunk_size=3), tiny_inputs(7, 7)
    assert pair_model.model.text_model.training and pair_model.model.text_model.config.hidden_dropout_prob > 0
    again = gradients(pair_model, batch)
    monkeypatch.setattr(loss_module, "checkpoint", lambda encode, *inputs, use_reentrant: encode(*inputs))
    kept = gradients(pair_model, batch)
    assert again[0] == kept[0]
    for name in kept[1]:
        torch.testing.assert_close(again[1][name], kept[1][name], atol=1e-5, rtol=1e-4)


def test_nouns_are_found_in_captions():
    nouns = NounPrompts(["dog", "traffic light", "bus", "man", "baby", "light", "Dog"])
    assert nouns.nouns == ["dog", "traffic light", "bus", "man", "baby", "light"]
    found = nouns.find("Two men, three babies and dogs wait at the traffic lights; no business")
    assert {nouns.nouns[number] for number in found} == {"dog", "traffic light", "man", "baby", "light"}
    prompts, drawn = nouns.draw([["buses", "a tree by a man"], ["nothing here"]], epoch=0)
    assert drawn["has_noun"].tolist() == [[0, 0, 1, 1, 0, 0], [0] * 6] and len(prompts) == 6
    assert all(nouns.nouns[number] in prompt for number, prompt in zip(drawn["noun_ids"], prompts))
    assert set(drawn["noun_ids"][:3].tolist()) <= {2, 3}
    assert nouns.draw([["buses", "a tree by a man"]], epoch=0)[0] == prompts[:3]
    assert any(nouns.draw([["buses", "a tree by a man"]], epoch)[0] != prompts[:3] for epoch in range(1, 4))


def test_noun_prompts_teach_the_recognition_branch():
    """Against plain loops; a prompt of another image's is no negative of an image that has its noun."""
    model, batch = tiny_model(), tiny_inputs(3, 9)
    has_noun = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.uint8)
    noun_ids = torch.tensor([0, 1, 1, 1, 3, 2])
    outputs = PairModel(model, noun_weight=0.7).eval()(**batch, noun_ids=noun_ids, has_noun=has_noun)
    once = [0, 1, 5, 4]  # where each noun stands first
    with torch.no_grad():
        logits = model(**batch).logits_per_image[:, [3 + place for place in once]].tolist()

    def one_side(logits, positive) -> float:
        total = 0.0
        for row, of_row in zip(logits, positive):
            negatives = sum(np.exp(value) for value, is_positive in zip(row, of_row) if not is_positive)
            losses = [
                -np.log(np.exp(v) / (np.exp(v) + negatives)) for v, is_positive in zip(row, of_row) if is_positive
            ]
            total += np.mean(losses) if losses else 0.0
        return total / len(logits)

    positive = [[bool(has_noun[image, noun]) for noun in noun_ids[once]] for image in range(3)]
    nouns = (one_side(logits, positive) + one_side(zip_lists(logits), zip_lists(positive))) / 2
    plain = PairModel(model).eval()(
        **{**batch, "input_ids": batch["input_ids"][:3], "attention_mask": batch["attention_mask"][:3]}
    )
    assert outputs["losses"][0].item() == pytest.approx(0.3 * plain["losses"][0].item() + 0.7 * nouns, abs=1e-5)
    torch.testing.assert_close(outputs["losses"][1], plain["losses"][1], atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs["text_embeds"], plain["text_embeds"], atol=1e-5, rtol=0)


def zip_lists(rows: list[list]) -> list[list]:
    return [list(column) for column in zip(*rows)]


def test_locked_towers_stay_locked():
    pair_model = PairModel(tiny_model(), lock_text=True).train()
    assert not pair_model.model.vision_model.training and not pair_model.model.text_model.training
    _, grads = gradients(pair_model, tiny_inputs(4, 4))
    assert all(".recognition." in name or ".interpretability." in name for name in grads) and len(grads) == 6


def low_rank_model(text: str) -> ICLIPModel:
    """A tiny model with updates of rank 3 that are not zero, as they are at first."""
    pytest.importorskip("peft", reason="needs peft")
    model = tiny_model(text=text)
    add_low_rank(model, 3)
    for name, parameter in model.text_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.filterwarnings("error::FutureWarning")  # which a user would see
@pytest.mark.parametrize("text", TEXT)
@torch.no_grad()
def test_low_rank_updates_are_merged_into_a_plain_model(text, tmp_path):
    model, inputs = low_rank_model(text), tiny_inputs(4, 4)
    adapted, plain = model(**inputs).logits_per_image, tiny_model(text=text)
    merge_low_rank(model).save_pretrained(tmp_path)
    merged = ICLIPModel.from_pretrained(tmp_path)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(merged(**inputs).logits_per_image, adapted, atol=1e-5, rtol=1e-5)
    assert (plain(**inputs).logits_per_image - adapted).abs().max() > 0.01
    assert torch.equal(model(**inputs).logits_per_image, adapted)  # the model itself goes on to learn
    updated = 0
    for name, layer in model.text_model.model.named_modules():
        if hasattr(layer, "lora_A"):  # peft's scale is 8 / rank
            update = 8 / 3 * layer.lora_B.default.weight @ layer.lora_A.default.weight
            weight = plain.text_model.get_submodule(name).weight + update
            torch.testing.assert_close(merged.text_model.get_submodule(name).weight, weight)
            updated += 1
    assert updated == sum(isinstance(layer, torch.nn.Linear) for layer in plain.text_model.modules())


@pytest.mark.parametrize("text", TEXT)
def test_only_low_rank_updates_and_projections_learn(text):
    pair_model = PairModel(low_rank_model(text)).train()
    _, grads = gradients(pair_model, tiny_inputs(4, 4))
    assert pair_model.has_dropout == (text == "bert")
    assert all("lora_" in name or ".recognition." in name or ".interpretability." in name for name in grads)
    # Processes wait for the gradient of all that learn
    assert grads.keys() == {name for name, one in pair_model.named_parameters() if one.requires_grad}
    assert sum("lora_" in name for name in grads) >= 2 * 6 * 2  # two matrices for six linear layers of two blocks


@pytest.mark.parametrize("vision", VISION)
def test_the_last_blocks_of_the_image_tower_learn_alone(vision):
    """As they do when the whole tower learns."""
    batch, free = tiny_inputs(4, 4), tiny_model(vision, lock_vision=False)
    _, whole = gradients(PairModel(free, lock_text=True).eval(), batch)
    pair_model = PairModel(tiny_model(vision), lock_text=True, unlocked_vision_blocks=1).eval()
    _, grads = gradients(pair_model, batch)
    of_tower = {name for name in grads if "vision_model" in name}
    assert of_tower == {name for name in whole if ".layer.1." in name or ".layers.1." in name} != set()
    for name in grads:
        torch.testing.assert_close(grads[name], whole[name], atol=1e-5, rtol=1e-4)
    # Processes wait for the gradient of all that learn
    assert grads.keys() == {name for name, one in pair_model.named_parameters() if one.requires_grad}
    in_training = {name for name, one in pair_model.train().model.vision_model.named_modules() if one.training}
    assert in_training and all("layer.1" in name or "layers.1" in name for name in in_training)
    with pytest.raises(ValueError, match="at most 2, the blocks of the image tower, got 3: lower it"):
        PairModel(tiny_model(vision), unlocked_vision_blocks=3)


def test_clamped_scale_can_come_back():
    pair_model = PairModel(tiny_model()).eval()
    scale = pair_model.model.recognition.logit_scale
    scale.data.fill_(9.0)
    pair_model.clamp_logit_scales()
    assert scale.exp().item() == pytest.approx(100, abs=1e-3)
    gradients(pair_model, tiny_inputs(4, 4))
    assert scale.grad != 0


# --------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "masked_max"},
        {"pooling": "masked_max", "attention_norm": "quantile"},
        {"pooling": "max"},
        {"pooling": "average", "dual_projection": False},
        {"pooling": "class_token", "dual_projection": False},
        {"pooling": "max", "recognition_pooling": "class_and_average"},
        {"max_over": "similarity", "center_tokens": True, "map_affinity": 3.0},
        {
            "max_over": "similarity",
            "center_tokens": True,
            "map_affinity": 3.0,
            "recognition_pooling": "class_and_average",
        },
    ],
)
def test_any_pooling_comes_from_one_cache(hub, tmp_path_factory, tiny_processor, options):
    folder = tmp_path_factory.getbasetemp() / "one-cache"
    model, pairs = tiny_model(**options), load_pairs(str(hub / "pairs.tar"))
    model.vision_model.load_state_dict(tiny_model().vision_model.state_dict())
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("images-*/*.npy")}
    views = cache_images(folder, pairs, model, [WholeImage(tiny_processor)], accelerator())
    assert not before or before == {file: file.stat().st_mtime_ns for file in folder.rglob("images-*/*.npy")}
    dataset = CachedPairs(views, model.config, tiny_processor)
    cached = dataset.__getitems__([5, 60])["image_features"]
    pixel_values = tiny_processor(images=[pairs.read(index)["image"] for index in (5, 60)])["pixel_values"]
    direct = PairModel(model)._encode_images(pixel_values)
    branches = 2 if model.config.dual_projection else 1
    width = 64 if "recognition_pooling" in options else 32
    shapes = [(2, width), (2, 16, 32) if "max_over" in options else (2, 32)]
    assert [one.shape for one in direct[:branches]] == shapes[:branches]
    torch.testing.assert_close(cached, direct, atol=2e-3, rtol=2e-3)  # float16


def test_filling_a_cache_goes_on_where_it_stopped(hub, tmp_path, tiny_processor, monkeypatch):
    write_pairs(tmp_path / "many.tar", 600)
    pairs, model, transforms = load_pairs(str(tmp_path / "many.tar")), tiny_model(), [WholeImage(tiny_processor)]
    whole = cache_images(tmp_path / "whole", pairs, model, transforms, accelerator())[0]
    assert whole.num_shards == 3

    calls, encode_image = [], model.encode_image

    def stops_after_six(pixel_values):
        calls.append(len(pixel_values))
        if len(calls) == 7:
            raise KeyboardInterrupt
        return encode_image(pixel_values)

    monkeypatch.setattr(model, "encode_image", stops_after_six)
    with pytest.raises(KeyboardInterrupt):
        cache_images(tmp_path / "stopped", pairs, model, transforms, accelerator())
    resumed = cache_images(tmp_path / "stopped", pairs, model, transforms, accelerator())[0]
    assert sum(calls) == 600 + (6 + 1) * 64 - 256  # the first shard was kept
    rows = np.random.default_rng(0).integers(0, 600, 50)
    assert np.array_equal(resumed[rows], whole[rows]) and resumed.captions() == whole.captions()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_stale_cache_is_refused(hub, tmp_path, tiny_processor):
    def fill(model=None, name="pairs.tar", transform=None, precision="no"):
        transforms = [transform or AugmentedImage(tiny_processor)]
        model, place = model or tiny_model(), accelerator()
        place.state._mixed_precision = precision
        return cache_images(tmp_path, load_pairs(str(hub / name)), model, transforms, place)

    fill()
    fill()
    other_norm = tiny_model()
    other_norm.vision_model.config.layer_norm_eps = 1e-3
    for changed, what in (
        ({"model": tiny_model(seed=1)}, "tower"),
        ({"model": other_norm}, "tower"),
        ({"model": tiny_model(attention_quantile=0.5)}, "attention_quantile"),
        ({"name": "held_out.tar"}, "data"),
        ({"transform": AugmentedImage(tiny_processor, crop_scale=0.5)}, "augmentation"),
        ({"transform": WholeImage(tiny_processor)}, "image_processor"),
        ({"precision": "bf16"}, "mixed_precision"),
    ):
        with pytest.raises(ValueError, match=rf"{what}.* was .*delete this one"):
            fill(**changed)


def test_cached_texts_know_tokenizer_and_tower_but_not_their_use(tmp_path, tiny_processor):
    texts, model = ["a dog", "the red car"], tiny_model()

    def fill(**changes):
        return cache_texts(
            tmp_path,
            **{"texts": texts, "model": model, "processor": tiny_processor, **changes},
            accelerator=accelerator(),
        )

    kept = fill()
    written = (tmp_path / "00000.npy").stat().st_mtime_ns
    tiny_processor(text="a cat", padding="max_length", max_length=50)
    assert torch.equal(fill()[texts[:1]], kept[texts][:1]) and (tmp_path / "00000.npy").stat().st_mtime_ns == written
    shorter = ICLIPProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, max_text_length=20)
    for changed, what in (
        ({"processor": shorter}, "tokenizer"),
        ({"model": tiny_model(seed=1)}, "tower"),
        ({"model": tiny_model(text_pooling="class_token")}, "text_pooling"),
        ({"texts": ["a dog", "a red car"]}, "texts"),
    ):
        with pytest.raises(ValueError, match=rf"{what} was .*delete this one"):
            fill(**changed)


def test_bad_pairs_are_left_out_of_the_cache(tmp_path, tiny_processor):
    write_pairs(tmp_path / "pairs.tar", 40, broken=(0, 7))
    pairs, model = load_pairs(str(tmp_path / "pairs.tar")), tiny_model()

    def fill(**options):
        return cache_images(tmp_path, pairs, model, [WholeImage(tiny_processor)], accelerator(), **options)

    with pytest.raises(ValueError, match="1.00% bad pairs, but 2 of 40"):
        fill(max_bad_share=0.01)
    views = fill()
    texts = cache_texts(
        tmp_path / "texts",
        [caption for several in views[0].captions() for caption in several],
        model,
        tiny_processor,
        accelerator(),
    )
    dataset = CachedPairs(views, ICLIPConfig(pooling="max", dual_projection=False), tiny_processor, texts=texts)
    assert len(dataset) == 38
    for index, row in ((0, 1), (6, 8), (37, 39)):  # rows of the data without the bad ones
        batch = dataset.collate(dataset.__getitems__([index]))
        captions = tiny_processor(text=pairs.captions(row))
        both = model.encode_text(**captions)[0]
        distance = (both - batch["text_features"]).abs().amax(1)
        assert distance.min() < 2e-3
        assert np.array_equal(batch["image_features"][0], views[0][np.array([row])][:, 2])


def test_views_and_captions_are_drawn_by_the_epoch(tmp_path, tiny_processor):
    views = [FeatureShards(tmp_path / str(view), {}, 300) for view in range(3)]
    for number, view in enumerate(views):
        for shard in range(view.num_shards):
            rows = np.array(view.rows_of(shard))
            features = (rows + 0.25 * number).astype(np.float16)[:, None, None] * np.ones((1, 5, 2), np.float16)
            view.write(shard, features, [[f"red {row}", f"blue {row}"] for row in rows])
    dataset = CachedPairs(views, ICLIPConfig(pooling="max", dual_projection=False), tiny_processor)
    order = np.random.default_rng(0).permutation(300)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        batch = dataset.__getitems__(order)
        values = batch["image_features"][0][:, 0].numpy()
        assert np.array_equal(values.astype(int), order) and [int(c.split()[1]) for c in batch["caption"]] == list(
            order
        )
        epochs.append((values - order, batch["caption"]))
    assert np.array_equal(epochs[0][0], epochs[2][0]) and epochs[0][1] == epochs[2][1]
    assert not np.array_equal(epochs[0][0], epochs[1][0]) and epochs[0][1] != epochs[1][1]
    assert all(60 < np.count_nonzero(epochs[0][0] == view / 4) < 140 for view in range(3))


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_run_ends_with_a_model_that_loads(hub, tmp_path):
    metrics = run(
        hub, tmp_path, "--validation_data", hub / "held_out.tar", "--report_to", "tensorboard", "--pictures", 2
    )
    model, processor = (
        ICLIPModel.from_pretrained(tmp_path),
        ICLIPProcessor.from_pretrained(tmp_path),
    )
    pairs = load_pairs(str(hub / "held_out.tar"))
    with torch.no_grad():
        images = processor(images=[pairs[i]["image"] for i in range(17)])
        outputs = model(**images, **processor(text=[pairs[i]["caption"] for i in range(17)]), return_loss=True)
    own = torch.arange(17)
    assert metrics["val_loss"] == pytest.approx(contrastive_loss(outputs.logits_per_image).item(), abs=1e-4)
    assert metrics["image_to_text"] == pytest.approx(100 * (outputs.logits_per_image.argmax(1) == own).float().mean())
    assert metrics["text_to_image"] == pytest.approx(100 * (outputs.logits_per_text.argmax(1) == own).float().mean())

    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.training["epochs"] == 3 and card.data.training["data"] == [f"{hub.name}/pairs.tar"]
    assert str(hub) not in card.content

    before, after = weights(hub / "vision"), weights(tmp_path)
    assert all(torch.equal(after[f"vision_model.{name}"], weight) for name, weight in before.items())
    text = weights(hub / "text")
    assert not torch.equal(
        after["text_model.embeddings.word_embeddings.weight"], text["embeddings.word_embeddings.weight"]
    )
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == [
        "checkpoint-0000010",
        "checkpoint-0000012",
    ]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3 and list(tmp_path.rglob("events.out*"))
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == metrics
    assert json.loads((tmp_path / "results.json").read_text())["best"] == metrics["text_to_image"]
    assert not list(tmp_path.rglob("*.partial"))


def test_training_learns_its_pairs(hub, tmp_path):
    """Seventeen pairs of one tiny model are learnt by heart; chance is 6 %."""
    pairs = hub / "held_out.tar"
    arguments = [
        "--data",
        pairs,
        "--validation_data",
        pairs,
        "--batch_size",
        17,
        "--epochs",
        100,
        "--learning_rate",
        2,
    ]
    cached = ["--cache_features", tmp_path / "cache", "--lock_text", "--eval_steps", 100]
    metrics = run(hub, tmp_path / "run", *arguments, *cached)
    assert metrics["text_to_image"] > 90 and metrics["val_loss"] < 0.5


def test_settings_are_refused_in_one_line(hub, tmp_path, capsys):
    config = ["--config", str(hub / "train.yaml")]
    for arguments, expected in (
        ([*config, "--crop_scale", "nan"], "Expected crop_scale to be from 0 to 1"),
        ([*config, "--text_lora_rank", "8", "--lock_text"], "Expected lock_text or text_lora_rank, got both: leave"),
        ([*config, "--best_metric", "mAP"], "Expected eval_dataset for best_metric mAP"),
    ):
        try:
            code = cli.main(["train", *arguments])
        except SystemExit as stop:
            code = stop.code
        message = capsys.readouterr().err
        assert code == 2 and expected in message and message.count("\n") == 1, message


def test_every_way_to_name_a_configuration(hub, monkeypatch):
    shipped = parse_settings(["--config", "iclip-dinov2-s14-minilm", "pairs.csv"])
    assert (shipped.vision, shipped.data, shipped.output_dir) == (
        "embedded",
        ["pairs.csv"],
        "runs/iclip-dinov2-s14-minilm",
    )
    assert Path(shipped.nouns).name == "nouns.txt" and Path(shipped.nouns).is_file()
    assert parse_settings(["--config", str(hub)]) == parse_settings(["--config", str(hub / "train.yaml")])
    monkeypatch.chdir(hub)  # a folder's own file before a shipped one
    assert parse_settings(["--config", "train.yaml"]).vision == f"{hub}/vision"
    with pytest.raises(FileNotFoundError, match="absent: expected a train.yaml, .*iclip-vit-b16.*; name one"):
        parse_settings(["--config", "absent"])


def test_a_model_takes_the_place_of_the_towers_in_the_file(hub):
    further = parse_settings(["--config", str(hub), "--model", "m"])
    assert (further.model, further.vision, further.text) == ("m", "", "")
    assert parse_settings(["--config", str(hub), "--vision", "v"]).vision == "v"


def test_a_blank_setting_is_not_given(tmp_path):
    (tmp_path / "train.yaml").write_text("vision: v\ntext: t\ndata: [d]\nepochs: 3\nnouns:\neval_root: ~\n")
    settings = parse_settings(["--config", str(tmp_path / "train.yaml")])
    assert (settings.nouns, settings.eval_root, settings.epochs) == ("", "", 3)


def test_command_line_over_file_over_default(hub):
    settings = parse_settings(
        ["--config", str(hub / "train.yaml"), "--epochs", "7", "--model_options", "pooling=max", "projection_dim=8"]
    )
    assert (settings.epochs, settings.batch_size, settings.weight_decay) == (7, 16, 0.05)
    assert settings.best_metric == "text_to_image"
    assert settings.data == [f"{hub}/pairs.tar"] and settings.model_options == ["pooling=max", "projection_dim=8"]


def test_the_best_model_is_chosen_by_retrieval_where_there_are_pairs_for_it(hub):
    given = {"config": str(hub), "eval_dataset": "folder"}
    assert read_settings(given).best_metric == "mMIoU"
    assert read_settings({**given, "validation_data": ["v"]}).best_metric == "text_to_image"


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_model_in_parts_is_refused(hub, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType(kind))
    with pytest.raises(ValueError, match=f"or FSDP of version 2, got {kind}: use"):
        run(hub, tmp_path / "run")


def test_partly_locked_towers_resume_and_are_saved_as_a_plain_model(hub, tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    arguments = ["--text_lora_rank", 2, "--unlocked_vision_blocks", 1, "--max_steps", 6, "--checkpoint_steps", 3]
    arguments += ["--validation_data", hub / "held_out.tar", "--pictures", 2]
    metrics = run(hub, tmp_path / "run", *arguments)
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-0000006")
    (tmp_path / "resumed" / "model.safetensors").unlink()
    assert run(hub, tmp_path / "resumed", *arguments, "--resume") == metrics
    assert_same_weights(tmp_path / "run", tmp_path / "resumed")
    with pytest.raises(ValueError, match="text_lora_rank from 2 to 3"):
        run(hub, tmp_path / "run", *arguments, "--resume", "--text_lora_rank", 3)

    assert ICLIPModel.from_pretrained(tmp_path / "run").config.lock_vision is False
    card = ModelCard.load(tmp_path / "run" / "README.md").data.training
    assert (card["text_lora_rank"], card["unlocked_vision_blocks"]) == (2, 1)
    after, start = weights(tmp_path / "run"), {}
    for tower in ("vision", "text"):
        start |= {f"{tower}_model.{name}": weight for name, weight in weights(hub / tower).items()}
    assert start.keys() == {name for name in after if "_model." in name}
    changed = {name for name, weight in start.items() if not torch.equal(after[name], weight)}
    last_block = {name for name in start if "vision_model.encoder.layer.1." in name}
    updated = {name for name in start if "text_model.encoder" in name and start[name].ndim == 2}
    assert last_block and updated and changed == last_block | updated


def test_a_learning_text_tower_learns_from_cached_images_and_learning_blocks_are_not_cached(hub, tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    cache = ["--cache_features", tmp_path / "cache", "--max_steps", 1]
    run(hub, tmp_path / "run", *cache, "--text_lora_rank", 2)
    assert (tmp_path / "cache" / "training" / "images-0").is_dir()
    with pytest.raises(ValueError, match="locked image tower .* for cache_features, got an image tower that learns"):
        run(hub, tmp_path / "other", *cache, "--unlocked_vision_blocks", 1)


def test_model_options_reach_the_model(hub, tmp_path):
    options = ["pooling=average", "dual_projection=false", "logit_scale_init_value=2"]
    run(hub, tmp_path, "--max_steps", 1, "--model_options", *options)
    config = ICLIPModel.from_pretrained(tmp_path).config
    assert (config.pooling, config.dual_projection, config.logit_scale_init_value) == ("average", False, 2)
    with pytest.raises(ValueError, match="Expected model_options to name options of ICLIPConfig, got 'sharpness'"):
        run(hub, tmp_path, "--model_options", "sharpness=3")


def test_bad_steps_are_skipped_counted_and_stop_the_run(hub, tmp_path, monkeypatch):
    forward, broken = PairModel.forward, {3}
    calls = []

    def sometimes_broken(self, **batch):
        outputs = forward(self, **batch)
        calls.append(1)
        factor = float("nan") if len(calls) in broken else 1.0
        return {**outputs, "loss": outputs["loss"] * factor, "losses": outputs["losses"] * factor}

    monkeypatch.setattr(PairModel, "forward", sometimes_broken)
    run(hub, tmp_path / "skips")
    state = json.loads((tmp_path / "skips" / "results.json").read_text())
    assert (state["step"], state["bad_steps"], state["bad_in_a_row"]) == (12, 1, 0)
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "skips").values())
    calls.clear()
    broken.update(range(7, 20))
    with pytest.raises(FloatingPointError, match="last 4 steps, up to step 10: lower"):
        run(hub, tmp_path / "stops", "--max_bad_steps", 4)


def test_a_folder_holds_one_run(hub, tmp_path):
    run(hub, tmp_path, "--max_steps", 2)
    with pytest.raises(ValueError, match="expected no run here, but got one; add --resume"):
        run(hub, tmp_path, "--max_steps", 2)
    with pytest.raises(ValueError, match="weight_decay from 0.05 to 0.1; repeat the command that began it"):
        run(hub, tmp_path, "--max_steps", 2, "--resume", "--weight_decay", 0.1)
    with folder_lock(tmp_path), pytest.raises(BlockingIOError, match="expected no other run here"):
        run(hub, tmp_path, "--max_steps", 2, "--resume")


class Spy(torch.optim.AdamW):
    """AdamW that keeps what it is told, and what came of it, step by step."""

    def __init__(self, groups, **options):
        super().__init__(groups, **options)
        Spy.runs.append(self)
        self.options, self.rates, self.norms = options, [], []

    def step(self, closure=None):
        self.rates.append({group["lr"] for group in self.param_groups})
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return super().step(closure)


def test_the_optimizer_does_what_the_settings_say(hub, tmp_path, monkeypatch):
    """Rates for a batch of 16 out of 1024, one epoch of warm-up; clipped gradients; decay of matrices alone."""
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    Spy.runs = []
    arguments = [
        "--warmup_learning_rate",
        0.02,
        "--min_learning_rate",
        0.01,
        "--adam_beta2",
        0.95,
        "--adam_epsilon",
        1e-7,
    ]
    run(hub, tmp_path / "run", "--clip_grad_norm", 0.01, "--weight_decay", 0.3, *arguments)
    (spy,) = Spy.runs
    warmup = [0.02 + 0.03 * step / 4 for step in range(4)]
    cosine = [0.01 + 0.04 * np.cos(np.pi * step / 24) ** 2 for step in range(4, 12)]
    assert all(len(rates) == 1 for rates in spy.rates)
    assert [rate * 64 for (rate,) in spy.rates] == pytest.approx(warmup + cosine)
    assert spy.norms == pytest.approx([0.01] * 12, rel=1e-3)
    assert spy.defaults["betas"] == (0.9, 0.95) and spy.defaults["eps"] == 1e-7
    assert [group["weight_decay"] for group in spy.param_groups] == [0.3, 0.0]
    run(hub, tmp_path / "larger", "--max_steps", 1, "--batch_size", 32, "--warmup_epochs", 0)
    assert [rate for (rate,) in Spy.runs[1].rates] == pytest.approx([0.05 / 32])


def test_best_is_the_best_and_not_the_latest(hub, tmp_path, monkeypatch):
    scores, seen = iter([1.0, 3.0, 2.0]), []
    monkeypatch.setattr(program, "validate", lambda *arguments: {"text_to_image": next(scores)})
    exported = program.export
    monkeypatch.setattr(program, "export", lambda *a, **card: seen.append(a[3]) or exported(*a, **card))
    run(hub, tmp_path, "--validation_data", hub / "held_out.tar", "--eval_steps", 4, "--pictures", 0)
    state = json.loads((tmp_path / "results.json").read_text())
    assert seen == [tmp_path, tmp_path] and state["best"] == 3.0 and state["metrics"] == {"text_to_image": 3.0}
    best, last = weights(tmp_path), load_file(tmp_path / "checkpoint-0000012" / "learning.safetensors")
    assert any(not torch.equal(best[name.removeprefix("model.")], weight) for name, weight in last.items())


def test_each_epoch_has_an_order_of_its_own():
    sampler = GlobalBatches(100, 10, seed=3)
    orders = []
    for sampler.epoch in range(3):
        orders.append([index for batch in sampler for index in batch])
    assert orders[0] != orders[1] != orders[2] != orders[0] and sorted(orders[0]) == list(range(100))
    assert [index for batch in GlobalBatches(100, 10, seed=4) for index in batch] != orders[0]


def test_a_run_beside_its_settings_has_a_name(hub, tmp_path, monkeypatch):
    """Of the folder of a config that is given as a bare file name."""
    monkeypatch.chdir(hub)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(parse_settings(["--config", "train.yaml", "--output_dir", str(tmp_path), "--max_steps", "1"]))
    text = ModelCard.load(tmp_path / "README.md").text
    assert text.lstrip().startswith(f"# {hub.name}") and "partial" not in text
    assert parse_settings(["--config", "train.yaml"]).output_dir == f"runs/{hub.name}"


def test_features_stay_cached_and_chunks_as_they_were_where_dropout_learns(hub, tmp_path):
    cache = ["--cache_features", tmp_path / "cache"]
    run(hub, tmp_path / "cached", "--max_steps", 2, *cache)
    with pytest.raises(ValueError, match="cache_features from .*/cache to "):
        run(hub, tmp_path / "cached", "--max_steps", 2, "--resume")
    (tmp_path / "cache").rename(tmp_path / "moved")
    run(hub, tmp_path / "cached", "--max_steps", 2, "--resume", "--cache_features", tmp_path / "moved")
    with pytest.raises(ValueError, match="chunk_size from 256 to 8"):
        run(hub, tmp_path / "cached", "--max_steps", 2, "--resume", *cache, "--chunk_size", 8)
    run(hub, tmp_path / "locked", "--max_steps", 2, "--lock_text")
    run(hub, tmp_path / "locked", "--max_steps", 2, "--lock_text", "--resume", "--chunk_size", 8)


def test_a_tower_that_learns_has_dropout_as_its_configuration_says():
    model = tiny_model()
    assert PairModel(model).has_dropout and not PairModel(model, lock_text=True).has_dropout
    for rate in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(model.text_model.config, rate, 0.0)
    assert not PairModel(model).has_dropout
    model.config.lock_vision, model.vision_model.config.attention_probs_dropout_prob = False, 0.1
    assert PairModel(model).has_dropout


INTERRUPTED = """
import os, signal, sys
import torch
from iclip_hf import cli
from iclip_hf.training import run
from iclip_hf.training.loss import PairModel

torch.set_num_threads(1)
forward, steps = PairModel.forward, 0


def interrupted(self, **batch):
    global steps
    steps += 1
    if steps == 3:
        os.kill(os.getpid(), signal.{signal})
        os.kill(os.getpid(), signal.{signal})  # as a launcher repeats it
    return forward(self, **batch)


PairModel.forward = interrupted
if {early}:
    run.load_datasets = lambda *arguments: os.kill(os.getpid(), signal.{signal})
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(("name", "early"), [("SIGINT", False), ("SIGTERM", False), ("SIGTERM", True)])
def test_an_interrupted_run_saves_a_checkpoint_and_says_where(hub, tmp_path, name, early):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED.format(signal=name, early=early))
    arguments = ["--config", hub / "train.yaml", "--output_dir", tmp_path / "run", "--max_steps", "5"]
    done = subprocess.run(
        [sys.executable, *map(str, [script, *arguments])], capture_output=True, text=True, timeout=240
    )
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 130, done.stderr
    if early:
        assert said == "iclip train: interrupted before the first checkpoint; start it again"
        return
    checkpoint = tmp_path / "run" / "checkpoint-0000003"
    assert said == f"iclip train: interrupted after step 3; --resume goes on from {checkpoint}" and checkpoint.is_dir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the interrupted process: several round otherwise
    run(hub, tmp_path / "run", "--max_steps", 5, "--resume")
    run(hub, tmp_path / "whole", "--max_steps", 5)
    torch.set_num_threads(threads)
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


TERMINATED = """
import os, signal, sys
import torch
from iclip_hf import cli
from iclip_hf.training.loss import PairModel

torch.set_num_threads(1)
forward, sent = PairModel.forward, []


def terminated(self, **batch):
    if not (self.training or sent):
        sent.append(os.killpg(0, signal.SIGTERM))  # as a job's scheduler does: also to the workers
    return forward(self, **batch)


PairModel.forward = terminated
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize(
    ("eval_steps", "max_steps"), [(3, 3), (2, 4)]
)  # in the last evaluation, and in one without checkpoint
def test_a_job_that_is_ended_while_it_measures_loses_nothing(hub, tmp_path, eval_steps, max_steps):
    script = tmp_path / "terminated.py"
    script.write_text(TERMINATED)
    arguments = ["--max_steps", max_steps, "--eval_steps", eval_steps, "--validation_data", hub / "held_out.tar"]
    command = [
        script,
        "--config",
        hub / "train.yaml",
        "--output_dir",
        tmp_path / "run",
        *arguments,
        "--num_workers",
        2,
    ]
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, start_new_session=True)
    assert done.returncode == 130, done.stderr
    checkpoint = tmp_path / "run" / "checkpoint-0000003"
    said = f"iclip train: interrupted after step 3; --resume goes on from {checkpoint}"
    assert done.stderr.splitlines()[-1] == said
    metrics = run(hub, tmp_path / "run", *arguments, "--resume")
    assert metrics == run(hub, tmp_path / "whole", *arguments) and "text_to_image" in metrics


def test_a_second_ctrl_c_stops_at_once_but_not_its_repetition_by_a_launcher(monkeypatch, capsys):
    before, clock = signal.getsignal(signal.SIGINT), SimpleNamespace(monotonic=iter([5.0, 5.9, 7.0, 7.1]).__next__)
    monkeypatch.setattr("iclip_hf.training.interrupts.time", clock)
    with Interrupts() as interrupts:
        interrupts.deferred = True
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert interrupts.requested and capsys.readouterr().out.count("stopping after this step") == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_stream_interrupted_twice_in_a_row_goes_on_with_other_pairs(hub, tmp_path, monkeypatch):
    """Six steps: two, then one, then three. Each part is the beginning of the pass that its first step names."""
    source = {"train": str(hub / "pairs.tar")}
    opened = datasets.load_dataset("webdataset", data_files=source, split="train", streaming=True)
    monkeypatch.setattr("iclip_hf.data.pairs._open_hub_dataset", lambda name, split: opened)
    prepare, forward, seen = TrainingStream.prepare, PairModel.forward, []
    steps = 0

    def recorded(self, pair, key):
        seen.append(key)
        return prepare(self, pair, key)

    def interrupted(self, **batch):
        nonlocal steps
        steps += 1
        if steps in (2, 3):
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, **batch)

    monkeypatch.setattr(TrainingStream, "prepare", recorded)
    monkeypatch.setattr(PairModel, "forward", interrupted)
    arguments = ["--data", "org/pairs", "--pairs_per_epoch", 96, "--epochs", 1, "--resume"]
    for step in (2, 3):
        with pytest.raises(KeyboardInterrupt, match=f"interrupted after step {step}; --resume goes on from"):
            run(hub, tmp_path, *arguments)
    run(hub, tmp_path, *arguments)

    stream, expected = load_pairs("org/pairs"), []
    for first, count in ((0, 2), (2, 1), (3, 3)):
        stream.set_epoch(first)
        expected += [pair["key"] for pair in itertools.islice(stream, 16 * count)]
    assert seen == expected and steps == json.loads((tmp_path / "results.json").read_text())["step"] == 6


def test_the_death_of_a_partner_says_how_to_go_on(hub, tmp_path, monkeypatch):
    def lose_partner(*arguments):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        raise RuntimeError(
            "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typical."
        )

    monkeypatch.setattr(program, "run", lose_partner)
    said = r"died or no longer answers \(Connection closed by peer \[127.0.0.1\]:1\); see what it said, then start it again"
    with pytest.raises(OSError, match=f"{said}\\.$"):
        run(hub, tmp_path)
    (tmp_path / "checkpoint-0000005").mkdir()
    (tmp_path / "checkpoint-0000005" / "state.json").touch()
    with pytest.raises(OSError, match=f"{said}; --resume goes on from {tmp_path}/checkpoint-0000005"):
        run(hub, tmp_path)


KILLED = """
import os, random, shutil, signal, sys
import torch
import iclip_hf.training.checkpoints
from iclip_hf.training.run import train
from iclip_hf.training.settings import parse_settings

torch.set_num_threads(1)
calls_to_live = int(sys.argv[1])


def deadly(function):
    # Kills its own process before or after the work of one call
    def call(*arguments, **options):
        global calls_to_live
        for work in (None, function):
            calls_to_live -= 1
            if calls_to_live == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = work and work(*arguments, **options)
        return result
    return call


for module, name in ((os, "replace"), (torch, "save"), (shutil, "rmtree"), (iclip_hf.training.checkpoints, "save_file")):
    setattr(module, name, deadly(getattr(module, name)))
print("ready", flush=True)
train(parse_settings(sys.argv[2:]))
"""


def test_killed_at_any_moment_and_resumed_is_the_uninterrupted_run(hub, tmp_path):
    """Kill -9 of a run that saves after every step, by turns somewhere inside the saving and at a moment by the clock."""
    arguments = ["--validation_data", hub / "held_out.tar", "--eval_steps", 2, "--checkpoint_steps", 1]
    arguments += ["--pictures", 0, "--epochs", 6]
    script, draws, kills = tmp_path / "killed.py", random.Random(0), 0
    script.write_text(KILLED)

    def start(name: str, calls_to_live: int = -1) -> subprocess.Popen:
        command = ["--config", hub / "train.yaml", "--output_dir", tmp_path / name, "--resume", *arguments]
        command = [sys.executable, script, calls_to_live, *command]
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        return process

    whole, began = start("whole"), time.perf_counter()
    whole.communicate(timeout=120)
    assert whole.returncode == 0
    length = time.perf_counter() - began
    while True:
        process = start("killed", draws.randrange(1, 40) if kills % 2 == 0 and kills < 6 else -1)
        if kills % 2 and kills < 6:
            time.sleep(draws.uniform(0, length / 4))  # so that three kills leave something to do
            process.kill()
        process.communicate(timeout=120)
        if process.returncode != -signal.SIGKILL:
            break
        kills += 1
    assert process.returncode == 0 and kills >= 3
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole")]
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["best"] == results[1]["best"]
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) == 2


def tiny_nouns() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts for each of eight pairs, out of five nouns, and which pair has which."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, (16,), generator=generator), torch.randint(2, (8, 5), generator=generator).byte()


TWO_PROCESSES = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from accelerate import PartialState
from conftest import tiny_inputs, tiny_model
from test_training import tiny_nouns
from iclip_hf.training.loss import PairModel
from iclip_hf.training.run import train
from iclip_hf.training.settings import parse_settings

torch.set_num_threads(1)
folder, arguments = sys.argv[1], sys.argv[2:]
state = PartialState(cpu=True)
assert state.num_processes == 2 and torch.distributed.get_backend() == "gloo"

# Loss and gradients of eight pairs, four a process in two chunks, with both towers learning
model = tiny_model(lock_vision=False, max_over="similarity", map_affinity=2.0)
pair_model = PairModel(model, chunk_size=2, noun_branches=["recognition", "interpretability"]).eval()
pair_model = torch.nn.parallel.DistributedDataParallel(pair_model)
part = slice(4 * state.process_index, 4 * state.process_index + 4)
nouns = slice(8 + 8 * state.process_index, 16 + 8 * state.process_index)
inputs = tiny_inputs(8, 24)  # eight captions, two noun prompts each
batch = {{"pixel_values": inputs.pop("pixel_values")[part]}}
batch |= {{name: torch.cat([value[part], value[nouns]]) for name, value in inputs.items()}}
noun_ids, has_noun = tiny_nouns()
local = slice(nouns.start - 8, nouns.stop - 8)
outputs = pair_model(**batch, noun_ids=noun_ids[local], has_noun=has_noun[part])
outputs["loss"].backward()
loss = outputs["loss"].detach()
torch.distributed.all_reduce(loss)
grads = {{name.removeprefix("module."): p.grad for name, p in pair_model.named_parameters() if p.grad is not None}}
if state.is_main_process:
    torch.save({{"loss": loss / 2, "grads": grads}}, folder + "/gradients.pt")
del pair_model, outputs, grads

train(parse_settings(arguments))
"""


def test_two_processes_are_one_with_the_whole_batch(hub, tmp_path):
    arguments = ["--config", hub / "train.yaml", "--output_dir", tmp_path / "two", "--chunk_size", 3]
    arguments += ["--validation_data", hub / "held_out.tar", "--pictures", 0, "--lock_text"]
    (tmp_path / "nouns.txt").write_text("dog\ncat\nsky\n")
    arguments += ["--cache_features", tmp_path / "cache", "--nouns", tmp_path / "nouns.txt"]
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(tests=str(ROOT / "tests")))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        tmp_path,
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]

    model = tiny_model(lock_vision=False, max_over="similarity", map_affinity=2.0)
    pair_model = PairModel(model, noun_branches=["recognition", "interpretability"]).eval()
    noun_ids, has_noun = tiny_nouns()
    loss, grads = gradients(pair_model, {**tiny_inputs(8, 24), "noun_ids": noun_ids, "has_noun": has_noun})
    two = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert abs(two["loss"] - loss) < 1e-5 and two["grads"].keys() == grads.keys()
    for name in grads:
        torch.testing.assert_close(two["grads"][name], grads[name], atol=1e-5, rtol=1e-4)

    # A whole run, both caches filled by two processes; without a text tower that learns, whose dropout differs
    metrics = run(hub, tmp_path / "one", *arguments[4:], "--cache_features", tmp_path / "other_cache")
    together = json.loads((tmp_path / "two" / "results.json").read_text())
    assert together["metrics"] == pytest.approx(metrics, abs=1e-4)
    assert_same_weights(tmp_path / "two", tmp_path / "one", atol=1e-5, rtol=1e-4)


TWO_SHARDED_PROCESSES = """
import os, signal, sys
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from iclip_hf import cli
from iclip_hf.training.loss import PairModel

torch.set_num_threads(1)
state = PartialState(cpu=True)
# Accelerate itself shards on GPUs only
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
forward, steps = PairModel.forward, 0


def interrupted(self, **batch):
    global steps
    steps += 1
    if steps == 3 and state.process_index == 1 and "--resume" not in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    return forward(self, **batch)


PairModel.forward = interrupted
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


def test_two_sharded_processes_are_one_also_when_interrupted(hub, tmp_path):
    """FSDP2 with layers that learn: checkpoints, evaluation and export. A signal to one process stops both."""
    script = tmp_path / "two.py"
    script.write_text(TWO_SHARDED_PROCESSES)
    arguments = ["--max_steps", 5, "--chunk_size", 3, "--validation_data", hub / "held_out.tar"]
    arguments += ["--lock_text", "--model_options", "lock_vision=false"]  # the text tower has dropout
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    command = [sys.executable, *launcher, script, "--config", hub / "train.yaml", "--output_dir", tmp_path / "two"]
    environment = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_FSDP": "true"}
    environment |= {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    options = {"env": {**os.environ, **environment}, "capture_output": True, "text": True, "timeout": 240}

    stopped = subprocess.run([*map(str, [*command, *arguments])], **options)
    checkpoint = tmp_path / "two" / "checkpoint-0000003"
    said = f"iclip train: interrupted after step 3; --resume goes on from {checkpoint}"
    assert stopped.returncode == 1 and said in stopped.stderr.partition("Root Cause")[2], stopped.stderr[-3000:]
    assert (checkpoint / "pytorch_model_fsdp_0").is_dir() and (checkpoint / "state.json").is_file()
    assert [path.name for path in (tmp_path / "two").glob("checkpoint-*")] == [checkpoint.name]
    with pytest.raises(ValueError, match="expected a run with FSDP, as it began, got another; resume it with FSDP"):
        run(hub, tmp_path / "two", *arguments, "--resume")

    resumed = subprocess.run([*map(str, [*command, *arguments, "--resume"])], **options)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    metrics = run(hub, tmp_path / "one", *arguments)
    together = json.loads((tmp_path / "two" / "results.json").read_text())
    assert together["metrics"] == pytest.approx(metrics, abs=1e-3)
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert two.keys() == one.keys()
    for name in two:
        if not name.endswith("key.bias"):  # softmax cancels it: its gradient is rounding, which Adam enlarges
            torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)
