"""What the model card shows of a training."""

from __future__ import annotations

from dataclasses import fields

from ..utils.hub_ids import public_name
from .arguments import Arguments, ICLIPTrainingArguments


# Arguments of a `Trainer` that a model depends on.
_RECIPE = """
    per_device_train_batch_size num_train_epochs max_steps learning_rate warmup_steps warmup_learning_rate
    min_learning_rate weight_decay max_grad_norm keep_presence seed
""".split()
# Of whole images there is no augmentation.
_AUGMENTATION = {"crop_scale", "auto_augment", "random_erasing"}
_NAMES = {"model", "vision", "text", "nouns", "config"}  # of what may be a path of this machine


def card_of(training: ICLIPTrainingArguments, processes: int) -> dict[str, object]:
    """Returns the arguments of a training that its model depends on, for [`write_model_card`]."""
    shown = {name: getattr(training, name) for name in _RECIPE}
    if training.max_steps < 0:
        del shown["max_steps"]
    return shown | {"processes": processes, "precision": training.mixed_precision}


def card_settings(arguments: Arguments, processes: int) -> dict[str, object]:
    """Returns the arguments of `iclip train` that its model depends on, without paths of this machine."""
    shown = {
        entry.name: value
        for part in (arguments.model, arguments.data)
        for entry in fields(part)
        if (value := getattr(part, entry.name)) or entry.name in _AUGMENTATION
    }
    if arguments.data.cache_features:
        shown = {name: value for name, value in shown.items() if name not in _AUGMENTATION} | {"cache_features": True}
    shown |= {name: public_name(shown[name]) for name in shown.keys() & _NAMES}
    if shown.get("auto_augment") == "":
        shown["auto_augment"] = "none"
    shown["data"] = [public_name(name) for name in shown["data"]]
    return shown | card_of(arguments.training, processes)
