"""
The identity of a model: digests of everything that its numbers depend on. Caches, cards, results and runs compare it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib.metadata import version

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..model.configuration_iclip import LOSS_OPTIONS
from ..utils.digests import content_digest
from . import DTYPES


# Options that only training reads. The weights hold what it made of them.
TRAINING_OPTIONS = (*LOSS_OPTIONS, "map_tokens", "lock_vision", "logit_scale_init_value")
# Options that change no number: these, the place of the files, the code that wrote or loads them, and the dtype of the
# files (the loaded weights have a dtype of their own, which counts).
_WITHOUT_EFFECT = {"_name_or_path", "architectures", "auto_map", "custom_pipelines", "processor_class"}
_WITHOUT_EFFECT |= {"transformers_version", "dtype", "torch_dtype", *TRAINING_OPTIONS}
# The classes of configurations and image processors, which count although they are the defaults of themselves.
_KINDS = ("model_type", "image_processor_type")
# What transformers adds to a tokenizer of the tokenizers library.
_TOKENIZER_OPTIONS = ("model_input_names", "padding_side", "special_tokens_map", "truncation_side")
# Of other tokenizers: what they have met, and the place of their files.
_TOKENIZER_STATE = ("cache", "init_kwargs", "merges_file", "name_or_path", "vocab_file")


def identity(model, processor, dtype: str | None = None) -> dict[str, str]:
    """
    Describes a model. Two models with equal descriptions, apart from `model`, compute the same up to rounding, which
    also depends on the software, the device, the number of threads and the size of batches. Reads all weights, 100 MB
    in 0.1 s.

    Args:
        model, processor: a pair for [`load`].
        dtype (`str`, *optional*): weights are rounded to it first, as if the model were loaded in it.

    Returns:
        `dict` with `model`, a name, which may be that of its folder; and what counts: `configuration`, `weights`,
        `dtype`, `processor` (options and image processor) and `tokenizer`.
    """
    if isinstance(model, torch.nn.Module):
        rounded = getattr(torch, dtype) if dtype in DTYPES else None
        used, weights = rounded or next(model.parameters()).dtype, weights_digest(model, rounded)
    else:  # ONNX, any of whose files can hold weights, but for what the other parts describe
        files = [file for file in model.folder.rglob("*") if file.is_file() and file.suffix not in (".json", ".md")]
        hidden = {file for file in files if "/." in f"/{file.relative_to(model.folder).as_posix()}"}
        used, weights = model.dtype, content_digest(sorted({*files} - hidden), model.folder)
    config = getattr(model, "config", None)
    if config is None:  # of open_clip
        layers = {name: _plain_options(layer) for name, layer in model.named_modules()}
        configuration = digest([str(model), model.visual.preprocess_cfg, model.visual.image_size, layers])
    else:
        configuration = configuration_digest(config)
    options, tokenizer = {}, processor
    if images := getattr(processor, "image_processor", None):
        options, tokenizer = processor.to_dict() | {"image_processor": _options(images)}, processor.tokenizer
    return {
        "model": getattr(config, "_name_or_path", "") or type(model).__name__,
        "configuration": configuration,
        "weights": weights,
        "dtype": str(used).removeprefix("torch."),
        "processor": digest({name: value for name, value in options.items() if name not in _WITHOUT_EFFECT}),
        "tokenizer": tokenizer_digest(tokenizer),
    }


def changed(then: Mapping, now: Mapping) -> list[str]:
    """Returns the names of the entries that differ, sorted. `model`, the name, does not count."""
    compared = {**then, **now}.keys() - {"model"}
    return sorted(name for name in compared if then.get(name) != now.get(name))


def changed_model(described: Mapping, model, processor, start: Mapping | None = None) -> list[str]:
    """
    Returns the parts of the identity in which a model differs from the one that results or a card describe. The
    described dtype may be lower than the model's, whose weights are rounded to it. A model in a lower dtype than the
    described one differs in its weights. `start` is the identity that the model had, if it was trained since.
    """
    now = start or identity(model, processor, described.get("dtype"))
    parts = ("configuration", "processor", "tokenizer", "weights")
    return [part for part in parts if described.get(part) != now[part]]


def configuration_digest(config: PreTrainedConfig) -> str:
    """Returns 16 hex digits over the options of a configuration, and of those within it, that can change a number."""
    return digest(_options(config))


def weights_digest(model: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """
    Returns 32 hex digits over names, shapes and values of weights, of which floating-point ones are first rounded to
    `dtype`.
    """
    result, weights = hashlib.sha256(), model.state_dict()
    if any(weight.is_meta for weight in weights.values()):  # offloaded by Accelerate, which is then installed
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        weights = get_state_dict_offloaded_model(model)
    for name, weight in sorted(weights.items()):
        weight = weight.to(dtype) if dtype is not None and weight.is_floating_point() else weight
        result.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        result.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return result.hexdigest()[:32]


def tower_digest(tower: PreTrainedModel) -> str:
    """Returns 16 hex digits over the weights and the configuration of a tower."""
    return digest([configuration_digest(tower.config), weights_digest(tower)])


def tokenizer_digest(tokenizer) -> str:
    """Returns 16 hex digits over vocabulary, rules and special tokens of a tokenizer."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        rules = json.loads(backend.to_str())
        for of_last_call in ("truncation", "padding"):
            rules.pop(of_last_call, None)
        return digest([rules, {name: getattr(tokenizer, name) for name in _TOKENIZER_OPTIONS}])
    parts = {name: part for name, part in vars(tokenizer).items() if name not in _TOKENIZER_STATE}
    # Keys of JSON are texts, but those of the merges are pairs.
    return digest({name: [*part.items()] if isinstance(part, dict) else part for name, part in parts.items()})


def software() -> str:
    """
    Returns the version of the mathematics: this package's release, and the minor releases of torch and Transformers.
    Their patch releases repair faults, and their builds differ in the device.
    """
    libraries = (f"{name} {'.'.join(version(name).split('.')[:2])}" for name in ("torch", "transformers"))
    return ", ".join([f"iclip-hf {version('iclip-hf')}", *libraries])


def digest(value) -> str:
    """Returns 16 hex digits over a value as canonical JSON. The order of mappings does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()[:16]


def _options(part) -> dict:
    """
    Returns the options of a configuration or image processor, and of configurations within it, that differ from the
    defaults of its class. So a new version of Transformers, which adds options, does not make another model.
    """
    usual, options = type(part)().to_dict(), {}
    for name, value in part.to_dict().items():
        within = getattr(part, name, None)
        if isinstance(within, PreTrainedConfig):
            options[name] = _options(within)
        elif name in _KINDS or (value != usual.get(name) and name not in _WITHOUT_EFFECT):
            options[name] = value
    return options


def _plain_options(layer: torch.nn.Module) -> dict:
    """
    Returns the options of a layer without a configuration, such as the number of heads, which `str(model)` lacks.
    """
    options = {name: value for name, value in vars(layer).items() if isinstance(value, (bool, int, float, str))}
    return {name: value for name, value in options.items() if not name.startswith("_") and name != "training"}


def _plain(value):
    """Converts a value to what JSON has."""
    if hasattr(value, "backend_tokenizer"):  # within a tokenizer of open_clip
        return tokenizer_digest(value)
    if hasattr(value, "serialized_model_proto"):  # of sentencepiece
        return hashlib.sha256(value.serialized_model_proto()).hexdigest()
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return re.sub(r" at 0x\w+", "", str(value))  # functions and objects without a value
