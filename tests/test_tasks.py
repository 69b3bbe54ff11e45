"""Every task gives figures, whatever family of models, method, dtype and options come together."""

import copy
import itertools
import math

import pytest
import torch
from conftest import evaluate_model
from families import FAMILIES, REFUSED
from pairwise import pairwise

from iclip_hf.backends.loading import load
from iclip_hf.evaluation.metrics import make_metrics


FACTORS = {
    "family": FAMILIES,
    "task": ["interpretability", "segmentation", "windows", "faithfulness"],
    "method": ["itsm", "attention", "grad_cam", "gem", "grad_eclip"],
    "dtype": [torch.float32, torch.bfloat16],
    "templates": [None, ["{}", "a photo of the {}"]],
    "refine": [False, True],
    "batch_size": [1, 8],
}


def metrics(task: str, side: int) -> list:
    options = {"faithfulness": {"steps": 2}, "segmentation": {"threshold": 0.5}}
    if task == "windows":
        return make_metrics("segmentation", threshold=0.5, window=side, stride=32)
    return make_metrics(task, **options.get(task, {}))


@pytest.mark.parametrize("row", pairwise(FACTORS), ids=lambda row: "-".join(map(str, row.values())))
def test_every_task_gives_finite_figures(made, dataset, row):
    if (row["family"], row["method"]) in REFUSED:
        row = {**row, "method": "itsm"}
    model, processor, (side, _) = made(row["family"])
    model = load((copy.deepcopy(model).to(row["dtype"]), processor))
    options = {name: row[name] for name in ("templates", "refine", "batch_size")}
    if row["task"] == "windows":
        options["image_size"] = {"shortest_edge": side + 32}
    result = evaluate_model(model, dataset[:2], [row["method"]], metrics(row["task"], side), **options)
    (by_metric,) = result.results.values()
    scores = itertools.chain(*(of_metric.values() for of_metric in by_metric.values()))
    numbers = itertools.chain(*(one if isinstance(one, list) else [one] for one in scores))
    numbers = [one for one in numbers if isinstance(one, float)]
    assert len(numbers) >= 3 and all(map(math.isfinite, numbers)) and result.timing["images"] == 2
