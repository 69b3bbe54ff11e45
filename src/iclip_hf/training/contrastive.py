"""The module that Accelerate wraps: the model's loss of a large batch, with the memory of a small one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..model.modeling_iclip import ICLIPModel, ImageInputs, cosines
from .settings import Settings


class KeptPresence(nn.Module):
    """
    Computes the loss that keeps the presence of some texts as a recognition branch has it now, while the branch learns
    further (Learning without Forgetting, https://arxiv.org/abs/1606.09282). The loss of captions alone only compares
    cosines with each other, so on few pairs the presence would drift.

    Args:
        branch: recognition branch with a bias, of which a copy is kept.
        texts (`torch.Tensor` of shape `(K, D)`): features of the texts from the text tower.
    """

    def __init__(self, branch: nn.Module, texts: torch.Tensor):
        super().__init__()
        self.before = copy.deepcopy(branch).requires_grad_(False)
        self.register_buffer("texts", texts, persistent=False)

    def forward(self, branch: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """
        Returns the Kullback-Leibler divergence from the probabilities before to those of the branch, summed over the
        texts, the mean over images with the features (B, D'). It is 0 at the start.
        """
        before, now = (
            one(cosines(one.embed_image(images), one.embed_text(self.texts))) for one in (self.before, branch)
        )
        entropy, cross_entropy = (
            F.binary_cross_entropy_with_logits(logits, before.sigmoid(), reduction="sum") for logits in (before, now)
        )
        return (cross_entropy - entropy) / len(images)


class PairModel(nn.Module):
    """
    Computes the contrastive loss of the pairs of this process against the pairs of all processes, which is that of
    [`ICLIPModel`] with `return_loss`.

    Memory holds the towers' activations of `chunk_size` pairs only; those of the others are recomputed in the backward
    pass (gradient checkpointing). A large batch costs time but keeps all its negatives. Each process has the same
    number of pairs. The mean of losses and gradients over the processes equals that of one process with all pairs.
    Chunks and processes change no result, except for dropout, which is sampled for each chunk and process.

    Args:
        model: the model that learns.
        settings: of the run.
        kept: of which `settings.keep_presence` times the loss is added.
    """

    def __init__(self, model: ICLIPModel, settings: Settings, kept: KeptPresence | None = None):
        super().__init__()
        self.model, self.settings, self.kept = model, settings, kept
        if settings.lock_text:
            model.text_model.requires_grad_(False)  # so the model keeps it in eval mode
        self.train()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_inputs: ImageInputs | None = None,
        text_inputs: torch.Tensor | None = None,
        noun_ids: torch.Tensor | None = None,
        noun_labels: torch.Tensor | None = None,
        is_background: torch.Tensor | None = None,
        place: torch.Tensor | None = None,
        **texts: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            texts: the tokenizer's tensors (M, L), if there are no `text_inputs`. The first B texts are the captions,
                the others noun prompts.
            pixel_values, image_inputs, text_inputs, noun_ids, noun_labels, is_background, place: see
                [`ICLIPModel.forward`].

        Returns:
            `dict` with `loss` and, without gradient, the `branch_losses` and `logit_scales` (branches,), recognition
            first, and the unit vectors `image_embeds` and `text_embeds` (B, P) of the recognition branch. All are
            float32.
        """
        if image_inputs is None:
            image_inputs = ImageInputs(*self._in_chunks(self._encode_images, pixel_values))
        if text_inputs is None:
            (text_inputs,) = self._in_chunks(
                lambda *tensors: self._encode_texts(dict(zip(texts, tensors))), *texts.values()
            )
        outputs = self.model(
            image_inputs=image_inputs,
            text_inputs=text_inputs,
            noun_ids=noun_ids,
            noun_labels=noun_labels,
            is_background=is_background,
            place=place,
            return_loss=True,
        )
        loss = outputs.loss
        if self.kept is not None:
            loss = loss + self.settings.keep_presence * self.kept(self.model.recognition, image_inputs.recognition)
        return {
            "loss": loss,
            "branch_losses": torch.stack(outputs.branch_losses),
            "logit_scales": torch.cat([branch.logit_scale.exp() for branch in self.branches]).detach(),
            "image_embeds": outputs.image_embeds.detach(),
            "text_embeds": outputs.text_embeds[: len(outputs.image_embeds)].detach(),
        }

    @property
    def branches(self) -> list[nn.Module]:
        """The branches of the model, recognition first."""
        return [branch for branch in (self.model.recognition, self.model.interpretability) if branch is not None]

    def _encode_images(self, pixel_values: torch.Tensor) -> ImageInputs:
        return self.model.image_inputs(self.model.encode_image(pixel_values))

    def _encode_texts(self, texts: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
        return (self.model.encode_text(**texts)[0],)

    def _in_chunks(self, encode: Callable[..., tuple], *inputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Encodes a batch in chunks, and joins the parts of each result. A result can be None."""
        size = self.settings.chunk_size
        if len(inputs[0]) <= size:
            return encode(*inputs)
        chunks = zip(*(tensor.split(size) for tensor in inputs))
        parts = zip(*(checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks))
        return tuple(None if part[0] is None else torch.cat(part) for part in parts)

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        """
        Keeps the scales just below 100. Above, the clamp in the model has no gradient, so a scale could not decrease
        again.
        """
        for branch in self.branches:
            branch.logit_scale.clamp_(max=math.log(100) - 1e-6)
