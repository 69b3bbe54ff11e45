"""Conversion of arrays and tensors to numpy."""

from __future__ import annotations

import numpy as np


def to_numpy(array) -> np.ndarray:
    """Converts an array, or a tensor on any device, to numpy. bfloat16, which numpy lacks, becomes float32."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    array = array.detach().cpu()
    return (array.float() if str(array.dtype) == "torch.bfloat16" else array).numpy()
