"""
Contrastive losses: pure functions of logits, gathering of rows over all processes, and the nouns of a batch with their
labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import distributed
from torch.nn import functional as F


# Sharpness of `place_prior`: a noun at the bottom is exp(3) times as likely at the bottom of an image as at its top.
PLACE_SHARPNESS = 3.0


# ------------------------------------------------------------------------------------------------------- of logits


def contrastive_loss(logits_per_image: torch.Tensor, logits_per_text: torch.Tensor, offset: int) -> torch.Tensor:
    """
    Returns the symmetric cross entropy of image-text pairs (Eq. 13, one branch). Both logits are `(B, T)`: of this
    process's images with all texts, and of its texts with all images. Column `i + offset` is the positive of row i.
    `offset` is B times the rank if the columns come from several processes, otherwise 0.
    """
    targets = torch.arange(len(logits_per_image), device=logits_per_image.device) + offset
    return (F.cross_entropy(logits_per_image.float(), targets) + F.cross_entropy(logits_per_text.float(), targets)) / 2


def multi_positive_loss(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """
    Returns the cross entropy of scaled cosines `(B, T)` with any number of positives in a row, `(B, T)` boolean. A
    positive competes with the negatives of its row only. The result is the mean over the positives of a row, then over
    the rows, float32. A row without positives counts as 0.
    """
    logits = logits.float()
    negatives_logsumexp = logits.masked_fill(positives, -torch.inf).logsumexp(1)
    rows, columns = positives.nonzero(as_tuple=True)  # positives are few
    positive_logits = logits[rows, columns]
    losses = torch.logaddexp(positive_logits, negatives_logsumexp[rows]) - positive_logits
    return (losses / positives.sum(1)[rows]).sum() / len(logits)


def distillation_loss(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """
    Returns the cross entropy of knowledge distillation, between the class probabilities of a classifier and the
    softmax of the logits of the class texts, both `(B, K)`, as the mean over the images. The loss of an image is
    weighted by the sum of its probabilities. An image without probabilities counts as 0.
    """
    return -(probabilities * logits.float().log_softmax(1)).sum(1).mean()


def competition_loss(shares: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """
    Returns the loss of texts that compete for the patches of images, from their shares `(B, T)`
    ([`shares_of_texts`]). It is the negative logarithm of the share, averaged over the texts of an image
    (`positives`, `(B, T)` boolean), then over the images. Other texts of the image claim the patches behind an object,
    so the text of the object cannot keep them.
    """
    rows, columns = positives.nonzero(as_tuple=True)
    losses = -shares[rows, columns].clamp(min=torch.finfo(shares.dtype).tiny).log()
    return (losses / positives.sum(1)[rows]).sum() / len(shares)


def shares_of_texts(logits: torch.Tensor, spatial_prior: torch.Tensor) -> torch.Tensor:
    """
    Returns the share of each text in each image, `(B, T)` float32, in [0, 1]. The share in a patch is the softmax of
    the logits `(B, N, T)` over the texts. The share in an image is the mean over its N patches, weighted by
    `spatial_prior`, `(B, N, T)` or `(N, T)`, whose sum over N is 1.
    """
    return (spatial_prior * logits.float().softmax(-1)).sum(1)


def attention_prior(attention: torch.Tensor, is_background: torch.Tensor) -> torch.Tensor:
    """
    Returns the spatial prior `(B, N, T)` of nouns, whose sum over the N patches is 1, from the class token's attention
    `(B, N)` in [0, 1]. An object is equally likely in all patches. A noun of the background (`is_background`, `(T,)`
    boolean) is likelier in patches with less attention.
    """
    background = (1 - attention.float()) ** 8 + 1e-6
    background = (background / background.sum(1, keepdim=True)).unsqueeze(-1)
    return torch.where(is_background, background, 1 / attention.shape[1])


def place_prior(heights: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """
    Returns the spatial prior `(N, T)` of nouns, whose sum over the N patches is 1, from the heights y `(N,)` of the
    patches, 0 at the top and 1 at the bottom, and the place of the nouns `(T,)`. It is proportional to exp(3 y)
    for nouns at the bottom (1), such as floor, to exp(-3 y) for nouns at the top (-1), such as sky, and constant for
    others (0).
    """
    return (PLACE_SHARPNESS * heights.float().unsqueeze(1) * place.float()).softmax(0)


def direction_loss(weights: torch.Tensor, is_background: torch.Tensor) -> torch.Tensor:
    """
    Returns the squared hinge loss of the attention weights (T,) of nouns. The weight of an object should be at least
    1, and the weight of the background at most -1. Objects and background count equally.
    """
    errors = (1 - torch.where(is_background, -weights, weights)).relu() ** 2
    return torch.stack([errors[kind].mean() for kind in (is_background, ~is_background) if kind.any()]).mean()


# ------------------------------------------------------------------------------------------------ over all processes


# Torch's own, `torch.distributed.nn.functional.all_gather`, is deprecated in favour of a private module.
class _Gather(torch.autograd.Function):
    """
    Gathers the tensors (B, ...) of all processes as one tensor (processes * B, ...) on each process. The gradient of a
    row is the sum of its gradients on all processes.
    """

    @staticmethod
    def forward(ctx, local: torch.Tensor) -> torch.Tensor:
        gathered = local.new_empty(distributed.get_world_size(), *local.shape)
        distributed.all_gather(list(gathered), local.contiguous())
        return gathered.flatten(0, 1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def gather_with_gradient(local: torch.Tensor) -> torch.Tensor:
    """
    Gathers the rows of all processes in the order of their ranks, with gradient. All processes have the same number of
    rows.
    """
    return _Gather.apply(local) if is_distributed() else local


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def count_per_process(local: torch.Tensor) -> torch.Tensor:
    """
    Returns the number of true values in a boolean tensor, averaged over all processes. The total counts as at least 1.
    If a loss divides a sum over its true values by this number, the mean of the loss over all processes is the mean
    over all true values.
    """
    counts = gather_with_gradient(local.sum()[None])
    return counts.sum().clamp(min=1) / len(counts)


def row_ids(rows: torch.Tensor) -> torch.Tensor:
    """
    Returns ids `(B,)`, int64, of rows `(B, L)` of token ids or features. Rows that are equal, up to zeros at their
    end, have the same id on all processes.
    """
    values = rows.detach().float().view(torch.int32) if rows.is_floating_point() else rows
    powers = torch.full(rows.shape[1:], 6364136223846793005, device=rows.device).cumprod(0)  # modulo 2^64
    return (values.long() * powers).sum(1)


class BatchNouns(NamedTuple):
    """
    The V distinct nouns in the noun prompts of all processes, and the labels of images for them. A noun of several
    images counts once. `is_background` and `place` are marks of the nouns: the input of [`ICLIPModel.forward`] has
    marks of the same names for each noun prompt.
    """

    first_prompts: torch.Tensor  # index of the first prompt of each noun among the prompts of all processes (V,)
    shown: torch.Tensor  # whether the images of this process show the nouns, boolean (B, V)
    all_shown: torch.Tensor  # `shown` for the images of all processes, boolean (processes * B, V)
    absent: torch.Tensor  # whether the images of this process are known not to show the nouns, boolean (B, V)
    is_background: torch.Tensor  # whether the nouns describe the background, boolean (V,)
    place: torch.Tensor  # 1 for nouns at the bottom of images, -1 at the top, otherwise 0 (V,)
    # The probabilities of the K classes of a classifier for the images of this process (B, K), and labels of the
    # classes as in `noun_labels` (B, K). The prompts of the classes follow the prompts of the nouns.
    class_probabilities: torch.Tensor | None = None
    class_labels: torch.Tensor | None = None

    @classmethod
    def gathered(
        cls,
        noun_ids: torch.Tensor,
        noun_labels: torch.Tensor,
        class_ids: torch.Tensor | None = None,
        class_probabilities: torch.Tensor | None = None,
        **marks: torch.Tensor,
    ) -> BatchNouns:
        """
        Gathers the nouns of all processes.

        Args:
            noun_ids (`(M,)`): index in the vocabulary of the noun of each noun prompt.
            noun_labels (`(B, vocabulary)`): 1 if an image shows a noun, -1 if the noun is known to be absent,
                otherwise 0; of a signed type.
            class_ids (`(K,)`, *optional*): index in the vocabulary of each class of a classifier.
            class_probabilities (`(B, K)`, *optional*): probabilities of the classes by the classifier.
            marks: `is_background` and `place` of the noun prompts, `(M,)` each: whether the noun describes the
                background; 1 for a noun at the bottom of images, such as floor, -1 at the top, otherwise 0.
        """
        noun_ids, all_labels = gather_with_gradient(noun_ids), gather_with_gradient(noun_labels)
        # `torch.unique` does not return the index of the first prompt.
        _, first_prompts = np.unique(noun_ids.cpu(), return_index=True)
        first_prompts = torch.from_numpy(first_prompts).to(noun_ids.device)
        nouns = noun_ids[first_prompts]
        marks = {name: gather_with_gradient(mark)[first_prompts] for name, mark in marks.items()}
        labels = noun_labels[:, nouns]
        shown, all_shown, absent = labels > 0, all_labels[:, nouns] > 0, labels < 0
        class_labels = None if class_ids is None else noun_labels[:, class_ids]
        return cls(
            first_prompts,
            shown,
            all_shown,
            absent,
            **marks,
            class_probabilities=class_probabilities,
            class_labels=class_labels,
        )

    @property
    def num_classes(self) -> int:
        """The number K of classes."""
        return 0 if self.class_probabilities is None else self.class_probabilities.shape[1]

    @property
    def shows_place(self) -> torch.Tensor:
        """Whether the images of this process show a noun with a place, boolean (B,)."""
        return (self.shown & (self.place != 0)).any(1)

    @property
    def knows_background(self) -> torch.Tensor:
        """
        Whether the labels of the images of this process are complete for the background, boolean (B,): at least one
        noun of the background is known to be absent, and at least one noun is shown.
        """
        return (self.absent & self.is_background).any(1) & self.shown.any(1)

    @property
    def needs_even_patches(self) -> torch.Tensor:
        """Whether losses read the evenly spread patches of the images of this process, boolean (B,)."""
        return self.knows_background | self.shows_place

    def prompts(self, embeds: torch.Tensor) -> torch.Tensor:
        """
        Returns the vectors of the first prompt of each noun (V, P), from the vectors of this process's noun prompts
        (M - B - K, P).
        """
        return gather_with_gradient(embeds)[self.first_prompts]
