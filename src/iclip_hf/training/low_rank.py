"""Low-rank updates of the text tower (LoRA), by peft."""

from __future__ import annotations

import copy

from ..modeling_iclip import ICLIPModel
from ..utils.extras import require_extra


def add_low_rank(model: ICLIPModel, rank: int) -> None:
    """
    Freezes the weights of the text tower, and adds an update of this rank to each of its linear layers, zero at first. Other
    options are the defaults of peft's `LoraConfig`.
    """
    with require_extra("lora"):
        from peft import LoraConfig, LoraModel

    # Not `get_peft_model`, whose wrapper reads an attribute that transformers deprecates
    model.text_model = LoraModel(model.text_model, LoraConfig(r=rank, target_modules="all-linear"), "default")


def low_rank_of(model: ICLIPModel) -> int:
    """Returns the rank of the text tower's updates, 0 without."""
    adapters = getattr(model.text_model, "peft_config", {})
    return adapters["default"].r if adapters else 0


def merge_low_rank(model: ICLIPModel) -> ICLIPModel:
    """Returns the model without updates: itself, or a copy with the updates added to the weights. The copy shares the image tower."""
    if not low_rank_of(model):
        return model
    merged = copy.deepcopy(model, {id(model.vision_model): model.vision_model})
    merged.text_model = merged.text_model.merge_and_unload()
    return merged
