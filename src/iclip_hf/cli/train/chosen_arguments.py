"""The arguments of `iclip train` for few pairs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...data.pairs import BadPairError, PairDataset
from ...hub.configs import parse_options
from ...training.arguments import best_metric, few_pairs
from ...utils.cache import cache_folder
from ...utils.errors import loading_errors
from .arguments import RUNS
from .data import open_pairs


_CHECKED_PAIRS = 200  # evenly spaced over all


def few_pairs_arguments(given: Mapping, pairs: PairDataset) -> dict[str, object]:
    """
    Returns the arguments of `iclip train` for few pairs: those of [`few_pairs`], which train the projections of a
    trained model, and a tenth of the pairs for validation. The `given` arguments are left out; others may depend on
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
    num_training = len(pairs.split(share)[0]) if share else len(pairs)
    num_held_out = len(pairs) - num_training
    if given.get("validation_data"):
        num_held_out = len(open_pairs(given["validation_data"], given))
    if num_held_out:
        chosen["metric_for_best_model"] = best_metric(num_held_out)
    locked = _locks_vision(values)
    if locked:
        chosen["cache_features"] = str(cache_folder() / "features")
    # The held-out pairs are not passed, because `resolve_arguments` chooses the other arguments of their evaluation.
    # Without a given share, `few_pairs` would assume that no pair is bad, but a run allows the share of its pairs.
    chosen |= few_pairs(num_training, **{**given, "max_bad_share": pairs.max_bad_share})
    if not (locked and values["lock_text"] and values.get("model")):
        del chosen["keep_presence"]  # which needs locked towers and the presence of a trained model
    return {name: value for name, value in chosen.items() if name not in given}


def _stem(data: str) -> str:
    """
    Returns the name of a file or folder up to the first dot. A pattern and a hidden file get the name of their folder,
    because `rm -r` on a run named `*` would delete all runs.
    """
    stems = (part.partition(".")[0] for part in reversed(Path(os.path.abspath(data)).parts[1:]))
    return next((stem for stem in stems if stem and not set(stem) & set("*?[]{}")), "pairs")


def _locks_vision(values: Mapping) -> bool:
    """Whether the image tower is locked, by `model_options`, or else the config.json of a model folder."""
    model_options, model = parse_options(values.get("model_options", ())), values.get("model", "")
    if model and (file := Path(model, "config.json")).is_file():
        with loading_errors(model):
            model_options = json.loads(file.read_text(encoding="utf-8")) | model_options
    return bool(model_options.get("lock_vision", True))


def check_pairs(pairs: PairDataset) -> None:
    """
    Reads some pairs. Raises `ValueError` for fewer than two pairs, for too many pairs without an image or a caption,
    and for pairs with the same caption only.
    """
    num_pairs, where = len(pairs), pairs.sources[0].path
    if num_pairs < 2:
        raise ValueError(f"{where}: a training needs at least two pairs, got {num_pairs}; add more.")
    checked = np.unique(np.linspace(0, num_pairs - 1, min(num_pairs, _CHECKED_PAIRS)).astype(int)).tolist()
    captions, problems = set(), []
    for index in checked:
        try:
            pair = pairs.raw(index)
        except BadPairError as error:
            problems.append(error)
            continue
        captions.update(pair.texts.captions)
        if isinstance(pair.image, Path) and not pair.image.is_file():
            problems.append(
                f"{pair.image.absolute()}: there is no such image; paths are relative to the folder of the table"
            )
    if problems and len(problems) > pairs.max_bad_share * len(checked):
        raise ValueError(
            f"{where}: {len(problems)} of the {len(checked)} checked pairs have no image or no caption. The first: "
            f"{problems[0]}."
        )
    if len(captions) == 1:
        raise ValueError(f"{where}: all captions are {captions.pop()!r:.100}; describe what each image shows.")
