"""Word scores against what transformers' own text towers give, and how they are shown."""

import copy

import pytest
import torch
from conftest import tiny_model
from families import LABELS, images
from torch.nn import functional as F

from iclip_hf import explain, load
from iclip_hf.explainers import WordExplainer
from iclip_hf.explainers.words import word_tokens


TEXTS = ["the red ball", "dog"]
TEMPLATE = "a photo of {} ."
IMAGE = F.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(3)), dim=-1)


def prompt(text):
    return TEMPLATE.replace("{}", text)


def shares(relevance):
    return [one / sum(relevance) if sum(relevance) else 0.0 for one in relevance]


def stretched(values):
    low, high = min(values), max(values)
    return [(value - low) / (high - low) for value in values]


def words_of_one_query(query, key, value, gradient, text):
    """Grad-ECLIP of one prompt, token by token; each word of these texts is one token."""
    inside = range(1, 1 + len(prompt(text).split()))  # between the special tokens
    spatial = stretched([F.cosine_similarity(query, key[i], dim=0).item() for i in inside])
    relevance = [max(0.0, (gradient @ value[i]).item()) * s for i, s in zip(inside, spatial)]
    return shares(relevance[3 : 3 + len(text.split())])  # after "a photo of"


def words_of_all_queries(query, key, value, gradient, text):
    """The same with attention weights instead of stretched cosines, head by head."""
    relevance = [0.0] * len(value)
    for q in range(len(query)):
        weights = [
            (query_head[q] @ key_head.T / 12**0.5).softmax(-1)
            for query_head, key_head in zip(query.chunk(2, -1), key.chunk(2, -1))
        ]
        for i in range(len(value)):
            given = sum(w[i] * (g @ v) for w, g, v in zip(weights, gradient[q].chunk(2), value[i].chunk(2)))
            relevance[i] += max(0.0, given.item())
    return shares(relevance[4 : 4 + len(text.split())])


@pytest.mark.parametrize("family", ["clip", "metaclip_2"])
def test_words_of_an_end_token(made, family):
    """One prompt at a time; the gradient by what the last attention gives, through hooks on transformers' own modules."""
    model, processor, _ = made(family)
    words = WordExplainer((model, processor), TEXTS, [TEMPLATE])(IMAGE)
    reference, seen = copy.deepcopy(model), {}
    attention = reference.text_model.encoder.layers[-1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(lambda m, a, output, name=name: seen.update({name: output}))
    attention.out_proj.register_forward_pre_hook(lambda m, args: seen.update(mixed=args[0]))
    for image in range(2):
        for index, text in enumerate(TEXTS):
            tokens = processor.tokenizer([prompt(text)], return_tensors="pt")
            embed = reference.get_text_features(**tokens).pooler_output[0]
            (gradient,) = torch.autograd.grad(F.cosine_similarity(embed, IMAGE[image], dim=0), seen["mixed"])
            assert gradient[0, :-1].abs().max() == 0  # the score reads the end token alone
            query, key, value = (seen[name][0].detach() for name in ("q_proj", "k_proj", "v_proj"))
            assert [one.word for one in words[image][index]] == text.split()
            expected = words_of_one_query(query[-1], key, value, gradient[0, -1], text)
            assert [one.score for one in words[image][index]] == pytest.approx(expected, abs=1e-4)


def test_words_of_a_mean_of_tokens(tiny_processor):
    """A tower that averages its tokens reads all queries, the special tokens' too."""
    model = tiny_model()
    words = WordExplainer((model, tiny_processor), TEXTS, [TEMPLATE])(IMAGE)
    reference, seen = copy.deepcopy(model), {}
    attention = reference.text_model.encoder.layer[-1].attention.self
    for name in ("query", "key", "value"):
        getattr(attention, name).register_forward_hook(lambda m, a, output, name=name: seen.update({name: output}))
    attention.register_forward_hook(lambda m, args, output: seen.update(mixed=output[0]))
    for image in range(2):
        for index, text in enumerate(TEXTS):
            embed = reference.get_text_features(**tiny_processor(text=[prompt(text)])).text_embeds[0]
            (gradient,) = torch.autograd.grad(embed @ IMAGE[image], seen["mixed"])
            query, key, value = (seen[name][0].detach() for name in ("query", "key", "value"))
            expected = words_of_all_queries(query, key, value, gradient[0], text)
            assert [one.score for one in words[image][index]] == pytest.approx(expected, abs=1e-4)


def test_words_by_attention_times_its_gradient(made):
    model, processor, _ = made("clip")
    words = WordExplainer((model, processor), TEXTS, [TEMPLATE], "bi_modal")(IMAGE)
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    for image in range(2):
        for index, text in enumerate(TEXTS):
            tokens = processor.tokenizer([prompt(text)], return_tensors="pt")
            outputs = reference.text_model(**tokens, output_attentions=True)
            embed = reference.text_projection(outputs.pooler_output[0])
            weights = outputs.attentions[-1]
            (gradient,) = torch.autograd.grad(F.cosine_similarity(embed, IMAGE[image], dim=0), weights)
            end = (weights * gradient)[0].clamp(min=0).mean(0)[-1]  # the end token's row
            expected = shares(end[4 : 4 + len(text.split())].tolist())
            assert [one.score for one in words[image][index]] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["iclip", "clip", "metaclip_2", "siglip", "siglip2", "tipsv2"])
@pytest.mark.parametrize("method", ["grad_eclip", "bi_modal"])
def test_texts_and_images_do_not_mix(made, family, method):
    """Padding neither; several prompts are averaged before the shares are taken."""
    model, processor, _ = made(family)
    dim = {"siglip": 32, "siglip2": 32, "tipsv2": 32}.get(family, 16)
    embeds = F.normalize(torch.randn(2, dim, generator=torch.Generator().manual_seed(4)), dim=-1)
    together = WordExplainer((model, processor), TEXTS, [TEMPLATE, "{}"], method)(embeds)
    for image in range(2):
        for index, text in enumerate(TEXTS):
            ((alone,),) = WordExplainer((model, processor), [text], [TEMPLATE, "{}"], method)(
                embeds[image : image + 1]
            )
            assert [one.word for one in alone] == text.split()
            assert sum(one.score for one in alone) == pytest.approx(1) or not any(one.score for one in alone)
            assert [one.score for one in alone] == pytest.approx(
                [one.score for one in together[image][index]], abs=1e-4
            )
    assert together[0] != together[1]


class Letters:
    """A token for each letter, marks of the start and the end, and a mark before each word but none at the end."""

    def __call__(self, text, add_special_tokens=True):
        tokens = [ord(letter) for letter in text.replace(" ", "_")]
        return {"input_ids": [1, *tokens, 2] if add_special_tokens else tokens}


def test_tokens_of_words(tiny_processor):
    words = word_tokens(tiny_processor.tokenizer, "a photo of the {} .", "red unheardof ball")
    assert words == (slice(1, 9), [slice(5, 6), slice(6, 7), slice(7, 8)])
    # a_{}s: of "in it", the letters with what stands before the second word
    assert word_tokens(Letters(), "a {}s", "in it") == (slice(1, 9), [slice(2, 5), slice(5, 8)])
    assert word_tokens(Letters(), "{}", "in") == (slice(1, 3), [slice(1, 3)])
    assert word_tokens(Letters(), "{}", " ") == (slice(1, 2), [])


def test_truncated_words_have_no_share(made):
    model, processor, _ = made("clip")
    text = "dog " * 80 + "ball"
    ((words,),) = WordExplainer((model, processor), [text], ["{}"])(IMAGE[:1])
    assert len(words) == 81 and words[-1] == ("ball", 0.0)


# The way to the user


def test_explanations_carry_the_words_of_their_texts(made):
    model, processor, _ = made("iclip")
    texts = [["dog"], ["red ball", "dog", "blue car"], ["blue car"]]
    loaded = load((model, processor))
    before, own = [one.requires_grad for one in model.parameters()], loaded.network.text_model.config
    attention = own._attn_implementation
    with torch.inference_mode():
        explained = explain(loaded, images(), texts, words="grad_eclip")
    assert own._attn_implementation == attention != "iclip_recorded"
    for one, image, labels in zip(explained, images(), texts):
        (alone,) = explain((model, processor), [image], labels, words="grad_eclip")
        for label, scored, again, record in zip(labels, one.words, alone.words, one.to_dict()["texts"], strict=True):
            assert [word for word, _ in scored] == label.split()
            assert [score for _, score in scored] == pytest.approx([score for _, score in again], abs=1e-4)
            assert record["words"] == [{"word": word, "score": round(score, 4)} for word, score in scored]
        assert one.raw_maps.shape == (len(labels), 4, 4)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    (plain,) = explain((model, processor), images()[:1], LABELS)
    assert plain.words is None and all("words" not in record for record in plain.to_dict()["texts"])


def test_what_is_refused(made):
    model, tokenizer, _ = made("open_clip")
    with pytest.raises(ValueError, match="Word scores"):
        WordExplainer((model, tokenizer), LABELS)
