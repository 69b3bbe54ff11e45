"""Contrastive losses as pure functions."""

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


def sigmoid_loss(
    logits: torch.Tensor, positives: torch.Tensor, negative_weights: torch.Tensor, num_positives: torch.Tensor | float
) -> torch.Tensor:
    """
    Binary cross entropy of each image and text, as in SigLIP, with a weight for each negative.

    Args:
        logits (`torch.Tensor` of shape `(B, T)`): scaled cosines with a bias.
        positives (`torch.Tensor` of shape `(B, T)`): boolean.
        negative_weights (`torch.Tensor` of shape `(B, T)`): weights of the pairs that are not positive; the others have the weight 1.
        num_positives (`torch.Tensor` or `float`): divisor of the sum; with several processes their mean number of positives.

    Returns:
        `torch.Tensor` scalar, float32.
    """
    weights = torch.where(positives, 1.0, negative_weights)
    losses = F.binary_cross_entropy_with_logits(logits.float(), positives.float(), weights, reduction="sum")
    return losses / num_positives


def competition_loss(logits: torch.Tensor, prior: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """
    Loss of texts that compete for the patches of images. Each patch distributes itself over all texts by a softmax. The share of a
    text in an image is the mean of its shares in the patches, and the loss is the negative logarithm of the shares of the texts that
    the image has. So patches behind an object, which belong to some text of the image, cannot stay with the object's.

    Args:
        logits (`torch.Tensor` of shape `(B, N, T)`): scaled cosines of N patches with the texts.
        prior (`torch.Tensor` of shape `(B, N, T)`): weights of the patches in the mean, which add up to 1 over N.
        positives (`torch.Tensor` of shape `(B, T)`): boolean.

    Returns:
        `torch.Tensor` scalar, float32: mean over the positives of an image, then over the images. An image without positives counts 0.
    """
    shares = (prior * logits.float().softmax(-1)).sum(1)
    rows, columns = positives.nonzero(as_tuple=True)
    losses = -shares[rows, columns].clamp(min=torch.finfo(shares.dtype).tiny).log()
    return (losses / positives.sum(1)[rows]).sum() / len(logits)


def multi_positive_loss(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """
    Cross entropy of scaled cosines `(B, T)` with any number of positives in a row, `(B, T)` boolean. A positive competes with the
    negatives of its row only. Returns the mean over the positives of a row, then over the rows, float32; a row without positives
    counts 0.
    """
    logits = logits.float()
    negatives = logits.masked_fill(positives, -torch.inf).logsumexp(1)
    rows, columns = positives.nonzero(as_tuple=True)  # positives are few
    own = logits[rows, columns]
    losses = torch.logaddexp(own, negatives[rows]) - own
    return (losses / positives.sum(1)[rows]).sum() / len(logits)
