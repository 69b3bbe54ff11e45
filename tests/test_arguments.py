"""Arguments of `iclip train` from a train.yaml and the command line: what is taken, and what is refused."""

from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import iclip
from fault_inputs import written
from transformers import TrainingArguments

from iclip_hf import cli
from iclip_hf.cli.train.arguments import argument_parser, parse_arguments
from iclip_hf.training import ICLIPTrainingArguments


GOOD = {"vision": "v", "text": "t", "data": "[d]"}
# An argument, what it is set to, and what of it the error shows.
BAD = [
    ("eval_dataset", "cocos", "'cocos'"),
    ("batch_size", 9, "'batch_size' is no argument"),
    ("seed", 1.5, "'1.5'"),
    ("data", "[]", "data"),
    ("model", "m", "model='m'"),
    ("vision", "''", "vision=''"),
    ("text", "''\nmodel: m", "model='m', vision='v'"),
    ("validation_share", "0.1\nvalidation_data: [v]", "validation_data, validation_share"),
    ("keep_presence", 1, "keep_presence: "),  # of no model to train further
    ("keep_presence", -1, "keep_presence: -1"),
    ("crop_scale", 5, "crop_scale: 5"),
]


def said(tmp_path, capsys, content: str | bytes) -> str:
    """What `iclip train` says to a train.yaml, without training."""
    file = written(tmp_path, content, "train.yaml")
    with ExitStack() as stack:
        for name in ("training.train", "check_output_dir"):
            stack.enter_context(patch(f"iclip_hf.cli.train.{name}"))
        code = iclip("train", "--config", file)
    message = capsys.readouterr().err
    assert (code, message.count("\n")) in ((0, 0), (2, 1)), message
    return message


@pytest.mark.parametrize(("name", "value", "shown"), BAD)
def test_a_wrong_argument_is_named(tmp_path, capsys, name, value, shown):
    content = "\n".join(f"{other}: {its}" for other, its in {**GOOD, name: value}.items())
    assert shown in said(tmp_path, capsys, content)


@pytest.mark.parametrize("content", ["- vision\n- text", "vision: [v", "!!python/object/apply:os.mkdir [executed]"])
def test_what_is_no_file_of_arguments_is_named(tmp_path, capsys, content):
    assert "train.yaml: " in said(tmp_path, capsys, content)


@pytest.mark.parametrize(
    "content",
    [
        '{"vision": "v", "text": "t", "data": ["d"]}',
        "vision: v\ntext: t\ndata: d\nlr_scheduler_kwargs: {num_cycles: 1}",
        "vision: v\ntext: t\ndata: d\nseed:\nnouns:\nlearning_rate: 1e-4\nmodel_options: [pooling=max, 'x=[1, 2]']",
    ],
)
def test_forms_of_a_file_of_arguments(tmp_path, capsys, content):
    assert said(tmp_path, capsys, content) == ""


@pytest.mark.parametrize(
    ("typed", "data"),
    [
        ("a.csv --data b.csv c.csv", ["a.csv", "b.csv", "c.csv"]),
        ("--data b.csv --num_train_epochs 1 a.csv", ["b.csv", "a.csv"]),
        ("--data b.csv --data c.csv", ["b.csv", "c.csv"]),
        ("a.csv b.csv", ["a.csv", "b.csv"]),
        ("--num-train-epochs 1", None),
    ],
)
def test_all_pairs_that_are_named_are_trained_on(typed, data):
    assert vars(argument_parser().parse_args(typed.split())).get("data") == data


def test_a_repeated_option_adds_to_its_list():
    typed = "--model_options pooling=max --validation_data a.csv --model_options map_tokens=9 --validation_data b.csv"
    parsed = argument_parser().parse_args(typed.split())
    assert (parsed.model_options, parsed.validation_data) == (["pooling=max", "map_tokens=9"], ["a.csv", "b.csv"])
    for command, name in (("evaluate", "methods"), ("evaluate", "metrics"), ("compare", "methods")):
        values = ["mAP", "mMIoU"] if name == "metrics" else ["itsm", "gem"]
        required = ["--dataset", "folder", "--data-root", "."] if command == "evaluate" else ["photo.jpg"]
        repeated = [part for value in values for part in (f"--{name}", value)]
        assert getattr(cli.parser(command).parse_args([*required, *repeated]), name) == values


@pytest.mark.parametrize(
    ("own", "typed", "data", "share"),
    [
        ("validation_share: 0.2", "--validation_data b.csv", ["b.csv"], 0),
        ("validation_data: [c.csv]", "--validation_share 0.1", [], 0.1),
    ],
)
def test_given_validation_replaces_that_of_the_file(tmp_path, own, typed, data, share):
    file = written(tmp_path, f"vision: v\ntext: t\ndata: d\n{own}", "train.yaml")
    evaluation = parse_arguments(["--config", str(file), *typed.split()]).evaluation
    assert (evaluation.validation_data, evaluation.validation_share) == (data, share)


def test_every_way_to_name_a_configuration(hub, monkeypatch):
    model, data, evaluation, training = parse_arguments(["--config", "iclip-dinov2-s14-minilm", "pairs.csv"])
    assert (model.vision, data.data) == ("embedded", ["pairs.csv"])
    assert training.output_dir == "runs/iclip-dinov2-s14-minilm" and evaluation.validation_data
    assert Path(data.nouns).name == "nouns.txt" and Path(data.nouns).is_file()
    by_folder, by_file = (
        parse_arguments(["--config", str(hub), "--config", str(name)]) for name in (hub, hub / "train.yaml")
    )
    assert by_folder.model == by_file.model and by_folder.data == by_file.data
    monkeypatch.chdir(hub)  # a folder's own file before a shipped one
    bare = parse_arguments(["--config", "train.yaml"])
    assert (bare.model.vision, bare.training.output_dir) == (f"{hub}/vision", f"runs/{hub.name}")
    with pytest.raises(FileNotFoundError, match="absent: .*iclip-vit-b16"):
        parse_arguments(["--config", "absent"])


def test_the_command_line_precedes_the_file_and_this_the_defaults(hub):
    options = ["pooling=max", "projection_dim=8"]
    model, data, _, training = parse_arguments(
        ["--config", str(hub), "--num_train_epochs", "7", "--model_options", *options]
    )
    assert (training.num_train_epochs, training.per_device_train_batch_size, training.weight_decay) == (7, 16, 0.05)
    assert data.data == [f"{hub}/pairs.tar"] and model.model_options == options
    further = parse_arguments(["--config", str(hub), "--model", "m"]).model  # instead of the towers of the file
    assert (further.model, further.vision, further.text, further.image_size) == ("m", "", "", 0)
    with pytest.raises(ValueError, match="image_size"):  # the model has its own
        parse_arguments(["--config", str(hub), "--model", "m", "--image_size", "9"])
    assert parse_arguments(["--config", str(hub), "--vision", "v"]).model.vision == "v"


def test_what_is_measured_selects_the_model(hub):
    def training(*words):
        return parse_arguments(["--config", str(hub), *words]).training

    neither, pairs = training(), training("--validation_share", "0.1")
    assert not neither.load_best_model_at_end and neither.eval_strategy == "no"
    assert pairs.load_best_model_at_end and pairs.metric_for_best_model == "text_to_image" and not pairs.eval_on_start
    assert training("--eval_dataset", "folder").metric_for_best_model == "mMIoU"
    further = training("--validation_share", "0.1", "--model", "m", "--eval_steps", "7")
    assert further.eval_on_start and further.save_steps == further.eval_steps == 7
    for every in (0.25, 0.3):  # shares of all steps
        shared = training("--validation_share", "0.1", "--eval_steps", str(every))
        assert shared.save_steps == shared.eval_steps == every
    with pytest.raises(ValueError, match="100, which is not a round multiple of 1000"):  # of the best, a checkpoint
        training("--validation_share", "0.1", "--save_steps", "100", "--eval_steps", "1000")
    often = ["--save_steps", "100", "--eval_steps", "1000", "--load_best_model_at_end", "false"]
    assert training("--validation_share", "0.1", *often).save_steps == 100
    with pytest.raises(ValueError, match="metric_for_best_model: 'val_loss' is not measured; choose one of loss"):
        training("--validation_share", "0.1", "--metric_for_best_model", "val_loss")
    assert training("--validation_share", "0.1", "--metric_for_best_model", "eval_loss").greater_is_better is False


def test_pairs_are_not_split_over_the_gpus_of_one_process(monkeypatch, tmp_path):
    """`DataParallel` would contrast each part alone."""
    of_base = TrainingArguments.__post_init__

    def four_gpus(self):
        of_base(self)
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", four_gpus)
    assert ICLIPTrainingArguments(str(tmp_path)).n_gpu == 1


def test_memory_is_not_pinned_on_a_cpu(tmp_path):
    """Torch would warn of it in every run."""
    assert not ICLIPTrainingArguments(str(tmp_path), use_cpu=True).dataloader_pin_memory


def test_the_paper_is_the_default():
    """Batches of 1024 on four devices, two of thirty epochs of warm-up, GroupViT's rates."""
    training = parse_arguments(["--config", "iclip-vit-b16"]).training
    assert 4 * training.per_device_train_batch_size == 1024 and training.learning_rate == 1.25e-4
    assert training.num_train_epochs == 30 and training.get_warmup_steps(3000) == 200
    assert (training.warmup_learning_rate, training.min_learning_rate) == (1e-6, 1e-5)
    assert (training.weight_decay, training.max_grad_norm) == (0.05, 5)
