"""
Fits the logistic regressions of presence.py to the embedded model, on photographs with complete labels, and measures them on others.

    python benchmarks/presence.py --data-root DATA

`DATA/coco80` has 261 photographs of COCO in webdataset shards, whose `json` lists all COCO classes shown (`labels`). The constants are fitted on
these. The table is of `coco100` and `ade20k`, images at odd positions and all: AUC of the presence and of its parts, and shares kept and passed.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from measuring import command_line
from measuring import table as markdown
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from iclip_hf import load
from iclip_hf.data import load_segmentation
from iclip_hf.data.class_names import ADE20K, COCO_THINGS
from iclip_hf.model.modeling_iclip import cosines
from iclip_hf.model.presence import MIN_PRESENCE, PRESENT, at_prior, patch_evidence


def labelled(folder: Path) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """Yields the images of shards and whether they show each class of COCO, (80,) boolean."""
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as files:
            parts = {member.name: files.extractfile(member).read() for member in files}
        for name in sorted(name for name in parts if name.endswith(".json")):
            image = Image.open(io.BytesIO(parts[name.replace(".json", ".jpg")])).convert("RGB")
            yield image, np.isin(COCO_THINGS, json.loads(parts[name])["labels"])


def masked(dataset) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """Yields the images of a segmentation data set and whether they show each class, (K,) boolean."""
    for sample in dataset:
        yield sample.image, np.isin(dataset.labels, sample.labels)


@torch.no_grad()
def measure(model, images: Iterable[tuple[Image.Image, np.ndarray]], names: tuple[str, ...]):
    """Returns the rank and the evidence of the patches (images, K, 2), see `presence.presence`, and what is shown (images, K)."""
    templates = ["a photo of the {}"]
    texts, nouns = model.encode_texts(names, templates), model.references(templates)
    numbers, shown, images = [], [], iter(images)
    while batch := list(islice(images, 16)):
        pictures, truth = zip(*batch)
        image = model.get_image_features(model.processor(images=list(pictures))["pixel_values"])
        std, mean = torch.std_mean(cosines(image.image_embeds, nouns.text_embeds), dim=-1, keepdim=True)
        rank = (cosines(image.image_embeds, texts.text_embeds) - mean) / std
        evidence = patch_evidence(image.patch_embeds, texts.map_text_embeds, nouns.map_text_embeds)
        numbers.append(torch.stack([rank, evidence], -1).numpy())
        shown += truth
    return np.concatenate(numbers), np.array(shown)


def fit(numbers: np.ndarray, shown: np.ndarray) -> LogisticRegression:
    """Fits the probability that a pair is shown, at even odds."""
    found = LogisticRegression(C=1e3).fit(numbers.reshape(-1, numbers.shape[-1]), shown.ravel())
    found.intercept_ -= np.log(shown.mean() / (1 - shown.mean()))
    return found


def main():
    parser = command_line(__doc__)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of coco80, coco100 and ade20k")
    parser.add_argument("--model", default="embedded", help="as for load")
    options = parser.parse_args()
    model, root = load(options.model), options.data_root

    numbers, shown = measure(model, labelled(root / "coco80"), COCO_THINGS)
    both, alone = fit(numbers, shown), fit(numbers[..., :1], shown)
    for name, found in (("RANK_AND_PATCHES", both), ("RANK_ALONE", alone)):
        print(name, "=", tuple(round(float(value), 3) for value in (*found.coef_[0], found.intercept_[0])))
    print()
    coco = load_segmentation("coco2017", root / "coco100", "train2017")
    ade20k = load_segmentation("ade20k", root / "ade20k")
    rows, bins = [], []
    for title, dataset, names in (("coco100", coco, COCO_THINGS), ("ade20k", ade20k, ADE20K)):
        numbers, shown = measure(model, masked(dataset), names)
        for images, part in (("all", slice(None)), ("odd", slice(1, None, 2))):
            values, truth = numbers[part], shown[part]
            presence = both.predict_proba(values.reshape(-1, 2))[:, 1].reshape(truth.shape)
            auc = [roc_auc_score(truth.ravel(), of.ravel()) for of in (values[..., 0], values[..., 1], presence)]
            shares = [100 * (presence[of] >= at).mean() for at in (MIN_PRESENCE, PRESENT) for of in (truth, ~truth)]
            rows.append([title, images, *(f"{value:.3f}" for value in auc), *(f"{value:.1f}" for value in shares)])
            calibrated = at_prior(presence, truth.mean())
            edges = [0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.001]
            inside = [(low <= calibrated) & (calibrated < high) for low, high in pairwise(edges)]
            cells = [f"{calibrated[of].mean():.2f} / {truth[of].mean():.2f} ({of.sum()})" for of in inside]
            bins.append([title, images, f"{truth.mean():.3f}", *cells])
    headings = ["AUC of the rank", "of the patches", "of the presence", "kept", "passed", "kept, present", "passed"]
    print(markdown(["data", "images", *headings], rows))
    print()
    print(markdown(["data", "images", "prior", *(f"from {low}" for low in edges[:-1])], bins))


if __name__ == "__main__":
    main()
