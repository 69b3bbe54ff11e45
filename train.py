"""
Trains ICLIP: `accelerate launch train.py --config hub_configs/<name>/train.yaml`, or `python train.py` on one device.

A `train.yaml` holds settings, `config.json` and `processor_config.json` beside it the model's options; any setting can be given on the
command line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from iclip_hf.utils.extras import require_extra


with require_extra("train"):
    from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
    from accelerate.utils import ProjectConfiguration, parse_flag_from_env, set_seed

from iclip_hf import ICLIPConfig, ICLIPModel, ICLIPProcessor
from iclip_hf.data.pairs import PairStream, load_pairs
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.evaluation.evaluate import evaluate
from iclip_hf.hub.folders import join_towers
from iclip_hf.models.loading import load_iclip
from iclip_hf.training.checkpoints import (
    checkpoints,
    export,
    keep_learning_weights_only,
    load_checkpoint,
    save_checkpoint,
)
from iclip_hf.training.data import AugmentedImage, BatchLoader, TrainingPairs, TrainingStream, WholeImage, derive_seed
from iclip_hf.training.feature_cache import CachedPairs, cache_images, cache_texts
from iclip_hf.training.loss import PairModel, set_token_mean
from iclip_hf.training.nouns import NounPrompts
from iclip_hf.training.schedule import cosine_schedule, parameter_groups
from iclip_hf.training.validation import draw_examples, validate
from iclip_hf.utils.distributed import partner_errors, shared_folder_lock
from iclip_hf.utils.files import atomic_write


# ----------------------------------------------------------------------------------------------------------- settings


def setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """The paper's recipe by default; where it leaves things open, GroupViT's and DeiT's, which it follows."""

    config: str = setting("hub_configs/iclip-vit-b16/train.yaml", "settings; beside them the model's configuration")
    output_dir: str = setting("", "folder of the run; runs/<name of the config's folder> if not given")
    resume: bool = setting(False, "go on from the last checkpoint in output_dir, if there is one")

    # model
    model: str = setting("", "ICLIP model to train further (folder or Hub id), instead of two towers")
    vision: str = setting("", 'image tower (folder, Hub id, or DINO\'s .pth), or "embedded" for the one of the demo')
    text: str = setting("", 'text tower (folder or Hub id), or "embedded" for the one of the demo')
    model_options: list[str] = field(
        default_factory=list, metadata={"help": "options of the model over those of config.json, as name=value"}
    )
    lock_text: bool = setting(False, "train the projections only")
    image_size: int = setting(224, "height and width of images in pixels")

    # data
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "training pairs: tar shards, image folders, .csv or .tsv tables, or one Hub dataset"},
    )
    validation_data: list[str] = field(default_factory=list, metadata={"help": "pairs to validate on, local"})
    split: str = setting("train", "split of a Hub dataset")
    pairs_per_epoch: int = setting(
        0, "pairs in an epoch of a Hub dataset, which is streamed and does not tell its length"
    )
    max_bad_share: float = setting(0.05, "the run stops if more of the pairs are broken")
    crop_scale: float = setting(0.08, "smallest area of a random crop, as a share of the image")
    auto_augment: str = setting("rand-m9-mstd0.5-inc1", "timm's name of an augmentation policy, or empty")
    random_erasing: float = setting(0.25, "probability of erasing a rectangle")
    nouns: str = setting("", "text file of nouns, a line each: those of a caption become prompts, as in GroupViT")
    noun_prompts: int = setting(3, "nouns that a pair brings; each noun of a batch counts once")
    noun_weight: float = setting(0.5, "their share in the loss of the branches that learn them")
    noun_branches: list[str] = field(
        default_factory=lambda: ["recognition"],
        metadata={"help": "branches that learn them: recognition, interpretability"},
    )
    map_tokens: int = setting(16, "patches that stand for an image where max_over is similarity")
    num_workers: int = setting(4, "processes that load pairs, for each training process")
    cache_features: str = setting("", "folder for features of locked towers, computed once and trained from")
    views: int = setting(1, "views of an image in that cache: the whole image, then augmented ones")

    # optimisation
    epochs: int = setting(30, "passes over the pairs")
    max_steps: int = setting(0, "stop after so many steps, the schedule with them; 0 for all epochs")
    batch_size: int = setting(1024, "pairs in a batch of all processes together")
    chunk_size: int = setting(256, "pairs that a tower sees at once in a process; the memory it needs, not the result")
    learning_rate: float = setting(
        1.25e-4, "learning rate at the peak, for a batch of 1024; all three rates follow the batch size"
    )
    warmup_learning_rate: float = setting(1e-6, "learning rate at the start")
    min_learning_rate: float = setting(1e-5, "learning rate at the end")
    warmup_epochs: float = setting(2.0, "epochs of linear warm-up, before half a cosine")
    weight_decay: float = setting(0.05, "weight decay of matrices; not of biases, norms and logit scales")
    adam_beta1: float = setting(0.9, "AdamW's memory of the gradient")
    adam_beta2: float = setting(0.999, "AdamW's memory of the squared gradient")
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon")
    clip_grad_norm: float = setting(5.0, "largest norm of the gradient")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = setting(
        "auto",
        "auto: fp16 or bf16 if Accelerate was told one of them, else the one that the GPU prefers, none on a CPU",
    )
    max_bad_steps: int = setting(30, "stop after so many steps in a row without a finite loss and gradient")
    seed: int = setting(0, "seed of everything random")

    # watching
    report_to: str = setting("tensorboard", "Accelerate's name of a tracker, or none")
    log_steps: int = setting(10, "steps between two logs")
    eval_steps: int = setting(1000, "steps between two evaluations; there is one at the end in any case")
    eval_dataset: Literal["none", "voc2012", "coco2017", "folder"] = setting(
        "none", "segmentation data to evaluate maps on"
    )
    eval_root: str = setting("", "folder of eval_dataset")
    eval_split: str = setting("", "split of eval_dataset, if not the official one")
    best_metric: Literal["auto", "text_to_image", "image_to_text", "mAP", "mMIoU", "mFMB"] = setting(
        "auto", "what the kept best model is best in; auto: text_to_image, or mMIoU without validation_data"
    )
    pictures: int = setting(4, "validation images to draw the maps of at each evaluation")
    checkpoint_steps: int = setting(1000, "steps between two checkpoints")
    keep_checkpoints: int = setting(2, "checkpoints to keep")

    def __post_init__(self):
        self.output_dir = self.output_dir or f"runs/{Path(self.config).parent.name}"
        limits = dict.fromkeys(("image_size", "views", "epochs", "batch_size", "chunk_size", "max_bad_steps"), 1)
        limits |= dict.fromkeys(("log_steps", "eval_steps", "checkpoint_steps", "keep_checkpoints", "noun_prompts"), 1)
        limits["map_tokens"] = 1
        limits |= dict.fromkeys(("num_workers", "max_steps", "pairs_per_epoch", "pictures"), 0)
        limits |= dict.fromkeys(("warmup_epochs", "weight_decay", "warmup_learning_rate", "min_learning_rate"), 0)
        for name, least in limits.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_grad_norm", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("crop_scale", "random_erasing", "max_bad_share", "adam_beta1", "adam_beta2", "noun_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for one in self.model_options:
            name, equals, _ = one.partition("=")
            if not equals or name not in ICLIPConfig.__annotations__:
                raise ValueError(f"model_options must be name=value with an option of ICLIPConfig, got {one!r}")
        branches = ("recognition", "interpretability")
        if unknown := [name for name in self.noun_branches if name not in branches]:
            raise ValueError(f"noun_branches must be of {', '.join(branches)}, got {unknown[0]!r}")
        given = {"validation_data": bool(self.validation_data), "eval_dataset": self.eval_dataset != "none"}
        needed = "validation_data" if self.best_metric in ("text_to_image", "image_to_text") else "eval_dataset"
        if self.best_metric == "auto":
            maps_alone = given["eval_dataset"] and not given["validation_data"]
            self.best_metric = "mMIoU" if maps_alone else "text_to_image"
        elif not given[needed]:
            raise ValueError(f"best_metric {self.best_metric} needs {needed}, which is not given")
        if not self.data:
            raise ValueError("data must name training pairs, such as a folder of webdataset shards")
        if bool(self.model) == bool(self.vision and self.text):
            raise ValueError("either model must be given, or vision and text")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says nothing of a default that is nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in ("", []) else super()._get_help_string(action)


def read_settings(arguments: list[str]) -> Settings:
    """Defaults, then `train.yaml`, then the command line; one line on stderr and exit code 2 if one of them is wrong."""
    parser = HfArgumentParser(
        Settings, prog="train.py", description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"train.py: {message}\n")
    config, _ = parser.parse_known_args([a for a in arguments if a not in ("-h", "--help")])
    try:
        from_file = yaml.safe_load(Path(config.config).read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        parser.error(f"{config.config}: cannot be read as YAML settings: {' '.join(str(error).split())}")
    if not isinstance(from_file, dict):
        parser.error(f"{config.config}: expected settings as `name: value`, got {type(from_file).__name__}")
    # A file says what a command line would, so it goes the same way, ahead of the real one.
    command = []
    for name, value in from_file.items():
        if name not in Settings.__dataclass_fields__ or name == "config":
            parser.error(f"{config.config}: there is no setting {name!r}")
        values = value if isinstance(value, list) else [value]
        if any(isinstance(one, (list, dict)) for one in values):
            parser.error(f"{config.config}: {name} must be a value or a list of values")
        command += [f"--{name}", *map(str, values)]
    try:
        return parser.parse_args_into_dataclasses([*command, *arguments], look_for_args_file=False)[0]
    except ValueError as error:
        parser.error(str(error))


# --------------------------------------------------------------------------------------------------- model and data


def load_model(settings: Settings) -> tuple[ICLIPModel, ICLIPProcessor]:
    """The model to train and its processor: a trained one, or fresh projections on two towers."""
    options = {
        name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in settings.model_options)
    }
    if settings.model:
        return load_iclip(settings.model, **options)
    folder = Path(settings.config).parent
    return join_towers(folder, settings.vision, settings.text, settings.image_size, **options)


def load_datasets(settings: Settings, model: ICLIPModel, processor: ICLIPProcessor, accelerator: Accelerator):
    """What to train on, and the local pairs to validate on with their prepared form (None without them)."""
    shared = {"seed": settings.seed, "max_bad_share": settings.max_bad_share}
    source = settings.data[0] if len(settings.data) == 1 else settings.data
    placed = {"rank": accelerator.process_index, "world_size": accelerator.num_processes, "split": settings.split}
    with accelerator.main_process_first():  # which leaves the indexes of tar shards behind for the others
        pairs = load_pairs(source, **shared, **placed)
        held_out = load_pairs(settings.validation_data, **shared) if settings.validation_data else None
    whole = WholeImage(processor)
    augmented = AugmentedImage(processor, settings.crop_scale, settings.auto_augment, settings.random_erasing)

    nouns = NounPrompts.from_file(settings.nouns, settings.noun_prompts, settings.seed) if settings.nouns else None

    def cached(pairs, part: str, transforms: list, nouns: NounPrompts | None = None) -> CachedPairs:
        if not model.config.lock_vision or isinstance(pairs, PairStream):
            raise ValueError("cache_features needs a locked image tower and local pairs.")
        folder = Path(settings.cache_features, part)
        limits = {"num_workers": settings.num_workers, "max_bad_share": settings.max_bad_share}
        views = cache_images(folder, pairs, model, transforms, accelerator, map_tokens=settings.map_tokens, **limits)
        texts = {}
        if settings.lock_text:
            captions = itertools.chain.from_iterable(views[0].captions())
            texts["texts"] = cache_texts(folder / "texts", captions, model, processor, accelerator)
            if nouns is not None:
                prompts = nouns.all_prompts()
                texts["prompts"] = cache_texts(folder / "prompts", prompts, model, processor, accelerator)
        return CachedPairs(views, model.config, processor, settings.seed, nouns, **texts)

    model.to(accelerator.device).eval()
    if isinstance(pairs, PairStream):
        some = (pair["image"] for pair in itertools.islice(pairs, 256))
    else:
        some = (pairs[index]["image"] for index in range(0, len(pairs), max(1, len(pairs) // 256)))
    set_token_mean(model, map(whole, some))
    if settings.cache_features:
        training = cached(pairs, "training", [whole] + [augmented] * (settings.views - 1), nouns)
        return training, held_out, held_out and cached(held_out, "validation", [whole])
    prepared = TrainingStream if isinstance(pairs, PairStream) else TrainingPairs
    training = prepared(pairs, augmented, processor, settings.seed, nouns)
    return training, held_out, held_out and TrainingPairs(held_out, whole, processor, settings.seed)


def start_accelerator(settings: Settings, model: ICLIPModel) -> Accelerator:
    precision = settings.mixed_precision
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # of `accelerate launch`, "no" by default
    # Without `cpu`, two processes on CPU would not find each other.
    on_gpu = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device.type == "cuda"
    if settings.mixed_precision == "auto" and precision == "no" and on_gpu:
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(settings.output_dir, logging_dir=str(Path(settings.output_dir, "logs"))),
        # An image tower that learns may have parameters that no forward uses, such as a mask token.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not model.config.lock_vision)],
    )
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"Expected processes that each hold the whole model, got {accelerator.distributed_type}: use a configuration of "
            "Accelerate without it, such as those in hub_configs/accelerate."
        )
    return accelerator


# What may differ when a run goes on: it changes no number.
FREE_TO_CHANGE = {"config", "output_dir", "resume", "cache_features", "num_workers", "chunk_size", "max_bad_steps"}
FREE_TO_CHANGE |= {"report_to", "log_steps", "eval_steps", "pictures", "checkpoint_steps", "keep_checkpoints"}


def checkpoint_to_resume(settings: Settings) -> Path | None:
    """The last checkpoint in the run's folder, if this run may go on from it; None where there is none."""
    folder = Path(settings.output_dir)
    if not checkpoints(folder):
        return None
    if not settings.resume:
        raise ValueError(f"{folder}: holds a run already; add --resume to go on with it, or name another output_dir.")
    last = checkpoints(folder)[-1]
    before = json.loads((last / "state.json").read_text())["settings"]
    changed = [name for name, value in asdict(settings).items() if before.get(name) != value]
    if changed := [name for name in changed if name not in FREE_TO_CHANGE]:
        differences = ", ".join(f"{name} from {before.get(name)} to {getattr(settings, name)}" for name in changed)
        raise ValueError(f"{folder}: cannot go on with other settings, but they changed: {differences}.")
    return last


# --------------------------------------------------------------------------------------------------------------- main


def main(arguments: list[str]) -> dict[str, float]:
    """Trains, and returns the metrics of the last evaluation."""
    settings = read_settings(arguments)
    transformers_logging.disable_progress_bar()
    set_seed(settings.seed)
    model, processor = load_model(settings)
    accelerator = start_accelerator(settings, model)
    lost = partner_errors("--resume goes on from the last checkpoint")
    with lost, shared_folder_lock(Path(settings.output_dir), accelerator):
        return train(settings, model, processor, accelerator)


def train(
    settings: Settings, model: ICLIPModel, processor: ICLIPProcessor, accelerator: Accelerator
) -> dict[str, float]:
    """The run itself; returns the metrics of the last evaluation."""
    output_dir = Path(settings.output_dir)
    last_checkpoint = checkpoint_to_resume(settings)

    # Data; first what is quickly found to be missing
    segmentation = None
    if settings.eval_dataset != "none":
        segmentation = load_segmentation(settings.eval_dataset, settings.eval_root, settings.eval_split or None)
    training, held_out, validation = load_datasets(settings, model, processor, accelerator)
    workers = 0 if settings.cache_features else settings.num_workers
    loader = BatchLoader(training, accelerator, settings.batch_size, settings.seed, workers, settings.pairs_per_epoch)

    # Optimizer and schedule
    pair_model = PairModel(
        model,
        settings.chunk_size,
        settings.lock_text,
        settings.map_tokens,
        settings.noun_weight,
        settings.noun_branches,
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(pair_model, settings.weight_decay),
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
    )
    pair_model, optimizer = accelerator.prepare(pair_model, optimizer)
    total_steps = settings.max_steps or settings.epochs * loader.steps_per_epoch
    warmup_steps = min(round(settings.warmup_epochs * loader.steps_per_epoch), total_steps - 1)
    rates = (settings.learning_rate, settings.warmup_learning_rate, settings.min_learning_rate)
    rates = [rate * settings.batch_size / 1024 for rate in rates]

    # Where the run stands: all that a checkpoint holds beside weights and optimizer
    state = {"step": 0, "bad_steps": 0, "bad_in_a_row": 0, "skipped_pairs": 0, "best": None, "metrics": {}}
    state["evaluation"] = None  # of the maps, as `iclip evaluate` tells it
    keep_learning_weights_only(accelerator)
    if last_checkpoint:
        state = load_checkpoint(accelerator, last_checkpoint)
    state["settings"] = asdict(settings)
    accelerator.init_trackers("", {name: str(value) for name, value in asdict(settings).items()})

    name = Path(settings.config).parent.name

    def export_now(folder: Path) -> None:
        card = {"name": name, "metrics": state["evaluation"], "training": asdict(settings)}
        export(accelerator, pair_model, processor, folder, **card)

    def evaluate_now(step: int) -> dict[str, float]:
        metrics = {}
        if validation is not None:
            metrics |= validate(accelerator, pair_model, validation, settings.chunk_size, workers)
        pair_model.eval()
        trained = accelerator.unwrap_model(pair_model).model
        if segmentation is not None:
            result = evaluate(trained, processor, segmentation, progress=False)
            state["evaluation"] = {"protocol": {**result.protocol, "model": name}, "results": result.results}
            metrics |= {metric: result.results["itsm"][metric] for metric in ("mAP", "mMIoU", "mFMB")}
        if held_out is not None and settings.pictures and accelerator.is_main_process:
            (output_dir / "pictures").mkdir(exist_ok=True)
            figure = draw_examples(trained, processor, held_out, settings.pictures)
            figure.savefig(output_dir / "pictures" / f"{step:07d}.png")
        pair_model.train()
        accelerator.log(metrics, step)
        return metrics

    # Loop
    bar = tqdm(total=total_steps, initial=state["step"], disable=not accelerator.is_main_process)
    seconds = {"loading": 0.0, "all": 0.0}
    logged_step, ended = state["step"], time.perf_counter()
    while state["step"] < total_steps:
        epoch, first = divmod(state["step"], loader.steps_per_epoch)
        for batch in loader.epoch(epoch, first):
            seconds["loading"] += time.perf_counter() - ended
            # Dropout draws by the step, not by what was drawn before, so that a resumed step is the same.
            torch.manual_seed(derive_seed(settings.seed, state["step"], accelerator.process_index))
            learning_rate = cosine_schedule(state["step"], total_steps, warmup_steps, *rates)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            skipped = torch.tensor([float(batch.pop("skipped"))], device=accelerator.device)
            outputs = pair_model(**batch)
            # Every process decides by the same numbers.
            *losses, skipped = accelerator.reduce(torch.cat([outputs["losses"], skipped]), "mean").tolist()
            finite = all(map(math.isfinite, losses))
            if finite:
                accelerator.backward(outputs["loss"])
                norm = accelerator.clip_grad_norm_(pair_model.parameters(), settings.clip_grad_norm)
                finite = bool(torch.isfinite(norm))
                if finite or accelerator.scaler is not None:  # the scaler skips by itself, and lowers its scale
                    optimizer.step()
                    accelerator.unwrap_model(pair_model).clamp_logit_scales()
            optimizer.zero_grad()

            state["step"] += 1
            state["skipped_pairs"] += round(skipped * accelerator.num_processes)
            state["bad_steps"] += not finite
            state["bad_in_a_row"] = 0 if finite else state["bad_in_a_row"] + 1
            if state["bad_in_a_row"] == settings.max_bad_steps:
                raise FloatingPointError(
                    f"No finite loss and gradient in the last {settings.max_bad_steps} steps, up to step {state['step']}: lower "
                    "learning_rate, or set mixed_precision to bf16 or no; then go on from the last checkpoint."
                )
            seconds["all"] += time.perf_counter() - ended
            ended = time.perf_counter()
            bar.update()

            if state["step"] % settings.log_steps == 0 or state["step"] == total_steps:
                scales = [scale.item() for scale in accelerator.unwrap_model(pair_model).model.logit_scales()]
                log = {
                    "loss": sum(losses) / len(losses),
                    **dict(zip(("recognition_loss", "map_loss"), losses)),
                    **dict(zip(("logit_scale", "map_logit_scale"), scales[: len(losses)])),
                    "learning_rate": learning_rate,
                    "gradient_norm": norm.item() if finite else math.nan,
                    "pairs_per_second": (state["step"] - logged_step) * settings.batch_size / seconds["all"],
                    "share_of_time_loading": seconds["loading"] / seconds["all"],
                    **{name: state[name] for name in ("bad_steps", "skipped_pairs")},
                }
                accelerator.log(log, state["step"])
                bar.set_postfix(loss=f"{log['loss']:.3f}", pairs_per_s=f"{log['pairs_per_second']:.0f}")
                seconds, logged_step = {"loading": 0.0, "all": 0.0}, state["step"]

            if state["step"] % settings.eval_steps == 0 or state["step"] == total_steps:
                state["metrics"] = evaluate_now(state["step"])
                score = state["metrics"].get(settings.best_metric)
                if score is not None and (state["best"] is None or score > state["best"]):
                    state["best"] = score
                    export_now(output_dir / "best")
            if state["step"] % settings.checkpoint_steps == 0 or state["step"] == total_steps:
                save_checkpoint(accelerator, output_dir, state, settings.keep_checkpoints)
            ended = time.perf_counter()
            if state["step"] == total_steps:
                break
    bar.close()

    # Export
    export_now(output_dir / "model")
    if accelerator.is_main_process:
        with atomic_write(output_dir / "results.json") as partial:
            partial.write_text(json.dumps(state, indent=2))
        print(json.dumps(state["metrics"]))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return state["metrics"]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConnectionError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler may raise for the same death once more
        print(
            f"train.py: a process that loads pairs broke off ({' '.join(str(error).split())}), perhaps for want of memory: "
            "lower num_workers, then --resume goes on from the last checkpoint",
            file=sys.stderr,
        )
        sys.exit(2)
    except (OSError, ValueError, ImportError, FloatingPointError, StrictDataclassError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: interrupted, --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
