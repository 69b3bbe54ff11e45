"""Word scores: which words of a text made an image match it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ..backends.families import TransformersModel
from ..backends.loading import load
from ..backends.recording import AttentionRecord
from ..model.explanation import WordScore
from ..model.modeling_iclip import cosines
from ..model.prompts import check_templates
from .bi_modal import attention_relevance
from .grad_eclip import all_queries_relevance, one_query_relevance


WORD_METHODS = ("grad_eclip", "bi_modal")


class WordExplainer:
    """
    Scores the words of fixed texts for any number of images, by the gradient of the cosine of image and text in the last
    attention layer of the text tower.

    In a tower that pools by its end token, this token is the query. In a tower that averages its tokens, all tokens are queries. The
    relevance of a word is the sum over its tokens, averaged over the prompts.

    Args:
        model ([`TransformersModel`]): or anything that [`load`] takes and that is a PyTorch model of transformers.
        texts: T labels or phrases, whose words are separated by spaces.
        templates: prompts with one `{}` each; the processor's if not given. Words of the prompts get no score.
        method (`str`): [`GradECLIP`] (`"grad_eclip"`) or [`BiModal`] (`"bi_modal"`).

    Raises:
        `ValueError`: the method is another, or the model is not of transformers.
    """

    def __init__(
        self, model, texts: Sequence[str], templates: Sequence[str] | None = None, method: str = "grad_eclip"
    ):
        if method not in WORD_METHODS:
            raise ValueError(f"The method of word scores is one of {list(WORD_METHODS)}, not {method!r}.")
        self.method = method
        self.model = load(model)
        if not isinstance(self.model, TransformersModel):
            raise ValueError(
                f"Word scores need a text tower of transformers, which {type(self.model.network).__name__} lacks."
            )
        self.texts = list(texts)
        templates = check_templates(self.model.templates if templates is None else templates)
        # With a graph from the last attention layer on: M prompts of L tokens and W words.
        self._features, self._layer = self.model.trace_texts(self.texts, templates)
        tokenizer, length = self.model.processor.tokenizer, self._layer.key.shape[2]
        places = [word_tokens(tokenizer, template, text) for text in self.texts for template in templates]
        known = torch.zeros(len(places), length, dtype=torch.bool)  # tokens of the prompt
        members = torch.zeros(len(places), max(len(words) for _, words in places), length)  # 1 for tokens of a word
        for row, (prompt, words) in enumerate(places):
            known[row, prompt] = True
            for index, word in enumerate(words):
                members[row, index, word] = 1
        self._known, self._members = known.to(self.model.device), members.to(self.model.device)

    def __call__(self, image_embeds: torch.Tensor) -> list[list[list[WordScore]]]:
        """
        Scores the words for images, unit vectors `(B, P)` of the recognition branch. Returns B lists of T lists of [`WordScore`], in the
        order of the words. The scores of a text's words sum to 1, or are all 0 if no word has a positive relevance.
        """
        # A clone, because a tensor that was created in inference mode cannot be part of a graph.
        with torch.inference_mode(False):
            embeds = image_embeds.clone()
        return [
            [list(map(WordScore, text.split(), shares)) for text, shares in zip(self.texts, self._shares(embed))]
            for embed in embeds.split(1)
        ]

    def _shares(self, image_embed: torch.Tensor) -> list[list[float]]:
        """Computes the share of each word in its text, `(T, W)`."""
        layer = self._layer
        tensor = layer.weights if self.method == "bi_modal" else layer.mixed
        with torch.inference_mode(False), torch.enable_grad():
            # Texts are independent, so the gradient of their sum contains the gradient of each.
            score = cosines(image_embed, self._features.text_embeds).sum()
            (gradient,) = torch.autograd.grad(score, tensor, retain_graph=True)
        with torch.no_grad():
            words = (self._members @ self._relevance(layer, gradient).unsqueeze(-1)).squeeze(-1)  # (M, W)
            words = words.unflatten(0, (len(self.texts), -1)).mean(1)
            total = words.sum(-1, keepdim=True)
            return (words / total.masked_fill(total == 0, 1)).tolist()

    def _relevance(self, layer: AttentionRecord, gradient: torch.Tensor) -> torch.Tensor:
        """Computes the relevance of all tokens, `(M, L)`."""
        if self.method == "bi_modal":
            return attention_relevance(layer.weights, gradient).sum(1)
        read = gradient.abs().amax((1, 3))  # (M, L), exactly 0 at tokens that the score does not depend on
        if ((read > 0).sum(1) > 1).any():
            return all_queries_relevance(layer.weights, layer.value, gradient)
        end = read.argmax(1)[:, None, None, None].expand(-1, gradient.shape[1], 1, gradient.shape[3])
        query, gradient = (heads.gather(2, end) for heads in (layer.query, gradient))
        return one_query_relevance(query, layer.key, layer.value, gradient, self._known)


def word_tokens(tokenizer, template: str, text: str) -> tuple[slice, list[slice]]:
    """
    Finds the tokens of a prompt, which is the template with the text, and those of each word of the text.

    The tokens of a word are found by the number of tokens before its start and before its end. This works with any tokenizer that
    does not join words.
    """
    start = template.index("{}")
    prompt = template.replace("{}", text)

    def tokens(characters: str, special: bool = False) -> list[int]:
        return tokenizer(characters, add_special_tokens=special)["input_ids"] if characters else []

    whole, bare = tokens(prompt, special=True), tokens(prompt)
    first = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)  # after the special ones
    words = []
    for word in re.finditer(r"\S+", text):
        before = len(tokens(prompt[: start + word.start()].rstrip()))
        words.append(slice(first + before, first + len(tokens(prompt[: start + word.end()]))))
    return slice(first, first + len(bare)), words
