"""The training program: `iclip train`, which `accelerate launch train.py` is too."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
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
from ..data.segmentation import load_segmentation
from ..evaluation.evaluate import evaluate
from ..hub.folders import join_towers
from ..modeling_iclip import ICLIPModel
from ..models.identity import identity
from ..models.loading import load_iclip, warn_of_slow_bfloat16
from ..processing_iclip import ICLIPProcessor
from ..utils.distributed import partner_errors, shared_folder_lock
from ..utils.files import atomic_write
from .checkpoints import (
    advice_to_resume,
    check_content,
    export,
    keep_learning_weights_only,
    known_by_content,
    save_checkpoint,
    state_to_resume,
    update_checkpoint,
    whole_model,
)
from .checks import checkpoints
from .data import BatchLoader, derive_seed
from .datasets import load_datasets, open_pairs
from .interrupts import Interrupts
from .loss import PairModel
from .low_rank import add_low_rank
from .meter import Meter
from .nouns import NounPrompts
from .report import report
from .schedule import cosine_schedule, parameter_groups
from .settings import MAP_METRICS, Settings
from .validation import draw_examples, validate


# -------------------------------------------------------------------------------------------------------------- model


def build_model(settings: Settings) -> tuple[ICLIPModel, ICLIPProcessor]:
    """The model to train and its processor: a trained one, or fresh projections on two towers."""
    options = dict(one.split("=", 1) for one in settings.model_options)
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
    model of the evaluations, otherwise the last.

    Returns:
        The metrics of this model.

    Raises:
        `ValueError`: a setting or the data is not as described. `OSError`: something cannot be read or written.
        `FloatingPointError`: too many steps in a row have no finite loss. `KeyboardInterrupt`: the run was interrupted; its message
        says how to go on.
    """
    transformers_logging.disable_progress_bar()
    set_seed(settings.seed)
    output_dir = Path(settings.output_dir)
    with advice_to_resume(output_dir), Interrupts() as interrupts:
        model, processor = build_model(settings)
        started_from = identity(model, processor)
        if settings.text_lora_rank:
            add_low_rank(model, settings.text_lora_rank)
        accelerator = start_accelerator(settings, model)
        new = not checkpoints(output_dir)
        with partner_errors("start it again"), shared_folder_lock(output_dir, accelerator, own=new):
            return run(settings, model, processor, started_from, accelerator, interrupts)


def run(
    settings: Settings,
    model: ICLIPModel,
    processor: ICLIPProcessor,
    started_from: dict[str, str],
    accelerator: Accelerator,
    interrupts: Interrupts,
) -> dict[str, float]:
    """The run itself, top to bottom: data, optimizer, loop, report. Returns the metrics of the model in the run's folder."""
    output_dir = Path(settings.output_dir)
    pair_model = PairModel(
        model,
        settings.chunk_size,
        settings.lock_text,
        settings.map_tokens,
        settings.noun_weight,
        settings.noun_branches,
        settings.noun_competition,
        settings.unlocked_vision_blocks,
    )
    last_checkpoint, state = state_to_resume(settings, fixed=["chunk_size"] if pair_model.has_dropout else [])
    if last_checkpoint and state.sharded != accelerator.is_fsdp2:
        was = "with FSDP" if state.sharded else "without FSDP"
        raise ValueError(f"{last_checkpoint}: expected a run {was}, as it began, got another; resume it {was}.")
    state.settings, state.sharded = asdict(settings), accelerator.is_fsdp2

    # Data; first what is quickly found to be missing
    segmentation = None
    if settings.eval_dataset != "none":
        segmentation = load_segmentation(settings.eval_dataset, settings.eval_root, settings.eval_split or None)
    pairs, held_out = open_pairs(settings, accelerator)
    nouns = NounPrompts.from_file(settings.nouns, settings.noun_prompts, settings.seed) if settings.nouns else None
    with accelerator.main_process_first():  # the first process caches the digests of the files for the others
        content = {**started_from, **known_by_content(settings, pairs, held_out, nouns, segmentation)}
    if last_checkpoint:
        check_content(last_checkpoint, state, content)
    state.content = content
    training, validation = load_datasets(settings, pairs, held_out, nouns, model, processor, accelerator)
    workers = 0 if settings.cache_features else settings.num_workers
    loader = BatchLoader(training, accelerator, settings.batch_size, settings.seed, workers, settings.pairs_per_epoch)

    # Optimizer and schedule
    pair_model.train()
    optimizer = torch.optim.AdamW(
        parameter_groups(pair_model, settings.weight_decay),
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
    )
    pair_model, optimizer = accelerator.prepare(pair_model, optimizer)
    unwrapped = accelerator.unwrap_model(pair_model)
    total_steps = settings.max_steps or settings.epochs * loader.steps_per_epoch
    warmup_steps = min(round(settings.warmup_epochs * loader.steps_per_epoch), total_steps - 1)
    rates = (settings.learning_rate, settings.warmup_learning_rate, settings.min_learning_rate)
    rates = [rate * settings.batch_size / 1024 for rate in rates]

    keep_learning_weights_only(accelerator)
    if last_checkpoint:
        accelerator.load_state(str(last_checkpoint))
    accelerator.init_trackers("iclip-hf", {name: str(value) for name, value in state.settings.items()})

    def evaluate_now() -> tuple[dict[str, float], dict | None]:
        metrics, evaluation = {}, None
        if validation is not None:
            metrics |= validate(accelerator, pair_model, validation, settings.chunk_size, workers)
        whole = whole_model(accelerator, pair_model).eval()
        if segmentation is not None:
            result = evaluate((whole, processor), segmentation, progress=False)
            evaluation = {"protocol": {**result.protocol, "model": settings.name}, "results": result.results}
            metrics |= {metric: result.results["itsm"][metric] for metric in MAP_METRICS}
        if held_out is not None and settings.pictures and accelerator.is_main_process:
            draw_examples(whole, processor, held_out, settings.pictures, output_dir / "pictures", state.step)
        pair_model.train()
        accelerator.log(metrics, state.step)
        return metrics, evaluation

    if settings.model and state.step == 0:
        state.before, _ = evaluate_now()

    bar = tqdm(total=total_steps, initial=state.step, desc="Training", disable=not accelerator.is_main_process)
    shown = {}  # beside the bar

    def measure() -> None:
        """Evaluates the model, and exports it if it is the best so far."""
        metrics, evaluation = evaluate_now()
        score = metrics.get(settings.best_metric)
        last = state.step == total_steps
        better = last if score is None else state.best is None or settings.is_better(score, state.best)
        if better:
            state.best, state.metrics, state.evaluation = score, metrics, evaluation
            card = {"name": settings.name, "metrics": evaluation, "training": state.settings}
            export(accelerator, pair_model, processor, output_dir, **card)
        if score is not None:
            shown[settings.best_metric] = f"{score:.4g}"
            bar.set_postfix(shown)
        state.measured = True

    def measure_checkpoint() -> None:
        try:
            with interrupts.at_once():  # all is saved
                measure()
                update_checkpoint(accelerator, output_dir, state)
        except KeyboardInterrupt:
            bar.close()
            raise KeyboardInterrupt(f"interrupted after step {state.step}") from None

    # Loop
    meter = Meter(settings.batch_size)
    interrupts.deferred = True
    if not state.measured:  # interrupted meanwhile
        measure_checkpoint()
    while state.step < total_steps:
        epoch, first = divmod(state.step, loader.steps_per_epoch)
        for batch in loader.epoch(epoch, first):
            meter.loaded()
            # Dropout draws by the step, not by what was drawn before, so that a resumed step is the same.
            torch.manual_seed(derive_seed(settings.seed, state.step, accelerator.process_index))
            learning_rate = cosine_schedule(state.step, total_steps, warmup_steps, *rates)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            skipped = batch.pop("skipped")
            outputs = pair_model(**batch)
            # Every process decides by the same numbers.
            mine = torch.tensor([skipped, interrupts.requested], device=accelerator.device)
            shared = accelerator.reduce(torch.cat([outputs["losses"], mine.float()]), "mean")
            *losses, skipped, interrupted = shared.tolist()
            finite = all(map(math.isfinite, losses))
            if finite:
                accelerator.backward(outputs["loss"])
                norm = accelerator.clip_grad_norm_(pair_model.parameters(), settings.clip_grad_norm)
                norm = norm.full_tensor() if accelerator.is_fsdp2 else norm
                finite = bool(torch.isfinite(norm))
                if finite or accelerator.scaler is not None:  # the scaler skips by itself, and lowers its scale
                    optimizer.step()
                    unwrapped.clamp_logit_scales()
            optimizer.zero_grad()

            state.step += 1
            state.skipped_pairs += round(skipped * accelerator.num_processes)
            state.bad_steps += not finite
            state.bad_in_a_row = 0 if finite else state.bad_in_a_row + 1
            if state.bad_in_a_row == settings.max_bad_steps:
                raise FloatingPointError(
                    f"Expected a finite loss and gradient, got none in the last {settings.max_bad_steps} steps, up to step "
                    f"{state.step}: lower learning_rate, or set mixed_precision to bf16 or no"
                )
            meter.stepped()
            bar.update()

            last = state.step == total_steps
            if last or state.step % settings.log_steps == 0:
                log = {
                    "loss": sum(losses) / len(losses),
                    **dict(zip(("recognition_loss", "map_loss"), losses)),
                    **dict(zip(("logit_scale", "map_logit_scale"), outputs["logit_scales"].tolist())),
                    "learning_rate": learning_rate,
                    "gradient_norm": norm.item() if finite else math.nan,
                    **meter.read(),
                    "bad_steps": state.bad_steps,
                    "skipped_pairs": state.skipped_pairs,
                }
                accelerator.log(log, state.step)
                shown |= {"loss": f"{log['loss']:.3f}", "pairs_per_s": f"{log['pairs_per_second']:.0f}"}
                bar.set_postfix(shown)
            state.measured = not (last or state.step % settings.eval_steps == 0)
            saved = last or interrupted or state.step % settings.checkpoint_steps == 0
            if saved:  # before measuring, which may take long or fail
                save_checkpoint(accelerator, output_dir, state, settings.keep_checkpoints)
            if interrupted:
                bar.close()
                raise KeyboardInterrupt(f"interrupted after step {state.step}")
            if not state.measured:
                measure_checkpoint() if saved else measure()
            if last:
                break
            meter.pause()
    bar.close()

    # Report
    if accelerator.is_main_process:
        with atomic_write(output_dir / "results.json") as partial:
            partial.write_text(json.dumps(asdict(state), indent=2))
        print(report(settings, state, held_out))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return state.metrics
