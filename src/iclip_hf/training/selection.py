"""The evaluations of a run, and the selection and export of its best model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from ..utils.extras import require_extra


# First, so that a missing package is one of training: the evaluation would name its own extra.
with require_extra("train"):
    from accelerate import Accelerator

from ..evaluation.evaluate import evaluate_model
from ..model.processing_iclip import ICLIPProcessor
from .checkpoints import RunState, export, holds_start
from .inputs import Inputs
from .report import FEWEST, draw_examples, own_labels
from .settings import MAP_METRICS, Settings
from .validation import validate


_DRAWS = 2000  # of the bootstrap


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
        lost = lost_metrics(change, len(next(iter(by_pair.values()), ())))
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
                labels = own_labels(self.inputs.held_out) if self.inputs.held_out is not None else None
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
    Returns the 95 % interval of the mean change of a score over pairs, by the paired bootstrap: pairs are drawn again, with their
    scores before and after. The draws are always the same.
    """
    changes, draws = np.subtract(after, before), np.random.default_rng(0)
    means = [changes[draws.integers(len(changes), size=len(changes))].mean() for _ in range(_DRAWS)]
    return np.quantile(means, [0.025, 0.975]).tolist()


def lost_metrics(change: Mapping[str, Sequence[float]], pairs: int) -> list[str]:
    """
    Returns the metrics that got worse, by their intervals of [`change_interval`] over so many pairs: the interval holds a loss and no
    gain. None on fewer than `FEWEST` pairs.
    """
    if pairs < FEWEST:
        return []
    gains = {name: [-high, -low] if name == "val_loss" else [low, high] for name, (low, high) in change.items()}
    return [name for name, (low, high) in gains.items() if low < 0 and high <= 0]
