"""Statistics of training images, which a model keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from tqdm import tqdm
from transformers.trainer_utils import has_length
from transformers.utils import SAFE_WEIGHTS_NAME

from ..data.pairs import PairDataset
from ..model.modeling_iclip import ICLIPModel
from ..model.processing_iclip import ICLIPProcessor
from ..utils.distributed import broadcast_from_main, partial_state


_IMAGES = 1024  # statistics are computed from this number of images, or up to twice as many, evenly spread
_DEVIATION = 4.0  # standard deviation of a whitened component


@torch.no_grad()
def set_statistics(model: ICLIPModel, processor: ICLIPProcessor, pairs: Iterable[Mapping]) -> None:
    """
    Sets the statistics of training images that a model keeps. With a feature tower, `feature_reduction` becomes the
    whitening of its features. With `center_tokens`, `token_mean` becomes the mean patch token. Statistics of an
    earlier training stay, because the branches were trained with them. All processes get the statistics of the first
    process.

    The whitening projects to the principal components with the largest variance, and scales each to a standard
    deviation of 4 over the positions of its map. The tokens of DINOv2 have a standard deviation of 2, and would
    outweigh smaller features.

    Args:
        pairs: rows with an `image`. About a thousand are read, evenly spread if the data set has random access.
    """
    whiten = model.feature_model is not None and not model.feature_reduction.weight.any()
    center = model.config.center_tokens and not model.token_mean.any()
    if not whiten and not center:
        return
    if partial_state("train").is_main_process:
        mean_tokens, mean_features = [], []  # of each image, on the grid of patches
        num_positions, feature_sum, product_sum = 0, 0.0, 0.0  # over all positions of feature maps
        rows = _sample(pairs.distinct()[0] if isinstance(pairs, PairDataset) else pairs)
        images = (row["image"] for row in tqdm(rows, "Statistics", unit="image", delay=3, leave=False))
        while batch := [*islice(images, 32)]:  # a thousand photographs can be larger than the memory
            pixel_values = processor(images=batch)["pixel_values"].to(model.device)
            encoded = model.encode_image(pixel_values)
            mean_tokens.append(encoded.patch_tokens.float().mean(1))
            if whiten:
                features = model.feature_map(pixel_values)
                on_grid = F.interpolate(features, encoded.grid, mode="bilinear", align_corners=False)
                mean_features.append(on_grid.mean((2, 3)))
                features = features.movedim(1, -1).flatten(0, 2).cpu().double()
                num_positions += len(features)
                feature_sum = feature_sum + features.sum(0)
                product_sum = product_sum + features.T @ features
        token_mean = torch.cat(mean_tokens).mean(0)
        if whiten:
            _whiten(model, feature_sum / num_positions, product_sum / num_positions)
            # The tokens were encoded before the reduction was set. The mean of its results is its result for the mean,
            # because it is linear.
            token_mean[-model.config.feature_dim :] = model.feature_reduction(torch.cat(mean_features).mean(0))
        if center:
            model.token_mean.copy_(token_mean)
    statistics = [*model.feature_reduction.parameters()] if whiten else []
    statistics += [model.token_mean] if center else []
    for weight in statistics:
        weight.copy_(broadcast_from_main(weight.cpu()))  # other devices round differently


def load_statistics(model: ICLIPModel, checkpoint: str) -> None:
    """
    Loads the statistics of a checkpoint. Statistics that another machine computes again could differ from those that
    the projections were trained with.
    """
    with safe_open(Path(checkpoint, SAFE_WEIGHTS_NAME), framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(("feature_reduction.", "token_mean"))]
        statistics = {name: file.get_tensor(name) for name in names}
    model.load_state_dict(statistics, strict=False)


def _sample(pairs: Iterable[Mapping]) -> Iterable[Mapping]:
    """Yields about a thousand rows: evenly spread rows of a data set, or the first rows of a stream."""
    if isinstance(pairs, IterableDataset) or not has_length(pairs):
        return islice(pairs, _IMAGES)
    return (pairs[index] for index in range(0, len(pairs), max(1, len(pairs) // _IMAGES)))


def _whiten(model: ICLIPModel, mean: torch.Tensor, products: torch.Tensor) -> None:
    """Sets `feature_reduction` to the whitening of features with this mean (C,) and mean outer product (C, C)."""
    variances, directions = torch.linalg.eigh(products - torch.outer(mean, mean))  # in ascending order
    variances = variances.flip(0)[: model.config.feature_dim]
    directions = directions.flip(1)[:, : model.config.feature_dim].T
    # Directions among dead channels have no variance, and stay small.
    weight = _DEVIATION * directions * variances.clamp(min=1e-6 * variances[0]).rsqrt().unsqueeze(1)
    model.feature_reduction.weight.copy_(weight)
    model.feature_reduction.bias.copy_(-weight @ mean)
