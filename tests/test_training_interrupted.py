"""Runs that are interrupted, killed, resumed or shared by processes."""

import json
import os
import random
import signal
import subprocess
import sys
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import save, tiny_model
from fault_inputs import written
from processes import run_script
from training_runs import assert_same_weights, evaluations, run

from iclip_hf import ICLIPProcessor, explain
from iclip_hf.data.pairs import load_pairs
from iclip_hf.training import ICLIPTrainer, PairCollator
from iclip_hf.training.callbacks import Interrupts
from iclip_hf.training.kept_presence import KEPT_NOUNS, kept_presence
from iclip_hf.training.trainer import last_checkpoint


def test_the_last_checkpoint_is_a_complete_one(hub, tmp_path):
    """Its state is written last, and whole: a killed run, or a full disk, may leave others behind it."""
    trainer = run(hub, tmp_path, "--max_steps", 2)
    for step, name in ((5, "config.json"), (10, "trainer_state.json")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / name).touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = run(hub, tmp_path, "--max_steps", 3, "--resume")
    assert (trainer.state.global_step, resumed.state.global_step) == (2, 3)
    assert last_checkpoint(tmp_path / "checkpoint-5") is None


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(hub, tmp_path):
    """Its folder holds what a run writes before."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "start.json").write_text("{}")
    assert run(hub, tmp_path, "--max_steps", 1, "--resume").state.global_step == 1


def test_a_resumed_run_that_was_moved_keeps_its_best_checkpoint(hub, tmp_path):
    """The state of a checkpoint names the best one by the path of before."""
    options = ["--validation_data", hub / "held_out.tar", "--eval_steps", 1, "--save_steps", 1, "--learning_rate", 0.5]
    trainer = run(hub, tmp_path / "run", *options, "--num_train_epochs", 1)
    best, last = trainer.state.best_global_step, trainer.state.global_step
    assert best < last  # with such a rate, it becomes worse
    for file in ("model.safetensors", "config.json"):
        (tmp_path / "run" / file).unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    run(hub, tmp_path / "moved", *options, "--num_train_epochs", 1, "--resume")
    assert_same_weights(tmp_path / "moved", tmp_path / "moved" / f"checkpoint-{best}")


# `iclip train` with a hook before each forward pass, the `calls`th one
HOOKED = """
import os, signal, sys
import torch
from iclip_hf import ICLIPModel, cli

torch.set_num_threads(1)
forward, calls = ICLIPModel.forward, 0


def hooked(self, *args, **options):
    global calls
    calls += 1
    {hook}
    return forward(self, *args, **options)


ICLIPModel.forward = hooked
{setup}
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


def hooked_run(hub, output, arguments, hook="", setup="", **options):
    """Runs `iclip train` in a process of its own, with `hook` and `setup` as code."""
    script = HOOKED.format(hook=hook, setup=setup)
    (done,) = run_script(script, "--config", hub / "train.yaml", "--output_dir", output, *arguments, **options)
    return done


def test_an_interrupted_run_saves_a_checkpoint_and_says_where(hub, tmp_path):
    kill = "os.kill(os.getpid(), signal.SIGTERM)"
    twice = f"if calls == 3: {kill}; {kill}"  # as a launcher repeats it
    done = hooked_run(hub, tmp_path / "run", ["--max_steps", 6], twice)
    said, checkpoint = done.stderr.splitlines()[-1], tmp_path / "run" / "checkpoint-3"
    assert done.returncode == 130, done.stderr
    assert said == f"iclip train: interrupted; resume from {checkpoint}"
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert last_checkpoint(tmp_path / "run") == str(checkpoint)


def test_a_second_ctrl_c_stops_at_once_but_not_its_repetition_by_a_launcher(monkeypatch, capsys):
    before, clock = signal.getsignal(signal.SIGINT), SimpleNamespace(monotonic=iter([5.0, 5.9, 7.0, 7.1]).__next__)
    monkeypatch.setattr("iclip_hf.training.callbacks.time", clock)
    with Interrupts() as interrupts:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert interrupts.requested and capsys.readouterr().out.count("stopping after this step") == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def interrupt_at(recorded, *steps: int) -> None:
    """Ctrl-C while these steps, counted from one, compute."""
    numbers = count(1)

    def interrupt(*_, **options):
        if next(numbers) in steps:
            os.kill(os.getpid(), signal.SIGINT)

    recorded(ICLIPTrainer, "compute_loss", interrupt)


@pytest.fixture
def stream(hub, monkeypatch):
    """A Hub dataset `org/pairs` of the pairs."""
    source = {"train": str(hub / "pairs.tar")}
    opened = datasets.load_dataset("webdataset", data_files=source, split="train", streaming=True)
    monkeypatch.setattr("iclip_hf.data.pairs.open_hub_dataset", lambda *name, **options: opened)


def test_a_stream_interrupted_twice_in_a_row_goes_on_with_other_pairs(hub, tmp_path, recorded, stream):
    """Six steps: two, then one, then three. Each part is the beginning of the pass that its first step names."""
    seen = recorded(PairCollator, "__call__", lambda self, rows: [row["draw"] for row in rows])
    interrupt_at(recorded, 2, 3)
    arguments = ["--data", "org/pairs", "--pairs_per_epoch", 96, "--num_train_epochs", 1, "--resume"]
    arguments += ["--ignore_data_skip", True]
    for step in (2, 3):
        with pytest.raises(KeyboardInterrupt, match=f"interrupted; resume from .*{step}$"):
            run(hub, tmp_path, *arguments)
    assert run(hub, tmp_path, *arguments).state.global_step == 6
    assert [{epoch for _, epoch, _ in batch} for batch in seen] == [{0}, {0}, {2}, {3}, {3}, {3}]
    assert len({key for batch in seen[3:] for *_, key in batch}) == 48  # of one pass over 64 pairs


WORKERS = ["--dataloader_num_workers", 1, "--dataloader_persistent_workers", True]
WORKERS += ["--dataloader_prefetch_factor", 2, "--dataloader_multiprocessing_context", "fork"]
BY_EPOCH = [*"--eval_strategy epoch --save_strategy epoch".split(), "--validation_data", "held_out.tar"]
# Options of a run, and the forward pass that is interrupted: within the second epoch, or the last one
RESUMED = {
    "stream": (["--data", "org/pairs", "--pairs_per_epoch", 64, "--dataloader_num_workers", 1], 5),
    "cached features": (["--cache_features", "cache", "--lock_text", *WORKERS], 5),
    "kept presence": (["--model", "start", "--lock_text", "--keep_presence", 1], 5),
    "evaluation by epoch": (BY_EPOCH, 5),
    "evaluation by epoch, at the end": (BY_EPOCH, 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(hub, tmp_path, tiny_processor, recorded, stream, name):
    """To the bit, with the same evaluations."""
    options, step = RESUMED[name]
    start = save(tmp_path / "start", tiny_model(logit_bias_init_value=-1), tiny_processor)
    places = {"cache": tmp_path / "cache", "start": start, "held_out.tar": hub / "held_out.tar"}
    arguments = [places.get(option, option) for option in options] + ["--max_steps", 6, "--pictures", 0]
    arguments += ["--learning_rate", 0.01]
    whole = run(hub, tmp_path / "whole", *arguments)
    interrupt_at(recorded, step)
    with pytest.raises(KeyboardInterrupt, match="resume from .*checkpoint"):
        run(hub, tmp_path / "run", *arguments)
    resumed = run(hub, tmp_path / "run", *arguments, "--resume")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert evaluations(resumed) == evaluations(whole)
    assert resumed.state.best_global_step == whole.state.best_global_step


def test_a_training_that_ended_within_an_epoch_takes_no_further_step(hub, tmp_path):
    """Its last checkpoint is resumed if it was killed before the model was saved."""
    run(hub, tmp_path / "whole", "--max_steps", 3)
    for file in ("model.safetensors", "config.json"):
        (tmp_path / "whole" / file).rename(tmp_path / file)
    assert run(hub, tmp_path / "whole", "--max_steps", 3, "--resume").state.global_step == 3
    assert_same_weights(tmp_path / "whole", tmp_path)


@pytest.mark.slow
def test_the_presence_of_nouns_moves_less_if_it_is_kept(hub, tmp_path, tiny_processor):
    start = save(tmp_path / "start", tiny_model(logit_bias_init_value=-1), tiny_processor)
    arguments = ["--model", start, "--lock_text", "--learning_rate", 0.003, "--warmup_steps", 0]
    run(hub, tmp_path / "free", *arguments)
    run(hub, tmp_path / "kept", *arguments, "--keep_presence", 10)
    images = [pair["image"] for pair in islice(load_pairs(str(hub / "pairs.tar")), 16)]
    # Most words of the 256 nouns are unknown to the tokenizer, as "man".
    before, free, kept = (
        torch.cat([one.presence for one in explain(tmp_path / name, images, ["man"], refine=False)])
        for name in ("start", "free", "kept")
    )
    assert (kept - before).abs().mean() < (free - before).abs().mean() / 2


def test_presence_is_kept_of_common_nouns(tmp_path, tiny_processor):
    """Of a model that has one. Each noun has one prompt. Two of five training photographs show a person."""
    model = tiny_model(logit_bias_init_value=-1).train()
    parts = tiny_processor.image_processor, tiny_processor.tokenizer
    processor = ICLIPProcessor(*parts, templates=["{a} {}", "the {}"])
    assert kept_presence(tiny_model(), processor) is None
    kept = kept_presence(model, processor)
    with torch.no_grad():
        commonest, _ = model.eval().encode_text(**processor(text=["{a} person"]))
    assert len(kept.texts) == KEPT_NOUNS
    torch.testing.assert_close(kept.texts[:1], commonest, atol=1e-5, rtol=1e-4)


# Kills its own process before or after the work of one call that changes files
DEADLY = """
import shutil
import safetensors.torch

calls_to_live = {calls}


def deadly(function):
    def call(*arguments, **options):
        global calls_to_live
        for work in (None, function):
            calls_to_live -= 1
            if calls_to_live == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = work and work(*arguments, **options)
        return result
    return call


for module, name in ((os, "replace"), (torch, "save"), (shutil, "rmtree")):
    setattr(module, name, deadly(getattr(module, name)))
"""


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_the_uninterrupted_run(hub, tmp_path):
    """Kill -9 of a run that saves after every step, somewhere inside the saving."""
    arguments = ["--validation_data", hub / "held_out.tar", "--eval_steps", 2, "--save_steps", 2]
    arguments += ["--pictures", 0, "--num_train_epochs", 2, "--resume"]
    assert hooked_run(hub, tmp_path / "whole", arguments).returncode == 0
    draws, codes = random.Random(0), []
    while not codes or codes[-1] == -signal.SIGKILL:
        calls = draws.randrange(1, 40)
        codes.append(hooked_run(hub, tmp_path / "killed", arguments, setup=DEADLY.format(calls=calls)).returncode)
    assert codes[-1] == 0 and len(codes) > 2
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert_same_weights(*(tmp_path / name / "checkpoint-8" for name in ("killed", "whole")))


TWO_PROCESSES = """
import sys
import torch
from accelerate import PartialState
from iclip_hf.cli.train.training import train
from iclip_hf.cli.train.arguments import parse_arguments

torch.set_num_threads(1)
state = PartialState(cpu=True)
assert state.num_processes == 2 and torch.distributed.get_backend() == "gloo"
train(parse_arguments(sys.argv[1:]))
"""


def test_two_processes_are_one_with_the_whole_batch(hub, tmp_path):
    """Of the same pairs in each step, with caches that two processes fill, and an odd number of held-out pairs."""
    (tmp_path / "nouns.txt").write_text("dog\ncat\nsky\n")
    arguments = ["--config", hub / "train.yaml", "--chunk_size", 3, "--nouns", tmp_path / "nouns.txt", "--lock_text"]
    arguments += ["--validation_data", hub / "held_out.tar", "--pictures", 0, "--per_device_eval_batch_size", 4]
    arguments += ["--model_options", "max_over=similarity", "center_tokens=true", "--eval_steps", 12]
    of_two = ["--output_dir", tmp_path / "two", "--cache_features", tmp_path / "cache", "--use_cpu"]
    of_two += ["--per_device_train_batch_size", 8]
    for done in run_script(TWO_PROCESSES, *arguments, *of_two, processes=2):
        assert done.returncode == 0, done.stderr[-3000:]
    trainer = run(hub, tmp_path / "one", *arguments[2:], "--cache_features", tmp_path / "other_cache")
    state = json.loads(Path(last_checkpoint(tmp_path / "two"), "trainer_state.json").read_text())
    together = evaluations(SimpleNamespace(state=SimpleNamespace(log_history=state["log_history"])))
    assert together[12] == pytest.approx(evaluations(trainer)[12], abs=1e-4)
    assert_same_weights(tmp_path / "two", tmp_path / "one", atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(hub, tmp_path):
    stop = "if calls == 3 and torch.distributed.get_rank() == 1: os.kill(os.getpid(), signal.SIGTERM)"
    arguments = ["--max_steps", 5, "--lock_text"]
    script = written(tmp_path, HOOKED.format(hook=stop, setup=""), "hooked.py")
    command = [*"-m torch.distributed.run --standalone --nproc_per_node 2".split(), script]  # plain torchrun
    command += ["--config", hub / "train.yaml", "--output_dir", tmp_path / "two", *arguments]
    command += ["--per_device_train_batch_size", 8]
    options = {"capture_output": True, "text": True, "timeout": 240, "env": {**os.environ, "ACCELERATE_USE_CPU": "1"}}
    stopped = subprocess.run([sys.executable, *map(str, command)], **options)
    checkpoint = tmp_path / "two" / "checkpoint-3"
    said = f"iclip train: interrupted; resume from {checkpoint}"
    assert stopped.returncode == 1 and said in stopped.stderr, stopped.stderr[-3000:]
    run(hub, tmp_path / "two", *arguments, "--resume")  # in one process
    run(hub, tmp_path / "one", *arguments)
    assert_same_weights(tmp_path / "two", tmp_path / "one", atol=1e-5, rtol=1e-4)
