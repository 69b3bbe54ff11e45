"""Conversion of DINO's original checkpoints to `ViTModel`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import ViTConfig, ViTModel


# Patterns of names in DINO's checkpoints, and the names in checkpoints of `ViTModel`.
_DINO_NAMES = {
    r"cls_token": "embeddings.cls_token",
    r"pos_embed": "embeddings.position_embeddings",
    r"patch_embed\.proj\.(\w+)": r"embeddings.patch_embeddings.projection.\1",
    r"blocks\.(\d+)\.norm1\.(\w+)": r"encoder.layer.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.norm2\.(\w+)": r"encoder.layer.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.attn\.proj\.(\w+)": r"encoder.layer.\1.attention.output.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc1\.(\w+)": r"encoder.layer.\1.intermediate.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(\w+)": r"encoder.layer.\1.output.dense.\2",
    r"norm\.(\w+)": r"layernorm.\1",
}


def load_dino_checkpoint(path: str | Path, config: ViTConfig) -> ViTModel:
    """
    Loads DINO's ViT from an original checkpoint: the backbone alone, or the teacher of a whole training state.

    Code in the file is not executed, and the projection head is left out. `config.layer_norm_eps` is set to 1e-6, the value of
    DINO's training.

    Raises:
        `ValueError`: the file contains no ViT of the shape of `config`.
        `FileNotFoundError`: the file does not exist.
    """
    if config.model_type != "vit":
        raise ValueError(
            f"{path}: expected a configuration of model_type vit, got {config.model_type}; choose one that fits DINO's checkpoint."
        )
    weights = _convert_dino(_read_state_dict(path))
    config.layer_norm_eps = 1e-6
    model, loading = ViTModel.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        add_pooling_layer=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    if wrong:
        few = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items())
        raise ValueError(
            f"{path}: expected a ViT of this configuration, got {few}; name another checkpoint or configuration."
        )
    return model


def _read_state_dict(path: str | Path) -> Mapping[str, torch.Tensor]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a DINO checkpoint, but there is no such file; check the path.")
    try:
        # A training state also contains the parsed command line, a namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of unpickling, of the zip archive, or of reading
        raise ValueError(f"{path}: expected a file of weights alone, but got: {error}; download it again.") from error
    for key in ("teacher", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    return state if isinstance(state, Mapping) else {}


def _convert_dino(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in state.items():
        name = re.sub(r"^(module\.|teacher\.|backbone\.)+", "", name)
        if qkv := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name):
            for part, third in zip(("query", "key", "value"), tensor.chunk(3)):
                weights[f"encoder.layer.{qkv[1]}.attention.attention.{part}.{qkv[2]}"] = third
            continue
        if name.startswith("head."):
            continue
        for pattern, replacement in _DINO_NAMES.items():
            name = re.sub(rf"\A{pattern}\Z", replacement, name)
        weights[name] = tensor
    return weights
