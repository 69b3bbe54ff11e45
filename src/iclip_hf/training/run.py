"""The training program: `iclip train`, which `accelerate launch train.py` is too."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ..utils.extras import require_extra


with require_extra("train"):
    from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
    from accelerate.utils import ProjectConfiguration, parse_flag_from_env, set_seed

from ..configuration_iclip import ICLIPConfig
from ..data.pairs import PairStream
from ..data.segmentation import load_segmentation
from ..evaluation.evaluate import evaluate
from ..hub.folders import join_towers
from ..modeling_iclip import ICLIPModel
from ..models.identity import digest, identity
from ..models.loading import load_iclip, warn_of_slow_bfloat16
from ..processing_iclip import ICLIPProcessor
from ..utils.distributed import partner_errors, shared_folder_lock
from ..utils.files import atomic_write
from .checkpoints import (
    advice_to_resume,
    check_content,
    export,
    holds_start,
    keep_learning_weights_only,
    save_checkpoint,
    state_to_resume,
    whole_model,
    write_state,
)
from .checks import STATE_FILE, checkpoints
from .data import BatchLoader, derive_seed
from .datasets import load_datasets, open_pairs
from .interrupts import Interrupts, ended_workers
from .low_rank import add_low_rank
from .nouns import NounPrompts
from .pair_model import PairModel
from .report import own_labels, report
from .schedule import cosine_schedule, parameter_groups
from .settings import MAP_METRICS, Settings
from .validation import change_interval, draw_examples, validate


# -------------------------------------------------------------------------------------------------------------- model


def build_model(settings: Settings) -> tuple[ICLIPModel, ICLIPProcessor]:
    """The model to train and its processor: a trained one, or fresh projections on two towers."""
    options = dict(option.split("=", 1) for option in settings.model_options)
    if unknown := [name for name in options if name not in ICLIPConfig.__annotations__]:
        raise ValueError(f"Expected model_options to name options of ICLIPConfig, got {unknown[0]!r}: correct it.")
    options = {name: yaml.safe_load(value) for name, value in options.items()}
    if settings.model:
        return load_iclip(settings.model, **options)
    folder = Path(settings.config).parent
    return join_towers(folder, settings.vision, settings.text, settings.image_size, **options)


def start_accelerator(settings: Settings, model: ICLIPModel) -> Accelerator:
    precision = settings.mixed_precision
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # of `accelerate launch`, "no" by default
    # Without `cpu`, two processes on CPU would not find each other.
    on_gpu = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device.type == "cuda"
    if settings.mixed_precision == "auto" and precision == "no" and on_gpu:
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    whole_tower_learns = not (model.config.lock_vision or settings.unlocked_vision_blocks)
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(settings.output_dir, logging_dir=str(Path(settings.output_dir, "logs"))),
        # An image tower that learns as a whole may have parameters that no forward uses, such as a mask token.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=whole_tower_learns)],
    )
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu":
        warn_of_slow_bfloat16()
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise ValueError(
            f"Expected processes that each hold the whole model, or FSDP of version 2, got {kind}: use a configuration of "
            "Accelerate such as those in hub_configs/accelerate."
        )
    return accelerator


# ---------------------------------------------------------------------------------------------------------------- run


def train(settings: Settings) -> dict[str, float]:
    """
    Trains a model in the folder `settings.output_dir`, which `from_pretrained` then loads. With validation, this is the best
    model of the evaluations, which may be the one that the run started from; otherwise the last.

    Returns:
        The metrics of this model.

    Raises:
        `ValueError`: a setting or the data is not as described. `OSError`: something cannot be read or written.
        `FloatingPointError`: too many steps in a row have no finite loss. `KeyboardInterrupt`: the run was interrupted; its message
        names the checkpoint to resume from.
    """
    transformers_logging.disable_progress_bar()
    set_seed(settings.seed)
    output_dir = Path(settings.output_dir)
    with advice_to_resume(output_dir), Interrupts() as interrupts, ended_workers():
        model, processor = build_model(settings)
        started_from = identity(model, processor)
        if settings.text_lora_rank:
            add_low_rank(model, settings.text_lora_rank)
        accelerator = start_accelerator(settings, model)
        with partner_errors("start it again"), shared_folder_lock(output_dir, accelerator):
            if accelerator.is_main_process:
                with atomic_write(output_dir / STATE_FILE) as temporary:
                    temporary.write_text(json.dumps(asdict(settings), indent=2))
            return TrainingRun(settings, model, processor, started_from, accelerator, interrupts).run()


@dataclass(eq=False, repr=False)
class TrainingRun:
    """A run from its data to its report. Parameters: see [`train`]."""

    settings: Settings
    model: ICLIPModel
    processor: ICLIPProcessor
    started_from: dict[str, str]
    accelerator: Accelerator
    interrupts: Interrupts

    def __post_init__(self):
        settings, model, accelerator = self.settings, self.model, self.accelerator
        self.output_dir = Path(settings.output_dir)
        options = "chunk_size lock_text map_tokens noun_weight noun_branches noun_competition unlocked_vision_blocks"
        pair_model = PairModel(model, **{name: getattr(settings, name) for name in options.split()})
        fixed = ["chunk_size"] if pair_model.has_dropout else []
        last_checkpoint, self.state = state_to_resume(settings, fixed)
        if last_checkpoint and self.state.sharded != accelerator.is_fsdp2:
            was = "with FSDP" if self.state.sharded else "without FSDP"
            raise ValueError(f"{last_checkpoint}: expected a run {was}, as it began, got another; resume it {was}.")
        self.state.settings, self.state.sharded = asdict(settings), accelerator.is_fsdp2

        # Data; first what is quickly found to be missing
        self.segmentation = None
        if settings.eval_dataset != "none":
            self.segmentation = load_segmentation(
                settings.eval_dataset, settings.eval_root, settings.eval_split or None
            )
        pairs, self.held_out = open_pairs(settings, accelerator)
        nouns = NounPrompts.from_file(settings.nouns, settings.noun_prompts, settings.seed) if settings.nouns else None
        with accelerator.main_process_first():  # the first process caches the digests of the files for the others
            streamed = isinstance(pairs, PairStream)  # which has a name only
            content = self.started_from | {
                "data": settings.data if streamed else pairs.fingerprint(),
                "validation_data": self.held_out and self.held_out.fingerprint(),
                "nouns": nouns and digest([nouns.nouns, nouns.is_background.tolist()]),
                "eval_root": self.segmentation and self.segmentation.fingerprint(),
            }
        if last_checkpoint:
            check_content(last_checkpoint, self.state, content)
        self.state.content = content
        training, self.validation = load_datasets(
            settings, pairs, self.held_out, nouns, model, self.processor, accelerator
        )
        self.workers = 0 if settings.cache_features else settings.num_workers
        self.loader = BatchLoader(
            training, accelerator, settings.batch_size, settings.seed, self.workers, settings.pairs_per_epoch
        )

        # Optimizer and schedule
        pair_model.train()
        optimizer = torch.optim.AdamW(parameter_groups(pair_model, settings.weight_decay))
        self.pair_model, self.optimizer = accelerator.prepare(pair_model, optimizer)
        steps_per_epoch = self.loader.steps_per_epoch
        self.total_steps = settings.max_steps or settings.epochs * steps_per_epoch
        self.warmup_steps = min(round(settings.warmup_epochs * steps_per_epoch), self.total_steps - 1)
        rates = (settings.learning_rate, settings.warmup_learning_rate, settings.min_learning_rate)
        self.rates = [rate * settings.batch_size / 1024 for rate in rates]

        keep_learning_weights_only(accelerator)
        if last_checkpoint:
            accelerator.load_state(str(last_checkpoint))
        accelerator.init_trackers("iclip-hf", {name: str(value) for name, value in self.state.settings.items()})
        self.times: list[tuple[float, float]] = []  # seconds of loading and of computing a step, since the last log
        self.bar = tqdm(total=self.total_steps, initial=self.state.step, disable=not accelerator.is_main_process)
        self.shown: dict[str, str] = {}  # beside the bar

    def run(self) -> dict[str, float]:
        """Trains, and returns the metrics of the model in the run's folder."""
        if self.settings.model and self.state.step == 0:
            self.measure_start()
        self.interrupts.deferred = True
        if not self.state.measured:  # interrupted meanwhile
            self.measure_checkpoint()
        self.bar.set_description("Training")
        while self.state.step < self.total_steps:
            self.train_epoch(*divmod(self.state.step, self.loader.steps_per_epoch))
        self.bar.close()

        write_state(self.accelerator, self.output_dir, self.state, "results.json")
        if self.accelerator.is_main_process:
            print(report(self.settings, self.state, self.held_out))
        self.accelerator.end_training()
        return self.state.before if holds_start(self.settings, self.state) else self.state.metrics

    # ---------------------------------------------------------------------------------------------------------- steps

    def train_epoch(self, epoch: int, first: int) -> None:
        """Takes the steps of an epoch from its batch `first` on, up to the last of the run, and logs, saves and evaluates."""
        settings, state = self.settings, self.state
        began = time.perf_counter()
        for batch in self.loader.epoch(epoch, first):
            loaded = time.perf_counter()
            row, interrupted = self.train_step(batch)
            self.times.append((loaded - began, time.perf_counter() - loaded))
            self.bar.update()

            last = state.step == self.total_steps
            if last or state.step % settings.log_steps == 0:
                self.log_row(row)
            state.measured = not (last or state.step % settings.eval_steps == 0)
            saved = last or interrupted or state.step % settings.checkpoint_steps == 0
            if saved:  # before measuring, which may take long or fail
                save_checkpoint(self.accelerator, self.output_dir, state, settings.keep_checkpoints)
            if interrupted:
                self.bar.close()
                raise KeyboardInterrupt(f"interrupted after step {state.step}")
            if not state.measured:
                self.measure_checkpoint() if saved else self.measure()
            if last:
                return
            began = time.perf_counter()  # logs, checkpoints and evaluations do not count

    def train_step(self, batch: dict) -> tuple[dict[str, float], bool]:
        """Takes a step, unless loss or gradient are not finite. Returns its row of the log, and whether a process got a signal."""
        settings, state, accelerator = self.settings, self.state, self.accelerator
        # Dropout draws by the step, not by what was drawn before, so that a resumed step is the same.
        torch.manual_seed(derive_seed(settings.seed, state.step, accelerator.process_index))
        learning_rate = cosine_schedule(state.step, self.total_steps, self.warmup_steps, *self.rates)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        skipped = batch.pop("skipped")
        outputs = self.pair_model(**batch)
        # Every process decides by the same numbers.
        mine = torch.tensor([skipped, self.interrupts.requested], device=accelerator.device)
        shared = accelerator.reduce(torch.cat([outputs["losses"], mine.float()]), "mean")
        *losses, skipped, interrupted = shared.tolist()
        norm = math.nan
        if all(map(math.isfinite, losses)):
            accelerator.backward(outputs["loss"])
            norm = accelerator.clip_grad_norm_(self.pair_model.parameters(), settings.clip_grad_norm)
            norm = (norm.full_tensor() if accelerator.is_fsdp2 else norm).item()
            if math.isfinite(norm) or accelerator.scaler is not None:  # which skips by itself, and lowers its scale
                self.optimizer.step()
                accelerator.unwrap_model(self.pair_model).clamp_logit_scales()
        self.optimizer.zero_grad()

        finite = math.isfinite(norm)
        state.step += 1
        state.skipped_pairs += round(skipped * accelerator.num_processes)
        state.bad_steps += not finite
        state.bad_in_a_row = 0 if finite else state.bad_in_a_row + 1
        if state.bad_in_a_row == settings.max_bad_steps:
            raise FloatingPointError(
                f"Expected a finite loss and gradient, got none in the last {settings.max_bad_steps} steps, up to step "
                f"{state.step}: lower learning_rate, or set mixed_precision to bf16 or no"
            )
        row = {
            "loss": sum(losses) / len(losses),
            **dict(zip(("recognition_loss", "map_loss"), losses)),
            **dict(zip(("logit_scale", "map_logit_scale"), outputs["logit_scales"].tolist())),
            "learning_rate": learning_rate,
            "gradient_norm": norm if finite else math.nan,
        }
        return row, bool(interrupted)

    def log_row(self, row: dict[str, float]) -> None:
        """Logs what a step returned, with the speed and the counts of the run, and shows its loss beside the bar."""
        loading, computing = map(sum, zip(*self.times))
        row["pairs_per_second"] = len(self.times) * self.settings.batch_size / (loading + computing)
        row["share_of_time_loading"] = loading / (loading + computing)
        row |= {"bad_steps": self.state.bad_steps, "skipped_pairs": self.state.skipped_pairs}
        self.times.clear()
        self.accelerator.log(row, self.state.step)
        self.shown |= {"loss": f"{row['loss']:.3f}", "pairs_per_s": f"{row['pairs_per_second']:.0f}"}
        self.bar.set_postfix(self.shown)

    # ---------------------------------------------------------------------------------------------------- evaluations

    def evaluate(self) -> tuple[dict[str, float], list[float], dict | None]:
        """Returns the metrics of the model, `best_metric` for each held-out pair, and the evaluation on maps."""
        settings, pair_model, is_main = self.settings, self.pair_model, self.accelerator.is_main_process
        metrics, by_pair, evaluation = {}, [], None
        if self.validation is not None:
            self.bar.set_description(f"Evaluating on {len(self.validation)} held-out pairs")
            scores = validate(self.accelerator, pair_model, self.validation, settings.chunk_size, self.workers)
            metrics |= {name: values.mean().item() for name, values in scores.items()}
            by_pair = scores[settings.best_metric].tolist() if settings.best_metric in scores else []
        whole = whole_model(self.accelerator, pair_model).eval()
        if self.segmentation is not None:
            self.bar.set_description(f"Evaluating maps on {settings.eval_dataset}")
            result = evaluate((whole, self.processor), self.segmentation)
            evaluation = {"protocol": {**result.protocol, "model": settings.name}, "results": result.results}
            metrics |= {metric: result.results["itsm"][metric] for metric in MAP_METRICS}
        if self.held_out is not None and settings.pictures and is_main:
            self.bar.set_description("Drawing pictures")
            pictures = self.output_dir / "pictures"
            draw_examples(whole, self.processor, self.held_out, settings.pictures, pictures, self.state.step)
        pair_model.train()
        self.accelerator.log(metrics, self.state.step)
        return metrics, by_pair, evaluation

    def measure_start(self) -> None:
        """Evaluates the model that the run starts from. Its folder holds it until an evaluation is better."""
        self.state.before, self.state.before_by_pair, evaluation = self.evaluate()
        if self.state.before:
            self.export(metrics=evaluation, source=self.settings.model)

    def measure(self) -> None:
        """Evaluates the model, and exports it if it is the best so far."""
        settings, state = self.settings, self.state
        metrics, by_pair, evaluation = self.evaluate()
        score = metrics.get(settings.best_metric)
        last = state.step == self.total_steps
        if last if score is None else settings.is_better(score, state.best):
            state.best, state.metrics, state.evaluation = score, metrics, evaluation
            if state.before_by_pair:
                state.change = change_interval(state.before_by_pair, by_pair)
            if not holds_start(settings, state):
                labels = own_labels(self.held_out) if self.held_out is not None else None
                self.export(metrics=evaluation, training=state.settings, labels=labels)
        if score is not None:
            self.shown[settings.best_metric] = f"{score:.4g}"
            self.bar.set_postfix(self.shown)
        self.bar.set_description("Training")
        state.measured = True

    def measure_checkpoint(self) -> None:
        """Like `measure`, after a checkpoint: a signal acts at once."""
        try:
            with self.interrupts.at_once():  # all is saved
                self.measure()
                write_state(self.accelerator, checkpoints(self.output_dir)[-1], self.state)
        except KeyboardInterrupt:
            self.bar.close()
            raise KeyboardInterrupt(f"interrupted after step {self.state.step}") from None

    def export(self, **card: object) -> None:
        self.bar.set_description("Saving the model")
        export(self.accelerator, self.pair_model, self.processor, self.output_dir, name=self.settings.name, **card)
