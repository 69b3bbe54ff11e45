"""Settings of `iclip train` from a train.yaml and the command line: what is taken, and what is refused by its name."""

import argparse
import subprocess
import sys
from contextlib import ExitStack
from unittest.mock import patch

import pytest
from fault_inputs import BAD_JSON, written

from iclip_hf import cli
from iclip_hf.cli.train import _check_effects
from iclip_hf.training.settings import Settings, add_settings, changed_settings, parse_settings


GOOD = {"vision": "v", "text": "t", "data": "[d]"}
# A setting, what it is set to, and what of it the error shows: one row a rule
BAD_SETTINGS = [
    ("config", "other.yaml", "'config'"),
    ("learning_rates", 1, "'learning_rates'"),
    ("epochs", 1.5, "'1.5'"),
    ("epochs", "[1, 2]", "list"),
    ("data", "{a: b}", "dict"),
    ("lock_text", "maybe", "maybe"),
    ("mixed_precision", "fp8", "'fp8'"),
    ("learning_rate", ".nan", "nan"),
    ("warmup_epochs", ".inf", "inf"),
    ("data", "[]", "data"),
    ("model", "m", "model='m'"),
    ("vision", "''", "vision=''"),
    ("model_options", "[pooling]", "'pooling'"),
    ("model_options", "'pooling=[a'", "'pooling=[a'"),
    ("best_metric", "mAP", "best_metric: mAP"),
    ("learning_rate", 0, "learning_rate: 0"),
    ("epochs", 0, "epochs: 0"),
    ("noun_weight", 0.7, "model_options: [noun_weight=0.7]"),  # an option of the model, once a setting
    ("weight_decay", -1, "weight_decay: -1"),
    ("min_learning_rate", 1, "min_learning_rate: 1"),  # the rate would rise
    ("warmup_learning_rate", 1, "warmup_learning_rate: 1"),
    ("seed", -1, "seed: -1"),
    ("seed", 2**32, f"seed: {2**32}"),
    ("keep_presence", 1, "keep_presence: "),  # of no model to train further
]


def said(tmp_path, capsys, content: str | bytes) -> str:
    """What `iclip train` says to a train.yaml, without a look at the files, and without training."""
    file = written(tmp_path, content, "train.yaml")
    unchecked = (
        patch(f"iclip_hf.training.{name}") for name in ("train.train", "inputs.check_run", "inputs.open_inputs")
    )
    with ExitStack() as stack:
        for one in unchecked:
            stack.enter_context(one)
        code = cli.main(["train", "--config", str(file)])
    message = capsys.readouterr().err
    assert (code, message.count("\n")) in ((0, 0), (2, 1)), message
    return message


@pytest.mark.parametrize(("name", "value", "shown"), BAD_SETTINGS)
def test_a_wrong_setting_is_named(tmp_path, capsys, name, value, shown):
    content = "\n".join(f"{other}: {its}" for other, its in {**GOOD, name: value}.items())
    assert shown in said(tmp_path, capsys, content)


@pytest.mark.parametrize(
    "content",
    [
        *BAD_JSON.values(),
        "- vision\n- text",
        "!!python/object/apply:os.mkdir [executed]",
        # Aliases that name ten times more than the one before
        "data: " + "\n".join(["&a0 [x]", *(f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))]),
    ],
)
def test_what_is_no_file_of_settings_is_named(tmp_path, capsys, content):
    assert "train.yaml: " in said(tmp_path, capsys, content)


@pytest.mark.parametrize(
    "content",
    [
        '{"vision": "v", "text": "t", "data": ["d"]}',
        "vision: v\ntext: t\ndata: d\nepochs:\nnouns:\nlearning_rate: 1e-4\nmodel_options: [pooling=max, 'x=[1, 2]']",
    ],
)
def test_forms_of_a_file_of_settings(tmp_path, capsys, content):
    assert said(tmp_path, capsys, content) == ""


def test_gradients_are_not_accumulated(tmp_path, capsys, monkeypatch):
    """Accelerate would divide them by the number, without accumulating."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    assert cli.main(["train", "--config", "iclip-vit-b16", "pairs.csv"]) == 2
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "data"),
    [
        ("a.csv --data b.csv c.csv", ["a.csv", "b.csv", "c.csv"]),
        ("--data b.csv --epochs 1 a.csv", ["b.csv", "a.csv"]),
        ("--data b.csv --data c.csv", ["b.csv", "c.csv"]),
        ("a.csv b.csv", ["a.csv", "b.csv"]),
        ("--epochs 1", None),
    ],
)
def test_all_pairs_that_are_named_are_trained_on(typed, data):
    parser = argparse.ArgumentParser()
    add_settings(parser)
    assert vars(parser.parse_args(typed.split())).get("data") == data


@pytest.mark.parametrize(
    ("own", "typed", "data", "share"),
    [
        ("validation_share: 0.2", "--validation_data b.csv", ["b.csv"], 0),
        ("validation_data: [c.csv]", "--validation_share 0.1", [], 0.1),
    ],
)
def test_given_validation_replaces_that_of_the_file(tmp_path, own, typed, data, share):
    file = written(tmp_path, f"vision: v\ntext: t\ndata: d\n{own}", "train.yaml")
    settings = parse_settings(["--config", str(file), *typed.split()])
    assert (settings.validation_data, settings.validation_share) == (data, share)


def test_no_more_loading_processes_than_processors_by_default():
    code = (
        "import os; os.sched_getaffinity = lambda _: {0, 1, 2}\n"
        "from iclip_hf.training.settings import Settings; print(Settings(model='m', data=['d']).num_workers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr  # two are left to the model


def test_what_a_run_may_be_resumed_with():
    """The evaluations decide which model is kept."""
    began = parse_settings(["--config", "iclip-vit-b16", "--data", "a.csv"])
    options = ["--log_steps=1", "--checkpoint_steps=2", "--eval_steps=3", "--num_workers=0", "--data=b.csv"]
    now = parse_settings(["--config", "iclip-vit-b16", "--max_bad_share=0.5", *options])
    assert changed_settings(now, vars(began)) == {"eval_steps": 1000}
    began = vars(began) | {"max_steps": 5, "epochs": 7}
    del began["keep_presence"]  # of a version that had no such setting
    now = parse_settings(["--config", "iclip-vit-b16", "--data", "a.csv", "--max_steps", "5"])
    assert changed_settings(now, began) == {}
    now.keep_presence = 1.0
    assert changed_settings(now, began) == {"keep_presence": 0.0}


def test_a_split_is_that_of_a_dataset_with_splits(tmp_path):
    (tmp_path / "dataset_dict.json").touch()
    for named in ({"data": ["org/pairs"]}, {"data": ["a.csv"], "validation_data": [str(tmp_path)]}):
        _check_effects({"split": "test"}, Settings(model="embedded", **named))
    with pytest.raises(ValueError, match="^split: "):
        _check_effects({"split": "test"}, Settings(model="embedded", data=["a.csv"]))


def test_cached_features_are_of_whole_images():
    """Which may be asked for, but cannot be changed."""
    settings = Settings(model="embedded", data=["pairs.csv"], cache_features="cache")
    _check_effects({"crop_scale": 1, "auto_augment": "", "random_erasing": 0}, settings)
    for name, value in (("crop_scale", 0.5), ("auto_augment", "rand-m9-n3-mstd0.5"), ("random_erasing", 0.1)):
        with pytest.raises(ValueError, match=rf"{name}: .*--cache_features ''"):
            _check_effects({name: value}, settings)
