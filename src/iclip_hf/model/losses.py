"""The contrastive loss of the paper, as a pure function."""

import torch
from torch.nn import functional as F


def contrastive_loss(
    logits_per_image: torch.Tensor, logits_per_text: torch.Tensor | None = None, offset: int = 0
) -> torch.Tensor:
    """
    Symmetric cross entropy of image-text pairs: half image-to-text plus half text-to-image (Eq. 13, one branch).

    Args:
        logits_per_image (`torch.Tensor` of shape `(B, T)`): scaled cosines of this process's images with all texts.
        logits_per_text (`torch.Tensor` of shape `(B, T)`, *optional*): this process's texts with all images; the
            transpose of `logits_per_image` when there is one process.
        offset (`int`): column of the first pair: rank times B when columns come from several processes.

    Returns:
        `torch.Tensor` scalar, float32. Pair i is positive at column `i + offset`, all others are negatives.
    """
    if logits_per_text is None:
        logits_per_text = logits_per_image.mT
    labels = torch.arange(len(logits_per_image), device=logits_per_image.device) + offset
    return (F.cross_entropy(logits_per_image.float(), labels) + F.cross_entropy(logits_per_text.float(), labels)) / 2
