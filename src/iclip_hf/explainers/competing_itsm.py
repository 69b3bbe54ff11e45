"""Image-text similarity maps in competition with the nouns that an image may show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..backends.embedded import encoded_vocabulary, vocabulary
from ..model.outputs import ICLIPImageFeatures, ICLIPTextFeatures
from ..model.presence import EVEN_PRIOR, at_prior, check_priors
from ..model.projections import normalize
from ..model.prompts import check_text, split_texts
from ..model.similarity import cosine_similarity_map
from .explainer import Explainer


# A noun and a text whose features have at least this cosine do not compete. The mean of the vocabulary is subtracted
# from both features first.
ALIKE = 0.5


class CompetingITSM(Explainer):
    """
    The map of [`ITSM`], lowered where other nouns match the patch too, see [`compete`]. The weight of each noun is its
    presence in the image at its prior, or 1 if the model has no presence. Nouns with nearly the same meaning as the
    text do not compete.

    Args:
        rivals (`str`, a list or `Mapping[str, float]`, *optional*): the other nouns, in one string ([`split_texts`])
            or as a list, each with the prior 0.5; or a mapping from each noun to its prior; [`vocabulary`] if not
            given.
    """

    needs_layers = False

    def __init__(self, model, rivals: str | Sequence[str] | Mapping[str, float] | None = None):
        super().__init__(model)
        nouns = vocabulary()
        if rivals is None:
            rivals = nouns
        elif not isinstance(rivals, Mapping):
            rivals = dict.fromkeys(map(check_text, split_texts(rivals)), EVEN_PRIOR)
        if not rivals:
            raise ValueError("rivals has no noun: name at least one.")
        check_priors(rivals)
        self.nouns, self.rivals = [*nouns], [*rivals]
        # The mean of the encoded vocabulary, and the encoded rivals, by the templates of the texts. In other
        # templates, nouns would not be similar to the texts.
        self._encoded: dict[tuple[str, ...], tuple[torch.Tensor, ICLIPTextFeatures]] = {}
        self.priors = torch.tensor([*rivals.values()], dtype=torch.float32)
        logit_at_0, logit_at_1 = self.model.logits(torch.tensor([0.0, 1.0], dtype=torch.float32)).tolist()
        self.scale = logit_at_1 - logit_at_0

    @torch.no_grad()
    def forward(
        self,
        pixel_values: torch.Tensor,
        texts: ICLIPTextFeatures,
        features: ICLIPImageFeatures,
        templates: Sequence[str],
    ) -> tuple[torch.Tensor, ICLIPImageFeatures]:
        mean, encoded_rivals = self._encode(tuple(templates))
        scores = self.model.scores(features, encoded_rivals)
        presence = self.model.presence(scores)
        weights = torch.ones_like(scores) if presence is None else at_prior(presence, self.priors.to(presence))
        similarity = _directions(texts, mean) @ _directions(encoded_rivals, mean).mT
        maps, rival_maps = (
            cosine_similarity_map(features.map_embeds, embeds)
            for embeds in (texts.map_text_embeds, encoded_rivals.map_text_embeds)
        )
        maps = compete(maps, rival_maps, weights.unsqueeze(1) * (similarity < ALIKE), self.scale)
        return self.model.weigh_maps(maps, features, texts), features

    def _encode(self, templates: tuple[str, ...]) -> tuple[torch.Tensor, ICLIPTextFeatures]:
        """Returns the mean of the vocabulary `(P,)` and the encoded rivals, in these templates."""
        if templates not in self._encoded:
            encoded_nouns = encoded_vocabulary(self.model, templates)
            same = self.rivals == self.nouns
            encoded_rivals = encoded_nouns if same else self.model.encode_texts(self.rivals, templates)
            self._encoded[templates] = encoded_nouns.text_embeds.float().mean(0), encoded_rivals
        return self._encoded[templates]


def _directions(texts: ICLIPTextFeatures, mean: torch.Tensor) -> torch.Tensor:
    """Subtracts the mean of the vocabulary from the features of texts. Returns unit vectors `(..., T, P)`."""
    return normalize(texts.text_embeds.float() - mean)


def compete(maps: torch.Tensor, rival_maps: torch.Tensor, weights: torch.Tensor, scale: float) -> torch.Tensor:
    """
    Lowers maps `(B, T, h, w)` of cosines where other texts, the rivals, match too. `rival_maps` are
    `(B, num_rivals, h, w)`, with weights `(B, T, num_rivals)` in [0, 1]. A value s becomes
    s - log(exp(k s) + sum_r w_r exp(k s_r)) / (4 k), where k is `scale`. This is s - m / 4, where m is the smooth
    maximum of s and the values of the rivals.
    """
    with torch.autocast(maps.device.type, enabled=False):
        highest = rival_maps.amax(1, keepdim=True)  # so that no power is infinite
        powers = weights.float() @ (scale * (rival_maps - highest)).exp().flatten(2)
        log_sum = powers.unflatten(-1, maps.shape[2:]).log() + scale * highest
        return maps - torch.logaddexp(scale * maps, log_sum) / (4 * scale)
