"""Recording of the attention layers of a tower in a forward pass, on a private copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


T = TypeVar("T")


@dataclass
class AttentionRecord:
    """An attention layer in a forward pass: Q queries attend to L tokens in several heads."""

    stream: torch.Tensor  # (B, L, D), input of the layer's block, before its norm
    # (B, L, D), input of the attention; the learned queries (B, Q, D) in the pooling heads of SigLIP and CoCa
    tokens: torch.Tensor | None = None
    query: torch.Tensor | None = None  # (B, heads, Q, D / heads)
    key: torch.Tensor | None = None  # (B, heads, L, D / heads)
    value: torch.Tensor | None = None  # (B, heads, L, D / heads)
    # (B, heads, Q, D / heads), values mixed by the attention, before the output projection
    mixed: torch.Tensor | None = None
    weights: torch.Tensor | None = None  # (B, heads, Q, L), attention weights of the values in `mixed`, if recorded
    # Runs the block on another stream `(B, L, D)`, with the other arguments of this pass.
    run_again: Callable[[torch.Tensor], object] | None = None


@dataclass
class _Recording:
    """What is recorded in a forward pass, see [`record`], and the records so far."""

    start: int
    grad: bool
    weights: bool
    records: list[AttentionRecord] = field(default_factory=list)


# The recording of the current forward pass. Other threads have their own.
_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


@dataclass(frozen=True)
class AttentionLayer:
    """
    An attention layer of an image tower, prepared to be recorded. Its fields are modules, because `copy.deepcopy` of a
    model does not copy what a function refers to.
    """

    block: nn.Module  # the block of the layer
    projection: nn.Module  # the output projection of the merged heads
    scale: nn.Module | None = None  # the layer scale, if the model has one
    # Residual stream after the attention (..., L, D) -> what the block's MLP adds to it; None for a pooling head.
    mlp: nn.Module | None = None

    def output(self, heads: torch.Tensor) -> torch.Tensor:
        """
        Computes what the layer adds to the residual stream, `(B, L, D)`, from the mixed values of its heads,
        `(B, heads, L, D / heads)`.
        """
        projected = self.projection(merge_heads(heads))
        return projected if self.scale is None else self.scale(projected)

    @property
    def residual(self) -> bool:
        """Whether the layer is a self-attention of a transformer block, with a residual connection."""
        return self.mlp is not None


def private_copy(model: nn.Module) -> nn.Module:
    """
    Returns a copy of a model, in eval mode. The copy shares the weights, without gradients. Attributes, hooks and
    modules that are set in the copy do not affect the model.
    """
    with torch.inference_mode(False):
        memo = {  # `deepcopy` takes these tensors instead of copies
            id(tensor): nn.Parameter(tensor.detach(), requires_grad=False) if tensor.requires_grad else tensor
            for tensor in chain(model.parameters(), model.buffers())
        }
        return copy.deepcopy(model, memo).eval()


def record(forward: Callable[[], T], start: int, grad: bool, weights: bool) -> tuple[T, list[AttentionRecord]]:
    """
    Runs `forward` of a model whose layers were prepared, see [`prepare`]. Returns its result and the records of the
    attention layers from `start` on. `grad` keeps the graph from the input of layer `start` to the result. `weights`
    also records the attention weights, which takes the memory that fused attention saves.
    """
    recording = _Recording(start, grad, weights)
    token = _recording.set(recording)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            return forward(), recording.records
    finally:
        _recording.reset(token)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Suspends the recording, for modules that run a second time."""
    token = _recording.set(None)
    try:
        yield
    finally:
        _recording.reset(token)


def prepare(index: int, block: nn.Module, attention: nn.Module, calls_sdpa: bool = False) -> None:
    """
    Makes layer `index` of a private copy record the inputs of its block and of its attention. A copy of this copy
    records them too. With `calls_sdpa`, the attention itself calls `scaled_dot_product_attention`, and this call is
    recorded.
    """
    if getattr(block, "is_prepared", False):
        return
    block.is_prepared = True
    # No closures, so that a model can be pickled.
    block.register_forward_pre_hook(partial(_enter_block, index), with_kwargs=True)
    attention.register_forward_pre_hook(_enter_attention, with_kwargs=True)
    if isinstance(attention, nn.MultiheadAttention):
        attention.forward = partial(_multihead_attention, attention)
    elif calls_sdpa:
        attention.forward = partial(_recorded_sdpa, attention)


def _enter_block(index: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    recording, stream = _recording.get(), args[0]
    if stream.ndim == 4:  # the feature map (B, D, h, w) of a convolutional tower, whose prepared pooling takes tokens
        stream = stream.flatten(2).mT
    if recording is not None and index >= recording.start:
        if recording.grad and index == recording.start:
            stream = stream.detach().requires_grad_()
        again = partial(_run_block, block, args[1:], kwargs)
        recording.records.append(AttentionRecord(stream, run_again=again))
    return (stream, *args[1:]), kwargs


def _run_block(block: nn.Module, other_args: tuple, kwargs: dict, stream: torch.Tensor) -> object:
    return block(stream, *other_args, **kwargs)


def _enter_attention(attention: nn.Module, args: tuple, kwargs: dict) -> None:
    if current := _current_record():
        current.tokens = args[0] if args else kwargs["hidden_states"]


def split_heads(tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Splits `(B, L, D)` into heads `(B, heads, L, D / heads)`."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(heads: torch.Tensor) -> torch.Tensor:
    """Merges heads `(B, heads, L, D / heads)` to `(B, L, D)`."""
    return heads.transpose(1, 2).flatten(2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_function: Callable[..., torch.Tensor] = F.scaled_dot_product_attention,
) -> torch.Tensor:
    """
    Computes the attention of the heads by a function of queries, keys and values, and records it. Returns the mixed
    values `(B, heads, Q, D / heads)`. The forward pass must continue with them, so that they have gradients.
    """
    current = _current_record()
    if current is None:
        return attention_function(query, key, value)
    current.query, current.key, current.value = query, key, value
    if _recording.get().weights:
        one_hot = torch.eye(key.shape[2]).to(value).expand(*value.shape[:2], -1, -1)
        current.weights = attention_function(query, key, one_hot)  # mixing one-hot values gives the weights
        current.mixed = current.weights @ value
    else:
        current.mixed = attention_function(query, key, value)
    return current.mixed


def _current_record() -> AttentionRecord | None:
    """Returns the record of the current layer; None if nothing is recorded."""
    recording = _recording.get()
    return recording.records[-1] if recording and recording.records else None


def _transformers_attention(module, query, key, value, attention_mask, **kwargs):
    """Computes attention by ICLIP's own function, and records it."""

    def attention_function(*heads: torch.Tensor) -> torch.Tensor:
        mixed, _ = AttentionInterface()["sdpa_class_row"](module, *heads, attention_mask, **kwargs)
        return mixed.transpose(1, 2)

    return attend(query, key, value, attention_function).transpose(1, 2), None


AttentionInterface.register("iclip_recorded", _transformers_attention)
AttentionMaskInterface.register("iclip_recorded", sdpa_mask)


def input_weights(attention: nn.MultiheadAttention) -> Sequence[torch.Tensor]:
    """Returns the weights of the projections to queries, keys and values."""
    if attention.in_proj_weight is None:  # keys and values have another width than queries
        return attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    return attention.in_proj_weight.chunk(3)


def _multihead_attention(attention: nn.MultiheadAttention, query, key, value, **kwargs):
    """Computes `nn.MultiheadAttention.forward` for batch-first input without masks, and records it."""
    projections = zip((query, key, value), input_weights(attention), attention.in_proj_bias.chunk(3))
    heads = [split_heads(F.linear(tokens, weight, bias), attention.num_heads) for tokens, weight, bias in projections]
    return attention.out_proj(merge_heads(attend(*heads))), None


def _recorded_sdpa(attention: nn.Module, *args, **kwargs):
    """Computes the forward pass of an attention, and records the `scaled_dot_product_attention` that it calls."""
    with _RecordedSDPA():
        return type(attention).forward(attention, *args, **kwargs)


class _RecordedSDPA(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        call = partial(function, **(kwargs or {}))
        return attend(*args, call) if function is F.scaled_dot_product_attention else call(*args)
