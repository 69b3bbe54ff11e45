"""Checks of a run that need no torch, so that a mistake is reported within a second."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..data.pairs import BadPairError, PairDataset
from ..data.sources import Columns, Source, TarShard, is_hub_id, open_sources
from ..models import check_model_name
from ..utils.extras import not_installed
from ..utils.files import check_new_folder
from .settings import Settings, read_file


# Settings of the run in its folder, which thereby is known as that of a training.
STATE_FILE = ".iclip-train.json"
_LOOKED_AT = 200  # pairs, evenly spaced over all


def check_run(settings: Settings) -> None:
    """
    Checks packages, files, columns and folders of a run.

    Raises:
        `ImportError`: a package is missing. `FileNotFoundError`: a file or folder does not exist. `ValueError`: something is not as
        described.
    """
    check_packages(settings)
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":  # Accelerate would divide the gradients
        raise ValueError(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: all pairs of a batch contrast, so gradients are not accumulated; leave it out, and "
            "limit the memory by chunk_size."
        )
    folder = Path(settings.output_dir)
    if settings.model and os.path.realpath(settings.model) == os.path.realpath(folder):
        raise ValueError(f"{folder}: output_dir is the folder of model; name a new one.")
    check_output_dir(folder, settings.resume)
    if settings.model:
        check_model_name(settings.model, ("iclip",))
    elif not Path(settings.config).with_name("config.json").is_file():
        raise FileNotFoundError(
            f"{settings.config}: the model's config.json and processor_config.json are not beside it; copy its whole folder, or name a "
            "model."
        )
    if settings.nouns and not Path(settings.nouns).is_file():
        raise FileNotFoundError(f"{settings.nouns}: there is no such file of nouns.")
    if settings.eval_dataset != "none" and not (settings.eval_root and Path(settings.eval_root).is_dir()):
        raise FileNotFoundError(f"eval_root: {settings.eval_root!r} is not the folder of {settings.eval_dataset}.")
    if settings.config:  # without one, the settings were chosen by pairs that are checked
        sources = _open_local(settings, "data")
        # A Hub dataset is opened with its download, and the index of a shard may take minutes.
        if not any(map(is_hub_id, settings.data)) and not any(isinstance(source, TarShard) for source in sources):
            check_pairs(PairDataset(sources), settings.max_bad_share)
    _open_local(settings, "validation_data")


def _open_local(settings: Settings, name: str) -> list[Source]:
    """Opens the pairs on disk of a setting. An error says if a configuration names them."""
    paths = [path for path in getattr(settings, name) if not is_hub_id(path)]
    try:
        return open_sources(paths, Columns.named(settings.image_column, settings.caption_column), settings.split)
    except FileNotFoundError as error:
        if not settings.config or read_file(Path(settings.config)).get(name) != getattr(settings, name):
            raise
        raise FileNotFoundError(
            f"{error} The configuration {settings.name} names it as {name}: name your own pairs by --{name}"
            f"{', or hold out a part by --validation_share' if name == 'validation_data' else ''}."
        ) from error


def check_output_dir(folder: Path, resume: bool) -> None:
    """
    Checks that a run can begin in a folder, or continue there with `resume`.

    Raises:
        `FileExistsError`: the folder holds files of others. `ValueError`: it holds a run, but not `resume`; or a run that has ended and
        whose checkpoints are gone, so that it would be made anew.
    """
    kept = checkpoints(folder)
    if not kept:
        check_new_folder(folder, STATE_FILE)
    if not resume and (kept or (folder / "model.safetensors").is_file()):
        raise ValueError(
            f"{folder}: this folder holds a run already; add --resume to continue it, or name another output_dir."
        )
    if not kept and (folder / "results.json").is_file():
        raise ValueError(f"{folder}: the run has ended and its checkpoints are gone; name another output_dir.")


def checkpoints(output_dir: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    return sorted(state.parent for state in output_dir.glob(f"checkpoint-{'[0-9]' * 7}/state.json"))


def check_packages(settings: Settings) -> None:
    """Raises `ImportError` if a package is missing that the run will import."""
    tracker = settings.report_to
    for package in ("accelerate", "timm", *(["tensorboard"] if tracker == "tensorboard" else [])):
        if find_spec(package) is None:
            raise not_installed(package, "train")
    if tracker not in ("none", "tensorboard") and find_spec(tracker) is None:
        raise ImportError(
            f"{tracker} is not installed: install it with `pip install {tracker}`, or set report_to.", name=tracker
        )


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
        texts.update(pair.captions)
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
