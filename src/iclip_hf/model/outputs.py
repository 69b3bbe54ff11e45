"""Outputs of the model: features of images, features of texts, and their comparison."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class ICLIPTextFeatures(BaseModelOutputWithPooling):
    """
    Features of texts. They can be computed once and reused for any number of images.

    Attributes:
        pooler_output (`torch.Tensor` of shape `(..., T, P)`): projected features of the recognition branch, not
            normalised. If a label has several prompts, `pooler_output` equals `text_embeds`.
        text_embeds (`torch.Tensor` of shape `(..., T, P)`): unit vectors of the recognition branch.
        map_text_embeds (`torch.Tensor` of shape `(..., T, P)`, or `(..., T, 2 P)` with a `recognition_share`): unit
            vectors that patches are compared with. They are equal to `text_embeds` in a model with one branch.
        attention_weights (`torch.Tensor` of shape `(..., T)`): weight in [-1, 1] of the attention in the map of each
            text, float32: positive for objects, negative for the background. None if `config.map_attention` is not
            `"signed"`. Also None for a target that is not a text, such as an image: its weight is 1.
    """

    text_embeds: torch.FloatTensor | None = None
    map_text_embeds: torch.FloatTensor | None = None
    attention_weights: torch.FloatTensor | None = None

    # fields that scores and maps are computed from
    compared_fields = ("text_embeds", "map_text_embeds", "attention_weights")


@dataclass
class ICLIPImageFeatures(BaseModelOutputWithPooling):
    """
    Features of images. Models of other families set only `image_embeds` and `patch_embeds`.

    Attributes:
        pooler_output (`torch.Tensor` of shape `(B, P)`): projected features of the recognition branch, not normalised.
        image_embeds (`torch.Tensor` of shape `(B, P)`): unit vectors of the recognition branch.
        map_image_embeds (`torch.Tensor` of shape `(B, P)`): unit vectors of the map branch; None with
            `max_over="similarity"`, because this branch then has no image vector.
        patch_embeds (`torch.Tensor` of shape `(B, h, w, P)`, or `(B, h, w, 2 P)` with a `recognition_share`): unit
            vectors of the patches, which are compared with `map_text_embeds`.
        cell_embeds (`torch.Tensor` of shape `(B, rows, columns, P)` or `(B, rows, columns, 2 P)`): the same unit
            vectors on the grid of `config.map_cell_size`; None if maps have the grid of the patches.
        patch_tokens (`torch.Tensor` of shape `(B, N, D)`, or `(B, N, D + Df)` with a feature tower): patch tokens of
            the image tower after its final norm, each followed by the Df reduced features of the feature tower;
            row-major, N = h * w.
        attention (`torch.Tensor` of shape `(B, N)`): class-token attention over the patches, normalised to [0, 1]
            (Eq. 9).
        map_attention (`torch.Tensor` of shape `(B, N)`, or `(B, rows * columns)` with `cell_embeds`): `attention`,
            averaged over similar patches, see `config.map_affinity`.
        feature_average (`torch.Tensor` of shape `(B, Df)`): the vector that the recognition branch projects with
            `recognition_pooling="feature_average"`; None with other poolings.
    """

    image_embeds: torch.FloatTensor | None = None
    map_image_embeds: torch.FloatTensor | None = None
    patch_embeds: torch.FloatTensor | None = None
    cell_embeds: torch.FloatTensor | None = None
    patch_tokens: torch.FloatTensor | None = None
    attention: torch.FloatTensor | None = None
    map_attention: torch.FloatTensor | None = None
    feature_average: torch.FloatTensor | None = None

    # fields that scores and maps are computed from
    compared_fields = ("image_embeds", "patch_embeds", "cell_embeds", "attention", "map_attention")

    @property
    def grid(self) -> tuple[int, int]:
        """
        Height and width of the patch grid. This is not a field, because fields are gathered over processes as tensors.
        """
        return tuple(self.patch_embeds.shape[1:3])

    @property
    def map_embeds(self) -> torch.FloatTensor:
        """The unit vectors that maps are computed from, of the cells or the patches."""
        return self.patch_embeds if self.cell_embeds is None else self.cell_embeds


@dataclass
class ICLIPOutput(ModelOutput):
    """
    Output of [`ICLIPModel`] for B images and T texts. If `input_ids` has three dimensions, each image has its own T
    texts.

    Attributes:
        loss (`torch.Tensor` scalar, with `return_loss=True`): contrastive loss, averaged over the branches (Eq. 13).
            `map_attention="signed"` adds the loss of the weights of the attention.
        branch_losses (`tuple[torch.Tensor]`, with `return_loss=True`): a scalar for each branch, the recognition
            branch first, without gradient.
        logits_per_image (`torch.Tensor` of shape `(B, T)`): scaled cosines of the recognition branch, with its bias,
            float32. None if the model is in training mode and `return_loss=True`.
        logits_per_text (`torch.Tensor` of shape `(T, B)`): the transpose of `logits_per_image`.
        image_embeds, text_embeds (`torch.Tensor` of shape `(B, P)`, `(T, P)`): unit vectors of the recognition branch.
        map_image_embeds (`torch.Tensor` of shape `(B, P)`): unit vectors of the map branch.
        map_text_embeds, patch_embeds: unit vectors that maps are computed from, see [`ICLIPTextFeatures`] and
            [`ICLIPImageFeatures`].
        attention (`torch.Tensor` of shape `(B, N)`): normalised class-token attention, in [0, 1], row-major,
            N = h * w.
        similarity_maps (`torch.Tensor` of shape `(B, T, h, w)`, with `output_similarity_maps=True`): raw maps, see
            [`ICLIPModel.similarity_maps`].
        vision_model_output ([`ICLIPImageFeatures`]), text_model_output ([`ICLIPTextFeatures`]): all features of the
            images and of the texts.
    """

    loss: torch.FloatTensor | None = None
    branch_losses: tuple[torch.FloatTensor, ...] | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    map_image_embeds: torch.FloatTensor | None = None
    map_text_embeds: torch.FloatTensor | None = None
    patch_embeds: torch.FloatTensor | None = None
    attention: torch.FloatTensor | None = None
    similarity_maps: torch.FloatTensor | None = None
    vision_model_output: ICLIPImageFeatures | None = None
    text_model_output: ICLIPTextFeatures | None = None

    def to_tuple(self):
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())
