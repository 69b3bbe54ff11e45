"""The settings of a run on few pairs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..data.pairs import BadPairError, PairDataset
from ..hub.configs import parse_options
from ..utils.files import loading_errors
from ..utils.prefetch import spare_processors
from .inputs import hold_out
from .settings import RUNS


# On few pairs. With 50 and with 500, ten times the learning rate cost the embedded model retrieval.
RATE = 1e-5
STEPS = 200
# Without it, of the classes that images show, 50 pairs make every tenth absent.
KEEP_PRESENCE = 1.0
_LOOKED_AT = 200  # pairs, evenly spaced over all


def choose_settings(
    overrides: Mapping, pairs: PairDataset
) -> tuple[dict[str, object], tuple[PairDataset, PairDataset | None]]:
    """
    Returns the preset for training on few pairs, those of `overrides["data"]`: the projections of a trained model are
    trained for 200 steps, with a low learning rate, and evaluated on a tenth of the pairs. Settings that are given
    take precedence, and others depend on them.

    Returns:
        `tuple`: the chosen settings, and the training and held-out pairs by them, see [`~inputs.hold_out`].

    Raises:
        As [`check_pairs`] and [`~inputs.hold_out`].
    """
    check_pairs(pairs)
    preset: dict[str, object] = {}

    def set_default(name: str, value):
        """Sets a value unless the setting is given; returns the effective value."""
        return overrides[name] if name in overrides else preset.setdefault(name, value)

    folder = set_default("output_dir", f"{RUNS}/{_stem(overrides['data'][0])}")
    if not (overrides.get("vision") or overrides.get("text")):
        set_default("model", "embedded")
    if not overrides.get("validation_data"):
        set_default("validation_share", 0.1 if len(pairs) >= 20 else 0.0)
    pairs, held_out = hold_out(pairs, {**preset, **overrides})
    if held_out is not None and len(held_out) < 100:
        set_default("best_metric", "val_loss")  # a share of right answers is too coarse on so few
    locked = set_default("lock_text", True)
    if _locks_vision(overrides):
        set_default("cache_features", f"{folder}/cache")
        if locked and {**preset, **overrides}.get("model"):
            set_default("keep_presence", KEEP_PRESENCE)

    training, world = len(pairs), int(os.environ.get("WORLD_SIZE", 1))
    good = training - int(pairs.max_bad_share * training)  # at least so many; the feature cache leaves bad pairs out
    batch = set_default("batch_size", max(min(good, 256) // world * world, world))
    set_default("learning_rate", RATE)
    set_default("warmup_learning_rate", 0.0)
    set_default("min_learning_rate", 0.0)
    steps_per_epoch = max(training // max(batch, 1), 1)  # `Settings` refuses a batch of 0
    steps = overrides.get("max_steps") or steps_per_epoch * set_default(
        "epochs", max(1, round(STEPS / steps_per_epoch))
    )
    set_default("warmup_epochs", steps / steps_per_epoch / 10)
    set_default("eval_steps", max(1, steps // 5))
    set_default("log_steps", max(1, steps // 100))
    set_default("num_workers", min(training // 250, 4, spare_processors()))
    return preset, (pairs, held_out)


def _stem(data: str) -> str:
    """
    Returns the name of a file or folder up to the first dot. For a pattern and for a hidden file, it is that of the
    folder: a run in a folder `*` would be deleted with all others.
    """
    stems = [part.partition(".")[0] for part in Path(os.path.abspath(data)).parts[1:]]
    return next((stem for stem in reversed(stems) if stem and not set(stem) & set("*?[]{}")), "pairs")


def _locks_vision(overrides: Mapping) -> bool:
    """
    Whether the image tower is locked: by the options or, without them, by the configuration of a model in a folder.
    """
    options, model = parse_options(overrides.get("model_options", ())), overrides.get("model", "")
    if model and (file := Path(model, "config.json")).is_file():
        with loading_errors(model):
            options = json.loads(file.read_text(encoding="utf-8")) | options
    return bool(options.get("lock_vision", True))


def check_pairs(pairs: PairDataset) -> None:
    """
    Reads some pairs. `ValueError` for fewer than two, captions that do not differ, or too many that cannot be used.
    """
    count, where = len(pairs), pairs.sources[0].path
    if count < 2:
        raise ValueError(f"{where}: training contrasts pairs, and this has {count}; add more.")
    looked_at = np.unique(np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(int)).tolist()
    texts, bad = set(), []
    for index in looked_at:
        try:
            pair = pairs.raw(index)
        except BadPairError as error:
            bad.append(error)
            continue
        texts.update(pair.texts.captions)
        if isinstance(pair.image, Path) and not pair.image.is_file():
            bad.append(
                f"{pair.image.absolute()}: there is no such image; paths are relative to the folder of the table"
            )
    if len(bad) > pairs.max_bad_share * len(looked_at):
        raise ValueError(
            f"{where}: {len(bad)} of the {len(looked_at)} pairs looked at have no image or no caption. The first: "
            f"{bad[0]}."
        )
    if len(texts) == 1:
        raise ValueError(f"{where}: all captions are {texts.pop()!r:.100}; describe what each image shows.")
