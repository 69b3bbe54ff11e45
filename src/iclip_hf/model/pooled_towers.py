"""The towers with pooled tokens: what the branches and the loss read of images."""

from collections.abc import Iterable, Mapping

import torch

from .pair_loss import ImageInputs
from .pooling import average_by_affinity, even_patches, normalize_attention, pool, representative_patches
from .towers import ICLIPTowers, ImageTokens


class PooledTowers(ICLIPTowers):
    """Base class of [`ICLIPModel`], which has the buffer `token_mean`."""

    def normalized_attention(self, image: ImageTokens) -> torch.Tensor:
        """
        Returns the class token's attention over the patches, `(B, N)` in [0, 1] (Eq. 9), see `config.attention_norm`.
        """
        return normalize_attention(image.raw_attention, self.config.attention_norm, self.config.attention_quantile)

    def _pooled(self, image: ImageTokens, poolings: Iterable[str | None]) -> dict[str, torch.Tensor]:
        """
        Pools the tokens of images by each of `poolings`, see `config.recognition_poolings`. Returns vectors by the
        name of the pooling: `(B, D)`, or `(B, D + Df)` for poolings of patches with a feature tower, and `(B, Df)` for
        `"feature_average"`. A pooling of None is left out.
        """

        def pool_by(name: str) -> torch.Tensor:
            if name == "feature_average":
                return image.feature_average
            mode, _, norm = name.partition("/")
            attention = normalize_attention(image.raw_attention, norm or "minmax", self.config.attention_quantile)
            return pool(image.patch_tokens, image.class_token, attention, mode)

        return {name: pool_by(name) for name in poolings if name}

    def loss_features(self, image: ImageTokens, poolings: Iterable[str | None]) -> dict[str, torch.Tensor]:
        """
        Returns the features of images that a loss can read, by name. They are the tokens pooled by each of `poolings`,
        see `config.recognition_poolings`. `max_over="similarity"` adds `patches` and `attention`, and
        `known_competition` adds `even_patches`, see [`ImageInputs`]. With a locked tower, the features can be computed
        once and kept.
        """
        config, features = self.config, self._pooled(image, poolings)
        if config.max_over == "channels":
            return features
        tokens, attention = self.centered_tokens(image.patch_tokens), self.normalized_attention(image)
        vision_tokens = tokens[..., : config.vision_config.hidden_size]  # without the features of a feature tower
        chosen = representative_patches(vision_tokens, attention, image.grid, config.map_tokens)
        features["patches"], features["attention"] = self._average_similar(tokens, attention, chosen)
        if config.known_competition:
            even = even_patches(image.grid).to(tokens.device).expand(len(tokens), -1)
            features["even_patches"], _ = self._average_similar(tokens, attention, even)
        return features

    def loss_inputs(self, features: Mapping[str, torch.Tensor]) -> ImageInputs:
        """Selects the inputs of this model's loss from the `loss_features` of images."""
        pooled = torch.cat([features[name] for name in self.config.recognition_poolings], -1)
        return ImageInputs(
            pooled,
            map_pooled=features.get(self.config.map_pooling),
            representative_tokens=features.get("patches"),
            map_attention=features.get("attention"),
            even_tokens=features.get("even_patches"),
        )

    def image_inputs(self, image: ImageTokens) -> ImageInputs:
        """Returns the inputs of this model's loss from the tokens of images."""
        poolings = [*self.config.recognition_poolings, self.config.map_pooling]
        return self.loss_inputs(self.loss_features(image, poolings))

    def _average_similar(
        self, tokens: torch.Tensor, attention: torch.Tensor, chosen: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Averages tokens `(B, N, D)` and attention `(B, N)` over similar patches (`config.map_affinity`). Returns both
        for the patches with the indices `chosen` `(B, n)`, or for all patches: `(B, n, D)` and `(B, n)`.
        """
        chosen_tokens, chosen_attention = tokens, attention
        if chosen is not None:
            chosen_tokens = tokens.take_along_dim(chosen.unsqueeze(-1), 1)
            chosen_attention = attention.take_along_dim(chosen, 1)
        if self.config.map_affinity == 0:
            return chosen_tokens, chosen_attention
        values = torch.cat([tokens, attention.unsqueeze(-1).to(tokens.dtype)], -1)
        # The tokens of the image tower alone decide which patches are similar.
        width = self.config.vision_config.hidden_size
        keys, queries = tokens[..., :width], chosen_tokens[..., :width]
        averaged = average_by_affinity(values, keys, self.config.map_affinity, queries)
        # The attention is copied, so that it does not keep the tokens in memory.
        return averaged[..., :-1], averaged[..., -1].float().contiguous()

    def centered_tokens(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        """Returns patch tokens `(..., D)` as the map branch reads them: with `config.center_tokens`, centered."""
        if not self.config.center_tokens:
            return patch_tokens
        return patch_tokens - self.token_mean.to(patch_tokens)
