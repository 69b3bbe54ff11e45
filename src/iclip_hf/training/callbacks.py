"""The callbacks of [`ICLIPTrainer`]: checks, epochs and seeds, logit scales, signals, the start, and pictures."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, set_seed

from ..utils.errors import require_extra


with require_extra("train"):
    from accelerate.utils import reduce

from ..data.wrappers import leaf_of, leaves
from ..model.modeling_iclip import ICLIPModel
from ..utils.files import atomic_write
from .arguments import START_FILE, ICLIPTrainingArguments
from .collator import seed_of
from .datasets import CachedPairs, StreamedPairs, are_pairs
from .evaluation import change_interval, plot_examples, regressed_metrics
from .kept_presence import kept_presence


logger = logging.getLogger(__name__)

FEW_STEPS = 50  # a training with fewer steps gets a warning


class Checks(TrainerCallback):
    """Checks that the towers learn or are locked as the training needs, and warns of one that teaches little."""

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        _check_towers(model, args, train_dataloader.dataset, train_dataloader.collate_fn)
        if not state.is_world_process_zero:
            return
        if args.train_batch_size * args.world_size == 1:
            logger.warning("A batch of one pair has no negatives, so it teaches nothing. Raise the batch size.")
        if state.max_steps < FEW_STEPS:
            logger.warning(
                "The training has %d steps, which teach little. Raise num_train_epochs or max_steps, or lower "
                "per_device_train_batch_size: an epoch leaves out the pairs that do not fill a batch.",
                state.max_steps,
            )


def _check_towers(model: ICLIPModel, args: ICLIPTrainingArguments, pairs: Dataset, collator: Callable) -> None:
    """Raises `ValueError` if a tower learns although the model, cached features or `keep_presence` need it locked."""
    if model.config.lock_vision and any(weight.requires_grad for weight in model.vision_model.parameters()):
        raise ValueError("vision_model: the model locks it; load the model with lock_vision=False.")
    has_cached = any(isinstance(leaf, CachedPairs) for leaf in leaves(pairs))
    if not model.config.lock_vision and (has_cached or args.keep_presence):
        name = "CachedPairs" if has_cached else "keep_presence"
        raise ValueError(f"{name}: it needs a locked image tower; leave it out, or set lock_vision of the model.")
    has_text_features = getattr(collator, "text_features", None) is not None
    text_learns = any(weight.requires_grad for weight in model.text_model.parameters())
    if text_learns and (has_text_features or args.keep_presence):
        name = "text_features of the collator" if has_text_features else "keep_presence"
        raise ValueError(
            f"{name}: it needs a locked text tower; leave it out, or call model.text_model.requires_grad_(False)."
        )


class EpochsAndSeeds(TrainerCallback):
    """Sets the epoch of the pairs and the seed of each step, so that a resumed training has the same batches."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # Accelerate sets the epoch too, but neither for several processes nor in a resumed epoch. With
        # `ignore_data_skip`, a stream gets another epoch, because it would begin with the same pairs again.
        for pairs in (train_dataloader.dataset, *leaves(train_dataloader.dataset)):
            if hasattr(pairs, "set_epoch"):
                begins_anew = isinstance(pairs, StreamedPairs) and args.ignore_data_skip
                pairs.set_epoch(state.global_step if begins_anew else int(state.epoch))

    def on_step_begin(self, args, state, control, **kwargs):
        # Dropout depends on the step and the process, so that a resumed step is the same.
        set_seed(seed_of(args.seed, state.global_step, args.process_index))


class LogitScaleLimit(TrainerCallback):
    """Limits the logit scales to slightly less than 100."""

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        # Above 100, the clamp in the model has no gradient, so a scale could not decrease again.
        for branch in filter(None, (model.recognition, model.interpretability)):
            branch.logit_scale.clamp_(max=math.log(100) - 1e-6)


class Interrupts(TrainerCallback):
    """
    Ends a training with a checkpoint after SIGINT or SIGTERM to any process. Within the context of this callback, the
    first signal only sets `requested`. A Ctrl-C more than one second later raises `KeyboardInterrupt`. An earlier one
    is ignored, because launchers repeat a signal that a process already got from the terminal. Outside of the main
    thread, signals are not handled.
    """

    requested = stopped = False

    def __enter__(self) -> Interrupts:
        self.requested = self.stopped = False
        self._process, self._old_handlers = os.getpid(), {}
        if threading.current_thread() is threading.main_thread():  # Python sets handlers only there
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if not self.requested:
            self.requested, self._requested_at = True, time.monotonic()
            if os.environ.get("RANK", "0") == "0" and os.getpid() == self._process:  # not in a loading process
                print("stopping after this step, with a checkpoint; Ctrl-C again stops at once", flush=True)
        elif number == signal.SIGINT and time.monotonic() - self._requested_at > 1:
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        if reduce(torch.tensor(float(self.requested), device=args.device), "sum"):
            control.should_training_stop = control.should_save = self.stopped = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:
            # Within an epoch, the resumed training ends it.
            ends_epoch = float(state.epoch).is_integer() or state.global_step >= state.max_steps
            control.should_log &= ends_epoch
            control.should_evaluate &= ends_epoch
            control.should_save = control.should_evaluate  # again, with this evaluation


class Start(TrainerCallback):
    """
    The start of a training. Later evaluations are compared with it.

    Attributes:
        metrics (`dict`): for each held-out set, by the prefix of its metrics and a digest of its caption ids, its
            metrics at the start: for each, the values of all pairs.
        regressed (`dict`): for each held-out set, by this key, the metrics that got worse in the last evaluation.
        presence_loss ([`KeptPresence`], *optional*): the loss that keeps the presence of the model of the start.
        is_stored (`bool`): whether the model of the start is stored already. A resumed training stores no other model.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.metrics, self.regressed = trainer, {}, {}
        self.presence_loss, self._weights, self.is_stored = None, {}, False

    def store(self) -> None:
        """Stores what a training needs of the model of the start. Must be called before a checkpoint is loaded."""
        if self.is_stored:
            return
        self.is_stored = True
        args, model = self.trainer.args, self.trainer.model
        if args.eval_on_start and args.load_best_model_at_end:
            learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
            self._weights = {name: weight.detach().to("cpu", copy=True) for name, weight in learning.items()}
        self.presence_loss = kept_presence(model, self.trainer.processing_class) if args.keep_presence else None

    def compare(self, prefix: str, pair_ids: np.ndarray, metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """
        Compares metrics (num_pairs,) of pairs with these ids (num_pairs, 2) to those of the start. Sets `regressed`,
        and returns the bounds of the 95 % interval of the change of each metric. At the start itself, sets `metrics`
        and returns no bounds. Pairs without metrics of the start have no bounds. `prefix` is that of the held-out set:
        several sets may have the same captions.
        """
        # A digest of the captions alone, because another machine may compute other pixels.
        key, trainer = f"{prefix}/{hashlib.sha256(pair_ids[:, 1].tobytes()).hexdigest()}", self.trainer
        if trainer.is_in_train and trainer.state.global_step == 0:
            self.metrics[key] = {name: values.tolist() for name, values in metrics.items()}
            self._write()
            return {}
        before = self.metrics.get(key)
        if before is None:
            return {}
        intervals = {name: change_interval(before[name], metrics[name].tolist()) for name in before}
        self.regressed[key] = regressed_metrics(intervals, len(pair_ids))
        bounds = {}
        for name, (low, high) in intervals.items():
            bounds |= {f"{name}_change_low": low, f"{name}_change_high": high}
        return bounds

    def on_train_begin(self, args, state, control, **kwargs):
        eval_dataset, file = self.trainer.eval_dataset, Path(args.output_dir, START_FILE)
        held_out_sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        if args.eval_strategy != "no":
            for pairs in held_out_sets:
                self.trainer.get_eval_dataloader(pairs)  # raises for an empty set, before the first step
        self.regressed = {}
        if not state.global_step:
            self.metrics = {}
            self._write()
            self.store()
        elif file.is_file():
            self.metrics = json.loads(file.read_text())["scores"]
        # The state of a moved checkpoint names its earlier path. The base class forgets a path that does not exist.
        best = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.trainer.is_in_train and state.global_step == 0 and args.metric_for_best_model:
            name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
            state.best_metric = metrics.get(name, state.best_metric)  # later models have to be better

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.trainer.kept_start:
            model.load_state_dict(self._weights, strict=False)
            if not self.trainer.interrupts.stopped:
                logger.warning("No evaluation was better than the start, so the model is that of the start again.")

    def _write(self) -> None:
        if self.trainer.is_world_process_zero():
            with atomic_write(Path(self.trainer.args.output_dir, START_FILE)) as partial:
                partial.write_text(json.dumps({"scores": self.metrics}))


class Pictures(TrainerCallback):
    """Draws the maps of the first held-out pairs at each evaluation."""

    _step: int | None = None  # the last step with pictures

    def on_train_begin(self, args, state, control, **kwargs):
        self._step = None

    def on_evaluate(self, args, state, control, model=None, processing_class=None, eval_dataloader=None, **kwargs):
        pairs = eval_dataloader.dataset
        if args.pictures and are_pairs(pairs) and state.global_step != self._step:
            self._step = state.global_step
            if state.is_world_process_zero:
                items = (leaf_of(pairs, index) for index in range(min(args.pictures, len(pairs))))
                examples = [
                    leaf.pairs[int(leaf.indices[index])] if isinstance(leaf, CachedPairs) else leaf[index]
                    for leaf, index in items
                ]
                plot_examples(model, processing_class, examples, Path(args.output_dir, "pictures"), state.global_step)
