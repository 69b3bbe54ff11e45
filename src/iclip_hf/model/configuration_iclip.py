"""Configuration of ICLIP: its towers, the pooling of patch tokens, and the projections."""

import math
import os
from copy import copy
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from typing import Literal

from huggingface_hub.dataclasses import strict, validated_field
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


def _check_within(interval: str, value: float | None) -> None:
    if value is None:
        return
    low, high = map(float, interval[1:-1].split(", "))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):  # also for NaN
        raise ValueError(f"the value must be in {interval}, not {value}.")


def _option(default, interval: str | None = None, *, cached: bool | str = False, read_by: str = "outputs"):
    """
    Defines an option of the configuration.

    Args:
        interval (`str`, *optional*): interval of its values, such as "[0, 1)".
        cached: whether precomputed features of images depend on the option. With `"patches"`, only features that hold
            patches (`max_over="similarity"`) depend on it.
        read_by (`str`): `"outputs"` if outputs of the model depend on the option, `"training"` if only the training
            does, `"weights"` if only the initial weights do.
    """
    checks = [] if interval is None else [partial(_check_within, interval)]
    return validated_field(checks, default=default, metadata={"cached": cached, "read_by": read_by})


@strict
class ICLIPConfig(PreTrainedConfig):
    r"""
    Configuration of an [`ICLIPModel`]. The defaults are those of the paper: a locked DINO ViT-B/16 image tower, a CLIP
    text tower, masked max pooling and dual projections.

    A *branch* has an image and a text projection. The *map branch* computes the similarity maps: it is the
    interpretability branch, or the only branch if there are no dual projections.

    The options of the paper:

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*): configuration of the image tower, a ViT with a class
            token.
        text_config (`PreTrainedConfig` or `dict`, *optional*): configuration of the text tower.
        lock_vision (`bool`, defaults to `True`): whether the image tower is locked. A locked tower has no gradients
            and stays in eval mode.
        text_pooling (`str`, defaults to `"eos"`): how a text is pooled. `"eos"` is the pooled output of a CLIP or
            SigLIP tower. `"mean"` is the mean over the attended tokens.
        projection_dim (`int`, defaults to 512): width P of the shared image-text space.
        dual_projection (`bool`, defaults to `True`): whether there are two branches (Eq. 12): the recognition
            branch, whose pooling is `recognition_pooling`, and the interpretability branch. If `False`, one branch
            computes scores and maps (Table 3).
        pooling (`str`, defaults to `"masked_max"`): how the map branch pools patch tokens into one vector:
            `"masked_max"` (Eq. 9, 10), `"max"`, `"average"` or `"class_token"`, the rows of Table 2.
        attention_norm (`str`, defaults to `"minmax"`): how the class token's attention A is scaled to [0, 1].
            The paper's `"minmax"` maps the smallest value of the patches to 0 and the largest to 1. `"quantile"` maps
            the quantile `attention_quantile` to 1 instead and clips larger values, so that one very large value does
            not make all others small.
        attention_quantile (`float` in (0, 1], defaults to 0.9): the quantile of `attention_norm="quantile"`.
        logit_scale_init_value (`float` in [0, ln 100], defaults to 2.6592): initial value of the logarithm of the
            logit scale, ln(1 / 0.07).

        feature_config (`PreTrainedConfig` or `dict`, *optional*): configuration of a feature tower, a second image
            tower that is always locked: a convolutional backbone of timm (`TimmWrapperConfig` of Transformers). Its
            last feature map is resized to the grid of patches, reduced to `feature_dim` channels by a fixed linear map
            (`feature_reduction`), and joined to the patch tokens of the image tower. Scores and maps are computed from
            both. Attention, `value_share`, `map_affinity` and the selection of `map_tokens` depend on the image tower
            only. A feature tower requires the package timm. This option and the options below are not in the paper.
        feature_dim (`int`, defaults to 256): number Df of features that the feature tower adds to the patch tokens, at
            most the number of channels of its last feature map.
        feature_image_mean, feature_image_std (`list[float]`, *optional*): mean and standard deviation of each channel,
            by which pixel values *that the processor has normalized* are normalized again for the feature tower:
            (pixel value - mean) / std. [`ICLIPModel.from_vision_text_pretrained`] computes them from the normalization
            of the processor and the normalization that the feature tower was trained with, so a configuration for new
            models leaves them out.
        vision_downsampling (`int`, defaults to 1): side in pixels of the squares that are averaged to one pixel for
            the image tower. The feature tower sees all pixels. The side of the model's patches is the side of the
            image tower's patches times this factor.

        map_attention (`str`, defaults to `"similarity"`): how A weights the similarity map. `"similarity"` multiplies
            the cosines by A. `"none"` does not use A. `"additive"` changes the differences d of the cosines from
            their mean over the patches: a positive d becomes d + A min(d, 1 / (2 `max_sharpness`)), with A stretched
            to [0, 1], and a negative d becomes d / 10. `"signed"` does the same with A times a weight of the text in
            [-1, 1], which is learned from noun prompts: texts of objects raise patches with attention, and texts of
            the background ("sky") lower them.
        max_over (`str`, defaults to `"channels"`): where `"masked_max"` and `"max"` take the maximum. `"channels"`
            takes it for each channel over the tokens, before the projection (Eq. 10). `"similarity"` takes it for each
            text over the similarities of the patches, after the projection ([`~pooling.pool_similarities`]): the
            trained score is the peak of the map. `"similarity"` requires `dual_projection`, because the map branch
            then has no image vector.
        max_sharpness (`float`, defaults to 10): sharpness of the smooth maximum with `max_over="similarity"`. The
            larger it is, the nearer the smooth maximum is to the maximum. Must be positive.
        center_tokens (`bool`, defaults to `False`): whether the map branch subtracts the mean of the training images'
            patch tokens from its patch tokens. The model stores this mean as `token_mean`. Requires
            `max_over="similarity"`.
        value_share (`float` in [0, 1], defaults to 0): weight of the patch's own value in the output of the image
            tower's last attention. 0 keeps the attention of the tower. With 1, each patch attends to itself only, as
            in MaskCLIP, so that its token describes its own position. The class token is not changed. Requires SDPA
            attention.
        map_affinity (`float`, defaults to 0): sharpness of the average over similar patches. The token and the
            attention of each patch become the mean over all patches, weighted by softmax(map_affinity * cosine of the
            tokens). 0 disables the average.
        map_cell_size (`int`, defaults to 0): side in pixels of the cells of a map, at most the side of a patch. The
            image tower's tokens are resized to the grid of the cells, and so is the feature map of the feature tower,
            which may be finer than the patches. Scores read the patches. With 0, the cells of a map are the patches.
        recognition_share (`float` in [0, 1), defaults to 0): weight w of the recognition branch in the map. The values
            of the map are (1 - w) times the cosine of the map branch plus w times the cosine of the recognition
            branch, whose projection of the average patch is applied to each patch. Requires
            `recognition_pooling="class_and_average"` or `"feature_average"`.

        recognition_pooling (`str`, defaults to `"class_token"`): how the recognition branch of dual projections pools
            an image. `"class_token"` is the paper's. `"class_and_average"` is the class token followed by the mean
            patch token, as in DINOv2's linear evaluation and dino.txt. `"feature_average"` is the mean of the reduced
            feature map of the feature tower, which requires `feature_config`. With `vision_downsampling`, this mean is
            averaged with the mean of the feature map of the downsampled image. `"class_and_average"` and
            `"feature_average"` require `dual_projection`.
        peak_share (`float` in [0, 1], defaults to 0): weight w of the map's peak in the score of an image and a text.
            The score is (1 - w) times the cosine of the recognition branch plus w times the highest cosine of the map.
            A small object changes the peak more than it changes the vector of the whole image. Losses, `image_embeds`
            and gradient methods do not read the peak.
        image_hidden_size, text_hidden_size (`int`, default to 0): hidden width of the MLP in the image projection of
            the recognition branch, and of the MLP in the text projections, see [`~projections.Projection`]. With 0, a
            projection is linear, as in the paper.
        logit_bias_init_value (`float`, *optional*): initial value of the bias of the recognition branch's logits. With
            a bias, the sigmoid of the logits is a probability, as in SigLIP. It requires training with a sigmoid, such
            as the noun loss. Without a bias, the model has no presence.
        presence_bias (`float`, defaults to 0): number added to the logits for the presence, so that the presence is
            calibrated at a prior of 0.5. The logit bias itself fits the fraction of positives in training.

        noun_weight (`float` in [0, 1], defaults to 0.5): weight of the nouns in the loss of a branch, if the batch has
            nouns. With `max_over="channels"`, only the recognition branch learns from nouns.
        unknown_weight (`float` in [0, 1], defaults to 0.1): weight of unknown nouns in the loss of a recognition
            branch with a bias. A noun is unknown if no text of the image names it and no label excludes it.
        distillation_weight (`float`, defaults to 1): weight of a loss in which the recognition branch learns the
            probabilities of a classifier ([`~losses.distillation_loss`]) on images that have `class_probabilities`. A
            branch with a bias also learns from the probabilities which classes are absent
            ([`~loss_terms.class_presence_loss`]).
        noun_competition (`float` in [0, 1], defaults to 0): part of the noun loss of the map branch in which *all
            nouns of the batch* compete for the patches of *every* image ([`~losses.competition_loss`]).
        known_competition (`float`, defaults to 0): weight of a loss in which only *the known nouns of an image*, known
            to be shown or absent, compete for its patches: each noun shown has patches, and each patch shows one of
            the nouns shown ([`~loss_terms.known_competition_loss`]). The loss is computed on images whose labels are
            complete for the background, and added to the loss of the map branch. It requires `max_over="similarity"`.
            With a weight above 0, the loss of `noun_competition` also depends on the place of nouns at the top or the
            bottom of images ([`~loss_terms.shares_by_place`]).
        map_tokens (`int`, at least 5, defaults to 20): number of patches that represent an image in the loss of the
            map branch with `max_over="similarity"` ([`~pooling.representative_patches`]).

    Raises:
        `ValueError`: an option is misspelt. `huggingface_hub.errors.StrictDataclassError`: a value has a wrong type,
        is not one of the listed names, or is out of range, or an option lacks another one that it requires.
    """

    model_type = "iclip"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="vit", init_kwargs={"layer_norm_eps": 1e-6}
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model"),
        "feature_config": SubConfigSpec(config_class=AutoConfig, model_type="timm_wrapper", optional=True),
    }

    # the paper's
    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    lock_vision: bool = _option(True, read_by="training")
    text_pooling: Literal["eos", "mean"] = _option("eos")
    projection_dim: int = _option(512, "[1, inf)")
    dual_projection: bool = _option(True)
    pooling: Literal["masked_max", "max", "average", "class_token"] = _option("masked_max")
    attention_norm: Literal["minmax", "quantile"] = _option("minmax", cached="patches")
    attention_quantile: int | float = _option(0.9, "(0, 1]", cached=True)
    logit_scale_init_value: int | float = _option(2.6592, f"[0, {math.log(100)}]", read_by="weights")

    # the feature tower
    feature_config: PreTrainedConfig | dict | None = None
    feature_dim: int = _option(256, "[1, inf)")
    feature_image_mean: list[int | float] | None = _option(None, cached=True)
    feature_image_std: list[int | float] | None = _option(None, cached=True)
    vision_downsampling: int = _option(1, "[1, inf)", cached=True)

    # the map
    map_attention: Literal["similarity", "additive", "signed", "none"] = _option("similarity")
    max_over: Literal["channels", "similarity"] = _option("channels", cached=True)
    max_sharpness: int | float = _option(10.0, "(0, inf)")
    center_tokens: bool = _option(False, cached="patches")
    value_share: int | float = _option(0.0, "[0, 1]", cached=True)
    map_affinity: int | float = _option(0.0, "[0, inf)", cached="patches")
    map_cell_size: int = _option(0, "[0, inf)")
    recognition_share: int | float = _option(0.0, "[0, 1)")

    # recognition and presence
    recognition_pooling: Literal["class_token", "class_and_average", "feature_average"] = _option("class_token")
    peak_share: int | float = _option(0.0, "[0, 1]")
    image_hidden_size: int = _option(0, "[0, inf)")
    text_hidden_size: int = _option(0, "[0, inf)")
    logit_bias_init_value: int | float | None = _option(None, "(-inf, inf)", read_by="weights")
    presence_bias: int | float = _option(0.0, "(-inf, inf)")

    # the loss of nouns
    noun_weight: int | float = _option(0.5, "[0, 1]", read_by="training")
    unknown_weight: int | float = _option(0.1, "[0, 1]", read_by="training")
    distillation_weight: int | float = _option(1.0, "[0, inf)", read_by="training")
    noun_competition: int | float = _option(0.0, "[0, 1]", read_by="training")
    known_competition: int | float = _option(0.0, "[0, inf)", read_by="training")
    map_tokens: int = _option(20, "[5, inf)", cached="patches", read_by="training")

    def __post_init__(self, **kwargs):
        # The base class accepts any key, so a misspelt option would have no effect.
        for key in kwargs:
            if meant := get_close_matches(key, ICLIPConfig.__annotations__, n=1, cutoff=0.85):
                raise ValueError(f"ICLIPConfig has no option {key!r}: correct it to {meant[0]!r}, or remove it.")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Like the base class, but ignores the attention implementation in a file."""
        return super().from_dict(without_attention(config_dict), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """
        Like the base class, but without paths of towers on this machine, and without pipelines whose code is not in
        the folder: `pipeline` would ask for it.
        """
        config = copy(self)
        for name in self.sub_configs:
            tower = copy(getattr(self, name))
            source = getattr(tower, "_name_or_path", "") or ""
            if os.path.isabs(source) or os.path.exists(source):
                tower._name_or_path = ""
                setattr(config, name, tower)
        names = [pipeline["impl"] for pipeline in getattr(self, "custom_pipelines", {}).values()]
        # Code on the Hub is named "repository--module.Class".
        modules = [name.split(".")[0] for name in names if "--" not in name]
        if not all(os.path.isfile(os.path.join(save_directory, f"{module}.py")) for module in modules):
            del config.custom_pipelines
        super(ICLIPConfig, config).save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def option_names(cls, *read_by: str) -> list[str]:
        """Returns the names of the options, except the towers. `read_by` selects options with one of these marks."""
        marks = {option.name: option.metadata["read_by"] for option in fields(cls) if "read_by" in option.metadata}
        return [name for name, mark in marks.items() if not read_by or mark in read_by]

    @property
    def cache_options(self) -> dict[str, object]:
        """
        The options that precomputed features of images depend on, and whether the features hold evenly spread patches
        (`even_patches`) and the vectors of `recognition_pooling="feature_average"`.
        """
        marks = (True,) if self.max_over == "channels" else (True, "patches")
        names = [option.name for option in fields(self) if option.metadata.get("cached") in marks]
        options = {name: getattr(self, name) for name in names} | {"even_patches": self.known_competition > 0}
        if self.recognition_pooling == "feature_average":  # other poolings share their features
            options["feature_average"] = True
        return options

    @property
    def map_pooling(self) -> str | None:
        """The pooling of the map branch, a name in [`~pooling.POOLINGS`]; None with `max_over="similarity"`."""
        if self.max_over == "similarity":
            return None
        return f"masked_max/{self.attention_norm}" if self.pooling == "masked_max" else self.pooling

    @property
    def recognition_poolings(self) -> list[str]:
        """
        The poolings of the recognition branch, whose vectors are concatenated: names in [`~pooling.POOLINGS`], or
        `"feature_average"`. Without dual projections, the pooling is that of the map branch.
        """
        if not self.dual_projection:
            return [self.map_pooling]
        if self.recognition_pooling == "feature_average":
            return ["feature_average"]
        average = ["average"] if self.recognition_pooling == "class_and_average" else []
        return ["class_token", *average]

    @property
    def map_scale(self) -> float:
        """
        Scale of the cosines of patches and texts in losses of competing texts: 2 `max_sharpness`. The inverse of the
        scale is the most that additive or signed attention adds to a map.
        """
        return 2 * self.max_sharpness

    @property
    def patch_dim(self) -> int:
        """Width of the patch tokens: the image tower's, plus `feature_dim` with a feature tower."""
        return self.vision_config.hidden_size + (0 if self.feature_config is None else self.feature_dim)

    def validate_architecture(self):
        """Checks combinations of options. `@strict` has checked types and ranges."""
        # With "channels", tokens are pooled before the projection, and the feature cache holds the pooled tokens,
        # which are not centered.
        if self.center_tokens and self.max_over == "channels":
            raise ValueError('center_tokens=True needs max_over="similarity".')
        if self.max_over == "similarity" and not (self.dual_projection and self.pooling in ("masked_max", "max")):
            raise ValueError('max_over="similarity" needs dual_projection=True and pooling "masked_max" or "max".')
        if self.known_competition > 0 and self.max_over == "channels":
            raise ValueError('known_competition needs max_over="similarity".')
        if self.recognition_pooling != "class_token" and not self.dual_projection:
            raise ValueError(f"recognition_pooling={self.recognition_pooling!r} needs dual_projection=True.")
        if self.recognition_pooling == "feature_average" and self.feature_config is None:
            raise ValueError('recognition_pooling="feature_average" needs a feature_config.')
        if self.recognition_share > 0 and self.recognition_pooling == "class_token":
            raise ValueError('recognition_share needs another recognition_pooling than "class_token".')
        if self.feature_config is not None and self.map_pooling == "class_token":
            raise ValueError('feature_config needs another pooling than "class_token": it adds features to patches.')


def without_attention(content: dict) -> dict:
    """Returns the content of a config.json without its attention implementation, which could name code of the Hub."""
    return {name: value for name, value in content.items() if not name.endswith("attn_implementation")}


def patch_side(config: PreTrainedConfig) -> int:
    """Returns the side in pixels of the square patches of a model or an image tower."""
    size = getattr(config, "vision_config", config).patch_size  # some towers have (height, width)
    return (size if isinstance(size, int) else size[0]) * getattr(config, "vision_downsampling", 1)


__all__ = ["ICLIPConfig"]

# The trusted code of a model folder must not replace the class of the package for other models.
if __name__.startswith("iclip_hf.") or "iclip" not in CONFIG_MAPPING:
    AutoConfig.register("iclip", ICLIPConfig, exist_ok=True)
