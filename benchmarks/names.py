"""
Measures what a model names photographs that each show one thing: whether its best text is a label of the photograph,
among the first labels of all photographs, and whether the nearest other photograph by the image's vector shows the
same.

    python benchmarks/names.py DATA/imagenet_nips17

The folder has webdataset shards, whose `json` has `labels`.
"""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from measuring import command_line, shard_items
from measuring import table as markdown
from PIL import Image
from tqdm import tqdm

from iclip_hf import load


TEMPLATES = ["a photo of the {}"]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, help="folder of the shards")
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
    embeds, best = torch.cat(embeds), torch.cat(scores).topk(5).indices.tolist()
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
    print(markdown(("", "photographs", "%"), rows))


if __name__ == "__main__":
    main()
