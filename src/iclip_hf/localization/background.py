"""Features of the general nouns that presence is estimated on, cached on disk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..modeling_iclip import ICLIPModel, ICLIPTextFeatures
from ..models.explainable import ExplainableModel
from ..models.identity import configuration_digest, digest, software
from ..presence import BACKGROUND
from ..utils.digests import weights_digest
from ..utils.files import cache_folder, keep_in_cache


def encode_background(model: ExplainableModel, templates: Sequence[str]) -> ICLIPTextFeatures:
    """
    Encodes [`BACKGROUND`]. For an [`ICLIPModel`] on the CPU, the features are cached on disk, in a file for each model name and
    templates. A digest of the weights shows whether the file is valid; it takes a fifth of the text tower's time for one template.
    """
    network = model.network
    if not isinstance(network, ICLIPModel) or network.text_model.device.type != "cpu":  # another device, or offloaded
        return model.encode_texts(BACKGROUND, templates)
    path = cache_folder() / "nouns" / f"{digest([network.config._name_or_path, *templates])}.safetensors"
    fingerprint = _fingerprint(model, templates)
    try:
        with safe_open(path, "pt") as file:
            if file.metadata() == fingerprint:
                return ICLIPTextFeatures(**{name: file.get_tensor(name) for name in file.keys()})
    except (OSError, SafetensorError):  # absent or damaged
        pass
    features = model.encode_texts(BACKGROUND, templates)
    tensors = {name: features[name] for name in ("text_embeds", "map_text_embeds")}
    keep_in_cache(path, lambda partial: save_file(tensors, partial, fingerprint))
    return features


def _fingerprint(model: ExplainableModel, templates: Sequence[str]) -> dict[str, str]:
    """Returns everything that the features depend on: token ids, the text side of the model, and versions."""
    network, prompts = model.network, model.processor(labels=BACKGROUND, templates=templates)
    return {
        "tokens": digest({name: torch.as_tensor(value).tolist() for name, value in prompts.items()}),
        "weights": weights_digest(nn.ModuleList([network.text_model, network.recognition, network.map_branch])),
        "configuration": configuration_digest(network.config),
        "software": software(),
    }
