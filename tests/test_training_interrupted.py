"""Runs that are interrupted, killed, resumed or shared by processes."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import tiny_model
from fault_inputs import written
from PIL import Image
from processes import run_script
from training_runs import assert_same_weights, eight_pairs, gradients, run, weights

from iclip_hf import ICLIPModel, ICLIPProcessor, explain
from iclip_hf.backends.embedded import vocabulary
from iclip_hf.data.pairs import load_pairs
from iclip_hf.training.contrastive import PairModel
from iclip_hf.training.data import TrainingStream
from iclip_hf.training.settings import Settings
from iclip_hf.training.train import KEPT_NOUNS, kept_presence
from iclip_hf.utils.files import folder_lock
from iclip_hf.utils.interrupts import Interrupts


def test_a_folder_holds_one_run(hub, tmp_path):
    run(hub, tmp_path, "--max_steps", 2)
    with pytest.raises(ValueError, match="holds a run already; add --resume"):
        run(hub, tmp_path, "--max_steps", 2)
    with pytest.raises(ValueError, match="weight_decay from 0.05 to 0.1"):
        run(hub, tmp_path, "--max_steps", 2, "--resume", "--weight_decay", 0.1)
    with folder_lock(tmp_path), pytest.raises(BlockingIOError, match="another run is writing here"):
        run(hub, tmp_path, "--max_steps", 2, "--resume")
    last = max(tmp_path.glob("checkpoint-*"))
    whole = (last / "training.pt").read_bytes()
    for name, content in (
        ("training.pt", whole[:-100]),
        ("training.pt", b"{"),
        ("training.pt", b""),
        ("state.json", b"{"),
        ("state.json", b"[]"),
    ):
        (last / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged; delete this checkpoint"):
            run(hub, tmp_path, "--max_steps", 2, "--resume")
    for checkpoint in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    trained = (tmp_path / "model.safetensors").read_bytes()
    for resume, says in (([], "holds a run already"), (["--resume"], "its checkpoints are gone")):
        with pytest.raises(ValueError, match=says):
            run(hub, tmp_path, "--max_steps", 2, *resume)
    assert (tmp_path / "model.safetensors").read_bytes() == trained


# `iclip train` with a hook before each forward pass, the `calls`th one
HOOKED = """
import os, signal, sys
import torch
from iclip_hf import cli
from iclip_hf.training import train as run
from iclip_hf.training.contrastive import PairModel

torch.set_num_threads(1)
forward, calls = PairModel.forward, 0


def hooked(self, **batch):
    global calls
    calls += 1
    {hook}
    return forward(self, **batch)


PairModel.forward = hooked
{setup}
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


def hooked_run(hub, output, arguments, hook="", setup="", **options):
    """Runs `iclip train` in a process of its own, with `hook` and `setup` as code."""
    script = HOOKED.format(hook=hook, setup=setup)
    (done,) = run_script(script, "--config", hub / "train.yaml", "--output_dir", output, *arguments, **options)
    return done


@pytest.mark.parametrize("early", [False, True])
def test_an_interrupted_run_saves_a_checkpoint_and_says_where(hub, tmp_path, early):
    kill = "os.kill(os.getpid(), signal.SIGTERM)"
    twice = f"if calls == 3: {kill}; {kill}"  # as a launcher repeats it
    setup = f"run.load_datasets = lambda *arguments: {kill}" if early else ""
    done = hooked_run(hub, tmp_path / "run", ["--max_steps", 5], twice, setup)
    said, checkpoint = done.stderr.splitlines()[-1], tmp_path / "run" / "checkpoint-0000003"
    assert done.returncode == 130, done.stderr
    assert said == f"iclip train: interrupted{'' if early else f'; --resume continues from {checkpoint}'}"
    if not early:
        hooked_run(hub, tmp_path / "run", ["--max_steps", 5, "--resume"])
        hooked_run(hub, tmp_path / "whole", ["--max_steps", 5])
        assert_same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_a_job_that_is_ended_while_it_measures_loses_nothing(hub, tmp_path):
    """In an evaluation between two checkpoints, which makes one."""
    arguments = ["--max_steps", 3, "--eval_steps", 2, "--validation_data", hub / "held_out.tar"]
    # As a job's scheduler does: also to the workers
    hook = "if not self.training and not globals().get('sent'): globals()['sent'] = True; os.killpg(0, signal.SIGTERM)"
    done = hooked_run(hub, tmp_path / "run", [*arguments, "--num_workers", 2], hook, new_session=True)
    assert done.returncode == 130, done.stderr
    checkpoint = tmp_path / "run" / "checkpoint-0000002"
    assert done.stderr.splitlines()[-1] == f"iclip train: interrupted; --resume continues from {checkpoint}"
    metrics = run(hub, tmp_path / "run", *arguments, "--resume")
    # The first steps were those of a process with threads of its own.
    assert metrics == pytest.approx(run(hub, tmp_path / "whole", *arguments), rel=1e-4) and "text_to_image" in metrics


def test_a_second_ctrl_c_stops_at_once_but_not_its_repetition_by_a_launcher(monkeypatch, capsys):
    before, clock = signal.getsignal(signal.SIGINT), SimpleNamespace(monotonic=iter([5.0, 5.9, 7.0, 7.1]).__next__)
    monkeypatch.setattr("iclip_hf.utils.interrupts.time", clock)
    with Interrupts() as interrupts:
        interrupts.deferred = True
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert interrupts.requested and capsys.readouterr().out.count("stopping after this step") == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_stream_interrupted_twice_in_a_row_goes_on_with_other_pairs(hub, tmp_path, monkeypatch):
    """Six steps: two, then one, then three. Each part is the beginning of the pass that its first step names."""
    source = {"train": str(hub / "pairs.tar")}
    opened = datasets.load_dataset("webdataset", data_files=source, split="train", streaming=True)
    monkeypatch.setattr("iclip_hf.data.pairs.open_hub_dataset", lambda *name, **options: opened)
    prepare, forward, seen = TrainingStream.prepare, PairModel.forward, []
    steps = 0

    def recorded(self, pair, key):
        seen.append(key)
        return prepare(self, pair, key)

    def interrupted(self, **batch):
        nonlocal steps
        steps += self.training  # the last forward pass only checks the loss
        if self.training and steps in (2, 3):
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, **batch)

    monkeypatch.setattr(TrainingStream, "prepare", recorded)
    monkeypatch.setattr(PairModel, "forward", interrupted)
    arguments = ["--data", "org/pairs", "--pairs_per_epoch", 96, "--epochs", 1, "--resume"]
    for step in (2, 3):
        with pytest.raises(KeyboardInterrupt, match=f"interrupted; --resume continues from .*{step}$"):
            run(hub, tmp_path, *arguments)
    run(hub, tmp_path, *arguments)

    stream, expected = load_pairs("org/pairs"), []
    for first, count in ((0, 2), (2, 1), (3, 3)):
        stream.set_epoch(first)
        expected += [pair["key"] for pair in itertools.islice(stream, 16 * count)]
    assert seen == expected and steps == json.loads((tmp_path / "results.json").read_text())["step"] == 6


def test_a_resumed_stream_keeps_the_mean_that_its_branches_learned_with(hub, tmp_path, monkeypatch):
    """Another number of processes would read other images first."""
    source = {"train": str(hub / "pairs.tar")}
    opened = datasets.load_dataset("webdataset", data_files=source, split="train", streaming=True)
    parts = [opened.take(32), opened.skip(32), opened.skip(32)]
    monkeypatch.setattr("iclip_hf.data.pairs.open_hub_dataset", lambda *name, **options: parts.pop(0))
    forward, means = PairModel.forward, []

    def interrupted(self, **batch):
        means.append(self.model.token_mean.clone())
        if len(means) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, **batch)

    monkeypatch.setattr(PairModel, "forward", interrupted)
    arguments = ["--data", "org/pairs", "--pairs_per_epoch", 32, "--epochs", 1, "--warmup_epochs", 0, "--resume"]
    arguments += ["--model_options", "max_over=similarity", "center_tokens=true"]
    with pytest.raises(KeyboardInterrupt):
        run(hub, tmp_path / "run", *arguments)
    older = shutil.copytree(tmp_path / "run", tmp_path / "older")
    run(hub, tmp_path / "run", *arguments)
    kept = weights(tmp_path / "run")["token_mean"]
    assert all(torch.equal(mean, kept) for mean in means) and len(means) > 1

    (checkpoint,) = older.glob("checkpoint-*/training.pt")  # of a version that did not save it
    saved = torch.load(checkpoint, weights_only=True)
    del saved["token_mean"]
    torch.save(saved, checkpoint)
    run(hub, older, *arguments)
    assert not torch.allclose(weights(older)["token_mean"], kept, atol=1e-4)


# Kills its own process before or after the work of one call that changes files
def test_a_resumed_run_keeps_the_presence_of_its_start(hub, tmp_path, tiny_processor, monkeypatch):
    """With `keep_presence`, that of nouns moves less; a run that was interrupted still knows the start."""
    start = tiny_model(logit_bias_init_value=-1)
    start.save_pretrained(tmp_path / "start")
    tiny_processor.save_pretrained(tmp_path / "start")
    arguments = ["--model", tmp_path / "start", "--lock_text", "--learning_rate", 0.02, "--warmup_epochs", 0]
    keep = [*arguments, "--max_steps", 6, "--keep_presence", 10]
    run(hub, tmp_path / "free", *arguments, "--max_steps", 6)
    run(hub, tmp_path / "kept", *keep)

    def presences(folder: Path) -> torch.Tensor:
        explanation = explain(folder, Image.new("RGB", (32, 32), "red"), ["dog", "cat", "ball", "man", "woman"])
        return explanation.presence

    moved = {name: (presences(tmp_path / name) - presences(tmp_path / "start")).abs() for name in ("free", "kept")}
    assert moved["kept"].mean() < moved["free"].mean() / 2
    shown = [json.loads((tmp_path / name / "model_card.json").read_text())["training"] for name in ("free", "kept")]
    assert [training.get("keep_presence") for training in shown] == [None, 10.0]

    forward, steps = PairModel.forward, 0

    def interrupted(self, **batch):
        nonlocal steps
        steps += self.training
        if self.training and steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, **batch)

    monkeypatch.setattr(PairModel, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt, match="resume continues"):
        run(hub, tmp_path / "again", *keep)
    run(hub, tmp_path / "again", *keep, "--resume")
    assert_same_weights(tmp_path / "again", tmp_path / "kept")


def test_presence_is_kept_of_a_model_that_has_one_and_a_locked_tower(tmp_path, hub, tiny_processor):
    """Nothing is kept of another, which the card does not claim; each noun has one prompt."""
    for name, options in (("without", {}), ("with", {"logit_bias_init_value": -1})):
        tiny_model(**options).save_pretrained(tmp_path / name)
        tiny_processor.save_pretrained(tmp_path / name)
    arguments = ["--lock_text", "--max_steps", 1, "--keep_presence", 1]
    run(hub, tmp_path / "run", "--model", tmp_path / "without", *arguments)
    assert "keep_presence" not in json.loads((tmp_path / "run" / "model_card.json").read_text())["training"]
    with pytest.raises(ValueError, match="keep_presence: it needs a locked image tower"):
        run(hub, tmp_path / "no", "--model", tmp_path / "with", *arguments, "--model_options", "lock_vision=false")
    assert not (tmp_path / "no").exists()
    settings = Settings(model="with", data=["pairs"], lock_text=True, keep_presence=1)
    processor = ICLIPProcessor.from_pretrained(tmp_path / "with", templates=["a {}", "the {}"])
    model, prior = ICLIPModel.from_pretrained(tmp_path / "with"), vocabulary()
    kept = kept_presence(settings, model, processor)
    with torch.no_grad():
        commonest, _ = model.encode_text(**processor(text=[f"a {max(prior, key=prior.get)}"]))
    assert len(kept.texts) == KEPT_NOUNS
    torch.testing.assert_close(kept.texts[:1], commonest)


DEADLY = """
import shutil

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


def test_killed_at_any_moment_and_resumed_is_the_uninterrupted_run(hub, tmp_path):
    """Kill -9 of a run that saves after every step, somewhere inside the saving."""
    arguments = ["--validation_data", hub / "held_out.tar", "--eval_steps", 2, "--checkpoint_steps", 1]
    arguments += ["--pictures", 0, "--epochs", 2, "--resume"]
    assert hooked_run(hub, tmp_path / "whole", arguments).returncode == 0
    draws, codes = random.Random(0), []
    while not codes or codes[-1] == -signal.SIGKILL:
        calls = draws.randrange(1, 60)
        codes.append(hooked_run(hub, tmp_path / "killed", arguments, setup=DEADLY.format(calls=calls)).returncode)
    assert codes[-1] == 0 and len(codes) > 2
    # The folder may hold the model of an early step.
    last = [tmp_path / name / "checkpoint-0000008" / "training.pt" for name in ("killed", "whole")]
    torch.testing.assert_close(*(torch.load(file, weights_only=True)["weights"] for file in last), rtol=0, atol=0)
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole")]
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["best"] == results[1]["best"]
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) == 2


TWO_PROCESSES = """
import sys
import torch
from accelerate import PartialState
from training_runs import eight_pairs
from iclip_hf.training import data
from iclip_hf.training.train import train
from iclip_hf.training.settings import parse_settings

torch.set_num_threads(1)
folder, arguments = sys.argv[1], sys.argv[2:]
state = PartialState(cpu=True)
assert state.num_processes == 2 and torch.distributed.get_backend() == "gloo"

# Loss and gradients of eight pairs, four a process in two chunks, with both towers learning
pair_model, batch = eight_pairs(slice(4 * state.process_index, 4 * state.process_index + 4), chunk_size=2)
pair_model = torch.nn.parallel.DistributedDataParallel(pair_model)
outputs = pair_model(**batch)
outputs["loss"].backward()
loss = outputs["loss"].detach()
torch.distributed.all_reduce(loss)
grads = {name.removeprefix("module."): p.grad for name, p in pair_model.named_parameters() if p.grad is not None}
if state.is_main_process:
    torch.save({"loss": loss / 2, "grads": grads}, folder + "/gradients.pt")
del pair_model, outputs, grads

if not state.is_main_process:  # as another device would round the mean
    data.set_token_mean = lambda model, images: model.token_mean.fill_(0.1)
train(parse_settings(arguments))
"""


def test_two_processes_are_one_with_the_whole_batch(hub, tmp_path):
    arguments = ["--config", hub / "train.yaml", "--output_dir", tmp_path / "two", "--chunk_size", 3]
    arguments += ["--validation_data", hub / "held_out.tar", "--pictures", 0, "--lock_text"]
    (tmp_path / "nouns.txt").write_text("dog\ncat\nsky\n")
    arguments += ["--cache_features", tmp_path / "cache", "--nouns", tmp_path / "nouns.txt"]
    arguments += ["--model_options", "max_over=similarity", "center_tokens=true"]
    for done in run_script(TWO_PROCESSES, tmp_path, *arguments, processes=2):
        assert done.returncode == 0, done.stderr[-3000:]

    loss, grads = gradients(*eight_pairs(slice(0, 8)))
    two = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert abs(two["loss"] - loss) < 1e-5 and two["grads"].keys() == grads.keys()
    for name in grads:
        torch.testing.assert_close(two["grads"][name], grads[name], atol=1e-5, rtol=1e-4)

    # A whole run, both caches filled by two processes; without a text tower that learns, whose dropout differs
    metrics = run(hub, tmp_path / "one", *arguments[4:], "--cache_features", tmp_path / "other_cache")
    together = json.loads((tmp_path / "two" / "results.json").read_text())
    assert together["metrics"] == pytest.approx(metrics, abs=1e-4)
    assert_same_weights(tmp_path / "two", tmp_path / "one", atol=1e-5, rtol=1e-4)


def test_a_signal_to_one_of_two_processes_stops_both(hub, tmp_path):
    stop = "if calls == 3 and torch.distributed.get_rank() == 1: os.kill(os.getpid(), signal.SIGTERM)"
    arguments = ["--max_steps", 5, "--lock_text"]
    script = written(tmp_path, HOOKED.format(hook=stop, setup=""), "hooked.py")
    command = [*"-m torch.distributed.run --standalone --nproc_per_node 2".split(), script]  # plain torchrun
    command += ["--config", hub / "train.yaml", "--output_dir", tmp_path / "two", *arguments]
    options = {"capture_output": True, "text": True, "timeout": 240, "env": {**os.environ, "ACCELERATE_USE_CPU": "1"}}
    stopped = subprocess.run([sys.executable, *map(str, command)], **options)
    assert "Training with 2 processes" in stopped.stdout
    checkpoint = tmp_path / "two" / "checkpoint-0000003"
    said = f"iclip train: interrupted; --resume continues from {checkpoint}"
    assert stopped.returncode == 1 and said in stopped.stderr.partition("Root Cause")[2], stopped.stderr[-3000:]
    run(hub, tmp_path / "two", *arguments, "--resume")  # in one process
    run(hub, tmp_path / "one", *arguments)
    assert_same_weights(tmp_path / "two", tmp_path / "one", atol=1e-5, rtol=1e-4)
