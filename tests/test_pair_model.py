"""The loss of pairs and its gradients, salient tokens, nouns, and what learns."""

import math
import unicodedata

import pytest
import torch
from conftest import noise, tiny_inputs, tiny_model
from torch.utils.data import Dataset
from training_runs import eight_pairs, gradients, outputs_of

from iclip_hf.data.nouns import TEMPLATES, NounPrompts
from iclip_hf.hub.configs import EMBEDDED
from iclip_hf.model import pair_loss
from iclip_hf.model.loss_terms import class_presence_loss, known_competition_loss, shares_by_place, sigmoid_noun_loss
from iclip_hf.model.losses import (
    BatchNouns,
    attention_prior,
    competition_loss,
    contrastive_loss,
    multi_positive_loss,
    shares_of_texts,
)
from iclip_hf.model.pooling import even_heights, even_patches, representative_patches
from iclip_hf.training import statistics
from iclip_hf.training.kept_presence import KeptPresence
from iclip_hf.training.statistics import set_statistics


def test_representative_patches_by_hand():
    """Most attention first, then what is attended and unlike what was taken, and the quarters."""
    tokens = torch.tensor(
        [[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.0, 3.0], [-1.0, 0.0], *([-k, -k] for k in range(1, 8))]
    )[None]
    attention = torch.tensor([[0.9, 1.0, 0.5, 0.2, 0.335, *[0.0] * 7]])
    taken = representative_patches(tokens, attention, (3, 4), 7)
    # 1 has most; then 0.385 * sqrt(2) of the opposite one before 0.55 * sqrt(0.95) of the upright one; then that one
    assert taken[0].tolist() == [1, 4, 2, 1, 2, 9, 10]
    assert representative_patches(tokens, attention, (3, 4), 12)[0].tolist() == [*range(12)]


def test_even_patches_cover_each_row_and_column():
    """
    Of 16 x 16 patches every second row, and in them the even columns and the odd ones in turn; of others, 8 rows too.
    """
    rows, columns = even_patches((16, 16)).view(8, 8) // 16, even_patches((16, 16)).view(8, 8) % 16
    assert rows[:, 0].tolist() == [*range(1, 16, 2)] and (rows == rows[:, :1]).all()
    assert columns[0].tolist() == [*range(0, 16, 2)] and columns[1].tolist() == [*range(1, 16, 2)]
    wide = even_patches((10, 25))
    assert wide.min() >= 0 and wide.max() < 250 and len({*(wide // 25).tolist()}) == 8
    heights = even_heights().view(8, 8)
    assert heights[0, 0] == 1 / 16 and heights[7, 7] == 15 / 16 and (heights == heights[:, :1]).all()


def test_the_loss_reads_representative_patches_averaged_over_similar_ones():
    options = {"max_over": "similarity", "map_affinity": 5.0, "map_tokens": 6, "known_competition": 1.0}
    model, inputs = tiny_model(**options), tiny_inputs(size=(80, 72))
    with torch.no_grad():
        image = model.encode_image(inputs["pixel_values"])
        few, every = model.image_inputs(image), model.get_image_features(inputs["pixel_values"])
        patches, _ = model._average_similar(image.patch_tokens, model.normalized_attention(image))
    chosen = representative_patches(image.patch_tokens, model.normalized_attention(image), image.grid, 6)
    rows = torch.arange(2).unsqueeze(1)
    torch.testing.assert_close(few.representative_tokens, patches[rows, chosen])
    torch.testing.assert_close(few.map_attention, every.map_attention[rows, chosen])
    torch.testing.assert_close(few.even_tokens, patches[:, even_patches(image.grid)])


def test_no_word_of_a_prompt_is_a_noun_of_the_embedded_model():
    """It would be a noun of every image whose caption has the form of a prompt, and have to get patches there."""
    nouns = NounPrompts.from_file(EMBEDDED / "nouns.txt")
    assert not set().union(*(nouns.nouns_in(template) for template in TEMPLATES))


class Rows(Dataset):
    """Images, of which it notes those that are read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 120

    def __getitem__(self, index):
        self.read.append(index)
        return {"image": noise((32, 32), seed=index)}


@pytest.mark.parametrize("streamed", [False, True])
def test_statistics_are_of_images_evenly_spread_over_a_data_set(tiny_processor, monkeypatch, recorded, streamed):
    """Of a stream, they are those of its beginning. Few images are in memory at once."""
    monkeypatch.setattr(statistics, "_IMAGES", 40)
    rows, model = Rows(), tiny_model(max_over="similarity", center_tokens=True)
    read = recorded(model, "encode_image", lambda pixel_values: len(rows.read))
    set_statistics(model, tiny_processor, iter(rows) if streamed else rows)
    assert read == [32, 40] and rows.read == [*range(0, 40 if streamed else 120, 1 if streamed else 3)]


def test_chunks_are_computed_again_with_the_same_dropout(monkeypatch):
    model, batch = tiny_model().train(), tiny_inputs(7, 7)
    assert model.text_model.training and model.text_model.config.hidden_dropout_prob > 0
    again = gradients(model, batch, chunk_size=3)
    monkeypatch.setattr(pair_loss, "checkpoint", lambda encode, *inputs, use_reentrant: encode(*inputs))
    kept = gradients(model, batch, chunk_size=3)
    assert again[0] == kept[0]
    for name in kept[1]:
        torch.testing.assert_close(again[1][name], kept[1][name], atol=1e-5, rtol=1e-4)


def test_nouns_are_found_in_captions():
    nouns = NounPrompts(["dog", "traffic light (3)", "", "bus", "man", " ", "baby", "light"])
    assert nouns.nouns == ["dog", "traffic light", "bus", "man", "baby", "light"]
    found = nouns.nouns_in("Two men, three babies and dogs wait at the traffic lights; no business")
    assert {nouns.nouns[number] for number in found} == {"dog", "traffic light", "man", "baby"}  # no "light"
    images = [nouns.known_nouns(["buses", "a tree by a man"]), nouns.known_nouns(["nothing here"])]
    prompts, sampled = nouns.sample(images, epoch=0)
    assert sampled["noun_labels"].tolist() == [[0, 0, 1, 1, 0, 0], [0] * 6] and len(prompts) == 6
    assert all(nouns.nouns[number] in prompt for number, prompt in zip(sampled["noun_ids"], prompts))
    assert set(sampled["noun_ids"][:3].tolist()) <= {2, 3}
    for plural, noun in {"children": "child", "feet": "foot", "mice": "mouse", "salespeople": "salesperson"}.items():
        assert NounPrompts(["dog", noun]).nouns_in(f"two {plural}") == {1}
    assert NounPrompts(["person", "people"]).nouns_in("two people") == {1}  # which is a noun itself
    assert NounPrompts(["carpenter's kit"]).nouns_in("a photo of the carpenter's kits") == {0}
    assert nouns.sample(images[:1], epoch=0)[0] == prompts[:3]
    assert any(nouns.sample(images[:1], epoch)[0] != prompts[:3] for epoch in range(1, 4))


@pytest.mark.parametrize(
    ("caption", "phrases", "expected"),
    [
        ("a man eating a hot dog by his dog", (), {"man", "hot dog", "dog"}),
        ("a teddy bear", (), {"bear"}),
        ("a teddy bear, a bear", {"teddy bear"}, {"bear"}),
        ("teddy bears", {"teddy bears"}, set()),
        ("a city bus stop", (), {"bus stop"}),
        ("an orange bus with orange and red stripes", (), {"bus"}),
        ("Oranges on a bus", (), {"orange", "bus"}),
        ("an orange \u2764\ufe0f", (), {"orange"}),  # whose mark is no letter
    ],
)
def test_the_longest_noun_takes_its_words(caption, phrases, expected):
    nouns = NounPrompts(["dog", "hot dog", "man", "bear", "city bus", "bus stop", "bus", "orange"])
    assert {nouns.nouns[number] for number in nouns.nouns_in(caption, phrases)} == expected


@pytest.mark.parametrize(
    ("captions", "labels", "complete", "shown", "absent"),
    [
        (["a man eats a hot dog"], ["hot dog", "person"], ["hot dog", "person", "dog"], {"man", "person"}, {"dog"}),
        (["a teddy bear"], [], ["teddy bear", "bear"], set(), {"bear"}),
        (["a bear of stone"], [], ["bear", "dog"], set(), {"dog"}),  # named and denied: unknown
        (["teddy bears"], ["Teddy_Bear"], [], set(), set()),
        (["a street"], ["traffic_light", "DOG"], ["Traffic Light", "dog", "bear"], {"traffic light", "dog"}, {"bear"}),
    ],
)
def test_labels_say_what_an_image_shows_and_what_it_does_not(captions, labels, complete, shown, absent):
    nouns = NounPrompts(["dog", "person", "man", "bear", "traffic light"])
    known = nouns.known_nouns(captions, labels, complete)
    assert [{nouns.nouns[number] for number in found} for found in known[:2]] == [shown, absent]


def test_letters_and_marks_of_all_scripts_are_parts_of_words():
    """Vowels of Thai and Hindi are marks, and so are accents in the names of files of macOS, which are decomposed."""
    nouns = NounPrompts(["หมี", "หมู", "काल", "कील", "café"])  # bear and pig; time and nail
    for number, noun in enumerate(nouns.nouns):
        decomposed = unicodedata.normalize("NFD", noun)
        known = nouns.known_nouns([f"a photo of a {decomposed}"], [decomposed], nouns.nouns)
        assert known.shown == [number] and len(known.absent) == 4
        assert nouns.nouns_in(f"a {noun}, {decomposed}") == {number}


def test_sampled_prompts_are_of_nouns_shown_with_their_marks():
    nouns = NounPrompts(["sky (background) (above)", "floor (below) (background)", "man (19)"])
    assert nouns.nouns == ["sky", "floor", "man"]
    images = [nouns.known_nouns(["a man eats"], ["floor"], ["floor", "sky"]), nouns.known_nouns(["a man eats"])]
    _, sampled = nouns.sample(images, epoch=0)
    assert sampled["noun_labels"].tolist() == [[-1, 1, 1], [0, 0, 1]]
    ids = sampled["noun_ids"].tolist()
    assert set(ids[:3]) <= {1, 2} and set(ids[3:]) == {2}
    assert sampled["place"].tolist() == [{1: 1, 2: 0}[number] for number in ids]
    assert sampled["is_background"].tolist() == [number == 1 for number in ids]
    assert nouns.marks["place"].tolist() == [-1, 1, 0]


def test_each_class_has_a_prompt_and_the_probabilities_of_images():
    nouns = NounPrompts(["dog", "crane (class) (2)", "pug (class)"])
    classes = {"Crane": 0.25, "dog": 0.5, "crane": 0.5, "unheard of": 0.1}  # two classes of one name
    known = nouns.known_nouns(["a pug"], class_probabilities=classes)
    prompts, sampled = nouns.sample([known, nouns.known_nouns(["a dog"])], epoch=0)
    assert sampled["class_ids"].tolist() == [1, 2] and sampled["class_probabilities"].tolist() == [[0.75, 0], [0, 0]]
    both = nouns.known_nouns(["a pug"], class_probabilities={"pug": 0.9, "pugs": 0.8})
    assert nouns.sample([both], epoch=0)[1]["class_probabilities"].tolist() == [[0, 1]]
    assert len(prompts) == 8 and len(sampled["noun_ids"]) == 6
    assert "crane" in prompts[6] and "pug" in prompts[7]


@pytest.mark.parametrize("bias", [None, -2.0])
def test_the_recognition_branch_learns_the_probabilities_of_classes(bias):
    """With its weight, from the last texts, which no other loss reads. With a bias, also which classes are absent."""
    model, batch = tiny_model(logit_bias_init_value=bias), tiny_inputs(2, 8)
    marks = {"is_background": torch.tensor([False, True, False]), "place": torch.tensor([0, 1, -1])}
    nouns = {"noun_ids": torch.arange(3), "noun_labels": torch.tensor([[1, 0, 0], [0, 1, -1]]), **marks}
    probabilities, losses = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 0.5]]), {}
    for weight in (0, 0.4):
        classes = {"class_ids": torch.tensor([2, 0, 1]), "class_probabilities": probabilities}
        distilled = {**batch, "nouns": {**nouns, **classes}}
        with torch.no_grad():
            losses[weight] = outputs_of(model, distilled, distillation_weight=weight)["branch_losses"]
    first = {name: value[:5] for name, value in batch.items() if name != "pixel_values"}
    with torch.no_grad():
        without = outputs_of(model, {**batch, **first, "nouns": nouns})["branch_losses"]
        logits = model(**batch).logits_per_image[:, 5:]
    torch.testing.assert_close(losses[0], without)
    expected = -(probabilities * logits.log_softmax(1)).sum() / 2
    if bias is not None:
        labels = nouns["noun_labels"][:, classes["class_ids"]]
        expected = expected + 0.1 * class_presence_loss(logits, probabilities, labels)
    torch.testing.assert_close(losses[0.4] - losses[0], torch.stack([0.4 * expected, torch.zeros(())]))


def test_noun_prompts_are_no_captions():
    nouns = NounPrompts(["oven", "dog"])
    labels = ["a photo of an oven", "a photo of a dog"]
    assert nouns.sentences(["a photo of a cat", *labels]) == ["a photo of a cat"]  # no noun of the vocabulary
    assert nouns.sentences(labels) == labels  # nothing else to learn from


# Six prompts of four nouns, and the first prompt of each noun.
UNMARKED = {"noun_ids": torch.tensor([0, 1, 1, 1, 3, 2]), "is_background": torch.zeros(6) > 0, "place": torch.zeros(6)}
FIRST = (0, 1, 5, 4)


def test_noun_prompts_teach_the_recognition_branch():
    """Each noun once, of images and of nouns; a prompt of another image's is no negative of one that has its noun."""
    model, batch = tiny_model(), tiny_inputs(3, 9)
    noun_labels = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.int8)
    nouns = {**UNMARKED, "noun_labels": noun_labels}
    outputs = outputs_of(model, {**batch, "nouns": nouns}, noun_weight=0.7)
    with torch.no_grad():
        logits = model(**batch).logits_per_image[:, [3 + prompt for prompt in FIRST]]
    positives = noun_labels > 0
    loss = (multi_positive_loss(logits, positives) + multi_positive_loss(logits.mT, positives.mT)).item() / 2
    captions = {name: batch[name][:3] for name in ("input_ids", "attention_mask")}
    plain = outputs_of(model, {**batch, **captions})
    expected = 0.3 * plain["branch_losses"][0].item() + 0.7 * loss
    assert outputs["branch_losses"][0].item() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(outputs["branch_losses"][1], plain["branch_losses"][1], atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs["text_embeds"][:3], plain["text_embeds"], atol=1e-5, rtol=0)


def test_a_logit_bias_makes_the_noun_loss_one_of_sigmoids():
    """Captions and the map keep the softmax."""
    model, batch = tiny_model(logit_bias_init_value=-1.5, max_over="similarity"), tiny_inputs(3, 9)
    noun_labels = torch.tensor([[1, 1, -1, 0], [0, 1, 0, -1], [0, 0, -1, 0]], dtype=torch.int8)
    nouns = {**UNMARKED, "noun_labels": noun_labels}
    learns = {"noun_weight": 0.7, "unknown_weight": 0.3}
    outputs = outputs_of(model, {**batch, "nouns": nouns}, **learns)
    with torch.no_grad():
        logits = model(**batch).logits_per_image  # with the bias
    of_nouns = sigmoid_noun_loss(logits[:, [3 + prompt for prompt in FIRST]], BatchNouns.gathered(**nouns), 0.3)
    expected = 0.3 * contrastive_loss(logits[:, :3], logits[:, :3].mT, 0) + 0.7 * of_nouns
    assert outputs["branch_losses"][0].item() == pytest.approx(expected.item(), abs=1e-5)
    softmax = tiny_model(max_over="similarity")  # the same weights without a bias
    softmax.load_state_dict({name: weight for name, weight in model.state_dict().items() if "logit_bias" not in name})
    without = outputs_of(softmax, {**batch, "nouns": nouns}, **learns)
    torch.testing.assert_close(outputs["branch_losses"][1], without["branch_losses"][1])  # of the map
    outputs["loss"].backward()
    assert model.recognition.logit_bias.grad.abs() > 1e-3


def test_nouns_of_the_background_compete_for_patches_without_attention():
    """
    Against plain sums over patches: priors, the competition of a share of the loss, and the attention's direction.
    """
    options = {"max_over": "similarity", "map_attention": "signed"}
    model, batch = tiny_model(**options), tiny_inputs(3, 7)
    noun_labels = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 1, 1]], dtype=torch.int8)
    marks = {"is_background": torch.tensor([False, True, False, False]), "place": torch.zeros(4)}
    nouns = {"noun_ids": torch.arange(4) % 3, "noun_labels": noun_labels, **marks}
    with torch.no_grad():
        image = model.get_image_features(batch["pixel_values"])
        model.attention_direction.copy_(torch.linspace(-0.05, 0.05, model.config.projection_dim))
        texts = model.get_text_features(batch["input_ids"], batch["attention_mask"]).map_text_embeds[3:6]
        batch["nouns"] = nouns
        outputs = {share: outputs_of(model, batch, noun_weight=1.0, noun_competition=share) for share in (0, 0.25, 1)}
    cosines = (image.patch_embeds.flatten(1, 2) @ texts.T).double()
    seen = (1 - image.attention.double()) ** 8 + 1e-6
    prior = torch.full_like(cosines, 1 / cosines.shape[1])
    prior[..., 1] = seen / seen.sum(1, keepdim=True)
    pooled = (prior * (10 * cosines).exp()).sum(1).log() / 10
    scale, positives = model.interpretability.logit_scale.exp().double(), noun_labels > 0
    both = multi_positive_loss(scale * pooled, positives), multi_positive_loss(scale * pooled.T, positives.T)
    contrast = sum(both) / 2
    shares = (20 * cosines).exp()
    shares = (prior * shares / shares.sum(-1, keepdim=True)).sum(1)
    competition = -sum((shares[i].log() * noun_labels[i]).sum() / noun_labels[i].sum() for i in range(3)) / 3
    for share, found in outputs.items():
        expected = (1 - share) * contrast + share * competition
        assert found["branch_losses"][1].item() == pytest.approx(expected.item(), abs=1e-4)
    one, behind, other = (20 * texts @ model.attention_direction).tolist()
    short = [max(0, 1 - weight) ** 2 for weight in (-behind, one, other)]
    direction = (short[0] + (short[1] + short[2]) / 2) / 2
    found = outputs[0]["loss"] - outputs[0]["branch_losses"].mean()
    assert found.item() == pytest.approx(direction, abs=1e-4)


def test_the_direction_of_the_attention_learns_from_texts_and_does_not_teach_them():
    model = tiny_model(lock_vision=False, max_over="similarity", map_attention="signed", logit_bias_init_value=-2)
    batch, found = eight_pairs(slice(0, 8))[1], []
    model.eval()
    for direction in (0.0, 0.3):
        torch.nn.init.constant_(model.attention_direction, direction)
        found.append(gradients(model, batch)[1])
    without, within = (grads.pop("attention_direction") for grads in found)
    assert without.abs().max() > 0 and not torch.equal(without, within)
    torch.testing.assert_close(*found)


def test_kept_presence_is_the_divergence_from_that_at_the_start():
    """By hand, over images and texts; its gradient goes to the branch alone."""
    branch, draws = tiny_model(logit_bias_init_value=-2).recognition, torch.Generator().manual_seed(0)
    images = torch.randn(3, branch.visual_projection.weight.shape[1], generator=draws)
    texts = torch.randn(5, branch.text_projection.weight.shape[1], generator=draws)
    kept = KeptPresence(branch, texts)
    assert kept(branch, images).item() == pytest.approx(0, abs=1e-6)

    def probabilities() -> list[float]:
        return branch(branch.embed_image(images) @ branch.embed_text(texts).mT).sigmoid().flatten().tolist()

    before = probabilities()
    with torch.no_grad():
        branch.visual_projection.weight.mul_(torch.randn(branch.visual_projection.weight.shape, generator=draws))
        branch.logit_bias.sub_(0.5)
    expected = 0
    for old, new in zip(before, probabilities()):
        expected += old * math.log(old / new) + (1 - old) * math.log((1 - old) / (1 - new))
    loss = kept(branch, images)
    assert loss.item() == pytest.approx(expected / 3, rel=1e-4) and expected > 0.1
    loss.backward()
    assert branch.logit_bias.grad != 0 and all(parameter.grad is None for parameter in kept.parameters())


def test_the_competition_of_known_nouns_is_added_to_the_loss_of_the_map():
    """With its weight, over the evenly spread patches of images whose labels are complete, here the last two."""
    options = {"max_over": "similarity", "center_tokens": True, "map_affinity": 3.0}
    model, batch = tiny_model(**options), tiny_inputs(3, 7, size=(80, 72))
    labels = torch.tensor([[1, 0, 0], [1, -1, 0], [0, -1, 1]], dtype=torch.int8)
    marks = {"is_background": torch.tensor([False, True, False, False]), "place": torch.tensor([0, 1, -1, 0])}
    nouns = {"noun_ids": torch.arange(4) % 3, "noun_labels": labels, **marks}
    losses = {}
    for weight in (0, 0.4):
        model.config.known_competition = weight
        with torch.no_grad():
            losses[weight] = outputs_of(model, {**batch, "nouns": nouns})["branch_losses"]
    with torch.no_grad():
        image = model.get_image_features(batch["pixel_values"])
        texts = model.get_text_features(batch["input_ids"], batch["attention_mask"]).map_text_embeds[3:6]
    patches = image.patch_embeds.flatten(1, 2)[1:, even_patches(image.grid)]
    known = BatchNouns.gathered(**nouns)
    expected = known_competition_loss(patches, texts, 20, known)
    assert expected > 0.1
    torch.testing.assert_close(losses[0.4][1] - losses[0][1], 0.4 * expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(losses[0.4][0], losses[0][0])


def test_nouns_with_a_place_compete_for_evenly_spread_patches():
    """
    Where an image shows one, here the second and third, also if their labels are complete. Against the shares of all
    patches, by the noun loss with and without the competition.
    """
    model, batch = tiny_model(max_over="similarity", center_tokens=True, known_competition=1e-9), tiny_inputs(3, 7)
    labels = torch.tensor([[1, -1, 0], [1, 1, 0], [0, -1, 1]], dtype=torch.int8)  # the first is complete, without one
    marks = {"is_background": torch.tensor([False, True, False, False]), "place": torch.tensor([0, 1, -1, 0])}
    nouns = {"noun_ids": torch.arange(4) % 3, "noun_labels": labels, **marks}
    model.config.noun_weight, losses = 1, {}
    for share in (0, 1):
        model.config.noun_competition = share
        with torch.no_grad():
            losses[share] = outputs_of(model, {**batch, "nouns": nouns})["branch_losses"][1]
    known = BatchNouns.gathered(**nouns)
    with torch.no_grad():
        inputs = model.image_inputs(model.encode_image(batch["pixel_values"]))
        texts = model.get_text_features(batch["input_ids"], batch["attention_mask"]).map_text_embeds[3:6]
        patches, even = (
            model.interpretability.embed_image(tokens)
            for tokens in (inputs.representative_tokens, inputs.even_tokens[1:])
        )
        prior = attention_prior(inputs.map_attention, known.is_background)
        shares = shares_of_texts(20 * patches @ texts.T, prior)
        expected = competition_loss(shares_by_place(shares, even, texts, 20, known), known.shown)
    torch.testing.assert_close(losses[1], expected, atol=1e-5, rtol=0)
    assert (losses[0] - losses[1]).abs() > 0.01 and (competition_loss(shares, known.shown) - expected).abs() > 0.01
