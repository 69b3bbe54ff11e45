"""The file cache of a model's reference nouns, so that a command need not encode them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..model.modeling_iclip import ICLIPModel, ICLIPTextFeatures
from ..model.processing_iclip import ICLIPProcessor
from ..utils.files import cache_folder, keep_in_cache
from .identity import configuration_digest, digest, software, weights_digest


def kept_on_disk(
    model: ICLIPModel,
    processor: ICLIPProcessor,
    templates: Sequence[str],
    encode: Callable[[Sequence[str]], ICLIPTextFeatures],
    labels: Sequence[str],
) -> ICLIPTextFeatures:
    """
    Returns the features of labels by `encode`, or from a file, one for each model name and templates. The file is valid for these token
    ids, weights of the text side, options and versions.
    """
    path = cache_folder() / "nouns" / f"{digest([model.config._name_or_path, *templates])}.safetensors"
    prompts = processor(labels=labels, templates=templates)
    fingerprint = {
        "tokens": digest({name: torch.as_tensor(value).tolist() for name, value in prompts.items()}),
        "weights": weights_digest(nn.ModuleList([model.text_model, model.recognition, model.map_branch])),
        "configuration": configuration_digest(model.config),
        "software": software(),
    }
    try:
        with safe_open(path, "pt") as file:
            if file.metadata() == fingerprint:
                return ICLIPTextFeatures(**{name: file.get_tensor(name) for name in file.keys()})
    except (OSError, SafetensorError):  # absent or damaged
        pass
    features = encode(labels)
    tensors = {name: features[name] for name in ("text_embeds", "map_text_embeds")}
    keep_in_cache(path, lambda partial: save_file(tensors, partial, fingerprint))
    return features
