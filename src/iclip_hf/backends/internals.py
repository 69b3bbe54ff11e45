"""
Internals of other libraries that are replaced for some calls, where no public option does the same. Each function
names the version in which its internal was read.
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


def symbolic_grid(tower: nn.Module) -> AbstractContextManager:
    """
    Keeps an image tower of Transformers (5.24) from converting its grid to int, which would fix the size of images in
    an exported graph.
    """
    module_name = type(tower).__module__
    if not hasattr(importlib.import_module(module_name), "torch_int"):
        return nullcontext()

    def torch_int(number):
        return number if isinstance(number, torch.SymInt) else int(number)

    return _replaced(module_name, "torch_int", torch_int)


def symbolic_padding() -> AbstractContextManager:
    """
    Replaces convolutions with TensorFlow's padding in timm (1.0.31) by nodes of ONNX with the same padding. timm
    computes sizes in each of these layers. In an export, these sizes are expressions that take hours to simplify.
    """

    def convolution(x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
        sides = (-(-side // step) for side, step in zip(x.shape[2:], stride))  # rounded up
        shape = (x.shape[0], len(weight), *sides)
        attributes = {"auto_pad": "SAME_UPPER", "kernel_shape": [*weight.shape[2:]], "group": groups}
        attributes |= {"strides": [*stride], "dilations": [*dilation]}
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return torch.onnx.ops.symbolic("Conv", inputs, attributes, dtype=x.dtype, shape=shape)

    return _replaced("timm.layers.conv2d_same", "conv2d_same", convolution)
