"""Parts of training against slow or direct computation: schedule, order of pairs, streams, retrieval, augmentation."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import noise, tiny_model
from timm.scheduler import CosineLRScheduler

from iclip_hf import ICLIPProcessor
from iclip_hf.data.pairs import load_pairs
from iclip_hf.model.images import load_image
from iclip_hf.training import (
    ICLIPTrainer,
    ICLIPTrainingArguments,
    PairCollator,
    StreamedPairs,
    augmentation,
    evaluation,
)
from iclip_hf.training.callbacks import EpochsAndSeeds
from iclip_hf.training.evaluation import regressed_metrics
from iclip_hf.training.trainer import cosine_schedule


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


class Stream:
    """Seven pairs, in an order of its epoch."""

    def one_pass(self, epoch):
        yield from ((epoch, number) for number in range(7))


def test_a_stream_goes_on_with_an_order_of_its_own():
    """A pass is followed by another one, whose number no step has."""
    pairs = StreamedPairs(Stream(), 10)
    pairs.set_epoch(5)
    seen = [*itertools.islice(pairs, 16)]
    first, second, third = {epoch for epoch, _ in seen[:7]}, {epoch for epoch, _ in seen[7:14]}, {seen[14][0]}
    assert first == {5} and second != third and min(second | third) > 10**9
    assert [number for _, number in seen[:14]] == [*range(7)] * 2
    assert next(iter(pairs)) == (5, 0) and len(pairs) == 10
    pairs.stream = SimpleNamespace(one_pass=lambda epoch: iter(()))
    with pytest.raises(ValueError, match="has no pairs"):
        next(iter(pairs))


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
    competing = logits.clone()
    competing[2, 6] = competing[6, 2] = -torch.inf  # an equal caption is no negative
    losses = -(competing.log_softmax(1).diag() + competing.log_softmax(0).diag()) / 2
    reached = [same(row, logits[:, row].argmax()) for row in range(11)]
    monkeypatch.setattr(evaluation, "_BLOCK", 4)
    shapes = recorded(evaluation.F, "cross_entropy", lambda logits, *args, **options: tuple(logits.shape))
    numbers = [[[*same].index(one) for one in same] for same in (digests, captions)]
    metrics = evaluation.retrieval_metrics(images, texts, torch.tensor(numbers).T)
    assert shapes == [(4, 11), (4, 11), (3, 11)] * 2
    torch.testing.assert_close(metrics["loss"].double(), losses, atol=1e-5, rtol=0)
    assert metrics["image_to_text"].tolist() == [100.0 * hit for hit in right]
    assert metrics["image_to_text"][[6, 9]].tolist() == [100, 100]
    assert metrics["text_to_image"].tolist() == [100.0 * hit for hit in reached]


def test_equal_rows_have_one_number():
    """Texts in batches of any padding, and images by all of their arrays."""
    ids = torch.tensor([[5, 7, 0, 0], [5, 0, 7, 0], [5, 7, 9, 0]])
    numbers = evaluation.content_ids([ids])
    assert len({*numbers.tolist()}) == 3 and torch.equal(evaluation.content_ids([ids[:1, :2]]), numbers[:1])
    first, second = torch.zeros(3, 2, 2), torch.tensor([[1.0], [1.0], [2.0]])
    a, b, c = evaluation.content_ids([first, second]).tolist()
    assert a == b != c


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK"])
def test_augmentation_takes_images_of_any_mode(tiny_processor, mode):
    image, collator = noise((40, 30)).convert(mode), PairCollator(tiny_processor, None, augmentation(tiny_processor))
    first, second = (
        collator([{"image": image, "caption": "a dog", "draw": (0, 0, 0)}])["pixel_values"]
        for image in (image, load_image(image))
    )
    assert torch.equal(first, second)


def test_a_metric_is_worse_if_its_interval_holds_a_loss_and_no_gain():
    intervals = {"a": [-3, -1], "b": [-3, 0], "c": [-3, 1], "d": [0, 1], "e": [0, 0], "loss": [0, 0.5]}
    assert regressed_metrics(intervals, 10) == ["a", "b", "loss"] and not regressed_metrics(intervals, 9)
    assert not regressed_metrics({"loss": [-0.5, -0.1]}, 10)


def test_augmentation_depends_on_seed_epoch_and_pair_alone(hub, tiny_processor):
    pairs = load_pairs(str(hub / "pairs.tar"))
    collator = PairCollator(tiny_processor, None, augmentation(tiny_processor))

    def images(*places, pairs=pairs):
        return collator([pairs[place] for place in places])["pixel_values"]

    first, other = images(3, 4)
    assert first.shape == other.shape == (3, 32, 32) and not torch.equal(first, other)
    assert torch.equal(images(7, 3)[1], first)
    pairs.set_epoch(1)
    assert not torch.equal(images(3)[0], first)
    assert not torch.equal(images(3, pairs=load_pairs(str(hub / "pairs.tar"), seed=1))[0], first)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    images(5)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    with pytest.raises(ValueError, match="auto_augment: 'rand-m9-xyz3'"):
        augmentation(tiny_processor, auto_augment="rand-m9-xyz3")


def test_augmentation_has_the_size_and_the_numbers_of_the_processor(tiny_processor):
    assert augmentation(tiny_processor, crop_scale=1, auto_augment="", random_erasing=0) is None  # the processor's own
    options = {"do_normalize": False, "resample": 0, "size": {"shortest_edge": 24}}
    images = type(tiny_processor.image_processor)(**{**tiny_processor.image_processor.to_dict(), **options})
    transform = augmentation(ICLIPProcessor(images, tiny_processor.tokenizer), auto_augment="", random_erasing=0)
    pixels = transform(noise((90, 40)).convert("1").convert("RGB"))
    assert pixels.shape == (3, 24, 24) and {*pixels.flatten().tolist()} == {0.0, 1.0}  # the nearest pixel, not scaled


def test_each_epoch_of_any_rows_has_an_order_of_its_own(tiny_processor, tmp_path):
    """With each row at most once."""
    args = ICLIPTrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True)
    loader = ICLIPTrainer(tiny_model(), args, None, [{}] * 17, None, tiny_processor).get_train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        orders.append([index for batch in loader.batch_sampler for index in batch])
    assert orders[0] == orders[2] != orders[1] and len({*orders[0]}) == 16


def test_dropout_differs_by_step_and_process_and_is_the_same_again():
    def drawn(step, process):
        args, state = SimpleNamespace(seed=3, process_index=process), SimpleNamespace(global_step=step)
        EpochsAndSeeds().on_step_begin(args, state, None)
        return tuple(torch.rand(4).tolist())

    steps = [(step, process) for step in range(3) for process in range(3)]
    draws = [drawn(*step) for step in steps]
    assert len(set(draws)) == len(steps)
    assert draws == [drawn(*step) for step in steps]
