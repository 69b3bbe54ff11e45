"""Runs of the training program on tiny random towers, and their settings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, LoggerType
from huggingface_hub import ModelCard
from training_runs import run, weights, write_table

from iclip_hf import ICLIPModel, ICLIPProcessor
from iclip_hf.data.pairs import load_pairs
from iclip_hf.model.losses import contrastive_loss
from iclip_hf.training import train as program
from iclip_hf.training.contrastive import PairModel
from iclip_hf.training.data import GlobalBatches
from iclip_hf.training.settings import parse_settings, read_settings


def test_a_run_ends_with_a_model_that_loads(hub, tmp_path):
    metrics = run(
        hub, tmp_path, "--validation_data", hub / "held_out.tar", "--report_to", "tensorboard", "--pictures", 2
    )
    model, processor = ICLIPModel.from_pretrained(tmp_path), ICLIPProcessor.from_pretrained(tmp_path)
    pairs = load_pairs(str(hub / "held_out.tar"))
    with torch.no_grad():
        images = processor(images=[pairs[i]["image"] for i in range(17)])
        outputs = model(**images, **processor(text=[pairs[i]["caption"] for i in range(17)]), return_loss=True)
    own = torch.arange(17)
    assert metrics["val_loss"] == pytest.approx(contrastive_loss(outputs.logits_per_image).item(), abs=1e-4)
    assert metrics["image_to_text"] == pytest.approx(100 * (outputs.logits_per_image.argmax(1) == own).float().mean())
    assert metrics["text_to_image"] == pytest.approx(100 * (outputs.logits_per_text.argmax(1) == own).float().mean())

    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.lstrip().startswith(f"# {hub.name}") and "partial" not in card.text
    training = json.loads((tmp_path / "model_card.json").read_text())["training"]
    assert training["epochs"] == 3 and training["data"] == ["pairs.tar"]
    assert str(hub) not in card.content

    before, after = weights(hub / "vision"), weights(tmp_path)
    assert all(torch.equal(after[f"vision_model.{name}"], weight) for name, weight in before.items())
    text = weights(hub / "text")
    assert not torch.equal(
        after["text_model.embeddings.word_embeddings.weight"], text["embeddings.word_embeddings.weight"]
    )
    assert [path.name[-7:] for path in sorted(tmp_path.glob("checkpoint-*"))] == ["0000010", "0000012"]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3 and list(tmp_path.rglob("events.out*"))
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == metrics
    assert json.loads((tmp_path / "results.json").read_text())["best"] == metrics["text_to_image"]
    assert not list(tmp_path.rglob("*.partial"))


def test_training_learns_its_pairs(hub, tmp_path):
    """Seventeen pairs of one tiny model are learnt by heart; chance is 6 %."""
    pairs = hub / "held_out.tar"
    arguments = [
        "--data",
        pairs,
        "--validation_data",
        pairs,
        *"--seed 1 --batch_size 17 --epochs 100 --learning_rate 0.01".split(),
    ]
    cached = ["--cache_features", tmp_path / "cache", "--lock_text", "--eval_steps", 100]
    metrics = run(hub, tmp_path / "run", *arguments, *cached)
    assert metrics["text_to_image"] > 90 and metrics["val_loss"] < 0.5


def test_a_model_in_half_precision_is_trained_in_single_precision(hub, tmp_path):
    run(hub, tmp_path / "start", "--max_steps", 1)
    half = ICLIPModel.from_pretrained(tmp_path / "start").bfloat16()
    half.save_pretrained(tmp_path / "half")
    ICLIPProcessor.from_pretrained(tmp_path / "start").save_pretrained(tmp_path / "half")
    run(hub, tmp_path / "run", "--model", tmp_path / "half", "--max_steps", 1, "--learning_rate", 1e-6)
    before, after = half.recognition.visual_projection.weight, weights(tmp_path / "run")
    after = after["recognition.visual_projection.weight"]
    assert after.dtype == torch.float32
    assert 0 < (after - before.float()).abs().max() < 1e-4  # less than the distance of two values in half precision


def test_every_way_to_name_a_configuration(hub, monkeypatch):
    shipped = parse_settings(["--config", "iclip-dinov2-s14-minilm", "pairs.csv"])
    assert (shipped.vision, shipped.data) == ("embedded", ["pairs.csv"])
    assert shipped.output_dir == "runs/iclip-dinov2-s14-minilm"
    held_out = parse_settings(["--config", "iclip-dinov2-s14-minilm", "pairs.csv", "--validation_share", "0.1"])
    assert shipped.validation_data and not held_out.validation_data
    assert Path(shipped.nouns).name == "nouns.txt" and Path(shipped.nouns).is_file()
    assert parse_settings(["--config", str(hub)]) == parse_settings(["--config", str(hub / "train.yaml")])
    monkeypatch.chdir(hub)  # a folder's own file before a shipped one
    bare = parse_settings(["--config", "train.yaml"])
    assert (bare.vision, bare.output_dir) == (f"{hub}/vision", f"runs/{hub.name}")
    with pytest.raises(FileNotFoundError, match="absent: .*iclip-vit-b16"):
        parse_settings(["--config", "absent"])


def test_settings_of_the_command_line_precede_those_of_the_file_and_these_the_defaults(hub, tmp_path):
    options = ["pooling=max", "projection_dim=8"]
    settings = parse_settings(["--config", str(hub), "--epochs", "7", "--model_options", *options])
    assert (settings.epochs, settings.batch_size, settings.weight_decay) == (7, 16, 0.05)
    assert settings.data == [f"{hub}/pairs.tar"] and settings.model_options == options
    further = parse_settings(["--config", str(hub), "--model", "m"])  # instead of the towers of the file
    assert (further.model, further.vision, further.text) == ("m", "", "")
    with pytest.raises(ValueError, match="image_size"):  # the model has its own
        parse_settings(["--config", str(hub), "--model", "m", "--image_size", "9"])
    assert parse_settings(["--config", str(hub), "--vision", "v"]).vision == "v"
    given = {"config": str(hub), "eval_dataset": "folder"}
    assert read_settings(given).best_metric == "mMIoU"
    assert read_settings({**given, "validation_data": ["v"]}).best_metric == settings.best_metric == "text_to_image"
    (tmp_path / "train.yaml").write_text(
        "vision: v\ntext: t\ndata: [d]\nepochs: 3\nnouns:\neval_root: ~\nimage_size: 32\n"
    )
    blank = parse_settings(["--config", str(tmp_path)])
    assert (blank.nouns, blank.eval_root, blank.epochs, blank.image_size) == ("", "", 3, 32)
    assert parse_settings(["--config", str(tmp_path), "--model", "m"]).image_size == 0  # of the towers


@pytest.mark.parametrize("tracker", ["tensorbord", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(hub, tmp_path, monkeypatch, tracker):
    """Accelerate would train without it."""
    monkeypatch.setattr("iclip_hf.training.train.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(ValueError, match=f"report_to: '{tracker}' .*tensorboard"):
        run(hub, tmp_path / "run", "--report_to", tracker)
    assert not (tmp_path / "run").exists()


def test_a_model_in_parts_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType("FSDP"))
    with pytest.raises(ValueError, match="FSDP"):
        run(hub, tmp_path / "run")


def test_model_options_reach_the_model(hub, tmp_path):
    options = ["pooling=average", "dual_projection=false", "logit_scale_init_value=2"]
    run(hub, tmp_path, "--max_steps", 1, "--model_options", *options)
    config = ICLIPModel.from_pretrained(tmp_path).config
    assert (config.pooling, config.dual_projection, config.logit_scale_init_value) == ("average", False, 2)
    with pytest.raises(ValueError, match="model_options: 'sharpness'"):
        run(hub, tmp_path / "other", "--model_options", "sharpness=3")


@pytest.mark.parametrize("option", ["map_attention=foo", "recognition_share=5", "projection_dim=7"])
def test_a_wrong_option_of_a_model_to_train_further(world, hub, tmp_path, option):
    """Also one that is only wrong by its range, before the first step."""
    model = world.folder / "model"
    with pytest.raises(ValueError, match="configuration says" if "dim" in option else option.split("=")[0]) as raised:
        run(hub, tmp_path / "run", "--model", model, "--model_options", option)
    assert str(raised.value).endswith("correct model_options.") and not (tmp_path / "run").exists()


def test_bad_steps_are_skipped_counted_and_stop_the_run(hub, tmp_path, monkeypatch):
    forward, broken = PairModel.forward, {3}
    calls = []

    def sometimes_broken(self, **batch):
        outputs = forward(self, **batch)
        calls.append(1)
        factor = float("nan") if len(calls) in broken else 1.0
        return {**outputs, "loss": outputs["loss"] * factor, "branch_losses": outputs["branch_losses"] * factor}

    monkeypatch.setattr(PairModel, "forward", sometimes_broken)
    run(hub, tmp_path / "skips")
    state = json.loads((tmp_path / "skips" / "results.json").read_text())
    assert (state["step"], state["bad_steps"], state["bad_in_a_row"]) == (12, 1, 0)
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "skips").values())
    calls.clear()
    broken.update(range(7, 20))
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="last 4 steps, up to step 10: lower"):
        patch.setattr(program, "MAX_BAD_STEPS", 4)
        run(hub, tmp_path / "stops")
    broken.update(range(20))
    calls.clear()
    with pytest.raises(FloatingPointError, match="last 3 steps, up to step 3"):  # all of a short run
        run(hub, tmp_path / "short", "--max_steps", 3)


def test_weights_that_are_not_finite_are_neither_kept_nor_exported(hub, tmp_path, monkeypatch):
    def spoil(self):
        self.model.recognition.logit_scale.data.fill_(float("nan"))

    monkeypatch.setattr(PairModel, "clamp_logit_scales", spoil)
    with pytest.raises(FloatingPointError, match="recognition.logit_scale are not finite"):
        run(hub, tmp_path, "--max_steps", 2)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.glob("checkpoint-*"))


def test_a_run_is_resumed_in_its_precision(hub, tmp_path, monkeypatch):
    """Also in that of `accelerate launch --mixed_precision`, which is no setting."""
    with monkeypatch.context() as launched:
        launched.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        run(hub, tmp_path, "--max_steps", 1)
    with pytest.raises(ValueError, match="mixed_precision from bf16 to no"):
        run(hub, tmp_path, "--max_steps", 1, "--resume")


class Spy(torch.optim.AdamW):
    """AdamW that keeps what it is told, and what came of it, step by step."""

    def __init__(self, groups, **options):
        super().__init__(groups, **options)
        Spy.runs.append(self)
        self.options, self.rates, self.norms = options, [], []

    def step(self, closure=None):
        self.rates.append({group["lr"] for group in self.param_groups})
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return super().step(closure)


def test_the_optimizer_does_what_the_settings_say(hub, tmp_path, monkeypatch):
    """One epoch of warm-up; clipped gradients; decay of matrices alone; the same rates for any batch."""
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    Spy.runs = []
    arguments = ["--learning_rate", 0.05, "--warmup_learning_rate", 0.02, "--min_learning_rate", 0.01]
    run(hub, tmp_path / "run", "--clip_grad_norm", 0.01, "--weight_decay", 0.3, *arguments)
    (spy,) = Spy.runs
    warmup = [0.02 + 0.03 * step / 4 for step in range(4)]
    cosine = [0.01 + 0.04 * np.cos(np.pi * step / 24) ** 2 for step in range(4, 12)]
    assert all(len(rates) == 1 for rates in spy.rates)
    assert [rate for (rate,) in spy.rates] == pytest.approx(warmup + cosine)
    assert spy.norms == pytest.approx([0.01] * 12, rel=1e-3)
    assert [group["weight_decay"] for group in spy.param_groups] == [0.3, 0.0]
    run(hub, tmp_path / "larger", "--max_steps", 1, "--batch_size", 32, "--warmup_epochs", 0, *arguments)
    assert [rate for (rate,) in Spy.runs[1].rates] == pytest.approx([0.05])


# Text to image, which selects, and image to text: of the start, then of the evaluations
SCORES = [
    ([(2.0, 9.0), (1.0, 9.0), (3.0, 9.0), (2.0, 9.0)], 3.0),
    ([(2.0, 9.0), (1.0, 9.0), (2.0, 9.0), (0.0, 9.0)], 2.0),
    ([(2.0, 9.0), (5.0, 8.0), (3.0, 9.0), (4.0, 7.0)], 3.0),  # the others lose in the other metric
]


@pytest.mark.parametrize(("scores", "kept"), SCORES)
def test_the_folder_holds_the_start_until_a_model_is_better(hub, tmp_path, monkeypatch, capsys, scores, kept):
    start = tmp_path / "start"
    run(hub, start, "--max_steps", 1)
    seen = iter(scores)
    names = ("text_to_image", "image_to_text", "val_loss")
    monkeypatch.setattr(
        program,
        "validate",
        lambda *_: {name: torch.full((17,), score) for name, score in zip(names, (*next(seen), 1.0))},
    )
    arguments = ["--model", start, "--validation_data", hub / "held_out.tar", "--eval_steps", 4, "--pictures", 0]
    assert run(hub, tmp_path / "run", *arguments) == {
        "text_to_image": kept,
        "image_to_text": 9.0,
        "val_loss": 1.0,
    }
    before, after = weights(start), weights(tmp_path / "run")
    started = kept == scores[0][0]
    assert started == all(torch.equal(before[name], weight) for name, weight in after.items())
    last = torch.load(tmp_path / "run" / "checkpoint-0000012" / "training.pt")["weights"]  # which is not the best
    assert any(not torch.equal(after[name.removeprefix("model.")], weight) for name, weight in last.items())
    assert started == ("holds the model that you started from" in capsys.readouterr().out)
    card = json.loads((tmp_path / "run" / "model_card.json").read_text())["training"]
    assert ("model" in card) != started  # the training of the start


def test_each_epoch_has_an_order_of_its_own():
    sampler = GlobalBatches(100, 10, seed=3)
    orders = []
    for sampler.epoch in range(3):
        orders.append([index for batch in sampler for index in batch])
    assert orders[0] != orders[1] != orders[2] != orders[0] and sorted(orders[0]) == list(range(100))
    assert [index for batch in GlobalBatches(100, 10, seed=4) for index in batch] != orders[0]


def test_features_stay_cached(hub, tmp_path):
    cache = ["--cache_features", tmp_path / "cache"]
    run(hub, tmp_path / "cached", "--max_steps", 2, *cache)
    with pytest.raises(ValueError, match="cache_features from .*/cache to "):
        run(hub, tmp_path / "cached", "--max_steps", 2, "--resume")
    (tmp_path / "cache").rename(tmp_path / "moved")
    run(hub, tmp_path / "cached", "--max_steps", 2, "--resume", "--cache_features", tmp_path / "moved")
    with pytest.raises(ValueError, match="cache_features"):
        run(hub, tmp_path / "learning", *cache, "--model_options", "lock_vision=false")


def test_a_batch_too_large_is_refused_before_features_are_computed(hub, tmp_path):
    with pytest.raises(ValueError, match="fewer than a batch of 10000"):
        run(hub, tmp_path / "run", "--batch_size", 10000, "--cache_features", tmp_path / "cache")
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_ends_without_a_finite_loss_fails(hub, tmp_path, capsys, steps):
    """Its last step, or the model that it would export."""
    with pytest.raises(FloatingPointError, match=f"at the last step, {steps}: lower learning_rate"):
        run(hub, tmp_path, "--max_steps", steps, "--learning_rate", 1e30, "--warmup_epochs", 0)
    assert not list(tmp_path.glob("*.safetensors")) and "Training with 1 process on cpu" in capsys.readouterr().out


def test_the_logged_loss_is_the_trained_one(hub, tmp_path, monkeypatch):
    """With that of the weights of the attention, which is no branch's."""
    (tmp_path / "nouns.txt").write_text("dog\nball\nsky (background)\ngrass (background)")
    rows, trained, step = [], [], program.step
    monkeypatch.setattr(Accelerator, "log", lambda self, row, step: rows.append(row))
    monkeypatch.setattr(program, "step", lambda *args: trained.append(args[3].item()) or step(*args))
    options = ["--model_options", "max_over=similarity", "map_attention=signed", "--nouns", tmp_path / "nouns.txt"]
    run(hub, tmp_path / "run", *options, "--max_steps", 2, "--log_steps", 1, "--eval_steps", 9)
    assert [row["loss"] for row in rows if row] == pytest.approx(trained) and len(trained) == 2
    assert all(row["loss"] > (row["recognition_loss"] + row["map_loss"]) / 2 + 0.01 for row in rows if row)


def test_a_run_whose_last_gradient_is_not_finite_fails(hub, tmp_path, monkeypatch):
    """Its loss is finite, but the last step changed nothing."""
    norms = iter([1.0, float("nan")])
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda self, *args: torch.tensor(next(norms)))
    with pytest.raises(FloatingPointError, match="at the last step, 2: lower learning_rate"):
        run(hub, tmp_path, "--max_steps", 2)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_run_whose_last_step_changed_nothing_fails(hub, tmp_path, monkeypatch):
    """Also if the losses of the model that it would export are finite."""
    forward, calls = PairModel.forward, []

    def broken_at_the_end(self, **batch):
        outputs = forward(self, **batch)
        calls.append(self.training)
        return outputs | ({"branch_losses": outputs["branch_losses"] * float("nan")} if calls == [True, True] else {})

    monkeypatch.setattr(PairModel, "forward", broken_at_the_end)
    with pytest.raises(FloatingPointError, match="at the last step, 2: lower learning_rate"):
        run(hub, tmp_path, "--max_steps", 2)
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_evaluation_without_a_finite_loss_ends_the_run(hub, tmp_path):
    """Otherwise it would stay the best one."""
    options = ["--max_steps", 4, "--eval_steps", 1, "--learning_rate", 1e30, "--warmup_epochs", 0]
    with pytest.raises(FloatingPointError, match="held-out pairs is not finite at step 1: lower learning_rate"):
        run(hub, tmp_path, *options, "--validation_data", hub / "held_out.tar")
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("cached", [False, True])
def test_a_broken_held_out_image_is_left_out(hub, tmp_path, caplog, cached):
    """Another pair in its place would be scored as its duplicate."""
    table = write_table(tmp_path / "held_out", 12)
    header, *rows = table.read_text().splitlines()
    others = tmp_path / "held_out" / "others.csv"
    others.write_text("\n".join([header, *rows[:3], *rows[4:]]))
    (tmp_path / "held_out" / "3.png").write_bytes(b"no image")
    options = ["--max_steps", 1, "--max_bad_share", 0.1, "--pictures", 0]
    options += ["--cache_features", tmp_path / "cache"] if cached else []
    metrics = run(hub, tmp_path / "run", *options, "--validation_data", table)
    assert metrics == run(hub, tmp_path / "other", *options, "--validation_data", others)
    assert "3.png" in caplog.text
    with pytest.raises(ValueError, match="1 of the 12 pairs .* max_bad_share"):
        run(hub, tmp_path / "strict", "--max_steps", 1, "--validation_data", table)


def test_a_logit_bias_that_nothing_would_train_is_refused(tmp_path):
    """The recipe of the embedded model without its nouns: the presence of the trained model would have no meaning."""
    with pytest.raises(ValueError, match="logit_bias_init_value"):
        program.build_model(
            parse_settings(["--config", "iclip-dinov2-s14-minilm", "--nouns", "", "--data", str(tmp_path)])
        )
