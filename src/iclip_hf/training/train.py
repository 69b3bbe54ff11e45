"""
The training program: `iclip train`, which `accelerate launch train.py` is too. It reads from set-up to steps and
evaluations.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ..utils.extras import require_extra


# First, so that a missing package is one of training: the evaluation would name its own extra.
with require_extra("train"):
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import ProjectConfiguration, set_seed

from ..backends.embedded import vocabulary
from ..backends.identity import changed, digest, identity
from ..backends.loading import load_iclip, warn_of_slow_bfloat16
from ..evaluation.evaluate import evaluate_model
from ..evaluation.metrics import make_metrics
from ..hub.folders import join_towers, options_of_model
from ..model.modeling_iclip import ICLIPModel, non_finite_weight
from ..model.processing_iclip import ICLIPProcessor
from ..utils.distributed import broadcast_from_main, partial_state, shared_folder_lock
from ..utils.files import atomic_write
from ..utils.interrupts import Interrupts
from .card import card_settings
from .checkpoints import (
    RunState,
    export,
    kept_initial_model,
    load_checkpoint,
    save_checkpoint,
    state_to_resume,
    write_state,
)
from .contrastive import KeptPresence, PairModel
from .data import BatchLoader, PairBatches, load_datasets, seed_everything
from .inputs import STATE_FILE, Inputs, checkpoints, open_inputs
from .settings import MAP_METRICS, Settings
from .validation import change_interval, draw_examples, regressed_metrics, report, validate


MAX_BAD_STEPS = 30  # in a row, after which the run stops
KEPT_NOUNS = 256  # of which `keep_presence` keeps the presence


# -------------------------------------------------------------------------------------------------------------- set-up


def train(settings: Settings, inputs: Inputs | None = None) -> dict[str, float]:
    """
    Trains a model in the folder `settings.output_dir`, which `from_pretrained` then loads. With validation, this is
    the best model of the evaluations, which may be the one that the run started from; otherwise the last.

    Returns:
        The metrics of this model.

    Raises:
        `ValueError`: a setting or the data is not as described. `OSError`: something cannot be read or written.
        `FloatingPointError`: too many steps in a row have no finite loss, or weights are not finite.
        `KeyboardInterrupt`: the run was interrupted; its message names the checkpoint to resume from.
    """
    transformers_logging.disable_progress_bar()
    set_seed(settings.seed)
    output_dir = Path(settings.output_dir)
    try:
        with Interrupts() as interrupts:
            inputs = inputs or open_inputs(settings)
            if inputs.segmentation is not None:
                make_metrics(MAP_METRICS)  # raises now, not after the features, if a package is missing
            model, processor = build_model(settings)
            accelerator = start_accelerator(settings, model)
            settings = copy.copy(settings)
            settings.mixed_precision = accelerator.mixed_precision  # as it is, so that a run is resumed in the same
            if inputs.held_out is not None:  # before there is a folder
                readable = inputs.held_out.readable() if accelerator.is_main_process else None
                inputs = inputs._replace(held_out=broadcast_from_main(readable))
            with shared_folder_lock(output_dir, accelerator):
                return run(settings, inputs, model, processor, accelerator, interrupts)
    except KeyboardInterrupt as error:
        last = checkpoints(output_dir)[-1:]
        raise KeyboardInterrupt(
            f"interrupted; --resume continues from {last[0]}" if last else "interrupted"
        ) from error


def build_model(settings: Settings) -> tuple[ICLIPModel, ICLIPProcessor]:
    """The model to train and its processor: a trained one, or fresh projections on two towers."""
    options = options_of_model(settings.model_options)
    if settings.model:
        # Small steps are lost in half precision.
        model, processor = load_iclip(settings.model, dtype="float32", **options)
        if settings.keep_presence and not model.config.lock_vision:
            raise ValueError("keep_presence: it needs a locked image tower; leave it out.")
        return model, processor
    folder = Path(settings.config).parent
    model, processor = join_towers(folder, settings.vision, settings.text, settings.image_size or None, **options)
    if model.recognition.logit_bias is not None and not settings.nouns:
        raise ValueError(
            "nouns: a logit bias learns from nouns alone; name a file of nouns, or set logit_bias_init_value to null."
        )
    return model, processor


@torch.no_grad()
def kept_presence(settings: Settings, model: ICLIPModel, processor: ICLIPProcessor) -> KeptPresence | None:
    """Returns the loss that keeps the presence of the commonest nouns; None without one, or for a model without it."""
    if not settings.keep_presence or model.recognition.logit_bias is None:
        return None
    prior = vocabulary()
    nouns = sorted(prior, key=prior.get, reverse=True)[:KEPT_NOUNS]
    prompts = [processor.templates[0].format(noun) for noun in nouns]
    return KeptPresence(model.recognition, model.encode_text(**processor(text=prompts))[0])


def start_accelerator(settings: Settings, model: ICLIPModel) -> Accelerator:
    """Starts Accelerate, with the precision that the settings, or else the launcher or the device, determine."""
    installed = [tracker.value for tracker in get_available_trackers()]
    if settings.report_to not in ("none", *installed):  # Accelerate would go on without a log
        raise ValueError(
            f"report_to: {settings.report_to!r} is no tracker of Accelerate that is installed here "
            f"({', '.join(installed) or 'none is'}); install it, or set report_to."
        )
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
            f"Each process holds the whole model, so {kind} is not supported: use a configuration of Accelerate such "
            "as those in hub_configs/accelerate."
        )
    return accelerator


def fingerprints(inputs: Inputs, accelerator: Accelerator) -> dict[str, object]:
    """Returns digests of what a run reads, by the name of the setting, as the first process finds it."""
    pairs, held_out, nouns, segmentation = inputs
    found = accelerator.is_main_process and {
        "data": pairs.fingerprint(),
        "validation_data": held_out and held_out.fingerprint(),
        "nouns": nouns and digest([nouns.nouns, nouns.is_background.tolist(), nouns.place.tolist()]),
        "eval_root": segmentation and segmentation.fingerprint(),
    }
    return broadcast_from_main(found)


# --------------------------------------------------------------------------------------------------------------- steps


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
    kept = kept_presence(settings, model, processor)
    if kept is None:
        settings.keep_presence = 0.0  # without effect, so the card does not claim it
    pair_model = PairModel(model, settings, kept)

    # The state of the run, a new one or that of the last checkpoint, and what it reads
    checkpoint, state = state_to_resume(settings)
    only_read_here = model.config.option_names("training", "weights")
    content = identity(model, processor) | {name: getattr(model.config, name) for name in only_read_here}
    begin(settings, content | fingerprints(inputs, accelerator), checkpoint, state, accelerator)
    training, validation = load_datasets(settings, inputs, model, processor, accelerator)
    workers = 0 if settings.cache_features else settings.num_workers
    loader = BatchLoader(training, accelerator, settings.batch_size, settings.seed, workers, settings.pairs_per_epoch)

    # Optimizer
    pair_model.train()
    optimizer = torch.optim.AdamW(parameter_groups(pair_model, settings.weight_decay))
    pair_model, optimizer = accelerator.prepare(pair_model, optimizer)
    if checkpoint:
        load_checkpoint(accelerator, pair_model, optimizer, checkpoint)
    accelerator.init_trackers("iclip-hf", {name: str(value) for name, value in state.settings.items()})

    # Steps, between evaluations of the start and of the end
    selection = Selection(settings, state, inputs, validation, pair_model, processor, accelerator)
    if settings.model and state.step == 0:
        selection.measure_start()
    interrupts.deferred = True
    take_steps(settings, state, loader, pair_model, optimizer, selection, accelerator, interrupts)

    # Report
    write_state(accelerator, output_dir, state, "results.json")
    if accelerator.is_main_process:
        print(*report(settings, state, inputs.held_out), sep="\n")
    accelerator.end_training()
    return state.before if kept_initial_model(settings, state) else state.metrics


def take_steps(
    settings: Settings,
    state: RunState,
    loader: BatchLoader,
    pair_model: nn.Module,
    optimizer: torch.optim.Optimizer,
    selection: Selection,
    accelerator: Accelerator,
    interrupts: Interrupts,
) -> None:
    """
    Takes the steps of a run from that of its state to the last, with evaluations, checkpoints and the log. Raises
    `FloatingPointError` if the run has failed, and `KeyboardInterrupt` after a signal, with a checkpoint.
    """
    total_steps = settings.max_steps or settings.epochs * loader.steps_per_epoch
    warmup_steps = min(round(settings.warmup_epochs * loader.steps_per_epoch), total_steps - 1)
    rates = (settings.learning_rate, settings.warmup_learning_rate, settings.min_learning_rate)
    times: list[tuple[float, float]] = []  # seconds of loading and of computing a step, since the last log
    batches = loader.steps(state.step, total_steps)
    with tqdm(total=total_steps, initial=state.step, desc="Training", disable=not accelerator.is_main_process) as bar:
        while True:
            # 1. Evaluation, if it is due after the last step, or was interrupted. A signal acts at once, as there is a
            # checkpoint.
            if not state.measured:
                with interrupts.at_once():
                    selection.measure(state.step == total_steps)
                    write_state(accelerator, checkpoints(Path(settings.output_dir))[-1], state)
            if state.step == total_steps:
                return

            # 2. Batch, and learning rate. Dropout is seeded by the step, so that a resumed step is the same.
            began = time.perf_counter()
            batch = next(batches)
            loaded = time.perf_counter()
            seed_everything(settings.seed, state.step, accelerator.process_index)
            learning_rate = cosine_schedule(state.step, total_steps, warmup_steps, *rates)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            # 3. Losses, averaged over the processes, so that all decide by the same numbers
            outputs = pair_model(**batch)
            mine = torch.tensor([interrupts.requested], device=accelerator.device)
            losses = torch.cat([outputs["loss"].detach().unsqueeze(0), outputs["branch_losses"]])
            *losses, interrupted = accelerator.reduce(torch.cat([losses, mine.float()]), "mean").tolist()

            # 4. Step
            norm = step(accelerator, pair_model, optimizer, outputs["loss"], losses, settings.clip_grad_norm)
            finite = math.isfinite(norm)
            count_step(state, finite, total_steps)
            times.append((loaded - began, time.perf_counter() - loaded))
            bar.update()

            # 5. A run whose weights or, in the end, losses are not finite has failed. The scaler of float16 may skip
            # the last step.
            last = state.step == total_steps
            state.measured = not (last or state.step % settings.eval_steps == 0)
            saves = interrupted or not state.measured or state.step % settings.checkpoint_steps == 0
            if saves:
                check_finite(accelerator.unwrap_model(pair_model))
            if last and not ((finite or accelerator.scaler) and loss_is_finite(accelerator, pair_model, batch)):
                raise FloatingPointError(f"The loss is not finite at the last step, {state.step}: lower learning_rate")

            # 6. Log
            if last or state.step % settings.log_steps == 0:
                row = log_row(losses, outputs["logit_scales"].tolist(), times, settings.batch_size)
                row |= {"learning_rate": learning_rate, "gradient_norm": norm, "bad_steps": state.bad_steps}
                accelerator.log(row, state.step)
                bar.set_postfix(loss=f"{row['loss']:.3f}", pairs_per_s=f"{row['pairs_per_second']:.0f}")
                times.clear()

            # 7. Checkpoint, also before an evaluation, which may take long or fail
            if saves:
                save_checkpoint(accelerator, pair_model, optimizer, Path(settings.output_dir), state)
            if interrupted:
                raise KeyboardInterrupt


def begin(
    settings: Settings, content: dict[str, object], checkpoint: Path | None, state: RunState, accelerator: Accelerator
) -> None:
    """
    Writes the settings of a run into its folder, and notes what it reads in its state. Raises `ValueError` if that is
    not what the run of the checkpoint read. The places may differ.
    """
    if checkpoint and (differing := changed(state.content, content)):  # leaves the folder as it is
        raise ValueError(
            f"{checkpoint}: the run began with other {', '.join(differing)}; restore what has changed, or name "
            "another folder by --output_dir."
        )
    if accelerator.is_main_process:
        with atomic_write(Path(settings.output_dir, STATE_FILE)) as temporary:
            temporary.write_text(json.dumps(asdict(settings), indent=2))
    state.settings, state.content = asdict(settings), content


def step(
    accelerator: Accelerator,
    pair_model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    losses: list[float],
    clip_grad_norm: float,
) -> float:
    """
    Makes a step of the optimizer, unless one of the `losses` or the gradient are not finite. The scaler of float16
    skips by itself, and lowers its scale. Returns the norm of the gradient; NaN if a loss is not finite.
    """
    norm = math.nan
    if all(map(math.isfinite, losses)):
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(pair_model.parameters(), clip_grad_norm).item()
        if math.isfinite(norm) or accelerator.scaler is not None:
            optimizer.step()
            accelerator.unwrap_model(pair_model).clamp_logit_scales()
    optimizer.zero_grad()
    return norm


def count_step(state: RunState, finite: bool, total_steps: int) -> None:
    """Counts a step. Raises `FloatingPointError` after too many in a row whose loss or gradient is not finite."""
    state.step += 1
    state.bad_steps += not finite
    state.bad_in_a_row = 0 if finite else state.bad_in_a_row + 1
    if state.bad_in_a_row == min(MAX_BAD_STEPS, total_steps):
        raise FloatingPointError(
            f"No loss and gradient was finite in the last {state.bad_in_a_row} steps, up to step {state.step}: lower "
            "learning_rate, or set mixed_precision to bf16 or no"
        )


def log_row(
    losses: list[float], logit_scales: list[float], times: list[tuple[float, float]], batch_size: int
) -> dict[str, float]:
    """
    Returns what is logged of the last step, and of the speed since the last log, from seconds of loading and
    computing. The `losses` are the trained one and those of the branches; it is their mean, plus the loss of the
    weights of the attention if these learn, and that of the kept presence.
    """
    loading, computing = map(sum, zip(*times))
    return {
        **dict(zip(("loss", "recognition_loss", "map_loss"), losses)),
        **dict(zip(("logit_scale", "map_logit_scale"), logit_scales)),
        "pairs_per_second": len(times) * batch_size / (loading + computing),
        "share_of_time_loading": loading / (loading + computing),
    }


def check_finite(model: nn.Module) -> None:
    """Raises `FloatingPointError` for a weight that is not finite."""
    if name := non_finite_weight(model):
        raise FloatingPointError(f"The weights {name} are not finite any more: lower learning_rate")


@torch.no_grad()
def loss_is_finite(accelerator: Accelerator, pair_model: nn.Module, batch: dict) -> bool:
    """Returns whether the losses of all processes are finite."""
    pair_model.eval()
    losses = accelerator.reduce(pair_model(**batch)["branch_losses"], "mean")
    pair_model.train()
    return bool(losses.isfinite().all())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """
    Returns trained parameters in two groups: matrices with weight decay; vectors, biases and logit scales without.
    """
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = [p for name, p in learning if p.ndim > 1 and not name.endswith("bias")]
    others = [p for name, p in learning if p.ndim <= 1 or name.endswith("bias")]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def cosine_schedule(step: int, total: int, warmup: int, peak: float, start: float, end: float) -> float:
    """
    Returns the learning rate of a step: linear from `start` towards `peak` during the warm-up, then half a cosine to
    `end`. The cosine spans all steps including the warm-up, so the rate after the warm-up is slightly below `peak`.
    This is GroupViT's recipe and timm's default (`warmup_prefix=False`).
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * step / total)) / 2


# ---------------------------------------------------------------------------------------------------------- evaluation


@dataclass(eq=False, repr=False)
class Selection:
    """
    Evaluates the model of a run, and keeps in the run's folder the best model so far. `validation` are the held-out
    pairs; None without any.
    """

    settings: Settings
    state: RunState
    inputs: Inputs
    validation: PairBatches | None
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
                training, start = card_settings(state.settings), state.content
                self._export(metrics=evaluation, training=training, source=settings.model, start=start)
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
                    f"The loss of the held-out pairs is not finite at step {self.state.step}: lower learning_rate, or "
                    "set mixed_precision to bf16 or no"
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
