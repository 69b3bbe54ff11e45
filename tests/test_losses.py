"""The contrastive loss against plain loops, and as the sum of its parts."""

import math

import pytest
import torch
from processes import run_script
from torch.nn import functional as F
from training_runs import eight_pairs, terms

from iclip_hf.model.loss_terms import (
    caption_loss,
    class_presence_loss,
    known_competition_loss,
    shares_by_place,
    sigmoid_noun_loss,
)
from iclip_hf.model.losses import (
    BatchNouns,
    competition_loss,
    contrastive_loss,
    count_per_process,
    distillation_loss,
    multi_positive_loss,
    place_prior,
    row_ids,
    shares_of_texts,
)
from iclip_hf.model.pooling import even_heights


@pytest.mark.parametrize("counts, expected", [([1, 0], 0.5), ([3, 1], 2.0), ([0, 0], 0.5)])
def test_sums_of_all_processes_are_divided_by_one_count(counts, expected, monkeypatch):
    """Also where there are fewer values than processes, or none."""
    monkeypatch.setattr("iclip_hf.model.losses.gather_with_gradient", lambda local: torch.tensor(counts))
    assert count_per_process(torch.tensor([[True, False]])).item() == expected


EACH_TERM = """
import sys
import torch
from accelerate import PartialState
from training_runs import eight_pairs, terms

torch.set_num_threads(1)
state = PartialState(cpu=True)
assert state.num_processes == 2
found = terms(*eight_pairs(slice(4 * state.process_index, 4 * state.process_index + 4)), chunk_size=2)
for loss, grads in found.values():
    for one in (loss, *grads.values()):
        torch.distributed.all_reduce(one)
        one /= 2
if state.is_main_process:
    torch.save(found, sys.argv[1])
"""


def test_every_term_is_a_mean_over_rows(tmp_path):
    """Of two processes, in two chunks each, the losses and gradients are those of the whole batch."""
    for done in run_script(EACH_TERM, tmp_path / "found.pt", processes=2):
        assert done.returncode == 0, done.stderr[-3000:]
    found, expected = torch.load(tmp_path / "found.pt", weights_only=True), terms(*eight_pairs(slice(0, 8)))
    assert found.keys() == expected.keys() and len({round(loss.item(), 4) for loss, _ in found.values()}) == len(found)
    for name, (loss, grads) in expected.items():
        assert abs(found[name][0] - loss) < 1e-5, name
        assert found[name][1].keys() == grads.keys()
        for weight, grad in grads.items():
            torch.testing.assert_close(found[name][1][weight], grad, atol=1e-5, rtol=1e-4, msg=f"{name}: {weight}")


def test_equal_captions_are_positives_of_each_other():
    """Against a loop: a pair competes with pairs of other captions; the result is the mean over all positives."""
    captions = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1)[[0, 1, 0, 2, 0]]
    images = F.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    ids = row_ids(captions)
    logits = 3 * images @ captions.T
    losses = []
    for rows in (logits.tolist(), logits.T.tolist()):
        for row, own in zip(rows, ids.tolist()):
            negatives = sum(math.exp(value) for value, other in zip(row, ids.tolist()) if other != own)
            positives = [value for value, other in zip(row, ids.tolist()) if other == own]
            of_row = [math.log(1 + negatives / math.exp(value)) for value in positives]
            losses.append(sum(of_row) / len(of_row))
    loss = caption_loss(lambda texts: 3 * images @ texts.T, captions, ids)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    one = caption_loss(lambda texts: 3 * images @ texts.T, captions[[0] * 5], ids[[0] * 5])
    assert one.item() == 0
    distinct = caption_loss(lambda texts: 3 * images @ texts.T, captions, torch.arange(5))
    assert distinct.item() == contrastive_loss(logits, logits.T, 0).item()


def test_ids_tell_rows_apart_and_ignore_zeros_at_the_end():
    tokens = torch.tensor([[5, 6, 0], [6, 5, 0], [5, 6, 7], [5, 6, 0]])
    assert row_ids(tokens).unique().numel() == 3
    assert row_ids(tokens)[0] == row_ids(tokens[:, :2])[3]
    features = torch.tensor([[0.5, -1.0], [0.5, 1.0], [0.5, -1.0]], dtype=torch.float16)
    assert (row_ids(features) == row_ids(features)[0]).tolist() == [True, False, True]


def test_half_precision_logits_lose_nothing_in_the_loss():
    logits = (torch.eye(64) * 100).half()  # exp(100) overflows float16
    assert contrastive_loss(logits, logits.mT, 0).item() == pytest.approx(0, abs=1e-6)
    assert contrastive_loss(logits, logits.mT, 0).dtype == torch.float32


def test_texts_compete_for_patches_by_hand():
    """
    A patch is shared by all texts; the shares of an image's texts count by its prior; an image without texts counts 0.
    """
    generator = torch.Generator().manual_seed(3)
    logits, prior = torch.randn(3, 4, 5, generator=generator) * 3, torch.rand(3, 4, 5, generator=generator)
    positives = torch.tensor([[True, False, True, False, False], [False] * 5, [False, True, False, False, False]])
    total = 0.0
    for image in range(3):
        losses = []
        for text in range(5):
            share = 0.0
            for patch in range(4):
                values = [math.exp(value) for value in logits[image, patch].tolist()]
                share += prior[image, patch, text].item() * values[text] / sum(values)
            if positives[image, text]:
                losses.append(-math.log(share))
        total += sum(losses) / len(losses) if losses else 0.0
    shares = shares_of_texts(logits, prior)
    assert competition_loss(shares, positives).item() == pytest.approx(total / 3, abs=1e-5)


def test_a_text_without_a_share_has_a_finite_loss():
    """Where another text wins a patch by so much that the share is 0 in float32."""
    logits = torch.tensor([[[0.0, 200.0]]], requires_grad=True)
    loss = competition_loss(shares_of_texts(logits, torch.ones(1, 1, 2)), torch.tensor([[True, False]]))
    assert loss.item() == pytest.approx(126 * math.log(2))  # the smallest normal number is 2 ** -126
    loss.backward()
    assert torch.isfinite(logits.grad).all()


def test_positives_are_not_one_anothers_negatives():
    logits = torch.tensor([[2.0, 1.0, 0.0], [5.0, -5.0, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    positives = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    loss = multi_positive_loss(logits, positives)
    by_hand = (
        math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))
    ) / 2  # the second row has none, the third no negative
    assert loss.item() == pytest.approx(by_hand / 3, abs=1e-6)
    loss.backward()
    assert torch.isfinite(logits.grad).all() and not logits.grad[1:].any()


def test_distillation_counts_an_image_by_its_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0], [5.0, -5.0, 0.0], [1.0, 2.0, 3.0]])
    probabilities = torch.tensor([[0.5, 0.25, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    sums = [sum(map(math.exp, row)) for row in logits.tolist()]
    first = -0.5 * math.log(math.exp(2) / sums[0]) - 0.25 * math.log(math.exp(1) / sums[0])
    third = -math.log(math.exp(3) / sums[2])
    assert distillation_loss(logits, probabilities).item() == pytest.approx((first + third) / 3, abs=1e-6)


def test_a_sure_classifier_denies_other_classes_unless_labels_show_them():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [1.0, 0.0, 0.0, 0.0]])
    probabilities = torch.tensor([[0.8, 0.1, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0]])
    labels = torch.tensor([[0, 1, 0, -1], [-1, 0, 0, 0]], dtype=torch.int8)
    shown = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))
    absent = 0.8**2 * math.log(2) + math.log(1 + math.exp(-1)) + math.log(1 + math.e) + 0.36 * 2.6 * math.log(2)
    assert class_presence_loss(logits, probabilities, labels).item() == pytest.approx((shown + absent) / 2, abs=1e-6)


def test_only_the_logits_of_common_nouns_are_adjusted():
    """The first noun is shown in 5 of 10 images and unknown in the others, the second is shown in 1 of 10."""
    logits = torch.linspace(-3, 3, 20).view(10, 2)
    shown = torch.zeros(10, 2, dtype=torch.bool)
    shown[:5, 0] = shown[0, 1] = True
    absent, marks = ~shown & torch.tensor([False, True]), torch.zeros(2)
    nouns = BatchNouns(torch.arange(2), shown, shown, absent, marks > 0, marks)
    adjusted = logits + torch.tensor([math.log(5.5 / (0.5 + 0.5) * 4), 0])
    weights = torch.where(shown | absent, 1.0, 0.1)
    expected = F.binary_cross_entropy_with_logits(adjusted, shown.float(), weights, reduction="sum") / 6
    torch.testing.assert_close(sigmoid_noun_loss(logits, nouns, 0.1), expected)


def test_a_place_prefers_the_lower_or_upper_patches_by_hand():
    heights = torch.tensor([0.0, 0.5, 1.0])
    prior = place_prior(heights, torch.tensor([0, 1, -1], dtype=torch.int8))
    weights = [math.exp(3 * height) for height in (0, 0.5, 1)]
    below = [weight / sum(weights) for weight in weights]
    expected = torch.tensor([[1 / 3, below[0], below[2]], [1 / 3, below[1], below[1]], [1 / 3, below[2], below[0]]])
    torch.testing.assert_close(prior, expected)


def test_nouns_with_a_place_have_their_share_in_even_patches():
    """
    Against plain loops: in images that show one, nouns below or above have the mean over evenly spread patches,
    weighted by their place. All other shares stay.
    """
    generator = torch.Generator().manual_seed(1)
    shown = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]) > 0
    place, background = torch.tensor([0, 1, -1, 0]), torch.tensor([False, True, True, False])
    nouns = BatchNouns(torch.arange(4), shown, shown, torch.zeros_like(shown), background, place)
    shares = torch.rand(3, 4, generator=generator)
    patches, prompts = torch.randn(2, 64, 8, generator=generator), torch.randn(4, 8, generator=generator)
    expected, heights = shares.tolist(), even_heights().tolist()
    for patch_logits, image in zip((1.5 * patches @ prompts.T).tolist(), (0, 2)):
        for noun in (1, 2):
            weights = [math.exp(3 * place[noun].item() * height) for height in heights]
            expected[image][noun] = sum(
                weight / sum(weights) * math.exp(patch[noun]) / sum(math.exp(value) for value in patch)
                for weight, patch in zip(weights, patch_logits)
            )
    torch.testing.assert_close(shares_by_place(shares, patches, prompts, 1.5, nouns), torch.tensor(expected))


def test_known_nouns_compete_where_labels_are_complete_for_the_background():
    """
    Against plain loops: unknown nouns have no share, the place is in the power mean over the patches, and
    images of which no absent noun of the background is known count nothing, nor those that show nothing.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[1, 1, -1, 0, 0], [1, -1, 0, 1, 0], [0, -1, -1, 1, 1], [0, 0, -1, 0, -1]])
    background, place = torch.tensor([False, False, True, True, False]), torch.tensor([0, 0, -1, 1, 0])
    nouns = BatchNouns(torch.arange(5), labels > 0, labels > 0, labels < 0, background, place)
    patches, prompts = torch.randn(2, 64, 8, generator=generator), torch.randn(5, 8, generator=generator)
    logits = 1.5 * patches @ prompts.T
    total, heights = 0.0, even_heights().tolist()
    for patch_logits, image in zip(
        logits.tolist(), (0, 2)
    ):  # of image 1 only an object is known to be absent, and image 3 shows nothing
        of_image = labels[image].tolist()
        known, shown = ([noun for noun in range(5) if of_image[noun] in kinds] for kinds in ((1, -1), (1,)))
        shares, losses = [], []
        for patch in patch_logits:
            denominator = sum(math.exp(patch[noun]) for noun in known)
            shares.append({noun: math.exp(patch[noun]) / denominator for noun in known})
        for noun in shown:
            weights = [math.exp(3 * place[noun].item() * height) for height in heights]
            mean = sum(weight * of_patch[noun] ** 4 for weight, of_patch in zip(weights, shares)) / sum(weights)
            losses.append(-math.log(mean) / 4)
        of_patches = [-math.log(sum(of_patch[noun] for noun in shown)) for of_patch in shares]
        total += sum(losses) / len(losses) + sum(of_patches) / 64
    assert known_competition_loss(patches, prompts, 1.5, nouns).item() == pytest.approx(total / 2, abs=1e-4)
    nothing = nouns._replace(absent=torch.zeros_like(nouns.absent))
    assert known_competition_loss(patches[:0], prompts, 1.5, nothing).item() == 0
