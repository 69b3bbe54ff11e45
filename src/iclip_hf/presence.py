"""Whether a text is in an image at all, which a map alone, stretched to [0, 1], does not tell."""

import torch


# What photographs show, coarsely: how much of it matches an image says what a chance match of this image is.
BACKGROUND = (
    "person",
    "animal",
    "insect",
    "flower",
    "tree",
    "mountain",
    "water",
    "sky",
    "street",
    "building",
    "room",
    "machine",
    "clothes",
    "food",
    "book",
    "toy",
)
# Where the share of present texts that are kept exceeds that of absent ones most, on COCO with the embedded model.
MIN_PRESENCE = 0.7


def presence(scores: torch.Tensor, background_scores: torch.Tensor) -> torch.Tensor:
    """
    How surely a text is in its image: the share of unrelated texts that would match the image less, by the normal
    distribution that [`BACKGROUND`] estimates. Of absent texts about one in ten reaches 0.9.

    Args:
        scores (`torch.Tensor` of shape `(B, T)`): cosines, or logits: any scale and offset give the same result.
        background_scores (`torch.Tensor` of shape `(B, K)`): of the same images with [`BACKGROUND`], in the same templates.

    Returns:
        `torch.Tensor` of shape `(B, T)`, in [0, 1].
    """
    std, mean = torch.std_mean(background_scores, dim=-1, keepdim=True)
    return torch.special.ndtr((scores - mean) / std)
