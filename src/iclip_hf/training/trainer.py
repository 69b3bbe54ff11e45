"""`Trainer` of Transformers for ICLIP: our loss, evaluation and schedule in the ecosystem's loop."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import signature
from operator import itemgetter
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, has_length

from ..utils.errors import require_extra


# Imported first, so that the error of a missing package names the extra of training, not that of evaluation.
with require_extra("train"):
    from accelerate.data_loader import prepare_data_loader

from ..backends.identity import changed_model
from ..data.items import Epochs
from ..data.segmentation import SegmentationDataset
from ..data.wrappers import at_first_epoch
from ..evaluation.evaluate import evaluate_model
from ..hub.folders import save_model
from ..hub.model_card import write_model_card
from ..model.modeling_iclip import ICLIPModel
from ..model.pair_loss import ImageInputs, in_chunks
from ..model.processing_iclip import ICLIPProcessor, check_processor
from ..utils.files import atomic_write
from ..utils.published import clean_configs, folder_name
from .arguments import MAP_METRICS, ICLIPTrainingArguments, training_recipe
from .callbacks import Checks, EpochsAndSeeds, Interrupts, LogitScaleLimit, Pictures, Start
from .collator import PairCollator
from .datasets import NumberedRows, StreamedPairs
from .evaluation import content_ids, retrieval_metrics


MAX_BAD_STEPS = 30  # number of steps in a row without a finite gradient, after which a training stops


class ICLIPTrainer(Trainer):
    """
    `Trainer` for [`ICLIPModel`]. It takes the arguments of the base class. These differ:

    Args:
        data_collator ([`PairCollator`], *optional*): collator; by default one without nouns and augmentation.
        train_dataset: pairs of [`~iclip_hf.data.load_pairs`], [`CachedPairs`], [`StreamedPairs`], or any rows that the
            collator takes.
        eval_dataset: held-out pairs, of the same types but no stream; a [`SegmentationDataset`]; or a `dict` of these.
        processing_class ([`ICLIPProcessor`], *optional*): processor of the model; the collator's if not given.
        compute_loss_func (`Callable`, *optional*): function of [`ICLIPOutput`], None and `num_items_in_batch=None`. It
            returns the loss of a training step. The loss of an evaluation stays the model's own.
        compute_metrics (`Callable`, *optional*): more metrics of held-out pairs. The predictions are the unit vectors
            of images times the logit scale, and the unit vectors of their captions, (num_pairs, P) each; the labels
            (num_pairs, 2) are ids of the images and of the captions. Equal images have the same id, and so have equal
            captions.
        map_dataset ([`SegmentationDataset`], *optional*): images with masks, on which each evaluation also measures
            mAP, mMIoU, mFMB and text contrast.
        card (`dict`, *optional*): arguments of [`~iclip_hf.hub.model_card.write_model_card`] for the saved model.

    The negatives of a pair are the other pairs of all processes, with gradients. An evaluation measures `loss`,
    `text_to_image` and `image_to_text` of all held-out pairs at once. For a model that is trained already, set
    `eval_on_start` and `load_best_model_at_end`: the training then ends with the best model by
    `metric_for_best_model`. A model that got worse than the start in any metric of the held-out pairs does not count.
    If no model is better than the start, the training ends with the model of the start.

    Raises:
        `ValueError`: a tower learns although cached features or `keep_presence` need it locked.
        `FloatingPointError`: 30 steps in a row, or all of a shorter training, have no finite gradient, or the held-out
            loss is not finite.
        `KeyboardInterrupt`: the training got SIGINT or SIGTERM, and has saved a checkpoint.

    Example:

    ```python
    >>> from iclip_hf import ICLIPModel, ICLIPProcessor
    >>> from iclip_hf.data import load_pairs
    >>> from iclip_hf.training import ICLIPTrainer, ICLIPTrainingArguments, few_pairs

    >>> model, processor = ICLIPModel.from_pretrained(folder), ICLIPProcessor.from_pretrained(folder)
    >>> model.text_model.requires_grad_(False)
    >>> pairs, held_out = load_pairs("pairs.csv").split(0.1)
    >>> args = ICLIPTrainingArguments("runs/tuned", **few_pairs(len(pairs), len(held_out)))
    >>> trainer = ICLIPTrainer(model, args, train_dataset=pairs, eval_dataset=held_out, processing_class=processor)
    >>> trainer.train()
    >>> trainer.save_model()
    ```
    """

    # The negatives of a pair are in its own batch, so the loss of a step is the mean over its batches.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: ICLIPModel | None = None,
        args: ICLIPTrainingArguments | None = None,
        data_collator: PairCollator | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: ICLIPProcessor | None = None,
        *arguments,
        map_dataset: SegmentationDataset | None = None,
        card: Mapping | None = None,
        **kwargs,
    ):
        args = ICLIPTrainingArguments("tmp_trainer") if args is None else args  # the folder of the base class
        if not isinstance(args, ICLIPTrainingArguments):
            raise TypeError(f"args: expected ICLIPTrainingArguments, got {type(args).__name__}.")
        if args.push_to_hub:  # the base class would push paths and the token of this machine
            raise ValueError("push_to_hub: upload the saved model by `iclip push`, with its code and card.")
        self.map_dataset, self.card, self._last_losses = map_dataset, card or {}, []
        if unknown := self.card.keys() - signature(write_model_card).parameters.keys():
            raise TypeError(f"card: {min(unknown)!r} is no argument of write_model_card.")
        if eval_dataset is None:
            eval_dataset = map_dataset
        elif map_dataset is not None and isinstance(eval_dataset, dict):
            eval_dataset = {**eval_dataset, "maps": map_dataset}
        processing_class = processing_class or getattr(data_collator, "processor", None)
        if processing_class is None:
            raise TypeError("processing_class: name the processor of the model.")
        collator = data_collator or PairCollator(processing_class)
        super().__init__(model, args, collator, train_dataset, eval_dataset, processing_class, *arguments, **kwargs)
        check_processor("processing_class", processing_class, self.model.config)
        vars(self.model.config).pop("use_cache", None)  # the base class sets this option of language models
        self.interrupts, self.start = Interrupts(), Start(self)
        for callback in (Checks, EpochsAndSeeds, LogitScaleLimit, self.start, Pictures, self.interrupts):
            self.add_callback(callback)

    # -------------------------------------------------------------------------------------------------------- steps

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments, **kwargs):
        """Like the base class. `resume_from_checkpoint=True` takes the last complete checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir) or True  # True raises in the base class
        self._bad_steps = 0
        if not resume_from_checkpoint:
            self.start.is_stored = False  # an earlier training may have stored its own start
        with self.interrupts:
            output = super().train(resume_from_checkpoint, *arguments, **kwargs)
        if self.interrupts.stopped:
            raise KeyboardInterrupt(f"interrupted; resume from {last_checkpoint(self.args.output_dir)}")
        return output

    def _run_epoch(self, *arguments, **kwargs) -> None:
        """Like the base class, which takes another step if a training that ended within an epoch is resumed."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **kwargs)

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *arguments, **kwargs):
        """Like the base class. The default of `compute_objective` is `eval_loss`, even if there are other metrics."""
        compute_objective = compute_objective or itemgetter("eval_loss")
        return super().hyperparameter_search(hp_space, compute_objective, *arguments, **kwargs)

    @property
    def kept_start(self) -> bool:
        """Whether the model is that of the start again, because no evaluation was better than the first."""
        args = self.args
        return args.eval_on_start and args.load_best_model_at_end and not self.state.best_global_step

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Like the base class. First stores what is needed of the start, whose weights the checkpoint replaces."""
        self.start.store()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def get_train_dataloader(self) -> DataLoader:
        """Like the base class. A stream is split over the processes already."""
        rows, batch_size, args = self.train_dataset, self._train_batch_size, self.args
        if isinstance(rows, StreamedPairs):
            persistent = args.dataloader_persistent_workers
            loader = self._loader(rows, batch_size, self.data_collator, drop_last=True, persistent_workers=persistent)
        elif (numbered := self._numbered(rows)) is not rows:
            sampler = self._get_train_sampler
            # A sampler by length reads a column of the rows themselves.
            loader = self._get_dataloader(numbered, "Training", batch_size, lambda _: sampler(rows), is_training=True)
        else:
            loader = super().get_train_dataloader()
        if has_length(loader) and not len(loader):
            raise ValueError(
                f"per_device_train_batch_size: an epoch has {len(rows)} pairs, fewer than a batch of {batch_size} on "
                f"each of {args.world_size} processes; lower it."
            )
        return loader

    def _loader(self, rows, batch_size: int, collator: Callable, **kwargs) -> DataLoader:
        """Returns a loader of rows in their order. The accelerator does not keep this loader."""
        names = ("num_workers", "pin_memory", "prefetch_factor", "multiprocessing_context", "in_order")
        kwargs |= {name: getattr(self.args, f"dataloader_{name}") for name in names}
        return DataLoader(rows, batch_size, collate_fn=collator, **kwargs)

    def _numbered(self, rows):
        """Adds the `draw` that a [`PairCollator`] samples by, unless rows have a `draw` already or no index."""
        can_be_numbered = not isinstance(rows, (Epochs, IterableDataset)) and has_length(rows)
        if can_be_numbered and isinstance(self.data_collator, PairCollator):
            return NumberedRows(rows, self.args.data_seed)
        return rows

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Returns the loss of the model or of `compute_loss_func`, plus the loss that keeps the presence."""
        if "image_features" in inputs or self.start.presence_loss is not None:  # the image tower is locked
            inputs["image_inputs"] = self._pop_image_inputs(inputs)
        outputs = model(**{**inputs, "return_loss": True}, chunk_size=self.args.chunk_size)
        function = self.compute_loss_func
        loss = outputs["loss"] if function is None else function(outputs, None, num_items_in_batch=num_items_in_batch)
        if self.start.presence_loss is not None:
            with self.accelerator.autocast():
                presence_loss = self.start.presence_loss(self.model.recognition, inputs["image_inputs"].pooled)
            loss = loss + self.args.keep_presence * presence_loss
        self._last_losses = outputs["branch_losses"]
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Like the base class. A step without a finite gradient changes nothing; in float16, the scaler skips it."""
        norm = super()._get_grad_norm(model, grad_norm)
        is_finite = math.isfinite(norm)
        if not is_finite and self.accelerator.scaler is None:
            self.optimizer.zero_grad()  # the optimizer leaves weights without a gradient as they are
        self._bad_steps = 0 if is_finite else self._bad_steps + 1
        if self._bad_steps == min(MAX_BAD_STEPS, self.state.max_steps):
            raise FloatingPointError(
                f"No gradient was finite in the last {self._bad_steps} steps: lower learning_rate, or train without "
                "fp16."
            )
        return norm

    def get_decay_parameter_names(self, model) -> list[str]:
        """Returns the names of the matrices. Vectors, biases and logit scales have no weight decay."""
        return [name for name, weight in model.named_parameters() if weight.ndim > 1 and not name.endswith("bias")]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Like the base class, but "cosine" without `lr_scheduler_kwargs` is GroupViT's schedule."""
        args = self.args
        if args.lr_scheduler_type != "cosine" or args.lr_scheduler_kwargs or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = min(args.get_warmup_steps(num_training_steps), num_training_steps - 1)
        peak = args.learning_rate
        start, end = (min(rate, peak) for rate in (args.warmup_learning_rate, args.min_learning_rate))
        self._created_lr_scheduler = True
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,
            lambda step: cosine_schedule(step, num_training_steps, warmup, peak, start, end) / (peak or 1),
        )
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Like the base class. Adds the losses of both branches in the last step, and their logit scales."""
        if "loss" in logs:
            for name, loss in zip(("recognition_loss", "map_loss"), self._last_losses):
                logs[name] = float(loss)
            logs["logit_scale"] = self.model.recognition.logit_scale.exp().item()
            if self.model.interpretability is not None:
                logs["map_logit_scale"] = self.model.interpretability.logit_scale.exp().item()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        """Returns 0: the count of the base class does not fit locked towers and cached features."""
        return 0

    # --------------------------------------------------------------------------------------------------- evaluation

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Like the base class. The captions are those of epoch 0, without nouns and augmentation."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None:
            return super().get_eval_dataloader()  # raises
        data = self.eval_dataset[data] if isinstance(data, str) else data
        if has_length(data) and not len(data):
            raise ValueError("eval_dataset: it has no pairs; give others, or leave it out.")
        if isinstance(data, SegmentationDataset):
            return DataLoader(data, batch_sampler=[])  # the evaluation of maps reads the images
        collator = self._get_collator_with_removed_columns(self.data_collator)
        collator = collator.for_evaluation() if isinstance(collator, PairCollator) else collator
        # A copy, because the loader sets the epoch, and the pairs to train on may share it.
        loader = self._loader(self._numbered(at_first_epoch(data)), self.args.eval_batch_size, collator)
        # Not prepared by the accelerator, which would keep the loader.
        processes = self.accelerator.num_processes, self.accelerator.process_index
        return prepare_data_loader(loader, self.args.device, *processes, put_on_device=True)

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Like the base class, and measures retrieval over all held-out pairs at once, and maps on masks."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if isinstance(dataloader.dataset, SegmentationDataset):
            measured = self._map_metrics(dataloader.dataset)
        else:
            measured = self._retrieval_metrics(output, metric_key_prefix)
            if self.map_dataset is not None and metric_key_prefix == "eval":
                measured |= self._map_metrics(self.map_dataset)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """
        Returns None as the loss, because only all pairs together have one; the unit vectors of B images times the
        logit scale, and the unit vectors of their captions, (B, P) each; and, as labels, the ids of images and
        captions (B, 2).
        """
        inputs, recognition = self._prepare_inputs(inputs), self.model.recognition
        names = self.processing_class.tokenizer.model_input_names
        tokens = {name: inputs[name] for name in names if name in inputs}
        text_inputs = inputs.get("text_inputs")
        images = inputs["image_features"].values() if "image_features" in inputs else [inputs["pixel_values"]]
        # Padding becomes zeros, which ids ignore, because each batch is padded to its own length.
        texts = tokens["input_ids"] * tokens.get("attention_mask", 1)
        pair_ids = torch.stack([content_ids(images), content_ids([texts])], 1).to(self.args.device)
        with torch.no_grad(), self.accelerator.autocast():
            if text_inputs is None:
                text_inputs, _ = self.model.encode_text(**tokens)
            image_embeds = recognition.embed_image(self._pop_image_inputs(inputs).pooled)
            scaled_images = recognition.logit_scale.exp() * image_embeds
            return None, (scaled_images, recognition.embed_text(text_inputs)), pair_ids

    def _retrieval_metrics(self, output: EvalLoopOutput, prefix: str) -> dict[str, float]:
        """Returns the metrics of held-out pairs, and how they changed since the start."""
        images, texts, pair_ids = (
            torch.from_numpy(array).to(self.args.device) for array in (*output.predictions, output.label_ids)
        )
        metrics_of_pairs = retrieval_metrics(images, texts, pair_ids)
        metrics = {name: values.mean().item() for name, values in metrics_of_pairs.items()}
        if not math.isfinite(metrics["loss"]):  # no later loss would be better
            raise FloatingPointError("The loss of the held-out pairs is not finite: lower learning_rate.")
        return metrics | self.start.compare(prefix, output.label_ids, metrics_of_pairs)

    def _map_metrics(self, data: SegmentationDataset) -> dict[str, float]:
        """Measures the maps, and writes the results, which the card of the model shows."""
        self.model.eval()
        result = evaluate_model((self.model, self.processing_class), data, metrics=MAP_METRICS)
        if self.is_world_process_zero():
            with atomic_write(Path(self.args.output_dir, "evaluations", f"{self.state.global_step}.json")) as partial:
                partial.write_text(json.dumps({"protocol": result.protocol, "results": result.results}))
        measured = {metric: result.results["itsm"][metric][metric.lower()] for metric in MAP_METRICS}
        # Images with one class each have no text contrast.
        return {metric: value for metric, value in measured.items() if value is not None}

    @torch.no_grad()
    def _pop_image_inputs(self, batch: dict) -> ImageInputs:
        """Removes the images from a batch. Returns what the loss reads of them, cached or encoded."""
        if "image_features" in batch:
            features = batch.pop("image_features")
            return self.model.loss_inputs({name: values.to(self.model.dtype) for name, values in features.items()})

        def encode(pixel_values: torch.Tensor) -> ImageInputs:
            return self.model.image_inputs(self.model.encode_image(pixel_values))

        with self.accelerator.autocast():
            return ImageInputs(*in_chunks(encode, self.args.chunk_size, batch.pop("pixel_values")))

    def _determine_best_metric(self, metrics, trial) -> bool:
        """
        Like the base class. A model that got worse in a metric of the held-out pairs is not the best. Returns True for
        an interrupted training, so that `save_strategy="best"` saves its checkpoint too.
        """
        got_worse = any(self.start.regressed.values())
        return (not got_worse and super()._determine_best_metric(metrics, trial)) or self.interrupts.stopped

    # ------------------------------------------------------------------------------------------------------- saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the model for `from_pretrained`, with its processor and card. Replaces the files of an earlier model one
        by one, each atomically. Other files, such as checkpoints, stay.
        """
        if _internal_call:  # a checkpoint
            super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                clean_configs(output_dir)
            return
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            card = {"training": training_recipe(self.args, self.accelerator.num_processes), **self.card}
            step = (self.state.best_global_step or 0) if self.args.load_best_model_at_end else self.state.global_step
            if self.kept_start:  # the model is not changed, and neither is its record
                card |= {"training": None, "source_identity": None}
            evaluation = Path(self.args.output_dir, "evaluations", f"{step}.json")
            if evaluation.is_file():
                results = json.loads(evaluation.read_text())
                # The file may be of an earlier training in this folder.
                if not changed_model(results["protocol"], self.model, self.processing_class):
                    card["metrics"] = results
            partial = folder / "model.partial"
            shutil.rmtree(partial, ignore_errors=True)  # a run that was killed here leaves it
            card = {"name": folder_name(folder), **card}
            save_model(self.model, self.processing_class, partial, **card)
            for file in [*partial.iterdir()]:
                with atomic_write(folder / file.name) as temporary:  # sets the mode of the file
                    os.replace(file, temporary)
            partial.rmdir()
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *arguments, **kwargs) -> None:
        """Does nothing: `save_model` writes the card, by the argument `card` of the constructor."""


def last_checkpoint(folder: str | Path) -> str | None:
    """
    Returns the last complete checkpoint in a folder; None if there is none. A checkpoint is complete if its state can
    be read, which is written last: a killed training may leave a part.
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
