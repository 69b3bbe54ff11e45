"""Conversion of arrays and tensors to numpy."""

from __future__ import annotations

import numpy as np


def to_numpy(array) -> np.ndarray:
    """Converts an array, or a tensor on any device, to numpy. bfloat16, which numpy lacks, becomes float32."""
    if not hasattr(array, "detach"):
        try:
            return np.asarray(array)
        except ValueError as error:
            raise ValueError(f"Expected an array, got {array!r:.100}: make its rows of one length.") from error
    array = array.detach().cpu()
    return (array.float() if str(array.dtype) == "torch.bfloat16" else array).numpy()
