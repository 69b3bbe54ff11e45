"""
Internals of other libraries that are replaced for some calls, where no public option does the same. Each function says
in which version its internal was read.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def _replaced(module_name: str, name: str, value) -> Iterator[None]:
    """Replaces an attribute of a module."""
    module = importlib.import_module(module_name)
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def without_question() -> AbstractContextManager:
    """
    Keeps Transformers from asking on standard input whether code may run (5.24). Some of its loaders ask although
    `trust_remote_code` is False, for that many seconds.
    """
    return _replaced("transformers.dynamic_module_utils", "TIME_OUT_REMOTE_CODE", 0)


def symbolic_grid(tower: nn.Module) -> AbstractContextManager:
    """Keeps an image tower of Transformers (5.24) from converting its grid to int, which fixes the size in a graph."""
    module_name = type(tower).__module__
    if not hasattr(importlib.import_module(module_name), "torch_int"):
        return nullcontext()

    def torch_int(number):
        return number if isinstance(number, torch.SymInt) else int(number)

    return _replaced(module_name, "torch_int", torch_int)


def symbolic_padding() -> AbstractContextManager:
    """
    Replaces timm's convolutions with TensorFlow's padding (1.0.31) by nodes of ONNX that pad in the same way. The
    sizes that timm computes, layer by layer, become expressions on which an export takes hours.
    """

    def convolution(x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
        shape = (x.shape[0], len(weight), *(-(-side // step) for side, step in zip(x.shape[2:], stride)))
        attributes = {"auto_pad": "SAME_UPPER", "kernel_shape": [*weight.shape[2:]], "group": groups}
        attributes |= {"strides": [*stride], "dilations": [*dilation]}
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return torch.onnx.ops.symbolic("Conv", inputs, attributes, dtype=x.dtype, shape=shape)

    return _replaced("timm.layers.conv2d_same", "conv2d_same", convolution)
