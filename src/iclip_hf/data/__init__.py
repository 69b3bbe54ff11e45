"""Segmentation data sets for evaluation, and image-text pairs for training."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names


if TYPE_CHECKING:
    from .mask_formats.sample import SegmentationSample
    from .pairs import BadPairError, PairDataset, load_pairs
    from .segmentation import SegmentationDataset, load_segmentation
    from .streams import PairStream

# Imported on first access, because streams import torch, and data is checked before torch is imported.
_MODULES = {
    "BadPairError": ".pairs",
    "PairDataset": ".pairs",
    "PairStream": ".streams",
    "load_pairs": ".pairs",
    "SegmentationDataset": ".segmentation",
    "SegmentationSample": ".mask_formats.sample",
    "load_segmentation": ".segmentation",
}
__all__ = [*_MODULES]
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
