"""
The training program: `iclip train`, which `accelerate launch train.py` is too. It reads from set-up and loop to checkpoints, evaluations and
report.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ..utils.extras import require_extra


# First, so that a missing package is one of training: the evaluation would name its own extra.
with require_extra("train"):
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import ProjectConfiguration, send_to_device, set_seed

from ..backends.identity import changed, digest, identity
from ..backends.loading import load_iclip, warn_of_slow_bfloat16
from ..data.nouns import NounPrompts
from ..data.pairs import PairDataset
from ..data.sources import CLASS_CAPTION
from ..evaluation.evaluate import evaluate_model
from ..hub.configs import EMBEDDED
from ..hub.folders import join_towers, save_model
from ..hub.model_card import HUB_RESULTS
from ..model.configuration_iclip import ICLIPConfig
from ..model.engine import Engine
from ..model.modeling_iclip import ICLIPModel, non_finite_weight
from ..model.processing_iclip import ICLIPProcessor
from ..plots.colors import overlay
from ..plots.sheets import picture_grid
from ..utils.distributed import broadcast_from_main, partial_state, shared_folder_lock
from ..utils.files import atomic_write, writing_errors
from ..utils.interrupts import Interrupts, ignore_signals
from .contrastive import PairModel
from .data import BatchLoader, load_datasets, seed_everything
from .inputs import STATE_FILE, Inputs, checkpoints, open_inputs
from .settings import MAP_METRICS, Settings, changed_settings


MAX_BAD_STEPS = 30  # in a row, after which the run stops
FEWEST = 10  # held-out pairs; on fewer, the interval of a change is too narrow
_KEPT = 2  # checkpoints
_TRAINING = "training.pt"  # weights and optimizer in a checkpoint
_BLOCK = 1024  # rows of logits that are in memory at once
_BOOTSTRAPS = 2000
_LOOKED_AT = 1000  # pairs, for the labels


# -------------------------------------------------------------------------------------------------------------- set-up


def build_model(settings: Settings) -> tuple[ICLIPModel, ICLIPProcessor]:
    """The model to train and its processor: a trained one, or fresh projections on two towers."""
    options = settings.parsed_options()
    if unknown := options.keys() - ICLIPConfig.__annotations__:
        raise ValueError(f"model_options: {min(unknown)!r} is no option of ICLIPConfig.")
    if settings.model:
        return load_iclip(settings.model, **options)
    folder = Path(settings.config).parent
    model, processor = join_towers(folder, settings.vision, settings.text, settings.image_size or None, **options)
    if model.recognition.logit_bias is not None and not settings.nouns:
        raise ValueError(
            "nouns: a logit bias learns from nouns alone; name a file of nouns, or set logit_bias_init_value to null."
        )
    return model, processor


def start_accelerator(settings: Settings, model: ICLIPModel) -> Accelerator:
    """Starts Accelerate, with the precision that the settings, or else the launcher or the device, determine."""
    on_gpu = partial_state("train").device.type == "cuda"
    precision = settings.mixed_precision
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # of `accelerate launch`, "no" by default
        if precision == "no" and on_gpu:
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(settings.output_dir, logging_dir=str(Path(settings.output_dir, "logs"))),
        # An image tower that learns may have parameters that no forward uses, such as a mask token.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not model.config.lock_vision)],
    )
    processes = f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}"
    accelerator.print(
        f"Training with {processes} on {accelerator.device.type}, precision {accelerator.mixed_precision}"
    )
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu":
        warn_of_slow_bfloat16()
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise ValueError(
            f"Each process holds the whole model, so {kind} is not supported: use a configuration of Accelerate such as those in "
            "hub_configs/accelerate."
        )
    return accelerator


def train(settings: Settings, inputs: Inputs | None = None) -> dict[str, float]:
    """
    Trains a model in the folder `settings.output_dir`, which `from_pretrained` then loads. With validation, this is the best
    model of the evaluations, which may be the one that the run started from; otherwise the last.

    Returns:
        The metrics of this model.

    Raises:
        `ValueError`: a setting or the data is not as described. `OSError`: something cannot be read or written.
        `FloatingPointError`: too many steps in a row have no finite loss, or weights are not finite. `KeyboardInterrupt`: the run
        was interrupted; its message names the checkpoint to resume from.
    """
    transformers_logging.disable_progress_bar()
    set_seed(settings.seed)
    output_dir = Path(settings.output_dir)
    try:
        with Interrupts() as interrupts:
            inputs = inputs or open_inputs(settings)
            model, processor = build_model(settings)
            accelerator = start_accelerator(settings, model)
            settings = copy.copy(settings)
            settings.mixed_precision = accelerator.mixed_precision  # as it is, so that a run is resumed in the same
            held_out = inputs.held_out
            if held_out is not None:  # before there is a folder
                held_out = broadcast_from_main(held_out.readable() if accelerator.is_main_process else None)
                inputs = inputs._replace(held_out=held_out)
            with shared_folder_lock(output_dir, accelerator):
                return run(settings, inputs, model, processor, accelerator, interrupts)
    except KeyboardInterrupt as error:
        last = checkpoints(output_dir)[-1:]
        raise KeyboardInterrupt(
            f"interrupted; --resume continues from {last[0]}" if last else "interrupted"
        ) from error


# ---------------------------------------------------------------------------------------------------------------- loop


def run(
    settings: Settings,
    inputs: Inputs,
    model: ICLIPModel,
    processor: ICLIPProcessor,
    accelerator: Accelerator,
    interrupts: Interrupts,
) -> dict[str, float]:
    """Runs a training from its data to its report, in a folder that is locked. See [`train`]."""
    output_dir = Path(settings.output_dir)
    pair_model = PairModel(model, settings)

    # 1. The state of the run, a new one or that of the last checkpoint, and what it reads
    checkpoint, state = state_to_resume(settings)
    content = identity(model, processor) | fingerprints(inputs, accelerator)
    if checkpoint and (differing := changed(state.content, content)):  # the places may differ
        raise ValueError(
            f"{checkpoint}: the run began with other {', '.join(differing)}; restore what has changed, or name another output_dir."
        )
    if accelerator.is_main_process:  # a run that may not go on leaves the folder as it is
        with atomic_write(output_dir / STATE_FILE) as temporary:
            temporary.write_text(json.dumps(asdict(settings), indent=2))
    state.settings, state.content = asdict(settings), content
    training, validation = load_datasets(settings, inputs, model, processor, accelerator)
    workers = 0 if settings.cache_features else settings.num_workers
    loader = BatchLoader(training, accelerator, settings.batch_size, settings.seed, workers, settings.pairs_per_epoch)

    # 2. Optimizer and schedule
    pair_model.train()
    optimizer = torch.optim.AdamW(parameter_groups(pair_model, settings.weight_decay))
    pair_model, optimizer = accelerator.prepare(pair_model, optimizer)
    total_steps = settings.max_steps or settings.epochs * loader.steps_per_epoch
    warmup_steps = min(round(settings.warmup_epochs * loader.steps_per_epoch), total_steps - 1)
    rates = (settings.learning_rate, settings.warmup_learning_rate, settings.min_learning_rate)
    if checkpoint:
        load_checkpoint(accelerator, pair_model, optimizer, checkpoint)
    accelerator.init_trackers("iclip-hf", {name: str(value) for name, value in state.settings.items()})

    selection = Selection(settings, state, inputs, validation, pair_model, processor, accelerator)
    if settings.model and state.step == 0:
        selection.measure_start()
    interrupts.deferred = True
    times: list[tuple[float, float]] = []  # seconds of loading and of computing a step, since the last log
    batches = loader.steps(state.step, total_steps)
    with tqdm(total=total_steps, initial=state.step, desc="Training", disable=not accelerator.is_main_process) as bar:
        while True:
            # 3. Evaluation, if it is due after the last step, or was interrupted. A signal acts at once, as there is a checkpoint.
            if not state.measured:
                with interrupts.at_once():
                    selection.measure(state.step == total_steps)
                    write_state(accelerator, checkpoints(output_dir)[-1], state)
            if state.step == total_steps:
                break

            # 4. Batch, and learning rate. Dropout draws by the step, not by what was drawn before, so that a resumed step is the same.
            began = time.perf_counter()
            batch = next(batches)
            loaded = time.perf_counter()
            seed_everything(settings.seed, state.step, accelerator.process_index)
            learning_rate = cosine_schedule(state.step, total_steps, warmup_steps, *rates)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            # 5. Losses, averaged over the processes, so that all decide by the same numbers
            outputs = pair_model(**batch)
            mine = torch.tensor([interrupts.requested], device=accelerator.device)
            *losses, interrupted = accelerator.reduce(torch.cat([outputs["losses"], mine.float()]), "mean").tolist()

            # 6. Step, unless loss or gradient are not finite. The scaler of float16 skips by itself, and lowers its scale.
            norm = math.nan
            if all(map(math.isfinite, losses)):
                accelerator.backward(outputs["loss"])
                norm = accelerator.clip_grad_norm_(pair_model.parameters(), settings.clip_grad_norm).item()
                if math.isfinite(norm) or accelerator.scaler is not None:
                    optimizer.step()
                    accelerator.unwrap_model(pair_model).clamp_logit_scales()
            optimizer.zero_grad()
            finite = math.isfinite(norm)
            state.step += 1
            state.bad_steps += not finite
            state.bad_in_a_row = 0 if finite else state.bad_in_a_row + 1
            if state.bad_in_a_row == min(MAX_BAD_STEPS, total_steps):
                raise FloatingPointError(
                    f"No loss and gradient was finite in the last {state.bad_in_a_row} steps, up to step {state.step}: lower "
                    "learning_rate, or set mixed_precision to bf16 or no"
                )
            times.append((loaded - began, time.perf_counter() - loaded))
            bar.update()

            # 7. Log. A run that ends with a model whose loss is not finite has failed. The scaler of float16 may skip the last step.
            last = state.step == total_steps
            if last:
                check_finite(accelerator.unwrap_model(pair_model))
                if not (finite or accelerator.scaler) or not loss_is_finite(accelerator, pair_model, batch):
                    raise FloatingPointError(
                        f"The loss is not finite at the last step, {state.step}: lower learning_rate"
                    )
            if last or state.step % settings.log_steps == 0:
                loading, computing = map(sum, zip(*times))
                speed = len(times) * settings.batch_size / (loading + computing)
                row = {
                    "loss": sum(losses) / len(losses),
                    **dict(zip(("recognition_loss", "map_loss"), losses)),
                    **dict(zip(("logit_scale", "map_logit_scale"), outputs["logit_scales"].tolist())),
                    "learning_rate": learning_rate,
                    "gradient_norm": norm,
                    "pairs_per_second": speed,
                    "share_of_time_loading": loading / (loading + computing),
                    "bad_steps": state.bad_steps,
                }
                accelerator.log(row, state.step)
                bar.set_postfix(loss=f"{row['loss']:.3f}", pairs_per_s=f"{speed:.0f}")
                times.clear()

            # 8. Checkpoint, also before an evaluation, which may take long or fail
            state.measured = not (last or state.step % settings.eval_steps == 0)
            if interrupted or not state.measured or state.step % settings.checkpoint_steps == 0:
                save_checkpoint(accelerator, pair_model, optimizer, output_dir, state)
            if interrupted:
                raise KeyboardInterrupt

    # 9. Report
    write_state(accelerator, output_dir, state, "results.json")
    if accelerator.is_main_process:
        print(report(settings, state, inputs.held_out))
    accelerator.end_training()
    return state.before if kept_initial_model(settings, state) else state.metrics


@torch.no_grad()
def loss_is_finite(accelerator: Accelerator, pair_model: nn.Module, batch: dict) -> bool:
    """Returns whether the losses of all processes are finite."""
    pair_model.eval()
    losses = accelerator.reduce(pair_model(**batch)["losses"], "mean")
    pair_model.train()
    return bool(losses.isfinite().all())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Returns trained parameters in two groups: matrices with weight decay; vectors, biases and logit scales without."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = [p for name, p in learning if p.ndim > 1 and not name.endswith("bias")]
    others = [p for name, p in learning if p.ndim <= 1 or name.endswith("bias")]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def cosine_schedule(step: int, total: int, warmup: int, peak: float, start: float, end: float) -> float:
    """
    Returns the learning rate of a step: linear from `start` towards `peak` during the warm-up, then half a cosine to `end`. The
    cosine spans all steps including the warm-up, so the rate after the warm-up is slightly below `peak`. This is GroupViT's
    recipe and timm's default (`warmup_prefix=False`).
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * step / total)) / 2


# --------------------------------------------------------------------------------------------------------- checkpoints


def fingerprints(inputs: Inputs, accelerator: Accelerator) -> dict[str, object]:
    """Returns digests of the content of what a run reads, by the name of the setting."""
    pairs, held_out, nouns, segmentation = inputs
    with accelerator.main_process_first():  # the first process caches the digests of the files for the others
        return {
            "data": pairs.fingerprint(),
            "validation_data": held_out and held_out.fingerprint(),
            "nouns": nouns and digest([nouns.nouns, nouns.is_background.tolist()]),
            "eval_root": segmentation and segmentation.fingerprint(),
        }


@dataclass
class RunState:
    """The state of a run that a checkpoint contains besides weights and optimizer, and with its results after the run."""

    step: int = 0  # number of completed steps
    bad_steps: int = 0  # number of steps without a finite loss and gradient
    bad_in_a_row: int = 0  # of them, since the last good step
    # Results of the model that the run started from, if it was trained already, and its results for each held-out pair.
    before: dict = field(default_factory=dict)
    before_by_pair: dict = field(default_factory=dict)
    # The best model of the training so far, or the last one without validation. One that lost in no metric goes before one that did.
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
    Whether the run's folder holds the model that the run started from, because no evaluation was better: in `best_metric`, without a
    loss in another metric of the held-out pairs.
    """
    start = state.before.get(settings.best_metric)
    return start is not None and (
        state.best is None or bool(state.regressed) or not settings.is_better(state.best, start)
    )


def state_to_resume(settings: Settings) -> tuple[Path | None, RunState]:
    """
    Returns the last checkpoint of a run and its state; None and a new state without one. Raises `ValueError` if a setting has changed
    that must not change.
    """
    folder = Path(settings.output_dir)
    *_, last = [None, *checkpoints(folder)]
    if last is None:
        return None, RunState()
    saved = json.loads((last / "state.json").read_text())
    state = RunState(**{name: value for name, value in saved.items() if name in RunState.__dataclass_fields__})
    if others := changed_settings(settings, state.settings):
        changes = (f"{name} from {state.settings.get(name)} to {getattr(settings, name)}" for name in others)
        raise ValueError(
            f"{folder}: the run to resume has other settings, which change {', '.join(changes)}; repeat the command that began it, on "
            "the same pairs, with --resume, or name another output_dir."
        )
    return last, state


def check_finite(model: nn.Module) -> None:
    """Raises `FloatingPointError` for a weight that is not finite."""
    if name := non_finite_weight(model):
        raise FloatingPointError(f"The weights {name} are not finite any more: lower learning_rate")


def save_checkpoint(
    accelerator: Accelerator, pair_model: nn.Module, optimizer: Optimizer, output_dir: Path, state: RunState
) -> None:
    """
    Saves `checkpoint-<state.step>` atomically, and deletes all but the last `_KEPT`. It holds the weights that learn and the optimizer,
    which are the same on all processes. Raises like [`check_finite`].
    """
    model = accelerator.unwrap_model(pair_model)
    check_finite(model)
    if accelerator.is_main_process:
        target = output_dir / f"checkpoint-{state.step:07d}"
        partial = Path(f"{target}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with writing_errors(target):
            partial.mkdir(parents=True)
            saved = {"weights": _learning_weights(model), "optimizer": optimizer.state_dict()}
            scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
            torch.save({**saved, "scaler": scaler}, partial / _TRAINING)
            (partial / "state.json").write_text(json.dumps(asdict(state), indent=2))
            os.replace(partial, target)
        for old in checkpoints(output_dir)[:-_KEPT]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one has ended


def load_checkpoint(accelerator: Accelerator, pair_model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> None:
    """Loads what [`save_checkpoint`] saved, apart from the state."""
    saved = torch.load(checkpoint / _TRAINING, map_location="cpu", weights_only=True)
    for name, weight in _learning_weights(accelerator.unwrap_model(pair_model)).items():
        weight.copy_(saved["weights"][name])
    optimizer.load_state_dict(saved["optimizer"])
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(saved["scaler"])


def _learning_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


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
    Writes the model, its processor and its card (see [`write_model_card`]) into a folder, for `from_pretrained`. Replaces the files
    of an earlier model one by one, each atomically, and leaves others, such as checkpoints. Raises like [`check_finite`].
    """
    model = accelerator.unwrap_model(pair_model).model
    check_finite(model)
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


# ---------------------------------------------------------------------------------------------------------- evaluation


@dataclass(eq=False, repr=False)
class Selection:
    """
    Evaluates the model of a run, and keeps in the run's folder the best model so far. `validation` are the held-out pairs as
    `TrainingPairs` or `CachedPairs`; None without any.
    """

    settings: Settings
    state: RunState
    inputs: Inputs
    validation: Dataset | None
    pair_model: nn.Module
    processor: ICLIPProcessor
    accelerator: Accelerator

    def measure_start(self) -> None:
        """Evaluates the model that the run starts from. Its folder holds it until an evaluation is better."""
        self.state.before, self.state.before_by_pair, evaluation = self._evaluate()
        if self.state.before:
            self._export(metrics=evaluation, source=self.settings.model)

    def measure(self, last: bool) -> None:
        """Evaluates the model, and exports it if it is the best so far; without validation the `last`."""
        settings, state = self.settings, self.state
        metrics, by_pair, evaluation = self._evaluate()
        change = {name: change_interval(before, by_pair[name]) for name, before in state.before_by_pair.items()}
        score = metrics.get(settings.best_metric)
        regressed = regressed_metrics(change, len(next(iter(by_pair.values()), ())))
        if score is None:
            best = last
        elif state.best is not None and bool(regressed) != bool(state.regressed):
            best = not regressed
        else:
            best = settings.is_better(score, state.best)
        if best:
            state.best, state.metrics, state.evaluation = score, metrics, evaluation
            state.change, state.regressed = change, regressed
            if not kept_initial_model(settings, state):
                labels = common_labels(self.inputs.held_out) if self.inputs.held_out is not None else None
                self._export(metrics=evaluation, training=state.settings, start=state.content, labels=labels)
        state.measured = True

    def _evaluate(self) -> tuple[dict[str, float], dict[str, list[float]], dict | None]:
        """Returns the metrics of the model, those of the held-out pairs for each pair, and the evaluation on maps."""
        settings, held_out = self.settings, self.inputs.held_out
        metrics, by_pair, evaluation = {}, {}, None
        if self.validation is not None:
            workers = 0 if settings.cache_features else settings.num_workers
            scores = validate(self.accelerator, self.pair_model, self.validation, settings.chunk_size, workers)
            metrics |= {name: values.mean().item() for name, values in scores.items()}
            by_pair = {name: values.tolist() for name, values in scores.items()}
            if not math.isfinite(metrics["val_loss"]):  # no later loss would be better
                raise FloatingPointError(
                    f"The loss of the held-out pairs is not finite at step {self.state.step}: lower learning_rate, or set "
                    "mixed_precision to bf16 or no"
                )
        model = self.accelerator.unwrap_model(self.pair_model).model.eval()
        if self.inputs.segmentation is not None:
            result = evaluate_model((model, self.processor), self.inputs.segmentation, metrics=MAP_METRICS)
            evaluation = {"protocol": {**result.protocol, "model": settings.name}, "results": result.results}
            measured = {metric: result.results["itsm"][metric][metric.lower()] for metric in MAP_METRICS}
            # Of images with one class each, there is no text contrast.
            metrics |= {metric: value for metric, value in measured.items() if value is not None}
        if held_out is not None and settings.pictures and self.accelerator.is_main_process:
            folder = Path(settings.output_dir, "pictures")
            draw_examples(model, self.processor, held_out, settings.pictures, folder, self.state.step)
        self.pair_model.train()
        self.accelerator.log(metrics, self.state.step)
        return metrics, by_pair, evaluation

    def _export(self, **card: object) -> None:
        folder = Path(self.settings.output_dir)
        export(self.accelerator, self.pair_model, self.processor, folder, name=self.settings.name, **card)


def change_interval(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """
    Returns the 95 % interval of the mean change of a score over pairs, by the paired bootstrap: pairs are resampled, with their
    scores before and after, by a fixed seed.
    """
    changes, draws = np.subtract(after, before), np.random.default_rng(0)
    means = [changes[draws.integers(len(changes), size=len(changes))].mean() for _ in range(_BOOTSTRAPS)]
    return np.quantile(means, [0.025, 0.975]).tolist()


def regressed_metrics(change: Mapping[str, Sequence[float]], pairs: int) -> list[str]:
    """
    Returns the metrics that got worse, by their intervals of [`change_interval`] over so many pairs: the interval holds a loss and no
    gain. None on fewer than `FEWEST` pairs.
    """
    if pairs < FEWEST:
        return []
    gains = {name: [-high, -low] if name == "val_loss" else [low, high] for name, (low, high) in change.items()}
    return [name for name, (low, high) in gains.items() if low < 0 and high <= 0]


@torch.no_grad()
def validate(
    accelerator: Accelerator, pair_model: nn.Module, dataset: Dataset, batch_size: int, num_workers: int = 0
) -> dict[str, torch.Tensor]:
    """
    Measures retrieval with the recognition branch, and its loss over all pairs of a validation set at once.

    Returns:
        `dict` of `torch.Tensor` of shape `(N,)`, a value for each pair, whose mean is the metric: `val_loss`, and `image_to_text`
        and `text_to_image`, 100 if the nearest text (image) of the image (text) is its own, or has the same caption, and else 0.
    """
    dataset.set_epoch(0)
    # Contiguous parts, padded to equal length because each forward pass gathers.
    part = math.ceil(len(dataset) / accelerator.num_processes)
    rows = [(accelerator.process_index * part + i) % len(dataset) for i in range(part)]
    pair_model.eval()
    images, texts = [], []
    options = {"collate_fn": dataset.collate, "num_workers": num_workers, "worker_init_fn": ignore_signals}
    batches = DataLoader(dataset, min(batch_size, part), sampler=rows, **options)
    for batch in tqdm(batches, desc="Held-out pairs", leave=False, disable=not accelerator.is_main_process):
        outputs = pair_model(**send_to_device(batch, accelerator.device))
        images.append(outputs["image_embeds"])
        texts.append(outputs["text_embeds"])
        scale = outputs["logit_scales"][0]
    pair_model.train()
    images, texts = (accelerator.gather(torch.cat(parts))[: len(dataset)] for parts in (images, texts))
    return retrieval_scores(scale * images, texts, dataset.sampled_captions())


def retrieval_scores(images: torch.Tensor, texts: torch.Tensor, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    """
    Returns the result of [`validate`] for scaled vectors of images (N, P) and vectors of their captions (N, P). The logits are computed in
    blocks, so that memory does not grow with N squared.
    """
    # Pairs with one caption have one number, because they cannot be told apart.
    numbers = {caption: number for number, caption in enumerate(captions)}
    same = torch.tensor([numbers[caption] for caption in captions], device=images.device)

    def of_each(queries: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses, hits = [], []
        for own in torch.arange(len(queries), device=queries.device).split(_BLOCK):
            logits = queries[own] @ candidates.T
            losses.append(F.cross_entropy(logits, own, reduction="none"))
            hits.append(100 * (same[logits.argmax(1)] == same[own]).float())
        return torch.cat(losses), torch.cat(hits)

    (image_loss, image_to_text), (text_loss, text_to_image) = of_each(images, texts), of_each(texts, images)
    return {
        "val_loss": (image_loss + text_loss) / 2,
        "image_to_text": image_to_text,
        "text_to_image": text_to_image,
    }


def draw_examples(
    model: ICLIPModel, processor: ICLIPProcessor, pairs: PairDataset, count: int, folder: Path, step: int
) -> None:
    """
    Draws the first pairs of a data set as `<step>.png`: each image beside the map of its caption, after the map that the model of
    step 0 had. Its maps are kept in the folder.
    """
    shown = [pairs[index] for index in range(min(count, len(pairs)))]
    images, captions = ([pair[name] for pair in shown] for name in ("image", "caption"))
    model.eval()
    explanations = Engine(model, processor, templates="{}").run(images, [[caption] for caption in captions])
    columns = {f"step {step}": [explanation.map(0).numpy() for explanation in explanations]}
    kept = folder / "before.npz"
    if step == 0:
        with atomic_write(kept) as partial, open(partial, "wb") as opened:  # numpy would add a suffix to a file name
            np.savez_compressed(opened, *(map_.astype(np.float16) for map_ in columns["step 0"]))
    elif kept.is_file():
        with np.load(kept) as before:
            columns = {"before": [before[name].astype(np.float32) for name in before.files], **columns}
    pictures = []
    for image, *maps in zip(images, *columns.values()):
        pictures += [image, *(overlay(image, map_) for map_ in maps)]
    titles = ["", *columns] + [""] * (len(pictures) - len(columns) - 1)
    sheet = picture_grid(pictures, titles, 1 + len(columns), captions)
    with atomic_write(folder / f"{step:07d}.png") as partial:
        sheet.save(partial, format="png")


def common_labels(pairs: PairDataset, count: int = 2) -> list[str]:
    """Returns the labels that most of the first captions have: classes, if all captions are made of them, else nouns."""
    captions = [caption for row in range(min(len(pairs), _LOOKED_AT)) for caption in pairs.captions(row)]
    start, end = CLASS_CAPTION.split("{}")
    if all(caption.startswith(start) for caption in captions) and len(set(captions)) < len(captions):
        labels = [caption.removeprefix(start).removesuffix(end) for caption in captions]
    else:
        nouns = NounPrompts.from_file(EMBEDDED / "nouns.txt")
        labels = [nouns.nouns[number] for caption in captions for number in sorted(nouns.find(caption))]
    return [label for label, _ in Counter(labels).most_common(count)]


def report(settings: Settings, state: RunState, held_out: PairDataset | None) -> str:
    """
    Returns the end of a run as text: a table of the metrics before and after with the 95 % interval of their change, the folder of the model,
    and the command that explains an image with it.
    """
    lines = [""]
    if state.metrics:
        few = held_out is not None and len(held_out) < FEWEST
        change = {} if few else state.change
        rows = [["", "before", "after", "change (95 %)" if change else ""] if state.before else ["", "", "", ""]]
        for name, after in state.metrics.items():
            before = _number(state.before[name]) if state.before else ""
            rows.append([name, before, _number(after), " to ".join(map(_number, change.get(name, [])))])
        lines += ["{:<14}{:>12}{:>12}   {}".format(*row).rstrip() for row in rows]
        if held_out is not None:
            too_few = ", too few for an interval" if few and state.change else ""
            lines.append(f"{len(held_out)} held-out pairs{too_few}")
    else:
        lines.append("Nothing was measured: name --validation_data, or hold out a part by --validation_share.")
    if state.bad_steps:
        lines.append(f"{state.bad_steps} of {state.step} steps had no finite loss and gradient, and changed nothing.")
    folder = shlex.quote(settings.output_dir)
    if kept_initial_model(settings, state):
        lines.append(
            f"No evaluation was better than the start: {folder} holds the model that you started from ({settings.model})."
        )
    else:
        lines.append(f"The trained model is in {folder}.")
    labels = common_labels(held_out) if held_out is not None else []
    lines.append(f"Next: iclip explain PHOTO --text {shlex.quote(', '.join(labels) or '...')} --model {folder}")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.4g}"
