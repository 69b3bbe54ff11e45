"""The arguments of a training on few pairs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..data.pairs import BadPairError, PairDataset
from ..hub.configs import parse_options
from ..utils.cache import cache_folder
from ..utils.errors import loading_errors
from ..utils.prefetch import spare_processors
from .arguments import RUNS


# On few pairs. With 50 and with 500, ten times the learning rate cost the embedded model retrieval.
RATE = 1e-5
STEPS = 200
# Without it, of the classes that images show, 50 pairs make every tenth absent.
KEEP_PRESENCE = 1.0
_LOOKED_AT = 200  # pairs, evenly spaced over all


def few_pairs(pairs: int, held_out: int = 0, max_bad_share: float = 0.0, **given) -> dict[str, object]:
    """
    Returns arguments of [`ICLIPTrainingArguments`] to train the projections of a trained model on so many pairs: 200
    steps with a low learning rate. If pairs are held out, the start is evaluated, and every fifth of the steps. Those
    arguments that are `given` stay, and others depend on them. A batch is without `max_bad_share` of the pairs, which
    [`CachedPairs`] leaves out.

    ```python
    >>> args = ICLIPTrainingArguments("runs/tuned", **few_pairs(len(pairs), len(held_out)))
    ```
    """
    processes, usable = int(os.environ.get("WORLD_SIZE", 1)), pairs - int(max_bad_share * pairs)
    batch = given.get("per_device_train_batch_size", max(min(usable, 256) // processes, 1))
    batches = pairs // max(batch * processes, 1)  # a batch of 0 is refused later
    steps_per_epoch = max(math.ceil(batches / max(given.get("gradient_accumulation_steps", 1), 1)), 1)
    epochs = given.get("num_train_epochs", max(1, round(STEPS / steps_per_epoch)))
    steps = given["max_steps"] if given.get("max_steps", 0) > 0 else math.ceil(epochs * steps_per_epoch)
    chosen = {
        "per_device_train_batch_size": batch,
        "num_train_epochs": epochs,
        "learning_rate": RATE,
        "warmup_learning_rate": 0.0,
        "min_learning_rate": 0.0,
        "warmup_steps": 0.1,
        "keep_presence": KEEP_PRESENCE,
        # Not shares of all steps: to Transformers, these are not the numbers of a checkpoint.
        "eval_steps": math.ceil(steps / 5),
        "save_steps": math.ceil(steps / 5),
        "logging_steps": math.ceil(steps / 10),
        "dataloader_num_workers": min(pairs // 250, 4, spare_processors()),
    }
    if held_out:
        chosen |= {"eval_strategy": "steps", "eval_on_start": True, "load_best_model_at_end": True}
        chosen["metric_for_best_model"] = _best_metric(held_out)
    return chosen | given


def _best_metric(held_out: int) -> str:
    return "loss" if held_out < 100 else "text_to_image"  # a share of right answers is too coarse on few


def preset(given: Mapping, pairs: PairDataset) -> dict[str, object]:
    """
    Returns the arguments of `iclip train` for few pairs: the projections of a trained model are trained as by
    [`few_pairs`], and evaluated on a tenth of the pairs. Those that are `given` are left out, and others depend on
    them. Raises as [`check_pairs`].
    """
    check_pairs(pairs)
    chosen: dict[str, object] = {"output_dir": f"{RUNS}/{_stem(given['data'][0])}", "lock_text": True}
    if not (given.get("vision") or given.get("text")):
        chosen["model"] = "embedded"
    if not given.get("validation_data"):
        chosen["validation_share"] = 0.1 if len(pairs) >= 20 else 0.0
    values = {**chosen, **given}
    share = values.get("validation_share")
    training = len(pairs.split(share)[0]) if share else len(pairs)
    if held_out := len(pairs) - training:
        chosen["metric_for_best_model"] = _best_metric(held_out)
    locked = _locks_vision(values)
    if locked:
        chosen["cache_features"] = str(cache_folder() / "features")
    chosen |= few_pairs(training, **{**given, "max_bad_share": pairs.max_bad_share})
    if not (locked and values["lock_text"] and values.get("model")):
        del chosen["keep_presence"]
    return {name: value for name, value in chosen.items() if name not in given}


def _stem(data: str) -> str:
    """
    Returns the name of a file or folder up to the first dot. For a pattern and for a hidden file, it is that of the
    folder: a run in a folder `*` would be deleted with all others.
    """
    stems = [part.partition(".")[0] for part in Path(os.path.abspath(data)).parts[1:]]
    return next((stem for stem in reversed(stems) if stem and not set(stem) & set("*?[]{}")), "pairs")


def _locks_vision(values: Mapping) -> bool:
    """
    Whether the image tower is locked: by the options or, without them, by the configuration of a model in a folder.
    """
    options, model = parse_options(values.get("model_options", ())), values.get("model", "")
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
