"""The loss that keeps the presence of common nouns."""

from __future__ import annotations

import copy
from itertools import islice

import torch
from torch import nn
from torch.nn import functional as F

from ..backends.embedded import vocabulary
from ..model.modeling_iclip import ICLIPModel
from ..model.processing_iclip import ICLIPProcessor
from ..model.similarity import cosines


KEPT_NOUNS = 256  # number of nouns whose presence is kept


class KeptPresence(nn.Module):
    """
    The loss that keeps the presence of some texts while a recognition branch learns (Learning without Forgetting,
    https://arxiv.org/abs/1606.09282). The loss compares the branch with a copy from the start. The loss of
    captions compares cosines only with each other, so on few pairs, the presence would drift.

    Args:
        branch: recognition branch with a bias, as it is at the start.
        texts (`torch.Tensor` of shape `(T, Dt)`): features of the texts from the text tower.
    """

    def __init__(self, branch: nn.Module, texts: torch.Tensor):
        super().__init__()
        self.before = copy.deepcopy(branch).requires_grad_(False)
        self.register_buffer("texts", texts, persistent=False)

    def forward(self, branch: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """
        Returns the Kullback-Leibler divergence of the branch's probabilities from those at the start, summed over the
        texts and averaged over images with these pooled vectors, `(B, recognition_dim)`. It is 0 at the start.
        """
        logits_before, logits_now = (
            recognition(cosines(recognition.embed_image(images), recognition.embed_text(self.texts)))
            for recognition in (self.before, branch)
        )
        entropy, cross_entropy = (
            F.binary_cross_entropy_with_logits(logits, logits_before.sigmoid(), reduction="sum")
            for logits in (logits_before, logits_now)
        )
        return (cross_entropy - entropy) / len(images)


@torch.no_grad()
def kept_presence(model: ICLIPModel, processor: ICLIPProcessor) -> KeptPresence | None:
    """Returns the loss that keeps the presence of the commonest nouns; None for a model without presence."""
    if model.recognition.logit_bias is None:
        return None
    nouns = islice(vocabulary(), KEPT_NOUNS)  # the commonest come first
    prompts = processor(labels=[*nouns], templates=processor.templates[:1]).to(model.device)
    texts, _ = model.eval().encode_text(**prompts)  # each step of a training sets its mode
    return KeptPresence(model.recognition, texts)
