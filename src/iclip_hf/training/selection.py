"""The evaluations of a run, and the selection and export of its best model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ..utils.extras import require_extra


# First, so that a missing package is one of training: the evaluation would name its own extra.
with require_extra("train"):
    from accelerate import Accelerator

from ..evaluation.evaluate import evaluate
from ..processing_iclip import ICLIPProcessor
from .checkpoints import RunState, export, holds_start
from .inputs import Inputs
from .pictures import draw_examples
from .report import own_labels
from .settings import MAP_METRICS, Settings
from .validation import change_interval, lost_metrics, validate


@dataclass(eq=False, repr=False)
class Selection:
    """
    Evaluates the model of a run, and keeps in the run's folder the best model so far.

    Args:
        validation: the held-out pairs as `TrainingPairs` or `CachedPairs`; None without any.
        workers: number of loading processes of each training process.
        bar: progress of the run, whose description says what is done.

    Attributes:
        seconds: duration of the last evaluation; None before the first.
    """

    settings: Settings
    state: RunState
    inputs: Inputs
    validation: Dataset | None
    workers: int
    pair_model: nn.Module
    processor: ICLIPProcessor
    accelerator: Accelerator
    bar: tqdm
    seconds: float | None = None

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
        score, lost = metrics.get(settings.best_metric), lost_metrics(change)
        if score is None:
            best = last
        elif state.best is not None and bool(lost) != bool(state.lost):
            best = not lost
        else:
            best = settings.is_better(score, state.best)
        if best:
            state.best, state.metrics, state.evaluation = score, metrics, evaluation
            state.change, state.lost = change, lost
            if not holds_start(settings, state):
                held_out = self.inputs.held_out
                labels = own_labels(held_out) if held_out is not None else None
                self._export(metrics=evaluation, training=state.settings, start=state.content, labels=labels)
        self.bar.set_description("Training")
        state.measured = True

    def _evaluate(self) -> tuple[dict[str, float], dict[str, list[float]], dict | None]:
        """Returns the metrics of the model, those of the held-out pairs for each pair, and the evaluation on maps."""
        settings, began = self.settings, time.perf_counter()
        metrics, by_pair, evaluation = {}, {}, None
        if self.validation is not None:
            self.bar.set_description(f"Evaluating on {len(self.validation)} held-out pairs")
            scores = validate(self.accelerator, self.pair_model, self.validation, settings.chunk_size, self.workers)
            metrics |= {name: values.mean().item() for name, values in scores.items()}
            by_pair = {name: values.tolist() for name, values in scores.items()}
        model = self.accelerator.unwrap_model(self.pair_model).model.eval()
        if self.inputs.segmentation is not None:
            self.bar.set_description(f"Evaluating maps on {settings.eval_dataset}")
            result = evaluate((model, self.processor), self.inputs.segmentation)
            evaluation = {"protocol": {**result.protocol, "model": settings.name}, "results": result.results}
            metrics |= {metric: result.results["itsm"][metric] for metric in MAP_METRICS}
        if self.inputs.held_out is not None and settings.pictures and self.accelerator.is_main_process:
            self.bar.set_description("Drawing pictures")
            pictures = Path(settings.output_dir, "pictures")
            held_out = self.inputs.held_out
            draw_examples(model, self.processor, held_out, settings.pictures, pictures, self.state.step)
        self.pair_model.train()
        self.accelerator.log(metrics, self.state.step)
        self.seconds = time.perf_counter() - began
        return metrics, by_pair, evaluation

    def _export(self, **card: object) -> None:
        self.bar.set_description("Saving the model")
        folder = Path(self.settings.output_dir)
        export(self.accelerator, self.pair_model, self.processor, folder, name=self.settings.name, **card)
