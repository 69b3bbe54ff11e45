"""What the model card shows of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from ..hub.record import public_name
from .settings import MAY_CHANGE, Settings


# How pairs are read, and what the results on the card tell.
_NOT_SHOWN = """
    image_column caption_column split chunk_size validation_data eval_dataset eval_root eval_split
""".split()
# Settings that are off at 0.
_OFF_AT_0 = "pairs_per_epoch validation_share max_steps image_size keep_presence".split()


def card_settings(settings: Mapping) -> dict[str, object]:
    """
    Returns the settings of a run that its model depends on, for [`write_model_card`]: those with an effect, without
    paths of this machine.

    Args:
        settings: values of [`Settings`], by their names.
    """
    names = [field.name for field in fields(Settings) if field.name not in {*MAY_CHANGE, *_NOT_SHOWN}]
    idle = {name for name in names if settings.get(name) in (None, "", [], {}) or settings[name] is False}
    idle |= {name for name in _OFF_AT_0 if settings.get(name) == 0}
    if settings.get("cache_features"):  # of whole images
        idle |= {"crop_scale", "auto_augment", "random_erasing"}
    if settings.get("model"):  # which has its own
        idle |= {"image_size"}
    shown = {name: settings[name] for name in names if name not in idle}
    if settings.get("auto_augment") == "" and not settings.get("cache_features"):
        shown["auto_augment"] = "none"
    for name in shown.keys() & {"model", "vision", "text", "nouns"}:
        shown[name] = public_name(shown[name])
    if "cache_features" in shown:
        shown["cache_features"] = True  # instead of its folder
    if "data" in shown:
        shown["data"] = [public_name(name) for name in shown["data"]]
    return shown
