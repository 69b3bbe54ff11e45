"""Loading of models from folders and the Hub, with all weights and without running code of the folder."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, ProcessorMixin

from ..modeling_iclip import ICLIPModel, check_weights
from ..processing_iclip import ICLIPProcessor
from ..utils.files import loading_errors
from .embedded import embedded_model
from .onnx import VISION_FILE, ONNXModel


logger = logging.getLogger(__name__)


def load_model(name: str | Path | None = None, dtype: str | None = None):
    """
    Loads model and processor for the commands and the demo, on the GPU if there is one.

    Args:
        name: as for [`load_pretrained`], or an exported ONNX folder; the embedded model if not given.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; that of the checkpoint if not given.

    Raises:
        As [`load_pretrained`]; also `ValueError` for a dtype with an ONNX folder, whose precision is set on export.
    """
    name = _located("embedded" if name is None else name)
    if Path(name, VISION_FILE).is_file():
        if dtype is not None:
            raise ValueError(
                f"{name}: expected no dtype with an ONNX folder, got {dtype}; export it in that precision."
            )
        return ONNXModel(name), AutoProcessor.from_pretrained(name, trust_remote_code=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "bfloat16" and device == "cpu":
        warn_of_slow_bfloat16()
    model, processor = load_pretrained(name, **({} if dtype is None else {"dtype": dtype}))
    return model.to(device), processor


def _located(name: str | Path) -> str | Path:
    """Returns the folder of the embedded model for its name, also beside another folder `embedded`; other names as they are."""
    return embedded_model() if name == "embedded" else name


def has_bfloat16() -> bool:
    """Returns whether this processor has instructions for bfloat16."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def warn_of_slow_bfloat16() -> None:
    """Logs a warning if this processor has no instructions for bfloat16. It then takes several times as long as float32."""
    if torch.backends.mkldnn.is_available() and not has_bfloat16():
        logger.warning("This processor has no instructions for bfloat16: float32 is several times faster on it.")


def load_pretrained(name: str | Path, **options):
    """
    Loads model and processor of a folder or Hub id from safetensors. Code in the folder is not run.

    Args:
        name: folder or Hub id of an ICLIP model or another model of the Auto classes, or `"embedded"`.
        options: options of the model's configuration.

    Returns:
        `tuple`: model, in eval mode, and processor.

    Raises:
        `OSError`: the model or one of its files does not exist. `ValueError`: a file is damaged, lacks weights or contains NaN.
    """
    name = _located(name)
    with loading_errors(name):
        model, loading = AutoModel.from_pretrained(
            name, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **options
        )
        if not isinstance(model, ICLIPModel):  # which checks its weights itself
            check_weights(name, model, loading["missing_keys"])
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{name}: expected a processor of images and texts, got {type(processor).__name__}; get it again."
        )
    return model, processor


def load_iclip(name: str | Path, **options) -> tuple[ICLIPModel, ICLIPProcessor]:
    """
    Loads model and processor of an ICLIP model, a folder, Hub id or `"embedded"`; `options` override its configuration.

    Raises:
        `ValueError`: the model is of another type or damaged. `OSError`: it does not exist.
    """
    name = _located(name)
    with loading_errors(name):
        model_type = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    if model_type != "iclip":
        raise ValueError(f"{name}: expected an ICLIP model, but got one of type {model_type}; name another.")
    return load_pretrained(name, **options)
