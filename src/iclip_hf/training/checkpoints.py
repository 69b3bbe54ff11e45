"""Checkpoints of training, and the export of the trained model."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..hub.folders import save_model
from ..hub.model_card import HUB_RESULTS
from ..modeling_iclip import ICLIPModel
from ..models.identity import changed
from ..processing_iclip import ICLIPProcessor
from ..utils.extras import require_extra
from ..utils.files import atomic_write, writing_errors
from .checks import check_output_dir, checkpoints
from .low_rank import add_low_rank, low_rank_of, merge_low_rank
from .settings import Settings, changed_settings


with require_extra("train"):
    from accelerate import Accelerator


@dataclass
class RunState:
    """
    The state of a run that a checkpoint contains besides weights and optimizer.

    Attributes:
        step: number of completed steps.
        bad_steps, bad_in_a_row: number of steps without a finite loss and gradient, in total and since the last good step.
        skipped_pairs: number of broken pairs that were replaced.
        before: results of the model that the run started from, if it was trained already.
        before_by_pair: its `best_metric` for each held-out pair.
        best: value of `best_metric` for the best model of the training so far.
        metrics: results of this model, or of the last one without validation.
        change: 95 % interval of the difference between the two in `best_metric`, see [`~validation.change_interval`].
        evaluation: its results on maps, as `iclip evaluate` returns them.
        settings: settings of the run.
        content: identity of the model that the run started from, and digests of what settings name, by the name of the setting.
        sharded: whether the run shards its weights with FSDP.
        measured: whether the model of this step has been evaluated, if it is to be.
    """

    step: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    skipped_pairs: int = 0
    before: dict = field(default_factory=dict)
    before_by_pair: list[float] = field(default_factory=list)
    best: float | None = None
    metrics: dict = field(default_factory=dict)
    change: list[float] = field(default_factory=list)
    evaluation: dict | None = None
    settings: dict = field(default_factory=dict)
    content: dict = field(default_factory=dict)
    sharded: bool = False
    measured: bool = True


def holds_start(settings: Settings, state: RunState) -> bool:
    """Whether the run's folder holds the model that the run started from, because no evaluation was better."""
    start = state.before.get(settings.best_metric)
    return start is not None and (state.best is None or not settings.is_better(state.best, start))


def keep_learning_weights_only(accelerator: Accelerator) -> None:
    """
    Restricts Accelerate's checkpoints to trained weights, and removes the prefix of its wrapper from their names, so that a run
    can resume with another number of processes.
    """

    def learning(models: list[nn.Module]) -> dict[str, torch.Tensor]:
        named = accelerator.unwrap_model(models[0]).named_parameters()
        return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}

    def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
        if weights:
            weights.clear()
            if accelerator.is_main_process:
                contiguous = {name: weight.contiguous() for name, weight in learning(models).items()}
                save_file(contiguous, Path(folder, "learning.safetensors"))

    def load(models: list[nn.Module], folder: str) -> None:
        file = Path(folder, "learning.safetensors")
        if file.exists():
            kept = load_file(file)
            for name, weight in learning(models).items():
                weight.copy_(kept[name])
            models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def state_to_resume(settings: Settings, fixed: Collection[str] = ()) -> tuple[Path | None, RunState]:
    """
    Returns the last checkpoint of a run and its state; None and a new state without one. `fixed`: see [`~settings.changed_settings`].

    Raises:
        `ValueError`: there is a checkpoint, but `resume` is not set, or a setting has changed that must not change.
    """
    folder = Path(settings.output_dir)
    check_output_dir(folder, settings.resume)
    *_, last = [None, *checkpoints(folder)]
    if last is None:
        return None, RunState()
    state = RunState(**json.loads((last / "state.json").read_text()))
    if others := changed_settings(settings, state.settings, fixed):
        differences = ", ".join(
            f"{name} from {state.settings.get(name)} to {getattr(settings, name)}" for name in others
        )
        raise ValueError(
            f"{folder}: expected the settings of the run to resume, but got others: {differences}; repeat the command that began it, on "
            "the same pairs, with --resume, or name another output_dir."
        )
    return last, state


def check_content(checkpoint: Path, state: RunState, content: Mapping) -> None:
    """
    Raises `ValueError` if a run would continue with another model or other data. Their places may differ, and the software, so that a
    long run can outlive an update.
    """
    if differing := changed(state.content, content, may_differ=["software"]):
        raise ValueError(
            f"{checkpoint}: expected the content that the run began with, but got other {', '.join(differing)}; "
            "restore what has changed, or name another output_dir."
        )


@contextmanager
def advice_to_resume(output_dir: Path) -> Iterator[None]:
    """Adds the last checkpoint, if there is one, to the message of an interruption or error."""
    try:
        yield
    except BlockingIOError:  # the checkpoints belong to another run
        raise
    except (KeyboardInterrupt, FloatingPointError, OSError) as error:
        last = checkpoints(output_dir)[-1:]
        if not last and not isinstance(error, KeyboardInterrupt):
            raise
        kind = OSError if isinstance(error, OSError) else type(error)
        said = str(error).rstrip(".") or "interrupted"
        advice = f"; --resume continues from {last[0]}" if last else " before the first checkpoint; run it again"
        raise kind(f"{said}{advice}") from error


def save_checkpoint(accelerator: Accelerator, output_dir: Path, state: RunState, keep: int) -> None:
    """Saves `checkpoint-<state.step>` atomically, and deletes all but the last `keep` checkpoints."""
    target = output_dir / f"checkpoint-{state.step:07d}"
    partial = Path(f"{target}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    with writing_errors(target):
        accelerator.save_state(str(partial))
    write_state(accelerator, partial, state)
    if accelerator.is_main_process:
        os.replace(partial, target)
        for old in checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended


def write_state(accelerator: Accelerator, folder: Path, state: RunState, name: str = "state.json") -> None:
    """Saves the state of a run as a file in a folder."""
    if accelerator.is_main_process:
        with atomic_write(folder / name) as partial:
            partial.write_text(json.dumps(asdict(state), indent=2))
    accelerator.wait_for_everyone()


def whole_model(accelerator: Accelerator, pair_model: nn.Module) -> ICLIPModel:
    """
    Returns the model with all its weights and without low-rank updates: itself, or a copy if FSDP shards it or updates are merged.
    Every process must call this.
    """
    model = accelerator.unwrap_model(pair_model).model
    if not accelerator.is_fsdp2:
        return merge_low_rank(model)
    weights = get_model_state_dict(pair_model, options=StateDictOptions(full_state_dict=True))
    whole = ICLIPModel(copy.deepcopy(model.config))
    if rank := low_rank_of(model):
        add_low_rank(whole, rank)
    whole.to(accelerator.device)
    whole.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
    return merge_low_rank(whole)


def export(
    accelerator: Accelerator, pair_model: nn.Module, processor: ICLIPProcessor, folder: Path, **card: object
) -> None:
    """
    Writes the model, its processor and its card (see [`write_model_card`]) into a folder, for `from_pretrained`. Replaces the files
    of an earlier model one by one, each atomically, and leaves others, such as checkpoints.
    """
    model = whole_model(accelerator, pair_model)
    if accelerator.is_main_process:
        partial = folder / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed during the export
        with writing_errors(folder):
            save_model(model, processor, partial, **card)
            (folder / HUB_RESULTS).unlink(missing_ok=True)  # of the model before, if this one has none
            for file in [path for path in partial.rglob("*") if path.is_file()]:
                target = folder / file.relative_to(partial)
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)
            shutil.rmtree(partial)
    accelerator.wait_for_everyone()
