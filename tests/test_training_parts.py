"""Parts of training against slow or direct computation: schedule, batches, streams, augmentation."""

import json
import multiprocessing

import datasets
import numpy as np
import pytest
import torch
from conftest import noise, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.scheduler import CosineLRScheduler
from torch.utils.data import IterableDataset
from training_runs import accelerator, pair_model_of

from iclip_hf.data.pairs import load_pairs
from iclip_hf.data.streams import PairStream
from iclip_hf.training import validation
from iclip_hf.training.data import (
    BatchLoader,
    GlobalBatches,
    TrainingPairs,
    TrainingStream,
    augmentation,
    whole_image,
)
from iclip_hf.training.train import cosine_schedule, parameter_groups
from iclip_hf.training.validation import regressed_metrics
from iclip_hf.utils.interrupts import Interrupts


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


def test_what_decays():
    pair_model = pair_model_of(tiny_model(image_hidden_size=8, logit_bias_init_value=0))
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

    @staticmethod
    def collate(items):
        return torch.tensor([item["number"] for item in items])

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for number in np.random.default_rng(self.epoch).permutation(7).tolist():
            yield {"number": number, "read": (None, 1, 0)}


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
    with pytest.raises(ValueError, match="batch_size"):
        list(BatchLoader(Stream(), accelerator(), 8, pairs_per_epoch=10).epoch(0))


@pytest.mark.parametrize("streamed", [False, True])
def test_too_many_bad_pairs_that_loading_processes_read_stop_the_run(tmp_path, tiny_processor, streamed):
    """Two of five are bad. Each of four processes reads 64 to 96 of the 300, and ends with the epoch."""
    good = [number % 5 > 1 for number in range(300)]
    rows = [{"image": f"{number}.jpg", "caption": "a"} for number in range(300)]
    for number in range(300):
        if good[number]:
            Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.jpg")
    content = (tmp_path / "2.jpg").read_bytes()
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def loader(max_bad_share):
        if streamed:
            images = [content if is_good else content[:9] for is_good in good]
            table = datasets.Dataset.from_dict({"image": images, "caption": ["a"] * 300})
            table = table.cast_column("image", datasets.Image()).to_iterable_dataset(num_shards=4)
            data = TrainingStream(PairStream(table, max_bad_share=max_bad_share), image_of, tiny_processor)
        else:
            data = TrainingPairs(
                load_pairs(tmp_path / "a.jsonl", max_bad_share=max_bad_share), image_of, tiny_processor
            )
        return BatchLoader(data, accelerator(), 32, num_workers=4, pairs_per_epoch=160)

    batches = loader(0.6)
    assert [len(list(batches.epoch(epoch))) for epoch in range(2)] == [5 if streamed else 9] * 2
    with pytest.raises(ValueError, match=r"of the \d+ pairs read so far are bad, .*5\.00%"):
        list(loader(0.05).epoch(0))
    assert not multiprocessing.active_children()


def image_of(image):
    return torch.zeros(3, 8, 8)


class Broken(Stream):
    def __iter__(self):
        raise ValueError("too many bad pairs")


def test_an_error_of_a_worker_ends_the_workers():
    """They ignore signals: the program would wait for them at its end."""
    loader = BatchLoader(Broken(), accelerator(), 4, pairs_per_epoch=16, num_workers=2)
    with pytest.raises(ValueError, match="too many bad pairs"), Interrupts():
        list(loader.epoch(0))
    assert not multiprocessing.active_children()


def test_retrieval_is_computed_in_blocks(monkeypatch, recorded):
    """Against one matrix of logits; a caption that two pairs have is right for both images, and so is an image."""
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 11, 4, generator=generator)
    captions = [f"caption {row}" for row in range(11)]
    captions[6], texts[6], images[6] = captions[2], texts[2], texts[2]
    digests = [bytes([row]) for row in range(11)]
    digests[9], images[9], texts[3] = digests[3], images[3], images[3]  # its two captions in two rows
    texts /= texts.norm(dim=1, keepdim=True)
    logits = images.double() @ texts.double().T

    def same(row: int, other: int) -> bool:
        return captions[row] == captions[other] or digests[row] == digests[other]

    right = [same(row, logits[row].argmax()) for row in range(11)]
    losses = -(logits.log_softmax(1).diag() + logits.log_softmax(0).diag()) / 2
    reached = [same(row, logits[:, row].argmax()) for row in range(11)]
    monkeypatch.setattr(validation, "_BLOCK", 4)
    shapes = recorded(validation.F, "cross_entropy", lambda logits, *args, **options: tuple(logits.shape))
    scores = validation.retrieval_scores(images, texts, captions, digests)
    assert shapes == [(4, 11), (4, 11), (3, 11)] * 2
    torch.testing.assert_close(scores["val_loss"].double(), losses, atol=1e-5, rtol=0)
    assert scores["image_to_text"].tolist() == [100.0 * hit for hit in right]
    assert scores["image_to_text"][[6, 9]].tolist() == [100, 100]
    assert scores["text_to_image"].tolist() == [100.0 * hit for hit in reached]


def test_a_metric_is_worse_if_its_interval_holds_a_loss_and_no_gain():
    intervals = {"a": [-3, -1], "b": [-3, 0], "c": [-3, 1], "d": [0, 1], "e": [0, 0], "val_loss": [0, 0.5]}
    assert regressed_metrics(intervals, 10) == ["a", "b", "val_loss"] and not regressed_metrics(intervals, 9)
    assert not regressed_metrics({"val_loss": [-0.5, -0.1]}, 10)


def test_augmentation_depends_on_seed_epoch_and_pair_alone(hub, tiny_processor):
    pairs = load_pairs(str(hub / "pairs.tar"))
    dataset = TrainingPairs(pairs, augmentation(tiny_processor), tiny_processor, seed=1)
    first, other = dataset[3]["image"], dataset[4]["image"]
    assert first.shape == other.shape == (3, 32, 32) and not torch.equal(first, other)
    assert torch.equal(dataset[3]["image"], first)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[3]["image"], first)
    with pytest.raises(ValueError, match="auto_augment: 'rand-m9-xyz3'"):
        augmentation(tiny_processor, auto_augment="rand-m9-xyz3")


def test_without_augmentation_the_image_is_whole_and_not_mirrored(tiny_processor):
    wide, transform = noise((90, 40)), augmentation(tiny_processor, crop_scale=1, auto_augment="", random_erasing=0)
    assert all(torch.equal(transform(wide), whole_image(tiny_processor, wide)) for _ in range(8))
