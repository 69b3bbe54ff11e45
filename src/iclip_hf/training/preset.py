"""The settings of a run on few pairs, and checks that need no torch, so that a mistake is reported within a second."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..backends import check_model_name
from ..data.pairs import BadPairError, PairDataset
from ..data.sources import Columns, open_sources
from ..utils.extras import not_installed
from ..utils.files import check_new_folder
from ..utils.hub_ids import RUNS, is_hub_id
from ..utils.prefetch import spare_processors
from .settings import Settings


# Settings of the run in its folder, which thereby is known as that of a training.
STATE_FILE = ".iclip-train.json"

# On few pairs. With 50 and with 500, ten times the learning rate cost the embedded model mAP on other images.
RATE = 1e-5
STEPS = 200
_LOOKED_AT = 200  # pairs, evenly spaced over all


def choose_settings(given: Mapping) -> dict[str, object]:
    """
    Returns the preset for training on the few pairs of `given["data"]`: the projections of a trained model are trained for 200 steps,
    with a low learning rate, and evaluated on a tenth of the pairs. Settings that are given take precedence, and others depend on them.

    Raises:
        As [`check_pairs`] and [`~iclip_hf.data.pairs.load_pairs`]. `ValueError`: the pairs are a stream.
    """
    if given.get("pairs_per_epoch") and any(map(is_hub_id, given["data"])):
        raise ValueError("config: name one for a stream, whose pairs are not counted, or leave pairs_per_epoch out.")
    columns = Columns.named(given.get("image_column"), given.get("caption_column"))
    pairs = PairDataset(open_sources(given["data"], columns, given.get("split", Settings.split)))
    max_bad_share = given.get("max_bad_share", Settings.max_bad_share)
    check_pairs(pairs, max_bad_share)
    chosen: dict[str, object] = {}

    def choose(name: str, value):
        """Sets a value unless the setting is given; returns the effective value."""
        return given[name] if name in given else chosen.setdefault(name, value)

    stem = Path(given["data"][0]).absolute().name.partition(".")[0]
    folder = choose("output_dir", f"{RUNS}/{stem}")
    if not (given.get("vision") or given.get("text")):
        choose("model", "embedded")
    share = 0.0 if given.get("validation_data") else choose("validation_share", 0.1 if len(pairs) >= 20 else 0.0)
    held_out = len(pairs.split(share)[1]) if share else 0
    if 0 < held_out < 100:
        choose("best_metric", "val_loss")  # a share of right answers is too coarse on so few
    choose("lock_text", True)
    choose("cache_features", f"{folder}/cache")

    training, world = len(pairs) - held_out, int(os.environ.get("WORLD_SIZE", 1))
    good = training - int(max_bad_share * training)  # at least so many; the feature cache leaves bad pairs out
    batch = choose("batch_size", max(min(good, 256) // world * world, world))
    choose("learning_rate", RATE)
    choose("warmup_learning_rate", 0.0)
    choose("min_learning_rate", 0.0)
    steps_per_epoch = max(training // batch, 1)
    steps = given.get("max_steps") or steps_per_epoch * choose("epochs", max(1, round(STEPS / steps_per_epoch)))
    choose("warmup_epochs", steps / steps_per_epoch / 10)
    choose("eval_steps", max(1, steps // 5))
    choose("log_steps", max(1, steps // 100))
    choose("num_workers", min(training // 250, 4, spare_processors()))
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


def check_run(settings: Settings) -> None:
    """
    Checks files, columns and folders of a run.

    Raises:
        `ImportError`: the tracker is missing. `FileNotFoundError`: a file or folder does not exist. `ValueError`: something is not as
        described.
    """
    tracker = settings.report_to
    if tracker != "none" and find_spec(tracker) is None:  # Accelerate would go on without a log
        if tracker == Settings.report_to:
            raise not_installed(tracker, "train")
        raise ImportError(f"{tracker} is not installed: `pip install {tracker}`, or set report_to.", name=tracker)
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":  # Accelerate would divide the gradients
        raise ValueError(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: all pairs of a batch contrast, so gradients are not accumulated; leave it out, and "
            "limit the memory by chunk_size."
        )
    check_output_dir(settings)
    if settings.model:
        check_model_name(settings.model, ("iclip",))
    if settings.nouns and not Path(settings.nouns).is_file():
        raise FileNotFoundError(f"{settings.nouns}: there is no such file of nouns.")
    if settings.eval_dataset != "none" and not (settings.eval_root and Path(settings.eval_root).is_dir()):
        raise FileNotFoundError(f"eval_root: {settings.eval_root!r} is not the folder of {settings.eval_dataset}.")
    for paths in (settings.data, settings.validation_data):
        local = [path for path in paths if not is_hub_id(path)]
        open_sources(local, Columns.named(settings.image_column, settings.caption_column), settings.split)


def check_output_dir(settings: Settings) -> None:
    """
    Checks that a run can begin in its folder, or continue there with `resume`.

    Raises:
        `FileExistsError`: the folder holds files of others. `ValueError`: it is that of the model; it holds a run, but not `resume`; or a
        run that has ended and whose checkpoints are gone, so that it would be made anew.
    """
    folder = Path(settings.output_dir)
    if settings.model and os.path.realpath(settings.model) == os.path.realpath(folder):
        raise ValueError(f"{folder}: output_dir is the folder of model; name a new one.")
    kept = checkpoints(folder)
    if not kept:
        check_new_folder(folder, STATE_FILE)
    if not settings.resume and (kept or (folder / "model.safetensors").is_file()):
        raise ValueError(
            f"{folder}: this folder holds a run already; add --resume to continue it, or name another output_dir."
        )
    if not kept and (folder / "results.json").is_file():
        raise ValueError(f"{folder}: the run has ended and its checkpoints are gone; name another output_dir.")


def checkpoints(output_dir: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    return sorted(state.parent for state in output_dir.glob(f"checkpoint-{'[0-9]' * 7}/state.json"))
