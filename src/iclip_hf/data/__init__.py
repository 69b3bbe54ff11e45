"""Data: images, segmentation sets for evaluation, image-text pairs for training."""

from .images import load_image
from .pairs import BadPairError, PairDataset, PairStream, load_pairs
from .segmentation import SegmentationDataset, SegmentationSample, load_segmentation


__all__ = [
    "BadPairError",
    "PairDataset",
    "PairStream",
    "SegmentationDataset",
    "SegmentationSample",
    "load_image",
    "load_pairs",
    "load_segmentation",
]
