"""Measures over a data set: recognition, maps, label maps and faithfulness. One file for each; `utils.names` lists them."""

from importlib import import_module

from ...utils.names import MEASURES
from .measure import EvaluatedImage, Measure


def make_measure(name: str, **options) -> Measure:
    """Creates a measure by its name in `MEASURES`, with the options of its class. Raises `ValueError` if it is unknown."""
    if name not in MEASURES:
        raise ValueError(f"Expected measures of {list(MEASURES)}, got {name!r}: choose one of them.")
    module, _, kind = MEASURES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), kind)(**options)


__all__ = ["MEASURES", "EvaluatedImage", "Measure", "make_measure"]
