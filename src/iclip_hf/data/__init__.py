"""Segmentation data sets for evaluation, and image-text pairs for training."""

from .pairs import BadPairError, PairDataset, PairStream, load_pairs
from .segmentation import SegmentationDataset, SegmentationSample, load_segmentation


__all__ = [
    "BadPairError",
    "PairDataset",
    "PairStream",
    "SegmentationDataset",
    "SegmentationSample",
    "load_pairs",
    "load_segmentation",
]
