"""Parameter groups of AdamW, and the learning rate schedule."""

from __future__ import annotations

import math

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Returns trained parameters in two groups: matrices with weight decay; vectors, biases and logit scales without."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = [p for name, p in learning if p.ndim > 1 and not name.endswith("bias")]
    others = [p for name, p in learning if p.ndim <= 1 or name.endswith("bias")]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def cosine_schedule(step: int, total: int, warmup: int, peak: float, start: float, end: float) -> float:
    """
    Returns the learning rate of a step: linear from `start` towards `peak` during the warm-up, then half a cosine to `end`. The
    cosine spans all steps including the warm-up, so the rate after the warm-up is slightly below `peak`. This is GroupViT's
    recipe and timm's default (`warmup_prefix=False`).
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * step / total)) / 2
