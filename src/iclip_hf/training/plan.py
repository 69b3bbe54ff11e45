"""Settings chosen by the number of pairs, where no configuration is named."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..data.pairs import PairDataset
from ..data.sources import Columns, is_hub_id, open_sources
from ..utils.hub_ids import RUNS
from ..utils.prefetch import spare_processors
from .checks import check_pairs
from .settings import Settings


# Peak of the learning rate: with 50 and with 500 pairs, ten times as much cost the embedded model mAP on other images.
RATE = 1e-5
STEPS = 200


class Choice(NamedTuple):
    """The value of a setting, and the reason for it."""

    value: object
    why: str


def choose_settings(given: Mapping) -> dict[str, Choice]:
    """
    Chooses settings, by name, for training on the pairs of `given["data"]`. Settings that are given take precedence: other choices follow
    from them.

    Raises:
        As [`~checks.check_pairs`] and [`~iclip_hf.data.pairs.load_pairs`]. `ValueError`: the pairs are a stream.
    """
    if given.get("pairs_per_epoch") and any(map(is_hub_id, given["data"])):
        raise ValueError(
            "Expected config for a stream, because settings are chosen by the number of all pairs, got none: name a configuration, or "
            "leave pairs_per_epoch out to download the data."
        )
    columns = Columns.named(given.get("image_column"), given.get("caption_column"))
    pairs = PairDataset(open_sources(given["data"], columns, given.get("split", Settings.split)))
    max_bad_share = given.get("max_bad_share", Settings.max_bad_share)
    check_pairs(pairs, max_bad_share)
    chosen: dict[str, Choice] = {}

    def choose(name: str, value, why: str):
        """Keeps a choice unless the setting is given; returns the value that holds."""
        if name in given:
            return given[name]
        chosen[name] = Choice(value, why)
        return value

    stem = Path(given["data"][0]).absolute().name.partition(".")[0]
    folder = choose("output_dir", f"{RUNS}/{stem}", "named after the data")
    if not (given.get("vision") or given.get("text")):
        choose("model", "embedded", "a trained model, which needs no model hub")
    share = 0.0
    if not given.get("validation_data"):
        share = choose(
            "validation_share", *((0.1, "to measure on") if len(pairs) >= 20 else (0.0, "fewer than 20 pairs"))
        )
    held_out = len(pairs.split(share)[1]) if share else 0
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
    rate = float(f"{RATE * 1024 / batch:.4g}")
    choose("learning_rate", rate, f"{RATE:g} for this batch, so that a trained model keeps what it knows")
    steps = given.get("max_steps") or 0
    if not steps:
        steps = steps_per_epoch * choose("epochs", max(1, round(STEPS / steps_per_epoch)), f"{STEPS} steps")
    choose("warmup_epochs", steps / steps_per_epoch / 10, "a tenth of the run")
    choose("eval_steps", max(1, steps // 5), "5 times in the run")
    choose("log_steps", max(1, steps // 100), "100 times in the run")
    workers = min(training // 250, 4, spare_processors())
    choose("num_workers", workers, "one for every 250 pairs, at most 4 and the processors that the model leaves")
    return chosen
