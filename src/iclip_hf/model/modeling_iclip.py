"""ICLIP: a locked image tower, masked max pooling and dual projections for recognition and interpretability."""

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForZeroShotImageClassification
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .configuration_iclip import ICLIPConfig
from .losses import BatchNouns, row_ids
from .outputs import ICLIPImageFeatures, ICLIPOutput, ICLIPTextFeatures
from .pair_loss import ImageInputs, in_chunks, pair_loss
from .pooled_towers import PooledTowers
from .projections import ICLIPBranch, Projection, average_prompts, join_branches, normalize
from .similarity import cosine_similarity_map, cosines, min_max_normalize
from .tower_loading import check_weights, keep_absolute_path, load_tower, tower_config
from .towers import EOS_TEXT_TOWERS, resize_grid


# Prefixes of the names of weights that belong to the model itself, not to a tower.
OWN_WEIGHTS = ("recognition.", "interpretability.", "feature_reduction.", "token_mean", "attention_direction")
# Additive and signed attention multiply the part of a map below its mean by this factor, which keeps the order of its
# values.
BELOW_MEAN = 0.1


class ICLIPModel(PooledTowers):
    """
    Contrastive image-text model that explains itself. One forward pass computes image and text embeddings and, for
    each text, a map of the patches that match it.

    Any image tower with a class token (ViT/DINO, DINOv2 with or without registers, DINOv3, CLIP) can be combined with
    any text tower (CLIP, SigLIP, BERT-like), and with a convolutional backbone of timm as a second image tower
    (`config.feature_config`).

    Example:

    ```python
    >>> from PIL import Image
    >>> from iclip_hf import ICLIPModel, ICLIPProcessor

    >>> model = ICLIPModel.from_pretrained("org/iclip-vit-b16")
    >>> processor = ICLIPProcessor.from_pretrained("org/iclip-vit-b16")
    >>> image = Image.open("dog.jpg")
    >>> inputs = processor(images=image, labels=["dog", "red ball"], return_tensors="pt")
    >>> outputs = model(**inputs, output_similarity_maps=True)
    >>> outputs.logits_per_image.shape
    torch.Size([1, 2])
    >>> maps = processor.post_process_similarity_maps(outputs.similarity_maps, [(image.height, image.width)])
    ```
    """

    base_model_prefix = "iclip"
    input_modalities = ("image", "text")
    # A projection adds the outputs of its two parts, so both are on one device. The towers name their own modules.
    _no_split_modules = ["Projection"]

    def __init__(self, config: ICLIPConfig, *towers, **named_towers):
        super().__init__(config, *towers, **named_towers)
        image_dim, text_dim = config.vision_config.hidden_size, config.text_config.hidden_size
        if config.text_pooling == "eos":
            text_dim = getattr(config.text_config, "projection_size", text_dim)  # the width of SigLIP's head
        pooled_dims = {"class_token": image_dim, "feature_average": config.feature_dim}
        recognition_dim = sum(pooled_dims.get(pooling, config.patch_dim) for pooling in config.recognition_poolings)
        self.recognition = ICLIPBranch(config, recognition_dim, text_dim, recognises=True)
        self.interpretability = None
        if config.dual_projection:
            self.interpretability = ICLIPBranch(config, config.patch_dim, text_dim)
        if config.center_tokens:
            self.token_mean = nn.Buffer(torch.zeros(config.patch_dim))
        if config.map_attention == "signed":
            self.attention_direction = nn.Parameter(torch.zeros(config.projection_dim))
        self.post_init()
        self.train(self.training)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Projection):
            init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            if module.hidden is not None:
                init.normal_(module.hidden[0].weight, std=module.weight.shape[1] ** -0.5)
                init.zeros_(module.hidden[-1].weight)
        elif isinstance(module, ICLIPBranch):
            init.constant_(module.logit_scale, float(self.config.logit_scale_init_value))
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, float(self.config.logit_bias_init_value))
        elif module is self.feature_reduction:  # zeros until a training sets the weights
            init.zeros_(module.weight)
        elif isinstance(module, ICLIPModel):
            for name in ("token_mean", "attention_direction"):
                if hasattr(module, name):
                    init.zeros_(getattr(module, name))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        Like the base class. Raises `ValueError` if weights are missing, contain NaN or infinity, or belong to a part
        that the configuration does not have, such as the bias of a model with presence.
        """
        model, loading = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if pretrained_model_name_or_path is not None:  # otherwise the caller passed a `state_dict` and checks it
            check_weights(pretrained_model_name_or_path, model, loading["missing_keys"])
            # Unused weights of a tower, such as a pooler's, and of a model that contains this one are no error.
            names = (name.removeprefix(f"{cls.base_model_prefix}.") for name in loading["unexpected_keys"])
            unused = sorted(name for name in names if name.startswith(OWN_WEIGHTS))
            if unused:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: its config.json describes a model without {', '.join(unused)}, "
                    "which is among the weights; use the config.json that was saved with them."
                )
            keep_absolute_path(pretrained_model_name_or_path, model)
        return (model, loading) if output_loading_info else model

    def load_state_dict(self, state_dict, *args, **kwargs):
        """
        Like the base class, but also accepts weights by their names in files: Trainer loads its checkpoints by this
        method.
        """
        if state_dict.keys() - self.state_dict().keys():
            loaded, loading = type(self).from_pretrained(
                None, config=self.config, state_dict=dict(state_dict), dtype=self.dtype, output_loading_info=True
            )
            renamed = {
                name: value for name, value in loaded.state_dict().items() if name not in loading["missing_keys"]
            }
            state_dict = renamed | {name: state_dict[name] for name in loading["unexpected_keys"]}
        return super().load_state_dict(state_dict, *args, **kwargs)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str, text: str, features: str | None = None, image_processor=None, **model_options
    ) -> "ICLIPModel":
        """
        Joins pretrained towers with newly initialised projections, in float32.

        Args:
            vision (`str`): folder or Hub id of the image tower, or of a two-tower model such as CLIP, whose image
                tower is used.
            text (`str`): folder or Hub id of the text tower, or of a two-tower model, whose text tower is used.
            features (`str`, *optional*): folder or Hub id of a feature tower, a convolutional backbone of timm, see
                `feature_config` of [`ICLIPConfig`].
            image_processor (*optional*): image processor of a model with a feature tower; the image tower's if not
                given. `feature_image_mean` and `feature_image_std` default to the values that convert the pixel values
                of this processor to the pixel values that the feature tower was trained with.
            model_options: options of [`ICLIPConfig`]. The configurations of the towers default to those of the
                checkpoints. `text_pooling` defaults to `"eos"` for CLIP and SigLIP towers, and to `"mean"` for others.

        Returns:
            [`ICLIPModel`] in eval mode.
        """
        checkpoints = {"vision_config": vision, "text_config": text}
        if features:
            checkpoints["feature_config"] = features
        defaults = {name: tower_config(checkpoint, name) for name, checkpoint in checkpoints.items()}
        has_eos = defaults["text_config"].model_type in EOS_TEXT_TOWERS
        defaults["text_pooling"] = "eos" if has_eos else "mean"
        # None leaves the configuration of a tower to its checkpoint. For other options, None is a value.
        given = {name: value for name, value in model_options.items() if value is not None or name not in checkpoints}
        config = cls.config_class(**{**defaults, **given})
        if config.feature_config is not None and not features:
            raise ValueError("The configuration has a feature tower: name one (features, --feature_tower).")
        cls._check_tower_types(config)
        towers = (load_tower(getattr(config, name), checkpoint) for name, checkpoint in checkpoints.items())
        model = cls(config, *towers).eval()
        if features and config.feature_image_mean is None:
            image_processor = image_processor or AutoImageProcessor.from_pretrained(vision, trust_remote_code=False)
            config.feature_image_mean, config.feature_image_std = model.feature_model.conversion_from(image_processor)
        return model

    @property
    def map_branch(self) -> ICLIPBranch:
        """The map branch: the interpretability branch, or the only branch."""
        return self.recognition if self.interpretability is None else self.interpretability

    def scores(self, image: ICLIPImageFeatures, text: ICLIPTextFeatures) -> torch.Tensor:
        """
        Computes the scores of images and texts, `(B, T)` in [-1, 1], float32. A score is the cosine of the recognition
        branch. With `config.peak_share`, a part of it is the highest cosine of the map. The vectors of `text` are
        `(T, P)` or `(B, T, P)`.
        """
        scores = cosines(image.image_embeds, text.text_embeds)
        if share := self.config.peak_share:
            peaks = cosine_similarity_map(image.patch_embeds, text.map_text_embeds).amax((2, 3))
            scores = (1 - share) * scores + share * peaks
        return scores

    def presence(self, scores: torch.Tensor) -> torch.Tensor | None:
        """
        Computes the probability that images show texts, at a prior of 0.5: the sigmoid of scale * score + logit bias
        + `config.presence_bias`. `scores` are from [`~ICLIPModel.scores`]. Returns float32 values in [0, 1] of the
        same shape, or None for a model without a logit bias, which was trained with a softmax.
        """
        if self.config.logit_bias_init_value is None:
            return None
        return (self.recognition(scores.float()) + self.config.presence_bias).sigmoid()

    def embed_patches(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        """
        Projects patch tokens `(..., D)` from [`~pooled_towers.PooledTowers.centered_tokens`] to unit vectors that a
        map compares with texts: `(..., P)`, or `(..., 2 P)` with a `recognition_share`.
        """
        patch_embeds = self.map_branch.embed_image(patch_tokens)
        if weight := self.config.recognition_share:
            # The recognition branch was trained with tokens that are not centered. They are the last part of its
            # input. The other parts, such as the class token, are zero here.
            tokens = patch_tokens
            if self.config.center_tokens:
                tokens = tokens + self.token_mean.to(tokens)
            projection = self.recognition.visual_projection
            if self.config.recognition_pooling == "feature_average":
                tokens = tokens[..., -self.config.feature_dim :]
            recognition_embeds = normalize(projection(tokens, linear=True).float())
            patch_embeds = join_branches(patch_embeds, recognition_embeds, weight)
        return patch_embeds.to(patch_tokens.dtype)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> ICLIPImageFeatures:
        """
        Encodes images.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): from [`ICLIPProcessor`]. H and W are multiples of
            the patch size.

        Returns:
            [`ICLIPImageFeatures`].
        """
        image = self.encode_image(pixel_values, **kwargs)
        attention = self.normalized_attention(image)
        poolings = [*self.config.recognition_poolings, self.config.map_pooling]
        inputs = self.loss_inputs(self._pooled(image, poolings))
        averaged, map_attention = self._average_similar(self.centered_tokens(image.patch_tokens), attention)
        cell_embeds = None
        if cell_size := self.config.map_cell_size:
            grid = tuple(side // cell_size for side in pixel_values.shape[-2:])
            cells = self.centered_tokens(self.resize_tokens(image, grid))
            cell_attention = resize_grid(attention.unsqueeze(-1), image.grid, grid).squeeze(-1)
            cells, map_attention = self._average_similar(cells, cell_attention)
            cell_embeds = self.embed_patches(cells).unflatten(1, grid)
        projected = self.recognition.visual_projection(inputs.pooled)
        map_image_embeds = None
        if inputs.map_pooled is not None:
            map_image_embeds = self.map_branch.embed_image(inputs.map_pooled).to(projected.dtype)
        return ICLIPImageFeatures(
            last_hidden_state=image.tower_output.last_hidden_state,
            hidden_states=image.tower_output.hidden_states,
            attentions=image.tower_output.attentions,
            pooler_output=projected,
            image_embeds=normalize(projected),
            map_image_embeds=map_image_embeds,
            patch_embeds=self.embed_patches(averaged).unflatten(1, image.grid),
            cell_embeds=cell_embeds,
            patch_tokens=image.patch_tokens,
            attention=attention,
            map_attention=map_attention,
            feature_average=image.feature_average,
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        num_templates: int = 1,
        **kwargs,
    ) -> ICLIPTextFeatures:
        """
        Encodes texts. The result can be used with any number of images.

        Args:
            input_ids (`torch.Tensor` of shape `(M, L)`, or `(B, M, L)` with a list of texts for each image): token
                ids.
            attention_mask, token_type_ids (`torch.Tensor` of the same shape, *optional*): outputs of the tokenizer.
            num_templates (`int`, defaults to 1): number of consecutive texts that are prompts of one label. Their unit
                vectors are averaged, so there are T = M / num_templates labels.

        Returns:
            [`ICLIPTextFeatures`].
        """
        shape, inputs = input_ids.shape[:-1], (input_ids, attention_mask, token_type_ids)
        inputs = [None if tensor is None else tensor.flatten(0, -2) for tensor in inputs]
        pooled, outputs = self.encode_text(*inputs, **kwargs)
        projected = self.recognition.text_projection(pooled).unflatten(0, shape)
        text_embeds = average_prompts(normalize(projected), num_templates)
        map_text_embeds = average_prompts(self.map_branch.embed_text(pooled).unflatten(0, shape), num_templates)
        attention_weights = None
        if self.config.map_attention == "signed":
            attention_weights = self.attention_weights(map_text_embeds).clamp(-1, 1)
        if weight := self.config.recognition_share:
            map_text_embeds = join_branches(map_text_embeds, text_embeds.float(), weight)
        return ICLIPTextFeatures(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            pooler_output=projected if num_templates == 1 else text_embeds,
            text_embeds=text_embeds,
            map_text_embeds=map_text_embeds.to(projected.dtype),
            attention_weights=attention_weights,
        )

    def attention_weights(self, map_text_embeds: torch.Tensor) -> torch.Tensor:
        """
        Computes the weight of the attention in the map of each text from unit vectors of the map branch `(..., T, P)`.
        Returns `(..., T)`, float32, not clamped to [-1, 1].
        """
        direction = self.attention_direction.to(map_text_embeds.device, torch.float32)
        with torch.autocast(direction.device.type, enabled=False):
            return self.config.map_scale * (map_text_embeds.float() @ direction)

    def similarity_maps(
        self, image: torch.FloatTensor | ICLIPImageFeatures, text: ICLIPTextFeatures
    ) -> torch.FloatTensor:
        """
        Computes raw image-text similarity maps: the cosines of patches and texts (Eq. 1-3), weighted by the class
        token's attention. See `config.map_attention` for the weighting, and `config.map_affinity` for the average over
        similar patches.

        Args:
            image (`torch.Tensor` of shape `(B, 3, H, W)` or [`ICLIPImageFeatures`]): pixel values, or the features of
                images.
            text ([`ICLIPTextFeatures`]): from `get_text_features`.

        Returns:
            `torch.Tensor` of shape `(B, T, h, w)`, in [-1, 1]. Additive or signed attention adds up to
            1 / `config.map_scale`. [`ICLIPProcessor.post_process_similarity_maps`] enlarges and stretches the maps.
        """
        if isinstance(image, torch.Tensor):
            image = self.get_image_features(image)
        return self.weigh_maps(cosine_similarity_map(image.map_embeds, text.map_text_embeds), image, text)

    def weigh_maps(
        self, maps: torch.FloatTensor, image: ICLIPImageFeatures, text: ICLIPTextFeatures
    ) -> torch.FloatTensor:
        """Weighs maps of cosines `(B, T, h, w)` by the class token's attention, as `config.map_attention` says."""
        attention = image.map_attention.unflatten(-1, image.map_embeds.shape[1:3]).unsqueeze(1).to(maps)
        if self.config.map_attention == "similarity":
            maps = maps * attention
        elif self.config.map_attention in ("additive", "signed"):
            attention = min_max_normalize(attention)
            if self.config.map_attention == "signed" and text.attention_weights is not None:
                attention = attention * text.attention_weights[..., None, None].to(attention)
            # The mean of the differences from the lowest value is exact for a constant map.
            low = maps.amin((-2, -1), keepdim=True)
            mean = low + (maps - low).mean((-2, -1), keepdim=True)
            above, below = (maps - mean).clamp(min=0), (maps - mean).clamp(max=0)
            raised = above.clamp(max=1 / self.config.map_scale)
            maps = mean + above + attention * raised + BELOW_MEAN * below
        return maps

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        text_features: ICLIPTextFeatures | None = None,
        num_templates: int = 1,
        image_inputs: ImageInputs | None = None,
        text_inputs: torch.Tensor | None = None,
        nouns: dict[str, torch.Tensor] | None = None,
        return_loss: bool | None = None,
        chunk_size: int | None = None,
        output_similarity_maps: bool = False,
        **kwargs,
    ) -> ICLIPOutput:
        """
        Compares images with texts.

        Args:
            input_ids (`torch.Tensor` of shape `(M, L)`, or `(B, M, L)` with a list of texts for each image): token
                ids. With `return_loss`, `(M, L)`: the first B texts are the captions of the images, the last K are
                prompts of classes, and the others are noun prompts.
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): from [`ICLIPProcessor`].
            attention_mask, token_type_ids (`torch.Tensor` of the shape of `input_ids`, *optional*): outputs of the
                tokenizer.
            text_features ([`ICLIPTextFeatures`], *optional*): encoded texts, instead of `input_ids`.
            num_templates (`int`, defaults to 1): number of consecutive texts that are prompts of one label, see
                `get_text_features`.
            image_inputs, text_inputs ([`ImageInputs`] and `torch.Tensor` of shape `(M, Dt)`, *optional*): results of
                `image_inputs` and `encode_text`, instead of `pixel_values` and `input_ids`, with `return_loss`.
            nouns (`dict` of `torch.Tensor`, *optional*): the nouns of the M - B - K noun prompts, as
                [`PairCollator`] returns them: the arguments of [`BatchNouns.gathered`].
            return_loss (`bool`, *optional*): whether to return the loss of B images with their captions and nouns,
                over all processes.
            chunk_size (`int`, *optional*): number of images, and of texts, that a tower encodes at once for the loss.
                Memory holds the activations of one chunk; the backward pass computes them again.
            output_similarity_maps (`bool`, defaults to `False`): whether to return raw maps.

        Returns:
            [`ICLIPOutput`].
        """
        tokenized = (input_ids, attention_mask, token_type_ids)
        encoded_texts = text_inputs if return_loss else text_features
        if (pixel_values is None and image_inputs is None) or (input_ids is None and encoded_texts is None):
            raise ValueError("Give pixel_values and input_ids, or call get_image_features or get_text_features.")
        if return_loss:
            if image_inputs is None:

                def encode_images(images: torch.Tensor) -> ImageInputs:
                    return self.image_inputs(self.encode_image(images, **kwargs))

                image_inputs = ImageInputs(*in_chunks(encode_images, chunk_size, pixel_values))
            if text_inputs is not None:
                text_ids = row_ids(text_inputs)
            else:
                text_ids = row_ids(input_ids if attention_mask is None else input_ids * attention_mask)

                def encode_texts(*tokens: torch.Tensor | None) -> tuple[torch.Tensor]:
                    return self.encode_text(*tokens, **kwargs)[:1]

                (text_inputs,) = in_chunks(encode_texts, chunk_size, *tokenized)
            nouns = BatchNouns.gathered(**nouns) if nouns else None
            return pair_loss(self, image_inputs, text_inputs, text_ids, nouns)
        kwargs["return_dict"] = True
        image = self.get_image_features(pixel_values, **kwargs)
        if text_features is None:
            text_features = self.get_text_features(*tokenized, num_templates, **kwargs)
        logits_per_image = self.recognition(self.scores(image, text_features))
        return ICLIPOutput(
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.mT,
            image_embeds=image.image_embeds,
            text_embeds=text_features.text_embeds,
            map_image_embeds=image.map_image_embeds,
            map_text_embeds=text_features.map_text_embeds,
            patch_embeds=image.patch_embeds,
            attention=image.attention,
            similarity_maps=self.similarity_maps(image, text_features) if output_similarity_maps else None,
            vision_model_output=image,
            text_model_output=text_features,
        )


__all__ = ["ICLIPModel", "ICLIPOutput", "ICLIPImageFeatures", "ICLIPTextFeatures"]

AutoModel.register(ICLIPConfig, ICLIPModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(ICLIPConfig, ICLIPModel, exist_ok=True)
