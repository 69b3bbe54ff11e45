"""The `evaluate` modules: loaded from every folder, from any place, offline, in several processes."""

import ast
import doctest
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


evaluate = pytest.importorskip("evaluate", reason="needs the extra [eval]")

from iclip_hf.evaluation.metrics import label_maps, maps, mean_iou, recognition  # noqa: E402
from iclip_hf.evaluation.metrics.maps import MeanForegroundMinusBackground, MeanMaxIoU, TextContrast  # noqa: E402


REPOSITORY = Path(__file__).parents[1]
FOLDERS = sorted(path for path in (REPOSITORY / "evaluate_metrics").iterdir() if (path / "README.md").is_file())
PAIR_METRICS = {"mmiou": MeanMaxIoU, "mfmb": MeanForegroundMinusBackground}
CACHES = ("HF_MODULES_CACHE", "HF_METRICS_CACHE")
ACCUMULATORS = {**PAIR_METRICS, "text_contrast": TextContrast}


def pairs():
    """Maps of ragged sizes, label masks and class ids, as the inputs are named."""
    random = np.random.default_rng(0)
    maps = [random.random((5 + i, 7)).astype(np.float32) for i in range(6)]
    masks = [random.choice([0, 1, 2, 255], size=heatmap.shape) for heatmap in maps]
    return {"predictions": maps, "references": masks, "labels": [1, 2] * 3}


def images():
    """Maps of two or three classes an image, masks that overlap or not, and lists of class ids."""
    random = np.random.default_rng(0)
    labels = [[1, 2], [1, 2, 5]] * 3
    maps = [random.random((len(one), 5 + i, 7)).astype(np.float32) for i, one in enumerate(labels)]
    masks = [random.choice([0, 1, 2, 255], size=one.shape[i % 2 :]) for i, one in enumerate(maps)]
    return {"predictions": maps, "references": masks, "labels": labels}


def items(name):
    return pairs() if name in PAIR_METRICS else images()


def expected(name, *settings, ignore_index=255, **inputs):
    accumulator = ACCUMULATORS[name](*settings, ignore_index=ignore_index)
    for item in zip(*(inputs or items(name)).values()):
        accumulator.update(*item)
    return accumulator.compute()


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Keeps counts out of the user's cache."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def folder(request):
    return request.param


def fresh_process(arguments, cwd, home):
    """Python in a new process that has no network to ask and no cache but `home`."""
    environment = {name: value for name, value in os.environ.items() if name not in CACHES}
    environment |= {"HF_HOME": str(home), "HF_EVALUATE_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)


def output_of(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return output.strip().splitlines()


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """
    A home into which the metrics were installed by another process, beside a broken script of an earlier version.
    """
    home = tmp_path_factory.mktemp("home")
    stale = home / "modules" / "evaluate_modules" / "metrics" / "evaluate-metric--mmiou" / ("0" * 64)
    stale.mkdir(parents=True)
    (stale / "mmiou.py").write_text("raise ImportError('an old version')")
    said = output_of(fresh_process(["-m", "iclip_hf.cli", "install-metrics"], home, home))
    assert [line.split(" -> ")[0] for line in said] == ["mfmb", "mmiou", "text_contrast"]
    return home


def test_importing_the_package_writes_nothing_and_leaves_a_users_evaluate_alone(tmp_path):
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    (work / "evaluate.py").write_text("name = 'of the user'")
    command = "import sys, iclip_hf; assert 'evaluate' not in sys.modules; import evaluate; print(evaluate.name)"
    assert output_of(fresh_process(["-Bc", command], work, home)) == ["of the user"]
    assert not home.exists() and [path.name for path in work.iterdir()] == ["evaluate.py"]


@pytest.mark.parametrize("keep_in_memory", [False, True])
def test_every_way_of_adding_gives_the_same(folder, keep_in_memory):
    metric, inputs = evaluate.load(str(folder), keep_in_memory=keep_in_memory), items(folder.name)
    assert metric.name == folder.name and metric.compute(**inputs) == expected(folder.name)
    assert all(result in metric.inputs_description for result in expected(folder.name))
    for prediction, reference, label in zip(*inputs.values()):
        metric.add(prediction=prediction, reference=torch.tensor(reference), label=label)
    assert metric.compute() == expected(folder.name)
    metric.add_batch(**{name: values[:4] for name, values in inputs.items()})
    assert metric.compute(**{name: values[4:] for name, values in inputs.items()}) == expected(folder.name)


def test_counts_are_stored_not_pixels(folder):
    metric = evaluate.load(str(folder))
    maps = np.random.default_rng(2).random((20, 300, 400), dtype=np.float32)
    for heatmap in maps:
        one = (heatmap, 1) if folder.name in PAIR_METRICS else (heatmap[None], [1])
        metric.add(prediction=one[0], reference=(heatmap > 0.5).astype(np.uint8), labels=one[1])
    metric._finalize()
    assert len(metric.data) == 20
    assert metric.data.data.nbytes < 20 * 2000  # a map has 480000 bytes


def test_combine(monkeypatch):
    monkeypatch.chdir(REPOSITORY / "evaluate_metrics")
    metric, inputs = evaluate.combine(["mmiou", "mfmb"]), pairs()
    metric.add_batch(**{name: values[:4] for name, values in inputs.items()})
    for prediction, reference, label in zip(*(values[4:] for values in inputs.values())):
        metric.add(prediction, reference, labels=label)
    result = metric.compute()
    for name in PAIR_METRICS:
        assert result[name] == expected(name)[name]
        assert result[f"{name}_per_class"] == expected(name)["per_class"]
    pooled = metric.compute(**inputs, aggregate="pixel")
    for name in PAIR_METRICS:
        assert pooled[name] == expected(name, "pixel")[name]
        assert evaluate.load(name, aggregate="pixel").compute(**inputs) == expected(name, "pixel")


def test_ignore_index_wherever_pairs_are_given(folder):
    inputs, wanted = items(folder.name), expected(folder.name, ignore_index=0)
    assert wanted != expected(folder.name)
    assert evaluate.load(str(folder), ignore_index=0).compute(**inputs) == wanted
    metric = evaluate.load(str(folder))
    metric.add_batch(**inputs, ignore_index=0)
    assert metric.compute() == wanted
    for prediction, reference, label in zip(*inputs.values()):
        metric.add(prediction=prediction, reference=reference, label=label, ignore_index=0)
    assert metric.compute() == wanted
    assert metric.compute(**inputs, ignore_index=255) == expected(folder.name)  # what was computed is forgotten


def test_mistakes_are_refused_and_cost_no_items(folder):
    metric, inputs = evaluate.load(str(folder)), items(folder.name)
    metric.add_batch(**inputs)
    last = inputs["predictions"][-1]
    with pytest.raises((ValueError, TypeError)):
        metric.compute(aggregate="class")
    with pytest.raises(ValueError, match="shorter"):
        metric.add_batch(**{**inputs, "labels": inputs["labels"][:1]})
    for spoiled in (2 * last, last * np.nan, last[..., 1:]):
        with pytest.raises(ValueError):
            metric.add_batch(**{**inputs, "predictions": [*inputs["predictions"][:-1], spoiled]})
    assert metric.compute() == expected(folder.name)
    with pytest.raises(TypeError, match="no option .'agregate'"):
        evaluate.load(str(folder), agregate="pixel")


@pytest.mark.slow
def test_bare_names_load_offline_from_any_folder(installed, tmp_path):
    command = f"""
import os, evaluate
item = dict(predictions=[[[1.0, 0.25], [0.0, 0.5]]], references=[[[3, 0], [0, 255]]], labels=[3])
for folder in ({str(REPOSITORY)!r}, {str(tmp_path)!r}):
    os.chdir(folder)
    print([evaluate.load(name).compute(**item)[name] for name in ("mmiou", "mfmb")])
"""
    assert output_of(fresh_process(["-c", command], tmp_path, installed)) == ["[100.0, 0.875]"] * 2


RANK = """
import pickle, sys, evaluate

rank = int(sys.argv[1])
with open("items", "rb") as file:
    items = pickle.load(file)
settings = dict(num_process=2, process_id=rank, cache_dir="stored", timeout=60)
for name, ranks in (("mmiou", (0, 1)), ("mfmb", (1,)), ("text_contrast", (0, 1))):
    metric = evaluate.load(name, experiment_id="test", **settings)
    if rank in ranks:
        part = slice(ranks.index(rank), None, len(ranks))
        metric.add_batch(**{column: values[part] for column, values in items[name].items()})
    print(metric.compute())
"""


@pytest.mark.slow
def test_two_processes_even_if_one_has_no_pairs(installed, tmp_path):
    (tmp_path / "items").write_bytes(pickle.dumps({name: items(name) for name in ACCUMULATORS}))
    processes = [fresh_process(["-c", RANK, rank], tmp_path, installed) for rank in (0, 1)]
    first, second = (output_of(process) for process in processes)
    assert second == ["None"] * 3
    for name, line in zip(("mmiou", "mfmb", "text_contrast"), first, strict=True):
        result, wanted = ast.literal_eval(line), expected(name)
        for value in (name, "per_class", "floor"):
            assert result.pop(value, 0) == pytest.approx(wanted.pop(value, 0), rel=1e-12)
        assert result == wanted


def test_examples_of_the_cards(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)  # where the bare name is a folder
    card = doctest.testfile(str(folder / "README.md"), module_relative=False)
    assert card.attempted and not card.failed


def test_examples_of_the_metrics():
    """With numpy alone in their namespace."""
    found = [doctest.testmod(module, extraglobs={"np": np}) for module in (label_maps, maps, mean_iou, recognition)]
    assert all(examples.attempted >= 3 and not examples.failed for examples in found)
