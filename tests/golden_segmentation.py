"""A tiny CLIP, a photograph and texts, generated from seeds whose stream numpy has frozen."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel


# Class of each text, -1 for the background: synonyms, and a text of the background that is a class, too.
CLASSES = (-1, -1, -1, 0, 0, 1, 2, 3, 4, 5)


def clip(seed: int) -> CLIPModel:
    """Patches of 8 pixels, and 64 pixels as its own size."""
    sides = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "hidden_act": "quick_gelu"}
    vision = {**sides, "num_hidden_layers": 3, "patch_size": 8, "image_size": 64}
    text = {**sides, "num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 16}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).eval()
    draw = np.random.RandomState(seed).standard_normal
    parameters = dict(model.vision_model.named_parameters()) | {"projection": model.visual_projection.weight}
    for name in sorted(parameters):
        values, parameter = draw(parameters[name].shape), parameters[name]
        scale = 0.2 if parameter.ndim == 1 else 1.5 * parameter[0].numel() ** -0.5
        mean = 1 if parameter.ndim == 1 and name.endswith("weight") else 0  # of a norm
        parameter.data = torch.tensor(mean + scale * values, dtype=torch.float32)
    return model


def photograph() -> Image.Image:
    """120 x 170 pixels (height x width): smooth colours, an edge, and noise."""
    y, x = np.mgrid[0:120, 0:170] / 100
    smooth = np.stack([np.sin(7 * x + 3 * y), np.cos(9 * y - 2 * x), np.sin(5 * x * y + 1)], -1)
    smooth[(x - 0.9) ** 2 + (y - 0.6) ** 2 < 0.12] *= -1
    noise = np.random.RandomState(1).standard_normal((120, 170, 3))
    return Image.fromarray((128 + 70 * smooth + 15 * noise).clip(0, 255).astype(np.uint8))


def text_features(seed: int) -> torch.Tensor:
    """Unit vectors `(T, 16)`; that of the third text of the background is also that of the second class."""
    features = torch.tensor(np.random.RandomState(seed + 1).standard_normal((len(CLASSES), 16)), dtype=torch.float32)
    features[5] = features[2]
    return F.normalize(features, dim=-1)
