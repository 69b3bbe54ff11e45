"""Models from folders and the Hub: whole or not at all, and nothing in them is executed."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, ProcessorMixin

from ..modeling_iclip import ICLIPModel, check_weights
from ..processing_iclip import ICLIPProcessor
from ..utils.files import loading_errors
from .embedded import embedded_model
from .onnx import VISION_FILE, ONNXModel


def load_model(name: str | Path | None = None, dtype: str | None = None):
    """
    What the commands and the demo work with: model and processor, on the GPU if there is one.

    Args:
        name: folder or Hub id of an ICLIP model, another that the Auto classes know, or an exported ONNX folder; the embedded
            checkpoint if not given.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; as it was saved if not given.

    Raises:
        As [`load_pretrained`]; `ValueError` also for a dtype with an ONNX folder, whose precision is that of its export.
    """
    name = embedded_model() if name is None else name
    if Path(name, VISION_FILE).is_file():
        if dtype is not None:
            raise ValueError(
                f"{name}: expected no dtype with an ONNX folder, got {dtype}; export it in that precision."
            )
        return ONNXModel(name), AutoProcessor.from_pretrained(name, trust_remote_code=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load_pretrained(name, **({} if dtype is None else {"dtype": dtype}))
    return model.to(device), processor


def load_pretrained(name: str | Path, **options):
    """
    Model and processor of a folder or Hub id, from safetensors; code that lies beside them is not run.

    Args:
        name: of an ICLIP model or another that the Auto classes know.
        options: of the model's configuration.

    Returns:
        `tuple`: model, in eval mode, and processor.

    Raises:
        `OSError`: there is none, or a file of it is missing. `ValueError`: a file is damaged, lacks weights or holds NaN.
    """
    with loading_errors(name):
        model, loading = AutoModel.from_pretrained(
            name, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **options
        )
        if not isinstance(model, ICLIPModel):  # which does so itself
            check_weights(name, model, loading["missing_keys"])
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{name}: expected a processor of images and texts, got {type(processor).__name__}; get it again."
        )
    return model, processor


def load_iclip(name: str | Path, **options) -> tuple[ICLIPModel, ICLIPProcessor]:
    """
    Model and processor of a folder or Hub id, with other options of the configuration if given.

    Raises:
        `ValueError`: it is a model of another kind, or damaged. `OSError`: there is none.
    """
    with loading_errors(name):
        model_type = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    if model_type != "iclip":
        raise ValueError(f"{name}: expected an ICLIP model, but got one of type {model_type}; name another.")
    return load_pretrained(name, **options)
