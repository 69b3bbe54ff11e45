"""The training program, and a collator for other ones."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names


if TYPE_CHECKING:
    from .data import PairCollator

_MODULES = {"PairCollator": ".data"}
__all__ = [*_MODULES]
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
