"""
Models that explain. This module checks their names without torch, so that the help of a command does not load torch.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path

from ..utils.errors import loading_errors
from ..utils.published import is_hub_id


# Models of transformers that explain: the class in `families.py` by the `model_type` of config.json.
MODEL_TYPES = {
    "iclip": "ExplainableICLIP",
    "clip": "ExplainableCLIP",
    "metaclip_2": "ExplainableCLIP",
    "siglip": "ExplainableSiglip",
    "siglip2": "ExplainableSiglip2",
    "tipsv2": "ExplainableTipsv2",
    "aimv2": "ExplainableAimv2",
    "altclip": "ExplainableCLIP",
    "chinese_clip": "ExplainableCLIP",
    "vision-text-dual-encoder": "ExplainableDualEncoder",
}
# Why other models of images and texts cannot be explained: by `model_type`, or "timm" and the image tower's class.
REFUSED = {
    "align": "its image tower, EfficientNet, has neither a class token nor attention",
    "blip": "the checkpoints of BLIP lack the projections of BlipModel",
    "clipseg": "its decoder makes the masks; load the CLIP ViT-B/16 that it contains, openai/clip-vit-base-patch16",
    "flava": "FlavaModel has no score of image and text",
    "groupvit": "its tower joins patches to groups, so that no patch is left at the end",
    "owlv2": "it was trained for boxes, without the head whose score would be explained",
    "owlvit": "it was trained for boxes, without the head whose score would be explained",
    "timm SwinTransformer": "its attention is limited to windows, and the image is pooled without attention",
}
OPEN_CLIP = "open_clip:"  # begins the name of a model of open_clip
DTYPES = ("float32", "bfloat16", "float16")


def check_model_name(name: str, types: Collection[str] = MODEL_TYPES) -> str:
    """
    Checks and returns the name of a model: `"embedded"`, a folder, a Hub id, or "open_clip:" and a name of open_clip.
    Only loading checks that a name of the Hub or of open_clip exists. Raises `OSError` for any other name, and
    `OSError` or `ValueError` for a folder without a readable config.json, or with a model whose type is not one of
    `types`.
    """
    is_open_clip = name.startswith(OPEN_CLIP) and types is MODEL_TYPES
    if name == "embedded" or is_hub_id(name) or is_open_clip:
        return name
    if not os.path.exists(name):
        raise FileNotFoundError(f'{name}: this is no folder, no Hub id (org/name) and not "embedded"; check the name.')
    with loading_errors(name):
        content = json.loads(Path(name, "config.json").read_text(encoding="utf-8"))
        check_model_type(name, content.get("model_type"), types)
    return name


def check_model_type(name: str | Path, model_type: str | None, types: Collection[str]) -> None:
    """Raises `ValueError` unless the type of a model is one of `types`."""
    if model_type not in types:
        reason = f": {REFUSED[model_type]}" if model_type in REFUSED else "; join towers by `iclip init` first"
        raise ValueError(
            f"{name}: expected a model of type {', '.join(types)}, but got one of type {model_type}{reason}."
        )
