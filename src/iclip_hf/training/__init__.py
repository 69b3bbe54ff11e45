"""Training with Transformers' `Trainer`."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names


if TYPE_CHECKING:
    from .arguments import ICLIPTrainingArguments, few_pairs
    from .collator import PairCollator, augmentation
    from .datasets import CachedPairs, StreamedPairs
    from .features import FeatureCache
    from .statistics import set_statistics
    from .trainer import ICLIPTrainer

_MODULES = {
    "CachedPairs": ".datasets",
    "FeatureCache": ".features",
    "ICLIPTrainer": ".trainer",
    "ICLIPTrainingArguments": ".arguments",
    "PairCollator": ".collator",
    "StreamedPairs": ".datasets",
    "augmentation": ".collator",
    "few_pairs": ".arguments",
    "set_statistics": ".statistics",
}
__all__ = [*_MODULES]
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
