"""Configuration of ICLIP: two towers, a pooling and the projections between them."""

import math
from difflib import get_close_matches
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


_MOST_LAYERS = 1000


@strict
class ICLIPConfig(PreTrainedConfig):
    r"""
    Configuration of an [`ICLIPModel`]. The defaults are the paper's model: a locked DINO ViT-B/16 image tower, a CLIP
    text tower, masked max pooling and dual projections.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*): the image tower, a ViT with a class token.
        text_config (`PreTrainedConfig` or `dict`, *optional*): the text tower.
        projection_dim (`int`, defaults to 512): width of the shared image-text space.
        pooling (`str`, defaults to `"masked_max"`): how the branch that is trained to explain turns patch tokens into
            one vector: `"masked_max"` (Eq. 9, 10), `"max"`, `"average"` or `"class_token"` (the rows of Table 2).
        max_over (`str`, defaults to `"channels"`): where `"masked_max"` and `"max"` take the maximum: `"channels"` of each
            channel over the tokens, before the projection (Eq. 10), or, beyond the paper, `"similarity"` of the patches'
            similarities with each text, after it, so that the score that is trained is the peak of the map that is drawn
            ([`~pooling.pool_similarities`]). `"similarity"` needs `dual_projection`, for it compares no single image vector.
        max_sharpness (`float`, defaults to 10): how near the smooth maximum of `"similarity"` is to the maximum.
        center_tokens (`bool`, defaults to `False`): beyond the paper: the branch that draws the maps sees patch tokens less
            their mean over the training images, which the model holds as `token_mean`. Needs `max_over="similarity"`.
        value_share (`float` in [0, 1], defaults to 0): beyond the paper: in the image tower's last attention, the share of its own
            value in what each patch receives. 0 is the tower's own attention, 1 is MaskCLIP's, where patches attend to themselves
            alone and their tokens say more of their own place. The class token attends as before. Needs SDPA attention.
        dual_projection (`bool`, defaults to `True`): a second pair of projections (Eq. 12) that pools by the class token,
            for recognition. Without it the one branch serves both (Table 3).
        projection_bias (`bool`, defaults to `False`): whether the projections have a bias.
        map_attention (`str`, defaults to `"similarity"`): where the class-token attention A enters the similarity map:
            `"similarity"` multiplies the cosines by A, `"sqrt_similarity"` by its root, `"features"` multiplies the patch
            tokens before the projection (Eq. 12 to the letter; cancelled by the normalisation unless `projection_bias`),
            `"additive"` cuts each text's cosines at their mean over the patches, so that less than average counts as 0, and adds A,
            stretched to [0, 1], / (2 `max_sharpness`), which never sees the text; `"none"` leaves it out.
        map_affinity (`float`, defaults to 0): beyond the paper: the token and the attention of each patch become the mean
            over all patches, weighted by softmax(map_affinity * cosine of their tokens), so that an object's patches share
            what one of them shows. 0 leaves them as they are.
        attention_norm (`str`, defaults to `"minmax"`): how A is brought to [0, 1]: `"minmax"` over the patches (the
            paper), or `"quantile"`, which saturates at `attention_quantile` so that one bright token cannot dim the rest.
        attention_quantile (`float`, defaults to 0.9): the quantile that becomes 1 with `attention_norm="quantile"`.
        logit_scales (`str`, defaults to `"per_branch"`): one learned temperature a branch, or one `"shared"`.
        logit_scale_init_value (`float`, defaults to 2.6592): initial logarithm of the temperature's inverse, ln(1 / 0.07).
        lock_vision (`bool`, defaults to `True`): the image tower takes no gradients and stays in eval mode.
        text_pooling (`str`, defaults to `"eos"`): the text feature: `"eos"` (the pooled output of a CLIP or SigLIP tower),
            `"mean"` over the attended tokens, or `"class_token"` (the first token).

    Raises:
        `ValueError`: for a misspelt option. `huggingface_hub.errors.StrictDataclassError`: for a value of another
        type, outside the listed names or out of range.
    """

    model_type = "iclip"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="vit", init_kwargs={"layer_norm_eps": 1e-6}
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model"),
    }

    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    projection_dim: int = 512
    pooling: Literal["masked_max", "max", "average", "class_token"] = "masked_max"
    max_over: Literal["channels", "similarity"] = "channels"
    max_sharpness: int | float = 10.0
    center_tokens: bool = False
    value_share: int | float = 0.0
    dual_projection: bool = True
    projection_bias: bool = False
    map_attention: Literal["similarity", "sqrt_similarity", "features", "additive", "none"] = "similarity"
    map_affinity: int | float = 0.0
    attention_norm: Literal["minmax", "quantile"] = "minmax"
    attention_quantile: int | float = 0.9
    logit_scales: Literal["per_branch", "shared"] = "per_branch"
    logit_scale_init_value: int | float = 2.6592
    lock_vision: bool = True
    text_pooling: Literal["eos", "mean", "class_token"] = "eos"

    def __post_init__(self, **kwargs):
        # The base class takes any other key, such as those of training loops, so a misspelt option would silently do nothing.
        options = list(ICLIPConfig.__annotations__)
        for key in kwargs:
            if meant := get_close_matches(key, options, n=1, cutoff=0.85):
                raise ValueError(
                    f"Expected an option of ICLIPConfig, got {key!r}: correct it to {meant[0]!r}, or remove it."
                )
        for side in self.sub_configs:
            given = getattr(self, side)
            if isinstance(given, dict) and (kind := given.get("model_type")) and kind not in CONFIG_MAPPING:
                raise ValueError(f"Expected {side} of a model_type that Transformers knows, got {kind!r}: correct it.")
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks the values against each other and their ranges; `@strict` has checked the types before."""
        for side in ("vision_config", "text_config"):
            layers = getattr(getattr(self, side), "num_hidden_layers", 1)
            if layers > _MOST_LAYERS:  # each is built before any weight is read
                raise ValueError(
                    f"Expected {side} to have at most {_MOST_LAYERS} layers, got num_hidden_layers={layers}."
                )
        if self.projection_dim < 1:
            raise ValueError(f"Expected projection_dim to be a positive integer, got {self.projection_dim}.")
        if not 0 <= self.value_share <= 1:
            raise ValueError(f"Expected value_share in [0, 1], got {self.value_share}.")
        if not self.map_affinity >= 0:
            raise ValueError(f"Expected map_affinity to be at least 0, got {self.map_affinity}.")
        if not self.max_sharpness > 0:
            raise ValueError(f"Expected max_sharpness to be positive, got {self.max_sharpness}.")
        if (
            self.center_tokens and self.max_over == "channels"
        ):  # what is pooled before the projection is cached uncentred
            raise ValueError(
                'Expected max_over="similarity" with center_tokens=True, got "channels": change one of them.'
            )
        if self.max_over == "similarity" and not (self.dual_projection and self.pooling in ("masked_max", "max")):
            raise ValueError(
                'Expected dual_projection=True and pooling "masked_max" or "max" for max_over="similarity", got '
                f"dual_projection={self.dual_projection} and pooling={self.pooling!r}."
            )
        if not 0 < self.attention_quantile <= 1:
            raise ValueError(f"Expected attention_quantile in (0, 1], got {self.attention_quantile}.")
        if not 0 <= self.logit_scale_init_value <= math.log(100):
            raise ValueError(
                f"Expected logit_scale_init_value in [0, {math.log(100):.4f}], got {self.logit_scale_init_value}: it is the "
                "logarithm of a scale between 1 and 100."
            )


__all__ = ["ICLIPConfig"]

AutoConfig.register("iclip", ICLIPConfig, exist_ok=True)
