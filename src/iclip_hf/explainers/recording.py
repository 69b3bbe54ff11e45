"""Recording what the attention layers of an image tower do in a forward, on a private copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


@dataclass
class AttentionRecord:
    """
    One attention layer in one forward, L tokens attended by Q queries in H heads.

    Attributes:
        stream (`torch.Tensor` of shape `(B, L, D)`): what enters the layer's block, before its norm. A ResNet's pooling
            gets a feature map `(B, D, h, w)`.
        tokens (`torch.Tensor` of shape `(B, L, D)`): what the attention itself sees.
        query, key, value (`torch.Tensor` of shape `(B, H, Q or L, D / H)`).
        weights (`torch.Tensor` of shape `(B, H, Q, L)`): after the softmax.
    """

    stream: torch.Tensor
    tokens: torch.Tensor | None = None
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    weights: torch.Tensor | None = None


@dataclass
class _Recording:
    start: int
    grad: bool
    layers: list[AttentionRecord]


# The forward now being recorded in this thread; none in any other.
_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


@dataclass
class AttentionLayer:
    """
    An attention layer of a tower, prepared to be recorded.

    Attributes:
        output: `(B, H, L, D / H)` mixed values of the heads -> `(B, L, D)`, what the layer adds to the stream.
        residual (`bool`): a self-attention in the stream; False for a head that pools the tokens at the end.
    """

    output: Callable[[torch.Tensor], torch.Tensor]
    residual: bool = True


def private_copy(model: nn.Module) -> nn.Module:
    """
    A copy in eval mode that shares the model's weights but takes no gradients for them: what is set, hooked or replaced
    in it never reaches the model, nor another thread that uses it.
    """
    with torch.inference_mode(False):
        shared = {
            id(tensor): nn.Parameter(tensor.detach(), requires_grad=False) if tensor.requires_grad else tensor
            for tensor in chain(model.parameters(), model.buffers())
        }
        return copy.deepcopy(model, shared).eval()


def record(forward: Callable[[], object], start: int, grad: bool) -> tuple[object, list[AttentionRecord]]:
    """
    Runs `forward` and returns its result with the records of the attention layers from `start` on.

    Args:
        grad (`bool`): keep the graph from the stream that enters layer `start` to the result.
    """
    recording = _Recording(start, grad, [])
    token = _recording.set(recording)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            return forward(), recording.layers
    finally:
        _recording.reset(token)


def text_gradients(logits: torch.Tensor, inputs: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """
    Gradients of each text's logits `(B, T)` with respect to the inputs: one backward a text, of all images at once, through
    the one graph. Images do not mix, so that the sum over them has each image's own gradient.
    """
    last = logits.shape[1] - 1
    for text in range(last + 1):
        yield torch.autograd.grad(logits[:, text].sum(), inputs, retain_graph=text < last)


def prepare_block(index: int, block: nn.Module, attention: nn.Module) -> None:
    """Has a private copy's block record what enters it and, if of transformers, what its attention sees."""

    def enter_block(module, args, kwargs):
        recording = _recording.get()
        if recording is None or index < recording.start:
            return None
        stream = args[0].detach().requires_grad_() if recording.grad and index == recording.start else args[0]
        recording.layers.append(AttentionRecord(stream))
        return (stream, *args[1:]), kwargs

    def enter_attention(module, args, kwargs):
        recording = _recording.get()
        if recording is not None and recording.layers:
            recording.layers[-1].tokens = args[0] if args else kwargs["hidden_states"]

    block.register_forward_pre_hook(enter_block, with_kwargs=True)
    attention.register_forward_pre_hook(enter_attention, with_kwargs=True)


def _explicit_attention(query, key, value, scaling: float) -> torch.Tensor:
    """Attention (B, H, Q, D / H) with its weights recorded if a recording reached this layer."""
    recording = _recording.get()
    # float32 before the product: its logits overflow float16
    weights = ((query.float() @ key.float().mT) * scaling).softmax(-1).to(value.dtype)
    if recording is not None and recording.layers:
        record = recording.layers[-1]
        record.query, record.key, record.value, record.weights = query, key, value, weights
    return weights @ value, weights


def _recorded_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' attention function: fused below the recorded layers. Image towers get no padding to mask."""
    recording = _recording.get()
    if recording is None or not recording.layers:
        fused = AttentionInterface()["sdpa_class_row"]
        return fused(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    output, weights = _explicit_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return output.transpose(1, 2), weights


AttentionInterface.register("iclip_recorded", _recorded_attention)
AttentionMaskInterface.register("iclip_recorded", sdpa_mask)
