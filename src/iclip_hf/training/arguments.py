"""The arguments of [`ICLIPTrainer`], and those for few pairs."""

# ruff: noqa: RUF009 (`argument` makes a field)

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..utils.prefetch import spare_processors


# File with the metrics of the held-out pairs by the model at the start of a training.
START_FILE = "start.json"
RETRIEVAL_METRICS = ("loss", "text_to_image", "image_to_text")  # measured on held-out pairs
MAP_METRICS = ("mAP", "mMIoU", "mFMB", "text_contrast")  # measured on a segmentation data set
# Arguments for few pairs. With ten times this learning rate, the embedded model gets worse in retrieval, on 50 and on
# 500 pairs. Without a loss that keeps presence, a training on 50 pairs makes a tenth of the shown classes absent.
FEW_PAIRS_RATE = 1e-5
FEW_PAIRS_STEPS = 200
FEW_PAIRS_KEEP_PRESENCE = 1.0
# Arguments of a `Trainer` that the trained model depends on.
_RECIPE = """
    per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps learning_rate warmup_steps
    warmup_learning_rate min_learning_rate weight_decay max_grad_norm keep_presence seed
""".split()


def argument(default, help: str, **kwargs):
    """Returns a field. Its metadata are keywords of `add_argument`, which `HfArgumentParser` reads."""
    default = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**default, metadata={"help": help, **kwargs})


@dataclass
class ICLIPTrainingArguments(TrainingArguments):
    """
    Arguments of [`ICLIPTrainer`]: those of Transformers' `TrainingArguments`, and some more. The defaults are the
    paper's recipe, and GroupViT's where the paper refers to it. On four devices, a batch has the paper's 1024 pairs.

    `lr_scheduler_type="cosine"` is GroupViT's schedule: linear from `warmup_learning_rate` during `warmup_steps`, then
    half a cosine over all steps to `min_learning_rate`. Other schedules, and any schedule with `lr_scheduler_kwargs`,
    are those of Transformers. The metadata of each field has its description, which `iclip train --help` prints.
    """

    per_device_train_batch_size: int = argument(256, "number of pairs in a batch of each process")
    per_device_eval_batch_size: int = argument(256, "number of held-out pairs in one forward pass")
    num_train_epochs: float = argument(30.0, "number of passes over the pairs")
    learning_rate: float = argument(1.25e-4, "peak of the learning rate, for any number of pairs in a batch")
    lr_scheduler_type: str = argument("cosine", "schedule of the learning rate")
    warmup_steps: float = argument(2 / 30, "steps of linear warm-up; below 1, a share of all steps")
    weight_decay: float = argument(0.05, "weight decay of matrices; biases, norms and logit scales have none")
    max_grad_norm: float = argument(5.0, "largest norm of the gradient")
    eval_steps: float | None = argument(1000, "number of steps between evaluations; below 1, a share of all steps")
    save_steps: float = argument(1000, "number of steps between checkpoints; below 1, a share of all steps")
    save_total_limit: int | None = argument(2, "number of checkpoints that are kept")
    logging_steps: float = argument(10, "number of steps between logs; below 1, a share of all steps")
    dataloader_drop_last: bool = argument(True, "leave out an incomplete last batch; the loss needs equal sizes")
    remove_unused_columns: bool = argument(False, "false, because the collator reads all columns of a data set")
    # The `noun_labels` of a batch must not be gathered.
    label_names: list[str] | None = argument([], "names of labels that an evaluation gathers; none by default")

    chunk_size: int = argument(256, "number of pairs in one forward pass of a tower, which limits the memory")
    keep_presence: float = argument(
        0.0, "weight of a loss that keeps the presence of common nouns as the model has it, with locked towers"
    )
    warmup_learning_rate: float = argument(1e-6, "first learning rate of the warm-up")
    min_learning_rate: float = argument(1e-5, "last learning rate")
    pictures: int = argument(4, "number of held-out images whose maps are drawn at each evaluation")

    def __post_init__(self):
        super().__post_init__()
        if self.greater_is_better and str(self.metric_for_best_model).endswith("loss"):
            raise ValueError("greater_is_better: a lower loss is better; leave it out.")
        if self.data_seed is None:  # Accelerate would take torch's seed, which changes as batches are made
            self.data_seed = self.seed
        # Without a launcher, only one GPU trains. `DataParallel` would contrast the pairs of each GPU alone.
        self._n_gpu = min(self.n_gpu, 1)
        self.dataloader_pin_memory &= self.device.type != "cpu"  # torch would warn without a GPU


def few_pairs(num_pairs: int, num_held_out: int = 0, max_bad_share: float = 0.0, **given) -> dict[str, object]:
    """
    Returns arguments of [`ICLIPTrainingArguments`] to train the projections of a trained model on `num_pairs` pairs:
    200 steps, or an epoch if that is more, with a low learning rate. If `num_held_out` pairs are held out, they are
    evaluated at the start and after each fifth of the steps. Arguments that are `given` stay, and the others are
    derived from them. A batch has no more pairs than [`CachedPairs`] keeps if `max_bad_share` of the pairs are bad.

    ```python
    >>> args = ICLIPTrainingArguments("runs/tuned", **few_pairs(len(pairs), len(held_out)))
    ```
    """
    num_usable = num_pairs - int(max_bad_share * num_pairs)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    batch_size = given.get("per_device_train_batch_size", max(min(num_usable, 256) // processes, 1))
    steps = given.get("max_steps") or max(FEW_PAIRS_STEPS, num_usable // max(batch_size * processes, 1))
    chosen = {
        "per_device_train_batch_size": batch_size,
        "max_steps": steps,
        "learning_rate": FEW_PAIRS_RATE,
        "warmup_learning_rate": 0.0,
        "min_learning_rate": 0.0,
        "warmup_steps": 0.1,
        "keep_presence": FEW_PAIRS_KEEP_PRESENCE,
        # Numbers of steps, not shares: a checkpoint stores numbers, and Transformers warns if an argument differs.
        "eval_steps": math.ceil(steps / 5),
        "save_steps": math.ceil(steps / 5),
        "logging_steps": math.ceil(steps / 10),
        "dataloader_num_workers": min(num_pairs // 250, 4, spare_processors()),
    }
    if "num_train_epochs" in given:
        chosen |= {"max_steps": -1, "eval_steps": 0.2, "save_steps": 0.2, "logging_steps": 0.1}
    if num_held_out:
        chosen |= {"eval_strategy": "steps", "eval_on_start": True, "load_best_model_at_end": True}
        chosen["metric_for_best_model"] = best_metric(num_held_out)
    return chosen | given


def best_metric(num_held_out: int) -> str:
    """Returns the metric that selects the best model on `num_held_out` pairs."""
    return "loss" if num_held_out < 100 else "text_to_image"  # on fewer pairs, a share of right answers is too coarse


def training_recipe(training: ICLIPTrainingArguments, processes: int) -> dict[str, object]:
    """Returns the arguments of a training that its model depends on, for [`write_model_card`]."""
    recipe = {name: getattr(training, name) for name in _RECIPE}
    del recipe["max_steps" if training.max_steps <= 0 else "num_train_epochs"]  # without effect
    recipe |= {"lr_scheduler_type": training.lr_scheduler_type.value}
    return recipe | {"processes": processes, "precision": training.mixed_precision}
