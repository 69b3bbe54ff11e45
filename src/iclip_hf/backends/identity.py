"""The identity of a model: digests of weights, configuration and processor, which cards, results and runs compare."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import ImageProcessingMixin, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from ..model.configuration_iclip import ICLIPConfig
from ..utils.cache import file_digest
from ..utils.published import public_name


# Options that change no number: options that only training reads, or whose value is among the weights; the path of the
# files; the code that wrote the files or loads them; and the dtype of the files.
_WITHOUT_EFFECT = {"_name_or_path", "architectures", "auto_map", "custom_pipelines", "processor_class"}
_WITHOUT_EFFECT |= {"transformers_version", "dtype", "torch_dtype", *ICLIPConfig.option_names("training", "weights")}
# Options that name the class of a configuration or image processor. They count even if they equal the defaults.
_KINDS = ("model_type", "image_processor_type")


def identity(model, processor, dtype: str | None = None) -> dict[str, str]:
    """
    Describes a model. Two models with equal descriptions, apart from `model`, compute the same up to rounding. The
    function reads all weights, 100 MB in 0.1 s.

    Args:
        model, processor: as in a tuple for [`load`].
        dtype (`str`, *optional*): dtype that the weights are rounded to first, as if the model were loaded in it.

    Returns:
        `dict` with `model`, its Hub id, the name of its folder or else its class; digests of `configuration`,
        `weights` and `processor` (options, image processor and tokenizer); and `dtype`.
    """
    config = getattr(model, "config", None)
    if isinstance(model, torch.nn.Module):
        used_dtype = getattr(torch, dtype) if dtype else next(model.parameters()).dtype
        weights = model.state_dict()
        if dtype:
            rounded = {name: weight.to(used_dtype) for name, weight in weights.items() if weight.is_floating_point()}
            weights = {**weights, **rounded}
    else:  # an ONNX model has the trained logit scale and bias in its configuration
        trained = [getattr(config, name) for name in ("logit_scale_init_value", "logit_bias_init_value")]
        used_dtype, weights = model.dtype, [trained, sorted(model.folder.glob("*.onnx*"))]
    if config is None:  # a model of open_clip
        config = [str(model), model.visual.preprocess_cfg, model.visual.image_size]
    return {
        "model": public_name(getattr(config, "_name_or_path", "")) or type(model).__name__,
        "configuration": digest(config),
        "weights": digest(weights),
        "dtype": str(used_dtype).removeprefix("torch."),
        "processor": digest(processor),
    }


def changed_model(described: Mapping, model, processor, source_identity: Mapping | None = None) -> list[str]:
    """
    Compares a model with the identity `described` in results or a card. Returns the names of the parts that differ.
    The model's weights are rounded to the described dtype first. `source_identity`, the identity before a training, is
    compared instead of the model's own if it is given.
    """
    compared = source_identity or identity(model, processor, described.get("dtype"))
    return [part for part in ("configuration", "processor", "weights") if described.get(part) != compared[part]]


def digest(value) -> str:
    """
    Returns the digest of a value, 16 hex digits. The value consists of JSON types, tensors, files (as `Path`),
    configurations, processors and tokenizers. The order of the keys of a mapping does not count.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()[:16]


def _plain(value):
    """Converts a value to JSON types, or to values that this function converts."""
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return [*value.shape, str(value.dtype), hashlib.sha256(content).hexdigest()]
    if isinstance(value, Path):
        return [value.name, file_digest(value).hex()]
    if isinstance(value, ProcessorMixin):
        parts = {name: getattr(value, name) for name in value.get_attributes()}
        return {**_with_effect(value.to_dict()), **parts}
    if isinstance(value, (PreTrainedConfig, ImageProcessingMixin)):
        options = value.to_dict()
        attributes = {name: getattr(value, name, None) for name in options}
        options |= {name: config for name, config in attributes.items() if isinstance(config, PreTrainedConfig)}
        # Defaults are left out, so that a model stays the same when a new version of Transformers adds options.
        defaults = type(value)().to_dict()
        changed = {name: option for name, option in options.items() if name in _KINDS or option != defaults.get(name)}
        return _with_effect(changed)
    if isinstance(value, PreTrainedTokenizerBase):
        if backend := getattr(value, "backend_tokenizer", None):
            rules = json.loads(backend.to_str()) | dict.fromkeys(("truncation", "padding"))  # the last call's
        else:
            rules = value.get_vocab()
        return [rules, value.special_tokens_map, value.padding_side, value.truncation_side, value.model_input_names]
    if hasattr(value, "context_length"):  # a tokenizer of open_clip, which may wrap one of Transformers
        return [type(value).__name__, value.context_length, getattr(value, "tokenizer", None)]
    return re.sub(r" at 0x\w+", "", str(value))  # such as a function


def _with_effect(options: Mapping) -> dict:
    return {name: value for name, value in options.items() if name not in _WITHOUT_EFFECT}
