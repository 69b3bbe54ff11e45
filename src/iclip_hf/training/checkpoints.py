"""
What a run writes into its folder: its state, checkpoints to resume from, and the model. Each is written atomically.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from ..hub.folders import save_model
from ..hub.model_card import HUB_RESULTS
from ..model.processing_iclip import ICLIPProcessor
from ..utils.files import atomic_write, writing_errors
from .inputs import checkpoints
from .settings import Settings, changed_settings


if TYPE_CHECKING:
    from accelerate import Accelerator

_KEPT = 2  # checkpoints
_TRAINING = "training.pt"  # weights and optimizer in a checkpoint


@dataclass
class RunState:
    """
    The state of a run that a checkpoint contains besides weights and optimizer, and with its results after the run.
    """

    step: int = 0  # number of completed steps
    bad_steps: int = 0  # number of steps without a finite loss and gradient
    bad_in_a_row: int = 0  # of them, since the last good step
    # Results of the model that the run started from, if it was trained already, and its results for each held-out
    # pair.
    before: dict = field(default_factory=dict)
    before_by_pair: dict = field(default_factory=dict)
    # The best model of the training so far, or the last one without validation. One that lost in no metric goes before
    # one that did.
    best: float | None = None  # its value of `best_metric`
    metrics: dict = field(default_factory=dict)  # its results
    change: dict = field(default_factory=dict)  # 95 % intervals of the differences to `before`, see `change_interval`
    # Metrics in which it is worse than the start, see [`regressed_metrics`].
    regressed: list[str] = field(default_factory=list)
    evaluation: dict | None = None  # its results on maps, as `iclip evaluate` returns them
    settings: dict = field(default_factory=dict)
    # Identity of the model that the run started from, and digests of what settings name, by the name of the setting
    content: dict = field(default_factory=dict)
    measured: bool = True  # whether the model of this step has been evaluated, if it is to be


def kept_initial_model(settings: Settings, state: RunState) -> bool:
    """
    Whether the run's folder holds the model that the run started from, because no evaluation was better: in
    `best_metric`, without a loss in another metric of the held-out pairs.
    """
    start = state.before.get(settings.best_metric)
    return start is not None and (
        state.best is None or bool(state.regressed) or not settings.is_better(state.best, start)
    )


def state_to_resume(settings: Settings) -> tuple[Path | None, RunState]:
    """
    Returns the last checkpoint of a run and its state; None and a new state without one. Raises `ValueError` if a
    setting has changed that must not change.
    """
    folder = Path(settings.output_dir)
    *_, last = [None, *checkpoints(folder)]
    if last is None:
        return None, RunState()
    try:
        saved = json.loads((last / "state.json").read_text())
        state = RunState(**{name: value for name, value in saved.items() if name in RunState.__dataclass_fields__})
    except (ValueError, AttributeError) as error:
        raise _damaged(last, "state.json") from error
    if others := changed_settings(settings, state.settings):
        changes = (f"{name} from {then} to {getattr(settings, name)}" for name, then in others.items())
        raise ValueError(
            f"{folder}: the run to resume has other settings, which change {', '.join(changes)}; repeat the command "
            "that began it, on the same pairs, with --resume and these settings as they were, or name another folder "
            "by --output_dir."
        )
    return last, state


def save_checkpoint(
    accelerator: Accelerator, pair_model: nn.Module, optimizer: Optimizer, output_dir: Path, state: RunState
) -> None:
    """
    Saves `checkpoint-<state.step>` atomically, and deletes all but the last `_KEPT`. It holds the weights that learn,
    `token_mean` and the optimizer, which are the same on all processes.
    """
    if accelerator.is_main_process:
        target = output_dir / f"checkpoint-{state.step:07d}"
        partial = Path(f"{target}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with writing_errors(target):
            partial.mkdir(parents=True)
            saved = {"weights": _learning_weights(accelerator, pair_model), "optimizer": optimizer.state_dict()}
            saved["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else {}
            saved["token_mean"] = getattr(accelerator.unwrap_model(pair_model).model, "token_mean", None)
            torch.save(saved, partial / _TRAINING)
            (partial / "state.json").write_text(json.dumps(asdict(state), indent=2))
            os.replace(partial, target)
        for old in checkpoints(output_dir)[:-_KEPT]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended


def load_checkpoint(accelerator: Accelerator, pair_model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> None:
    """Loads what [`save_checkpoint`] saved, apart from the state. Raises `ValueError` if it is damaged."""
    try:
        saved = torch.load(checkpoint / _TRAINING, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(checkpoint, _TRAINING) from error
    for name, weight in _learning_weights(accelerator, pair_model).items():
        weight.copy_(saved["weights"][name])
    if saved.get("token_mean") is not None:  # another number of processes reads another part of a stream first
        accelerator.unwrap_model(pair_model).model.token_mean.copy_(saved["token_mean"])
    optimizer.load_state_dict(saved["optimizer"])
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(saved["scaler"])


def _damaged(checkpoint: Path, name: str) -> ValueError:
    return ValueError(f"{checkpoint}: {name} is damaged; delete this checkpoint to resume from an earlier one.")


def _learning_weights(accelerator: Accelerator, pair_model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = accelerator.unwrap_model(pair_model).named_parameters()
    return {name: weight.detach() for name, weight in parameters if weight.requires_grad}


def write_state(accelerator: Accelerator, folder: Path, state: RunState, name: str = "state.json") -> None:
    """Saves the state of a run as a file in a folder."""
    if accelerator.is_main_process:
        with atomic_write(folder / name) as partial:
            partial.write_text(json.dumps(asdict(state), indent=2))
    accelerator.wait_for_everyone()


def export(
    accelerator: Accelerator, pair_model: nn.Module, processor: ICLIPProcessor, folder: Path, **card: object
) -> None:
    """
    Writes the model, its processor and its card (see [`write_model_card`]) into a folder, for `from_pretrained`.
    Replaces the files of an earlier model one by one, each atomically, and leaves others, such as checkpoints.
    """
    if accelerator.is_main_process:
        partial = folder / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed during the export
        with writing_errors(folder):
            save_model(accelerator.unwrap_model(pair_model).model, processor, partial, **card)
            (folder / HUB_RESULTS).unlink(missing_ok=True)  # of the model before, if this one has none
            for file in [path for path in partial.rglob("*") if path.is_file()]:
                with atomic_write(folder / file.relative_to(partial)) as temporary:
                    os.replace(file, temporary)
            shutil.rmtree(partial)
    accelerator.wait_for_everyone()
