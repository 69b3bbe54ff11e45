"""Checks of a run that need no torch, so that a mistake is reported within a second."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from ..backends import check_model_name
from ..data.sources import Columns, open_sources
from ..utils.files import check_new_folder
from ..utils.hub_ids import is_hub_id
from .settings import Settings


# Settings of the run in its folder, which thereby is known as that of a training.
STATE_FILE = ".iclip-train.json"


def check_run(settings: Settings) -> None:
    """
    Checks files, columns and folders of a run.

    Raises:
        `ImportError`: the tracker is missing. `FileNotFoundError`: a file or folder does not exist. `ValueError`: something is not as
        described.
    """
    tracker = settings.report_to
    if tracker != "none" and find_spec(tracker) is None:  # Accelerate would go on without a log
        raise ImportError(f"{tracker} is not installed: `pip install {tracker}`, or set report_to.", name=tracker)
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":  # Accelerate would divide the gradients
        raise ValueError(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: all pairs of a batch contrast, so gradients are not accumulated; leave it out, and "
            "limit the memory by chunk_size."
        )
    check_output_dir(settings)
    if settings.model:
        check_model_name(settings.model, ("iclip",))
    elif not Path(settings.config).with_name("config.json").is_file():
        raise FileNotFoundError(f"{settings.config}: the model's config.json is not beside it; copy its whole folder.")
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
