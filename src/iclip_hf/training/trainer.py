"""`Trainer` of Transformers for ICLIP: our loss, evaluation and schedule in the ecosystem's loop."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils.extras import require_extra


# First, so that a missing package is one of training: the evaluation would name its own extra.
with require_extra("train"):
    import accelerate  # noqa: F401

from ..backends.embedded import vocabulary
from ..data.pairs import PairDataset
from ..data.segmentation import SegmentationDataset
from ..evaluation.evaluate import evaluate_model
from ..hub.folders import save_model
from ..hub.model_card import HUB_RESULTS
from ..model.modeling_iclip import ICLIPModel, ImageInputs
from ..model.processing_iclip import ICLIPProcessor
from ..model.similarity import cosines
from ..utils.files import atomic_write, clean_configs, writing_errors
from .arguments import MAP_METRICS, ICLIPTrainingArguments
from .card import card_of
from .collator import PairCollator, seed_everything
from .datasets import CachedPairs, StreamedPairs
from .evaluation import (
    change_interval,
    draw_examples,
    regressed_metrics,
    retrieval_scores,
    sampled_captions,
)


MAX_BAD_STEPS = 30  # in a row, after which a training stops
KEPT_NOUNS = 256  # of which `keep_presence` keeps the presence
# Scores of the model that the training started from for each held-out pair, and a digest of these pairs.
START = "start.json"


class ICLIPTrainer(Trainer):
    """
    `Trainer` for [`ICLIPModel`]. It takes the arguments of the base class, and these:

    Args:
        args ([`ICLIPTrainingArguments`]): arguments of the training.
        data_collator ([`PairCollator`], *optional*): of the batches; one without nouns and augmentation by default.
        train_dataset: pairs of [`~iclip_hf.data.load_pairs`], [`CachedPairs`], [`StreamedPairs`], or any rows that the
            collator takes.
        eval_dataset: held-out pairs of [`~iclip_hf.data.load_pairs`] or [`CachedPairs`].
        processing_class ([`ICLIPProcessor`]): of the model.
        map_dataset ([`SegmentationDataset`], *optional*): also evaluated, by mAP, mMIoU, mFMB and text contrast.
        card (`dict`, *optional*): options of [`~iclip_hf.hub.model_card.write_model_card`] for the saved model.

    The negatives of a pair are the pairs of all processes, with gradients. An evaluation measures `loss`,
    `text_to_image` and `image_to_text` of all held-out pairs at once. Of a model that has learned before, evaluate the
    start (`eval_on_start=True`): then with `load_best_model_at_end` only a model counts that is better, and that has
    lost in no other metric of the held-out pairs. Without one, the model ends as it was at the start.

    Raises:
        `TypeError`: `eval_dataset` is neither of these.
        `FloatingPointError`: 30 steps in a row have no finite gradient, or the held-out loss is not finite.
        `KeyboardInterrupt`: the training got SIGINT or SIGTERM, and has saved a checkpoint.

    Example:

    ```python
    >>> from iclip_hf import ICLIPModel, ICLIPProcessor
    >>> from iclip_hf.data import load_pairs
    >>> from iclip_hf.training import ICLIPTrainer, ICLIPTrainingArguments

    >>> model, processor = ICLIPModel.from_pretrained(folder), ICLIPProcessor.from_pretrained(folder)
    >>> pairs, held_out = load_pairs("pairs.csv").split(0.1)
    >>> args = ICLIPTrainingArguments("runs/tuned", num_train_epochs=3, learning_rate=1e-5, eval_strategy="epoch")
    >>> trainer = ICLIPTrainer(model, args, train_dataset=pairs, eval_dataset=held_out, processing_class=processor)
    >>> trainer.train()
    >>> trainer.save_model()
    ```
    """

    def __init__(
        self,
        model: ICLIPModel,
        args: ICLIPTrainingArguments,
        data_collator: PairCollator | None = None,
        *arguments,
        processing_class: ICLIPProcessor,
        map_dataset: SegmentationDataset | None = None,
        card: Mapping | None = None,
        **options,
    ):
        self.map_dataset, self.card = map_dataset, dict(card or {})
        data_collator = data_collator or PairCollator(processing_class, seed=args.seed)
        held_out = options.get("eval_dataset")
        if not isinstance(held_out, (PairDataset, CachedPairs, NoneType)):
            raise TypeError(
                f"eval_dataset: expected pairs of load_pairs or CachedPairs, got {type(held_out).__name__}."
            )
        options |= {"eval_dataset": held_out or map_dataset, "processing_class": processing_class}
        super().__init__(model, args, data_collator, *arguments, **options)
        del self.model.config.use_cache  # of language models, which the base class sets
        self._start: dict[str, list[float]] = {}
        self._regressed: list[str] = []
        self._bad_steps, self._last_losses, self._kept = 0, [], None
        if isinstance(self.train_dataset, StreamedPairs):
            args.ignore_data_skip = True  # a resumed stream begins another pass
        self.add_callback(_Flow(self))

    # -------------------------------------------------------------------------------------------------------- steps

    def train(self, resume_from_checkpoint: str | bool | None = None, **options):
        """Like the base class. `resume_from_checkpoint=True` takes the last complete checkpoint, if there is one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint and (start := Path(self.args.output_dir, START)).is_file():
            content = json.loads(start.read_text())
            self._start = content["scores"]
            has_pairs = isinstance(self.eval_dataset, (PairDataset, CachedPairs))
            if not has_pairs or content["pairs"] != self._digest_of(self.eval_dataset):
                raise ValueError(
                    f"{self.args.output_dir}: the held-out pairs are not those of the start of this training; restore "
                    "the data, or name another output_dir."
                )
        start = {}  # as it is before a checkpoint is loaded
        if self.args.eval_on_start and self.args.load_best_model_at_end:
            learning = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
            start = {name: weight.detach().to("cpu", copy=True) for name, weight in learning.items()}
        if self.args.keep_presence:
            self._kept = kept_presence(self.model, self.processing_class)
        with Interrupts() as self.interrupts:
            output = super().train(resume_from_checkpoint, **options)
        if self.interrupts.stopped:
            raise KeyboardInterrupt(f"interrupted; --resume continues from {last_checkpoint(self.args.output_dir)}")
        if self.kept_start:
            self.model.load_state_dict(start, strict=False)
        return output

    @property
    def kept_start(self) -> bool:
        """Whether no evaluation was better than that of the start, so that the model is the one of the start again."""
        args = self.args
        return args.eval_on_start and args.load_best_model_at_end and not self.state.best_global_step

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        with _same_options(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        with _same_options(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def get_train_dataloader(self) -> DataLoader:
        """Like the base class. A stream is split over the processes already."""
        rows, batch = self.train_dataset, self.args.per_device_train_batch_size
        if isinstance(rows, StreamedPairs):
            options = {"num_workers": self.args.dataloader_num_workers, "drop_last": True}
            loader = DataLoader(rows, batch, collate_fn=self.data_collator, **options)
        else:
            loader = super().get_train_dataloader()
        if not len(loader):
            raise ValueError(
                f"per_device_train_batch_size: an epoch has {len(rows)} pairs, fewer than a batch of {batch} on each "
                f"of {self.args.world_size} processes; lower it."
            )
        return loader

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Like the base class. Dropout is seeded by the step and the process, so that a resumed step is the same."""
        seed_everything(self.args.seed, self.state.global_step, self.args.process_index)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of the model, plus that of the kept presence."""
        if "image_features" in inputs or self._kept is not None:  # the image tower is locked
            inputs["image_inputs"] = self._image_inputs(inputs)
        outputs = model(**inputs, chunk_size=self.args.chunk_size)
        loss = outputs["loss"]
        if self._kept is not None:
            with self.accelerator.autocast():
                kept = self._kept(self.model.recognition, inputs["image_inputs"].recognition)
            loss = loss + self.args.keep_presence * kept
        self._last_losses = outputs["branch_losses"]
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Like the base class. A step without a finite gradient changes nothing; float16 skips it by its scaler."""
        norm = super()._get_grad_norm(model, grad_norm)
        finite = math.isfinite(norm)
        if not finite and self.accelerator.scaler is None:
            self.optimizer.zero_grad()  # the optimizer leaves weights without a gradient as they are
        self._bad_steps = 0 if finite else self._bad_steps + 1
        if self._bad_steps == min(MAX_BAD_STEPS, self.state.max_steps):
            raise FloatingPointError(
                f"No gradient was finite in the last {self._bad_steps} steps: lower learning_rate, or train without "
                "fp16."
            )
        return norm

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """
        Like the base class. The logit scales stay just below 100: above, the clamp in the model has no gradient, so a
        scale could not decrease again.
        """
        optimizer = super().create_optimizer(model)
        scales = [weight for name, weight in self.model.named_parameters() if name.endswith("logit_scale")]

        @torch.no_grad()
        def clamp(*_):
            for scale in scales:
                scale.clamp_(max=math.log(100) - 1e-6)

        optimizer.register_step_post_hook(clamp)
        return optimizer

    def get_decay_parameter_names(self, model) -> list[str]:
        """Returns the names of the matrices. Vectors, biases and logit scales have no weight decay."""
        return [name for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("bias")]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Like the base class, with GroupViT's schedule for "cosine"."""
        if self.args.lr_scheduler_type != "cosine":
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = min(self.args.get_warmup_steps(num_training_steps), num_training_steps - 1)
        start, peak, end = self.args.warmup_learning_rate, self.args.learning_rate, self.args.min_learning_rate
        self._created_lr_scheduler = True
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,
            lambda step: cosine_schedule(step, num_training_steps, warmup, peak, start, end) / peak,
        )
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Like the base class. Adds the losses of the branches, of the last step, and the logit scales."""
        if "loss" in logs:
            logs |= zip(("recognition_loss", "map_loss"), map(float, self._last_losses))
            branches = (self.model.recognition, self.model.interpretability)
            names = ("logit_scale", "map_logit_scale")
            logs |= {name: branch.logit_scale.exp().item() for name, branch in zip(names, branches) if branch}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        """Not counted: locked towers and cached features need none."""
        return 0

    # --------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Measures the model on held-out pairs, by retrieval with the recognition branch and its loss over all pairs at
        once, and on `map_dataset`. Draws the maps of the first pairs.
        """
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics, step, output = {}, self.state.global_step, Path(self.args.output_dir)
        self.model.eval()
        if pairs is not None and pairs is not self.map_dataset:
            scores = self._scores_of(pairs)
            metrics = {name: values.mean().item() for name, values in scores.items()}
            if not math.isfinite(metrics["loss"]):  # no later loss would be better
                raise FloatingPointError("The loss of the held-out pairs is not finite: lower learning_rate.")
            if self.is_in_train and step == 0:
                self._start = {name: values.tolist() for name, values in scores.items()}
                if self.is_world_process_zero():
                    with atomic_write(output / START) as partial:
                        partial.write_text(json.dumps({"scores": self._start, "pairs": self._digest_of(pairs)}))
            change = {name: change_interval(before, scores[name].tolist()) for name, before in self._start.items()}
            self._regressed = regressed_metrics(change, len(pairs))
            for name, interval in change.items() if step else ():
                metrics |= dict(zip((f"{name}_change_low", f"{name}_change_high"), interval))
            if self.args.pictures and self.is_world_process_zero():
                held_out = pairs.pairs if isinstance(pairs, CachedPairs) else pairs
                shown = [held_out[index] for index in range(min(self.args.pictures, len(held_out)))]
                draw_examples(self.model, self.processing_class, shown, output / "pictures", step)
        if self.map_dataset is not None:
            result = evaluate_model((self.model, self.processing_class), self.map_dataset, metrics=MAP_METRICS)
            measured = {metric: result.results["itsm"][metric][metric.lower()] for metric in MAP_METRICS}
            # Of images with one class each, there is no text contrast.
            metrics |= {metric: value for metric, value in measured.items() if value is not None}
            if self.is_world_process_zero():
                with atomic_write(output / "evaluations" / f"{step}.json") as partial:
                    partial.write_text(json.dumps({"protocol": result.protocol, "results": result.results}))
        self.accelerator.wait_for_everyone()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        if self.is_in_train and step == 0:  # later models have to be better
            self._determine_best_metric(metrics, None)
            self.state.best_global_step = None
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _scores_of(self, pairs) -> dict[str, torch.Tensor]:
        """Returns [`retrieval_scores`] of held-out pairs."""
        pairs.set_epoch(0)
        collator, images, texts = self.data_collator.for_evaluation(), [], []
        workers = 0 if isinstance(pairs, CachedPairs) else self.args.dataloader_num_workers
        loader = DataLoader(pairs, self.args.per_device_eval_batch_size, collate_fn=collator, num_workers=workers)
        loader = self.accelerator.prepare(loader)
        for batch in tqdm(loader, desc="Held-out pairs", leave=False, disable=not self.is_world_process_zero()):
            with self.accelerator.autocast():
                image_inputs, text_inputs = self._image_inputs(batch), batch.pop("text_inputs", None)
                if text_inputs is None:
                    names = self.processing_class.tokenizer.model_input_names
                    text_inputs, _ = self.model.encode_text(**{name: batch[name] for name in names if name in batch})
                of_images = self.model.recognition.embed_image(image_inputs.recognition)
                of_texts = self.model.recognition.embed_text(text_inputs)
            # Without the pairs that fill up the last batches.
            images.append(self.accelerator.gather_for_metrics(of_images))
            texts.append(self.accelerator.gather_for_metrics(of_texts))
        scale = self.model.recognition.logit_scale.exp()
        captions = sampled_captions(pairs, collator.seed)
        return retrieval_scores(scale * torch.cat(images), torch.cat(texts), captions, pairs.image_digests())

    def _digest_of(self, pairs) -> str:
        """Of the captions alone: the data may be elsewhere now."""
        return hashlib.sha256(json.dumps(sampled_captions(pairs, self.args.seed)).encode()).hexdigest()

    def _image_inputs(self, batch: dict) -> ImageInputs:
        """Returns what the loss reads of the images of a batch, from cached features, or without a gradient."""
        if "image_features" in batch:
            features = batch.pop("image_features")
            return self.model.loss_inputs({name: of_images.float() for name, of_images in features.items()})
        with torch.no_grad(), self.accelerator.autocast():
            return self.model.image_inputs(self.model.encode_image(batch.pop("pixel_values")))

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Like the base class. A model that lost in a metric of the held-out pairs is not the best."""
        return not self._regressed and super()._determine_best_metric(metrics, trial)

    # ------------------------------------------------------------------------------------------------------- saving

    def _save_checkpoint(self, model, trial) -> None:
        with writing_errors(Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the model for `from_pretrained`, with its processor and card. Replaces the files of an earlier model one
        by one, each atomically, and leaves others, such as checkpoints.
        """
        if _internal_call and output_dir:  # a checkpoint; `push_to_hub` names no folder
            super().save_model(output_dir, _internal_call)
            return clean_configs(output_dir) if self.args.should_save else None
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            card = {"training": card_of(self.args, self.accelerator.num_processes), **self.card}
            step = (self.state.best_global_step or 0) if self.args.load_best_model_at_end else self.state.global_step
            if self.kept_start:  # whose record goes on
                card |= {"training": None, "start": None}
            evaluation = folder / "evaluations" / f"{step}.json"
            if evaluation.is_file():
                card["metrics"] = json.loads(evaluation.read_text())
            partial = folder / "model.partial"
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
            with writing_errors(folder):
                save_model(self.model, self.processing_class, partial, name=folder.resolve().name, **card)
                (folder / HUB_RESULTS).unlink(missing_ok=True)  # of the model before, if this one has none
                for file in [path for path in partial.rglob("*") if path.is_file()]:
                    with atomic_write(folder / file.relative_to(partial)) as temporary:
                        os.replace(file, temporary)
                shutil.rmtree(partial)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *arguments, **options) -> None:
        """The card is written by `save_model`."""


@contextmanager
def _same_options(checkpoint: str | None) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # weights or states of other shapes
        raise ValueError(f"{checkpoint}: this training had other options: repeat the same command.") from error


def last_checkpoint(folder: str | Path) -> str | None:
    """
    Returns the last checkpoint in a folder whose state, which is written last, is whole; None without one. A full disk
    may leave an empty state.
    """
    complete = {}
    for file in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"):
        with suppress(ValueError):
            complete[json.loads(file.read_text())["global_step"]] = str(file.parent)
    return complete[max(complete)] if complete else None


def cosine_schedule(step: int, total: int, warmup: int, peak: float, start: float, end: float) -> float:
    """
    Returns the learning rate of a step: linear from `start` towards `peak` during the warm-up, then half a cosine to
    `end`. The cosine spans all steps including the warm-up, so the rate after the warm-up is slightly below `peak`.
    This is GroupViT's recipe and timm's default (`warmup_prefix=False`).
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * step / total)) / 2


class _Flow(TrainerCallback):
    """Numbers the epochs of the pairs, and ends the training with a checkpoint after a signal to any process."""

    def __init__(self, trainer: ICLIPTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **options):
        # A resumed state has its path of before, and the base class forgets what is not there.
        best = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_epoch_begin(self, args, state, control, **options):
        # Accelerate does so too, but not for several processes, nor in the epoch of a checkpoint. The order of a pass
        # of a stream depends on its first step: a resumed epoch would begin with the same pairs again.
        pairs = self.trainer.train_dataset
        if hasattr(pairs, "set_epoch"):
            pairs.set_epoch(state.global_step if isinstance(pairs, StreamedPairs) else int(state.epoch))

    def on_step_end(self, args, state, control, **options):
        requested = torch.tensor(float(self.trainer.interrupts.requested), device=args.device)
        if self.trainer.accelerator.reduce(requested, "sum"):
            control.should_save = control.should_training_stop = True
            self.trainer.interrupts.stopped = True


class Interrupts:
    """
    Context manager in which SIGINT and SIGTERM only set `requested`. Another Ctrl-C, more than one second later,
    raises; within this second, launchers repeat a signal that a process already got from the terminal.
    """

    def __init__(self):
        self.requested = self.stopped = False
        self._process = os.getpid()

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
            if os.environ.get("RANK", "0") == "0" and os.getpid() == self._process:  # not of a loading process
                print("stopping after this step, with a checkpoint; Ctrl-C again stops at once", flush=True)
        elif number == signal.SIGINT and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt


# --------------------------------------------------------------------------------------------------- kept presence


class KeptPresence(nn.Module):
    """
    Computes the loss that keeps the presence of some texts as a recognition branch has it now, while the branch learns
    further (Learning without Forgetting, https://arxiv.org/abs/1606.09282). The loss of captions alone only compares
    cosines with each other, so on few pairs the presence would drift.

    Args:
        branch: recognition branch with a bias, of which a copy is kept.
        texts (`torch.Tensor` of shape `(K, D)`): features of the texts from the text tower.
    """

    def __init__(self, branch: nn.Module, texts: torch.Tensor):
        super().__init__()
        self.before = copy.deepcopy(branch).requires_grad_(False)
        self.register_buffer("texts", texts, persistent=False)

    def forward(self, branch: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """
        Returns the Kullback-Leibler divergence from the probabilities before to those of the branch, summed over the
        texts, the mean over images with the features (B, D'). It is 0 at the start.
        """
        before, now = (
            one(cosines(one.embed_image(images), one.embed_text(self.texts))) for one in (self.before, branch)
        )
        entropy, cross_entropy = (
            F.binary_cross_entropy_with_logits(logits, before.sigmoid(), reduction="sum") for logits in (before, now)
        )
        return (cross_entropy - entropy) / len(images)


@torch.no_grad()
def kept_presence(model: ICLIPModel, processor: ICLIPProcessor) -> KeptPresence | None:
    """Returns the loss that keeps the presence of the commonest nouns; None for a model without presence."""
    if model.recognition.logit_bias is None:
        return None
    prior = vocabulary()
    nouns = sorted(prior, key=prior.get, reverse=True)[:KEPT_NOUNS]
    prompts = processor(text=[processor.templates[0].format(noun) for noun in nouns]).to(model.device)
    training, _ = model.training, model.eval()
    texts, _ = model.encode_text(**prompts)
    model.train(training)
    return KeptPresence(model.recognition, texts)
