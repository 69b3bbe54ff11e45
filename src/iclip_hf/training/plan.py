"""Settings chosen by the number of pairs, where no configuration is named."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..data.pairs import BadPairError, PairDataset
from ..data.sources import Columns, open_sources
from ..utils.hub_ids import RUNS, is_hub_id
from ..utils.prefetch import spare_processors
from .settings import Settings


# Peak of the learning rate: with 50 and with 500 pairs, ten times as much cost the embedded model mAP on other images.
RATE = 1e-5
STEPS = 200
_LOOKED_AT = 200  # pairs, evenly spaced over all


def choose_settings(given: Mapping) -> dict[str, tuple[object, str]]:
    """
    Chooses settings for training on the pairs of `given["data"]`. Settings that are given take precedence: other choices follow
    from them.

    Returns:
        `dict`: value and reason of each chosen setting, by its name.

    Raises:
        As [`check_pairs`] and [`~iclip_hf.data.pairs.load_pairs`]. `ValueError`: the pairs are a stream.
    """
    if given.get("pairs_per_epoch") and any(map(is_hub_id, given["data"])):
        raise ValueError("config: name one for a stream, whose pairs are not counted, or leave pairs_per_epoch out.")
    columns = Columns.named(given.get("image_column"), given.get("caption_column"))
    pairs = PairDataset(open_sources(given["data"], columns, given.get("split", Settings.split)))
    max_bad_share = given.get("max_bad_share", Settings.max_bad_share)
    check_pairs(pairs, max_bad_share)
    chosen: dict[str, tuple[object, str]] = {}

    def choose(name: str, value, why: str):
        """Keeps a choice unless the setting is given; returns the value that holds."""
        if name in given:
            return given[name]
        chosen[name] = value, why
        return value

    stem = Path(given["data"][0]).absolute().name.partition(".")[0]
    folder = choose("output_dir", f"{RUNS}/{stem}", "named after the data")
    if not (given.get("vision") or given.get("text")):
        choose("model", "embedded", "a trained model, which needs no model hub")
    held_out = 0
    if not given.get("validation_data"):
        usual = (0.1, "to measure on") if len(pairs) >= 20 else (0.0, "fewer than 20 pairs")
        if share := choose("validation_share", *usual):
            held_out = len(pairs.split(share)[1])
    training = len(pairs) - held_out
    if 0 < held_out < 100:
        choose("best_metric", "val_loss", "a share of right answers is too coarse on so few pairs")
    choose("lock_text", True, "the tower stays as it is, the projections learn")
    choose("cache_features", f"{folder}/cache", "the image tower is locked, so its features are computed once")
    world = int(os.environ.get("WORLD_SIZE", 1))
    good = training - int(max_bad_share * training)  # at least so many; the feature cache leaves bad pairs out
    size = max(min(good, 256) // world * world, world)
    batch = choose("batch_size", size, f"all pairs at once, less the {max_bad_share:.0%} that may be bad; at most 256")
    steps_per_epoch = max(training // batch, 1)
    choose("learning_rate", RATE, "so that a trained model keeps what it knows")
    for name in ("warmup_learning_rate", "min_learning_rate"):
        choose(name, 0.0, "below the peak")
    steps = given.get("max_steps") or 0
    if not steps:
        steps = steps_per_epoch * choose("epochs", max(1, round(STEPS / steps_per_epoch)), f"{STEPS} steps")
    choose("warmup_epochs", steps / steps_per_epoch / 10, "a tenth of the run")
    choose("eval_steps", max(1, steps // 5), "5 times in the run")
    choose("log_steps", max(1, steps // 100), "100 times in the run")
    workers = min(training // 250, 4, spare_processors())
    choose("num_workers", workers, "one for every 250 pairs, at most 4 and the processors that the model leaves")
    return chosen


def check_pairs(pairs: PairDataset, max_bad_share: float) -> None:
    """Reads some pairs. `ValueError` for fewer than two, captions that do not differ, or too many that cannot be used."""
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
    if len(bad) > max_bad_share * len(looked_at):
        raise ValueError(
            f"{where}: {len(bad)} of the {len(looked_at)} pairs looked at have no image or no caption. The first: {bad[0]}."
        )
    if len(texts) == 1:
        raise ValueError(f"{where}: all captions are {texts.pop()!r:.100}; describe what each image shows.")
