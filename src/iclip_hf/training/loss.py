"""The contrastive loss over all processes: what Accelerate wraps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from ..losses import contrastive_loss, multi_positive_loss
from ..modeling_iclip import ICLIPModel, normalize


class PairModel(nn.Module):
    """
    What Accelerate wraps: the pairs of this process in, the contrastive loss against the pairs of all processes out.

    Memory holds the towers' activations of `chunk_size` pairs only: those of the others are computed again in the backward
    pass (cached gradients). So a big batch costs time, and keeps all its negatives. Each process has the same number of
    pairs; the mean over the processes of their losses and gradients is that of one process with all pairs. Both are exact but
    for dropout, which draws for each chunk and process anew, see `has_dropout`.

    Args:
        model: [`ICLIPModel`].
        chunk_size: images or texts in one forward of a tower that learns.
        lock_text: the text tower takes no gradients and stays in eval mode, as a locked image tower does.
    """

    def __init__(self, model: ICLIPModel, chunk_size: int = 256, lock_text: bool = False):
        super().__init__()
        self.model, self.chunk_size, self.lock_text = model, chunk_size, lock_text
        self.train()

    @property
    def branches(self) -> list[nn.Module]:
        """Those that the model has, recognition first."""
        one = self.model.recognition, self.model.interpretability
        return [branch for branch in one if branch is not None]

    @property
    def has_dropout(self) -> bool:
        """Whether a tower that learns drops units at random, so that `chunk_size` changes results."""
        learning = [] if self.model.config.lock_vision else [self.model.vision_model]
        learning += [] if self.lock_text else [self.model.text_model]
        rates = (value for tower in learning for name, value in tower.config.to_dict().items() if "drop" in name)
        return any(isinstance(rate, float) and rate > 0 for rate in rates)

    def train(self, mode: bool = True) -> PairModel:
        super().train(mode)
        if self.lock_text:
            self.model.text_model.eval().requires_grad_(False)
        return self

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
        noun_ids: torch.Tensor | None = None,
        has_noun: torch.Tensor | None = None,
        **texts: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: images (B, 3, H, W), or else
            image_features: what each branch's projection sees of them, (B, branches, D).
            text_features: what the projections see of the texts, (M, Dt), or else
            texts: `input_ids` and what goes with it, (M, L). The first B are the images' captions, the others noun prompts.
            noun_ids, has_noun: of the prompts, see [`NounPrompts`]. They teach the recognition branch: maps of a branch that
                learns nouns lose what all objects share against the background.

        Returns:
            `dict` with `loss`, the mean of `losses` (branches,) (Eq. 13), and the unit vectors `image_embeds` and
            `text_embeds` (B, branches, P), all float32; the embeddings have no gradient.
        """
        if image_features is None:
            image_features = self._in_chunks(self._encode_images, pixel_values)
        if text_features is None:
            text_features = self._in_chunks(lambda *t: self._encode_texts(**dict(zip(texts, t))), *texts.values())
        image_embeds = torch.stack([b.visual_projection(image_features[:, i]) for i, b in enumerate(self.branches)], 1)
        pairs, scales = len(image_embeds), self.model.logit_scales()
        text_embeds = torch.stack([b.text_projection(text_features[:pairs]) for b in self.branches], 1)
        prompt_embeds = self.model.recognition.text_projection(text_features[pairs:])

        # float16 would round the scaled cosines to a sixteenth.
        with torch.autocast(image_features.device.type, enabled=False):
            image_embeds, text_embeds, prompt_embeds = (
                normalize(one.float()) for one in (image_embeds, text_embeds, prompt_embeds)
            )
            all_images, all_texts = gather_with_gradient(torch.stack([image_embeds, text_embeds], 1)).unbind(1)
            losses = [
                contrastive_loss(
                    scale * image_embeds[:, i] @ all_texts[:, i].T,
                    scale * text_embeds[:, i] @ all_images[:, i].T if len(all_images) > pairs else None,
                    offset=_rank() * pairs,
                )
                for i, scale in zip(range(len(self.branches)), scales)
            ]
            if noun_ids is not None:
                all_ids, all_have = gather_with_gradient(noun_ids), gather_with_gradient(has_noun)
                per_image = scales[0] * image_embeds[:, 0] @ gather_with_gradient(prompt_embeds).T
                per_prompt = scales[0] * prompt_embeds @ all_images[:, 0].T
                noun_loss = multi_positive_loss(per_image, has_noun[:, all_ids] > 0)
                noun_loss = (noun_loss + multi_positive_loss(per_prompt, all_have[:, noun_ids].T > 0)) / 2
                losses[0] = (losses[0] + noun_loss) / 2
            losses = torch.stack(losses)
        return {
            "loss": losses.mean(),
            "losses": losses.detach(),
            "image_embeds": image_embeds.detach(),
            "text_embeds": text_embeds.detach(),
        }

    def _encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        image = self.model.encode_image(pixel_values)
        pooled = self.model.pool_image(image, self.model.normalized_attention(image))
        return torch.stack(pooled[: len(self.branches)], 1)

    def _encode_texts(self, **texts: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(**texts)[0]

    def _in_chunks(self, encode: Callable, *inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs[0]) <= self.chunk_size:
            return encode(*inputs)
        chunks = zip(*(one.split(self.chunk_size) for one in inputs))
        return torch.cat([checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks])

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        """Keeps the scales a hair below 100: the clamp in the model has no gradient above, so none would come back."""
        for branch in self.branches:
            if branch.logit_scale is not None:
                branch.logit_scale.clamp_(max=math.log(100) - 1e-6)


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """(B, ...) of each process -> (processes * B, ...) on all. Each row's gradient is the sum over all who used it."""

    @staticmethod
    def forward(ctx, local: torch.Tensor) -> torch.Tensor:
        gathered = local.new_empty(distributed.get_world_size() * len(local), *local.shape[1:])
        distributed.all_gather_into_tensor(gathered, local.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def gather_with_gradient(local: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks, equally many each; with gradient, unlike `gather`."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return local
    return _Gather.apply(local)
