"""
Loading of models from folders and the Hub, without running their code. `load` returns a model that explains.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from huggingface_hub import resolve_revision
from transformers import AutoConfig, AutoModel, AutoProcessor

from ..model.modeling_iclip import ICLIPModel
from ..model.processing_iclip import ICLIPProcessor, check_processor
from ..model.tower_loading import check_weights, keep_absolute_path
from ..utils.errors import loading_errors, require_extra
from ..utils.tables import known
from . import DTYPES, MODEL_TYPES, OPEN_CLIP, REFUSED, check_model_name, check_model_type, families
from .embedded import embedded_model
from .explainable import ExplainableModel
from .onnx import VISION_FILE, ONNXModel
from .open_clip import ExplainableCoCa, ExplainableOpenCLIP, ExplainableOpenCLIPResNet
from .timm import ExplainableTimm, ExplainableTimmMap


# Classes by the model type of a configuration, or for open_clip by the kind of the image tower, see `_tower_kind`.
_FAMILIES: dict[str, type[ExplainableModel]] = {
    **{model_type: getattr(families, name) for model_type, name in MODEL_TYPES.items()},
    "VisionTransformer": ExplainableOpenCLIP,
    "VisionTransformer with AttentionalPooler": ExplainableCoCa,
    "ModifiedResNet": ExplainableOpenCLIPResNet,
    **{f"timm {name}": ExplainableTimm for name in ("VisionTransformer", "VisionTransformerRelPos", "Eva")},
    **{f"timm {name}": ExplainableTimmMap for name in ("ConvNeXt", "FastVit")},
}


def load(
    source: str | os.PathLike | tuple | ExplainableModel = "embedded",
    *,
    dtype: str | None = None,
    device: str | torch.device | None = None,
) -> ExplainableModel:
    """
    Loads a model that explains. Everything that takes a model calls this function. A loaded model is returned
    unchanged.

    Example:

    ```python
    >>> from iclip_hf import explain, load

    >>> model = load("openai/clip-vit-base-patch16", device="cuda")
    >>> explanation = explain(model, "dog.jpg", ["dog", "red ball"], method="gem")
    ```

    Args:
        source: `"embedded"`; a folder or Hub id of an ICLIP model or another model of transformers
            (docs/guide/models.md lists the types); a folder of an ONNX export; open_clip's names of a model and of its
            weights, such as `"open_clip:ViT-B-16-SigLIP/webli"`; a tuple of a model, already on its device, and its
            processor; a tuple of a model of open_clip and its tokenizer; or the result of an earlier call.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; the checkpoint's if not given.
        device (*optional*): such as `"cpu"`, `"cuda"` or `"mps"`; if not given, the accelerator that torch finds, or
            the CPU.

    Returns:
        [`ExplainableModel`]. It works on a private copy that shares the model's weights, so a given model is not
        changed. After you move a given model to another device or dtype, load it again, because moving replaces its
        weights.

    Raises:
        `OSError`: the model or one of its files does not exist. `TypeError`: the given object is of another kind.
            `ValueError`: a folder or Hub id holds another kind of model; a file is damaged, lacks weights or contains
            NaN; the processor is of another model; or dtype or device are given for a model that has its own.
    """
    if isinstance(dtype, str):  # Transformers takes a `torch.dtype`, too
        dtype = known(dtype, DTYPES, "dtype")
    is_name = isinstance(source, (str, os.PathLike))
    source = resolve_name(source) if is_name else source
    is_onnx = is_name and Path(source, VISION_FILE).is_file()
    if (is_onnx or not is_name) and (dtype or device):
        name = source if is_onnx else type(source).__name__
        raise ValueError(f"{dtype or device} was given with {name}, which has its own dtype and device: leave it out.")
    if isinstance(source, ExplainableModel):
        return source
    if is_onnx:
        with loading_errors(source):
            processor = ICLIPProcessor.from_pretrained(source)
        return _explainable(ONNXModel(source), processor)
    if is_name:
        device = _usable(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        if str(source).startswith(OPEN_CLIP):
            model, tokenizer = _load_open_clip(source)
            return _explainable(model.to(device, dtype and getattr(torch, dtype)), tokenizer)
        model, processor = load_pretrained(source, dtype=dtype)
        return _FAMILIES[model.config.model_type](model.to(device), processor)
    if not isinstance(source, tuple) or len(source) != 2:
        raise TypeError(
            "Expected a folder, a Hub id, a tuple (model, processor) or a result of load, got "
            f"{type(source).__name__}: pass one of them."
        )
    return _explainable(*source)


def _load_open_clip(name: str) -> tuple[torch.nn.Module, Callable]:
    """Returns a model of open_clip, in eval mode, and its tokenizer. open_clip downloads the weights."""
    with require_extra("open-clip"):
        import open_clip
    architecture, weights = name.removeprefix(OPEN_CLIP), None
    if not architecture.startswith("hf-hub:"):
        architecture, _, weights = architecture.partition("/")
    with loading_errors(name, cure="open_clip.list_pretrained() has the names"):
        model = open_clip.create_model(architecture, weights, require_pretrained=True)
        return model.eval(), open_clip.get_tokenizer(architecture)


def _usable(device: str | torch.device) -> torch.device:
    """Returns a device. Raises `ValueError` if this machine does not have it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"This machine has no device {str(device)!r}; name one that it has, such as cpu.") from error


def _explainable(model, processor) -> ExplainableModel:
    """Creates the object that explains a given model. Raises `TypeError` if no class explains it."""
    if isinstance(model, ONNXModel):
        check_processor(model.folder, processor, model.config)
        return families.ExplainableONNX(model, processor)
    is_open_clip = hasattr(model, "visual")
    if is_open_clip:
        family = _tower_kind(model.visual)
        fits = family in _FAMILIES
    else:
        family = getattr(getattr(model, "config", None), "model_type", None)
        fits = family in _FAMILIES and hasattr(model, "get_text_features")  # CLIP's image classifier has CLIP's config
    description = type(model).__name__ + (f" ({family})" if family else "")
    if not fits:
        raise TypeError(
            "Expected an ICLIPModel, an ONNXModel, a model of open_clip, or one of transformers of type "
            f"{', '.join(MODEL_TYPES)}, got {description}: {REFUSED.get(family, 'load one of them')}."
        )
    if not is_open_clip:
        check_processor(getattr(model.config, "_name_or_path", "") or family, processor, model.config)
    return _FAMILIES[family](model, processor)


def _tower_kind(visual: torch.nn.Module) -> str:
    """Names the kind of an image tower of open_clip."""
    if hasattr(visual, "trunk"):
        return f"timm {type(visual.trunk).__name__}"
    pools = [getattr(visual, name, None) for name in ("attn_pool", "attn_pool_contrastive")]
    return " with ".join(type(module).__name__ for module in (visual, *pools) if module is not None)


def resolve_name(name: str | Path, types: Collection[str] = MODEL_TYPES) -> str | Path:
    """
    Returns the folder of the embedded model for "embedded", even if there is a folder of this name. Returns any other
    name unchanged, after [`check_model_name`].
    """
    return embedded_model() if name == "embedded" else check_model_name(os.fspath(name), types)


def load_pretrained(name: str | Path, types: Collection[str] = MODEL_TYPES, dtype: str | None = None, **model_options):
    """
    Loads a model, in eval mode, and its processor by the Auto classes from a folder, a Hub id or `"embedded"`. Weights
    are read from safetensors, and code in the folder is not run. `types` are the model types that may be loaded.
    `dtype` defaults to the checkpoint's. `model_options` override the model's configuration. Raises the errors of
    [`load`].
    """
    name = resolve_name(name, types)
    shared_kwargs, model_kwargs = {"trust_remote_code": False}, {"use_safetensors": True}
    if dtype is not None:
        model_kwargs["dtype"] = dtype
    cure = {"cure": "correct model_options"} if model_options else {}
    with loading_errors(name):
        if not os.path.exists(name):
            # All files are of one commit. Without a network and a cached copy, this fails at once; a download would
            # be retried.
            shared_kwargs["revision"] = resolve_revision(name)
        config = AutoConfig.from_pretrained(name, **shared_kwargs)
        check_model_type(name, config.model_type, types)
        config._attn_implementation = None  # a file could name code of the Hub
        with loading_errors(name, **cure):
            for option, value in model_options.items():
                setattr(config, option, value)
            model, loading = AutoModel.from_pretrained(
                name, config=config, output_loading_info=True, **model_kwargs, **shared_kwargs
            )
        if not isinstance(model, ICLIPModel):  # the class of an ICLIP model has done both itself
            check_weights(name, model, loading["missing_keys"])
            keep_absolute_path(name, model)
        processor = AutoProcessor.from_pretrained(name, **shared_kwargs)
    check_processor(name, processor, model.config)
    return model, processor


def load_iclip(name: str | Path, dtype: str | None = None, **model_options) -> tuple[ICLIPModel, ICLIPProcessor]:
    """Like [`load_pretrained`], only for ICLIP models."""
    return load_pretrained(name, ("iclip",), dtype, **model_options)
