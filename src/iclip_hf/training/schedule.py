"""Parameter groups of AdamW, and the learning rate of a step."""

from __future__ import annotations

import math

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """What learns, in two groups: matrices decay; one-dimensional tensors, biases and the 0-d logit scales do not."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = [p for name, p in learning if p.ndim > 1 and not name.endswith("bias")]
    others = [p for name, p in learning if p.ndim <= 1 or name.endswith("bias")]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def cosine_schedule(step: int, total: int, warmup: int, peak: float, start: float, end: float) -> float:
    """
    Learning rate of a step: linear from `start` towards `peak` over the warm-up, then half a cosine to `end`. The cosine is that
    of all steps, the warm-up's included, so the rate after the warm-up is a little below `peak`: GroupViT's recipe, which is
    timm's default (`warmup_prefix=False`).
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * step / total)) / 2
