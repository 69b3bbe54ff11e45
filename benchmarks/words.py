"""Measures what explanations of words are worth, on photographs that show two things of one word each.

    python benchmarks/words.py coco2017:DATA/coco100:train2017

The sentence is "a dog and a bicycle", taken as it is, with the largest two things. Maps are not refined. The first
table has the share of maps that are higher on the mask of their thing than on the mask of the other thing, and the
share of maps of "and" that are higher on the first. The second table has the mean score of the sentence over all steps
of a deletion of its words: those with the highest weight first, or the lowest. The weights are

- leaving one out, as in `explain(words=True)`: what the sentence loses without the word;
- the word alone: the score of the text that has this word only, minus the score of "a";
- Shapley values: the mean of what the word adds to the words before it, over all orders of the words;
- second order: the attribution of Möller et al. before the first layer of the text tower, or before the last. The
  reference has padding in place of the words;
- relevance: that of Chefer et al. for tokens of the text, from the last layer or from all. It has no maps.

A map of a word is the same difference of the maps, or what the word adds to the cosines of the patches.
"""

from itertools import permutations

import numpy as np
import torch
from measuring import command_line, table
from second_order import token_contributions

from iclip_hf import load
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.model.engine import Engine
from iclip_hf.model.similarity import cosine_similarity_map


SENTENCE = ("a", None, "and", "a", None)
THINGS = (1, 4)  # positions of the things in the sentence
ORDERS = [*permutations(range(len(SENTENCE)))]
MIN_AREA = 0.02  # of a thing, as a share of the image
EMPTY = "a"  # stands for the text without words, because no text is empty


def two_things(dataset):
    """Yields images, the names of the two largest things that an image shows, and their masks."""
    names = dict(zip(dataset.class_ids, dataset.class_names))
    for sample in dataset:
        masks = {names[class_id]: sample.mask(class_id) == class_id for class_id in sample.class_ids}
        large = [name for name, mask in masks.items() if " " not in name and mask.mean() > MIN_AREA]
        large = sorted(large, key=lambda name: -masks[name].sum())[:2]
        if len(large) == 2:
            yield sample.image, large, [masks[name] for name in large]


def subset_texts(words):
    """Returns the text of each subset of the words, by the tuple of their positions."""
    positions = range(len(words))
    subsets = [tuple(i for i in positions if bits >> i & 1) for bits in range(2 ** len(words))]
    return {subset: " ".join(words[i] for i in subset) or EMPTY for subset in subsets}


def contributions(values):
    """Returns, for each way to weigh words, the share of each word in values by subset: scores or maps."""
    positions = range(len(SENTENCE))
    whole, empty = values[tuple(positions)], values[()]
    left_out = [whole - values[tuple(i for i in positions if i != left)] for left in positions]
    alone = [values[i,] - empty for i in positions]
    shapley = [0.0] * len(SENTENCE)
    for order in ORDERS:
        for rank, word in enumerate(order):
            before = tuple(sorted(order[:rank]))
            shapley[word] = shapley[word] + (values[tuple(sorted((*before, word)))] - values[before]) / len(ORDERS)
    return {"leaving one out": left_out, "the word alone": alone, "Shapley values": shapley}


class TextTower:
    """Attributions from inside the text tower of an ICLIP model, for one sentence at a time."""

    def __init__(self, model):
        self.network, self.tokenizer = model.network, model.processor.tokenizer
        self.network.text_model.requires_grad_().set_attn_implementation("eager")  # returns attention
        self.layers = self.network.text_model.encoder.layer

    def tokenize(self, words):
        """Returns the token ids of words and, for each word, which of them are its own, `(W, L)`."""
        encoding = self.tokenizer(words, is_split_into_words=True, return_tensors="pt")
        owners = encoding.word_ids()
        return encoding["input_ids"], torch.tensor([[owner == word for owner in owners] for word in range(len(words))])

    def second_order(self, features, words, layer):
        """Returns the weight and the map of each word."""
        ids, owned = self.tokenize(words)

        def compare(ids):
            text = self.network.get_text_features(ids)
            cosines = cosine_similarity_map(features.map_embeds, text.map_text_embeds)[0]
            return torch.cat([self.network.scores(features, text).T, cosines.flatten(1)], -1)

        reference = ids.masked_fill(owned.any(0), self.tokenizer.pad_token_id)
        values = owned.float() @ token_contributions(compare, self.layers[layer], ids, reference)
        return values[:, 0].numpy(), values[:, 1:].unflatten(1, features.map_embeds.shape[1:3]).double()

    def relevance(self, features, words, layers):
        """Returns the weight of each word."""
        ids, owned = self.tokenize(words)
        text = self.network.get_text_features(ids, output_attentions=True)
        score = self.network.scores(features, text)[0, 0]
        attentions = text.attentions[layers]
        itself = relevance = torch.eye(ids.shape[-1])
        for attention, gradient in zip(attentions, torch.autograd.grad(score, attentions)):
            relevance = relevance + (attention * gradient)[0].relu().mean(0) @ relevance
        # The tower averages its tokens. Each token's relevance for itself would count the pieces of a word.
        return (owned.float() @ (relevance - itself).mean(0)).detach().numpy()


def deletion(scores, weights, descending):
    """Returns the mean score of a sentence whose words are deleted by their weights."""
    order = np.argsort(weights)[::-1] if descending else np.argsort(weights)
    return np.mean([scores[tuple(sorted(order[deleted:]))] for deleted in range(len(order) + 1)])


def measure(dataset):
    model = load("embedded")
    engine, tower = Engine(model, model.processor, templates=["{}"]), TextTower(model)
    hits, controls, curves = {}, {}, {"random order": []}
    for image, names, masks in two_things(dataset):
        words = [*SENTENCE]
        for position, name in zip(THINGS, names):
            words[position] = name
        subsets = subset_texts(words)
        (image,) = engine.encode_images([engine.prepare(image)])
        (explanation,) = engine.run([image], [*subsets.values()])
        scores = dict(zip(subsets, explanation.scores.double().numpy()))
        size = explanation.raw_maps.shape[-2:]
        raw_maps = dict(zip(subsets, explanation.raw_maps.double()))
        shares = [torch.from_numpy(mask).double()[None, None] for mask in masks]
        shares = [torch.nn.functional.interpolate(share, size, mode="area")[0, 0] for share in shares]
        weights, word_maps = contributions(scores), contributions(raw_maps)
        (features,) = image.features
        for name, layer in (("first", 0), ("last", -1)):
            name = f"second order, before the {name} layer"
            weights[name], word_maps[name] = tower.second_order(features, words, layer)
        for name, layers in (("the last layer", slice(-1, None)), ("all layers", slice(None))):
            weights[f"relevance, {name}"] = tower.relevance(features, words, layers)
        for method, maps in word_maps.items():
            first, second = ([(maps[i] * share).sum() / share.sum() for i in range(len(words))] for share in shares)
            hits.setdefault(method, []).extend([first[1] > second[1], second[4] > first[4]])
            controls.setdefault(method, []).append(first[2] > second[2])
        for method, values in weights.items():
            ways = [deletion(scores, values, descending) for descending in (True, False)]
            curves.setdefault(method, []).append(ways)
        curves["random order"].append([np.mean([deletion(scores, np.array(order), True) for order in ORDERS])])
    print(f"{len(controls['leaving one out'])} photographs\n")
    percent = {method: [100 * np.mean(shares) for shares in (hits[method], controls[method])] for method in hits}
    rows = [[method, f"{hit:.1f}", f"{control:.1f}"] for method, (hit, control) in percent.items()]
    print(table(["map", "of a thing, on its own mask %", 'of "and", on the first thing %'], rows), end="\n\n")
    means = {method: np.mean(values, 0) for method, values in curves.items()}
    rows = [[method, f"{values[0]:.3f}", f"{values[-1]:.3f}"] for method, values in means.items()]
    print(table(["weights", "highest first", "lowest first"], rows))


def main():
    parser = command_line(__doc__)
    parser.add_argument("data", metavar="NAME:FOLDER[:SPLIT]", help="data set of load_segmentation")
    measure(load_segmentation(*parser.parse_args().data.split(":")))


if __name__ == "__main__":
    main()
