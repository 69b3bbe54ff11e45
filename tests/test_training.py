"""Runs of `iclip train` on tiny random towers."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import save, tiny_inputs, tiny_model, write_folder
from fault_inputs import index_mask, masks_folder
from huggingface_hub import ModelCard
from training_runs import evaluations, run, weights, write_table

from iclip_hf import ICLIPModel, ICLIPProcessor
from iclip_hf.data.pairs import load_pairs
from iclip_hf.model.losses import contrastive_loss
from iclip_hf.training import ICLIPTrainer, ICLIPTrainingArguments
from iclip_hf.training import trainer as module
from iclip_hf.training.kept_presence import KeptPresence


def test_a_run_ends_with_a_model_that_loads(hub, tmp_path):
    trainer = run(hub, tmp_path, "--validation_data", hub / "held_out.tar", "--pictures", 2, "--eval_steps", 12)
    metrics = evaluations(trainer)[12]
    model, processor = ICLIPModel.from_pretrained(tmp_path), ICLIPProcessor.from_pretrained(tmp_path)
    pairs = load_pairs(str(hub / "held_out.tar"), seed=trainer.args.seed)
    with torch.no_grad():
        images = processor(images=[pairs[i]["image"] for i in range(17)])
        outputs = model(**images, **processor(text=[pairs[i]["caption"] for i in range(17)]), return_loss=True)
    own = torch.arange(17)
    loss = contrastive_loss(outputs.logits_per_image, outputs.logits_per_text, 0)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert metrics["image_to_text"] == pytest.approx(100 * (outputs.logits_per_image.argmax(1) == own).float().mean())
    assert metrics["text_to_image"] == pytest.approx(100 * (outputs.logits_per_text.argmax(1) == own).float().mean())

    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.lstrip().startswith(f"# {tmp_path.name}") and "partial" not in card.text
    training = json.loads((tmp_path / "model_card.json").read_text())["training"]
    assert training["num_train_epochs"] == 3 and training["data"] == ["pairs.tar"]
    assert str(hub) not in card.content and "use_cache" not in json.loads((tmp_path / "config.json").read_text())

    before, after = weights(hub / "vision"), weights(tmp_path)
    assert all(torch.equal(after[f"vision_model.{name}"], weight) for name, weight in before.items())
    text = weights(hub / "text")
    assert not torch.equal(
        after["text_model.embeddings.word_embeddings.weight"], text["embeddings.word_embeddings.weight"]
    )
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1 and not list(tmp_path.rglob("*.partial"))
    checkpoint = ICLIPModel.from_pretrained(tmp_path / "checkpoint-12")  # a model too
    assert torch.equal(checkpoint.recognition.visual_projection.weight, model.recognition.visual_projection.weight)


def test_a_model_in_half_precision_is_trained_in_single_precision(hub, tmp_path, tiny_processor):
    half = tiny_model().bfloat16()
    save(tmp_path / "half", half, tiny_processor)
    run(hub, tmp_path / "run", "--model", tmp_path / "half", "--max_steps", 1, "--learning_rate", 1e-6)
    before, after = half.recognition.visual_projection.weight, weights(tmp_path / "run")
    after = after["recognition.visual_projection.weight"]
    assert after.dtype == torch.float32
    assert 0 < (after - before.float()).abs().max() < 1e-4  # less than the distance of two values in half precision


def test_model_options_reach_the_model(hub, tmp_path):
    options = ["pooling=average", "dual_projection=false", "logit_scale_init_value=2"]
    run(hub, tmp_path, "--max_steps", 1, "--model_options", *options)
    config = ICLIPModel.from_pretrained(tmp_path).config
    assert (config.pooling, config.dual_projection, config.logit_scale_init_value) == ("average", False, 2)
    with pytest.raises(ValueError, match="model_options: 'sharpness'"):
        run(hub, tmp_path / "other", "--model_options", "sharpness=3")


class Spy(torch.optim.AdamW):
    """AdamW that keeps what it is told, and what came of it, step by step."""

    def __init__(self, groups, **options):
        super().__init__(groups, **{**options, "fused": False})
        Spy.runs.append(self)
        self.rates, self.norms = [], []

    def step(self, closure=None):
        self.rates.append({group["lr"] for group in self.param_groups})
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return super().step(closure)


def test_the_optimizer_does_what_the_arguments_say(hub, tmp_path, monkeypatch):
    """One epoch of warm-up; clipped gradients; decay of matrices alone; the same rates for any batch."""
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    Spy.runs = []
    arguments = ["--learning_rate", 0.05, "--warmup_learning_rate", 0.02, "--min_learning_rate", 0.01]
    run(hub, tmp_path / "run", "--max_grad_norm", 0.01, "--weight_decay", 0.3, *arguments)
    (spy,) = Spy.runs
    warmup = [0.02 + 0.03 * step / 4 for step in range(4)]
    cosine = [0.01 + 0.04 * np.cos(np.pi * step / 24) ** 2 for step in range(4, 12)]
    assert all(len(rates) == 1 for rates in spy.rates)
    assert [rate for (rate,) in spy.rates] == pytest.approx(warmup + cosine)
    assert spy.norms == pytest.approx([0.01] * 12, rel=1e-3)
    assert [group["weight_decay"] for group in spy.param_groups] == [0.3, 0.0]
    matrices, vectors = (group["params"] for group in spy.param_groups)
    assert all(p.ndim > 1 for p in matrices) and all(p.ndim <= 1 for p in vectors) and vectors
    larger = ["--max_steps", 1, "--per_device_train_batch_size", 32, "--warmup_steps", 0]
    run(hub, tmp_path / "larger", *larger, *arguments)
    assert [rate for (rate,) in Spy.runs[1].rates] == pytest.approx([0.05])
    other = run(
        hub, tmp_path / "linear", "--max_steps", 2, "--lr_scheduler_type", "linear", "--warmup_steps", 0, *arguments
    )
    assert [rate for (rate,) in Spy.runs[2].rates] == pytest.approx([0.05, 0.025]) and other.state.global_step == 2


def test_a_scale_stays_below_its_limit_and_can_come_back(hub, tmp_path, monkeypatch):
    """At 100, the clamp in the model has no gradient any more. The model of the run starts there."""
    options = ["--max_steps", 2, "--model_options", f"logit_scale_init_value={math.log(100)}"]
    model = run(hub, tmp_path, *options, "--learning_rate", 1e-9).model
    model.zero_grad()
    model(**tiny_inputs(4, 4), return_loss=True).loss.backward()
    for branch in (model.recognition, model.interpretability):
        assert branch.logit_scale.exp().item() == pytest.approx(100, abs=1e-3) and branch.logit_scale.grad != 0


# Text to image, which selects, and image to text: of the start, then of the evaluations
SCORES = [
    ([(2.0, 9.0), (1.0, 9.0), (3.0, 9.0), (2.0, 9.0)], 8),
    ([(2.0, 9.0), (1.0, 9.0), (2.0, 9.0), (0.0, 9.0)], None),
    ([(2.0, 9.0), (5.0, 8.0), (3.0, 9.0), (4.0, 7.0)], 8),  # the others lose in the other metric
]


@pytest.mark.parametrize(("scores", "kept"), SCORES)
def test_the_folder_holds_the_best_model_or_the_start(hub, tmp_path, monkeypatch, capsys, scores, kept):
    start = tmp_path / "start"
    run(hub, start, "--max_steps", 1)
    seen, names = iter(scores), ("text_to_image", "image_to_text", "loss")

    def measured(*_):
        assert not list((tmp_path / "run").glob("*.safetensors"))  # an interrupted run leaves checkpoints alone
        return {name: torch.full((17,), score) for name, score in zip(names, (*next(seen), 1.0))}

    monkeypatch.setattr(module, "retrieval_metrics", measured)
    arguments = ["--model", start, "--validation_data", hub / "held_out.tar", "--eval_steps", 4, "--pictures", 0]
    trainer = run(hub, tmp_path / "run", *arguments)
    assert trainer.state.best_global_step == kept
    expected = start if kept is None else tmp_path / "run" / f"checkpoint-{kept}"
    before, after = weights(expected), weights(tmp_path / "run")
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    assert (kept is None) == ("holds the model that you started from" in capsys.readouterr().out)
    card = json.loads((tmp_path / "run" / "model_card.json").read_text())["training"]
    assert ("model" in card) == (kept is not None)  # else the training of the start


def broken(monkeypatch, steps):
    """Losses that are not finite at these steps, counted from one."""
    forward, calls = ICLIPModel.forward, []

    def sometimes_broken(self, *args, **options):
        outputs = forward(self, *args, **options)
        if options.get("return_loss") and self.training:
            calls.append(1)
            if len(calls) in steps:
                outputs["loss"] = outputs["loss"] * float("nan")
        return outputs

    monkeypatch.setattr(ICLIPModel, "forward", sometimes_broken)


def test_bad_steps_are_skipped_and_stop_the_run(hub, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        broken(patch, {3, 5, 7})  # not in a row
        patch.setattr(module, "MAX_BAD_STEPS", 2)
        run(hub, tmp_path / "skips", "--max_grad_norm", 0)  # not clipped
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "skips").values())
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="finite in the last 3 steps"):
        broken(patch, range(1, 20))
        run(hub, tmp_path / "short", "--max_steps", 3)  # which is fewer than make a run stop
    broken(monkeypatch, range(2, 20))
    monkeypatch.setattr(module, "MAX_BAD_STEPS", 4)
    with pytest.raises(FloatingPointError, match="finite in the last 4 steps: lower learning_rate"):
        run(hub, tmp_path / "stops")
    assert not list((tmp_path / "stops").glob("*.safetensors"))


def test_an_evaluation_without_a_finite_loss_ends_the_run(hub, tmp_path):
    """Otherwise it would stay the best one."""
    options = ["--max_steps", 4, "--eval_steps", 1, "--learning_rate", 1e30, "--warmup_steps", 0]
    with pytest.raises(FloatingPointError, match="held-out pairs is not finite: lower learning_rate"):
        run(hub, tmp_path, *options, "--validation_data", hub / "held_out.tar", "--pictures", 0)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_logged_loss_is_the_trained_one(hub, tmp_path):
    """With that of the weights of the attention, which is no branch's."""
    (tmp_path / "nouns.txt").write_text("dog\nball\nsky (background)\ngrass (background)")
    options = ["--model_options", "max_over=similarity", "map_attention=signed", "--nouns", tmp_path / "nouns.txt"]
    trainer = run(hub, tmp_path / "run", *options, "--max_steps", 2, "--logging_steps", 1)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2 and all(row["loss"] > (row["recognition_loss"] + row["map_loss"]) / 2 + 0.01 for row in rows)
    assert all(row["logit_scale"] == pytest.approx(1 / 0.07, rel=0.01) for row in rows)


def test_the_loss_has_its_share_of_kept_presence(tiny_processor, tmp_path, monkeypatch):
    """The divergence is that from the start; the loss of captions does not depend on the bias."""
    model = tiny_model(logit_bias_init_value=-2)
    model.text_model.requires_grad_(False)
    args = ICLIPTrainingArguments(str(tmp_path), keep_presence=3.0, report_to="none")
    trainer = ICLIPTrainer(model, args, processing_class=tiny_processor)
    batch = tiny_inputs(4, 4) | {"return_loss": True}
    alone = trainer.compute_loss(model.eval(), {**batch})
    trainer.start.presence_loss = KeptPresence(model.recognition, torch.randn(5, model.config.text_config.hidden_size))
    with torch.no_grad():
        model.recognition.logit_bias.add_(1)
        features = model.image_inputs(model.encode_image(batch["pixel_values"])).pooled
        divergence = trainer.start.presence_loss(model.recognition, features)
    share = trainer.compute_loss(model, {**batch}) - alone
    assert share.item() == pytest.approx(3 * divergence.item(), rel=1e-4) != 0


@pytest.mark.parametrize("cached", [False, True])
def test_a_broken_held_out_image_is_left_out(hub, tmp_path, caplog, cached):
    """Another pair in its place would be scored as its duplicate."""
    table = write_table(tmp_path / "held_out", 12)
    header, *rows = table.read_text().splitlines()
    others = tmp_path / "held_out" / "others.csv"
    others.write_text("\n".join([header, *rows[:3], *rows[4:]]))
    (tmp_path / "held_out" / "3.png").write_bytes(b"no image")
    options = ["--max_steps", 1, "--pictures", 0]
    options += ["--cache_features", tmp_path / "cache"] if cached else []
    one, other = (
        evaluations(run(hub, tmp_path / held_out.stem, *options, "--validation_data", held_out))
        for held_out in (table, others)
    )
    assert one[1] == pytest.approx(other[1], rel=1e-4) and "3.png" in caplog.text
    for number in range(12):
        (tmp_path / "held_out" / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="eval_dataset: it has no pairs"):
        run(hub, tmp_path / "all", "--max_steps", 1, "--validation_data", table)


def test_what_cannot_be_trained_is_refused(hub, tmp_path):
    with pytest.raises(ValueError, match="logit_bias_init_value"):  # a presence without a meaning
        run(hub, tmp_path / "run", "--model_options", "logit_bias_init_value=-6")
    with pytest.raises(ValueError, match="an epoch has 64 pairs, fewer than a batch of 65"):
        run(hub, tmp_path / "run", "--per_device_train_batch_size", 65)
    with pytest.raises(ValueError, match="cache_features"):
        run(hub, tmp_path / "run", "--cache_features", tmp_path, "--model_options", "lock_vision=false")


def test_maps_are_measured_too(hub, tmp_path, tiny_processor):
    """The card has the results of the model that is saved."""
    (tmp_path / "masks").mkdir()
    root = write_folder(tmp_path / "masks", [[0, 1, 2]] * 2, 40)
    options = ["--eval_dataset", "folder", "--eval_root", root, "--max_steps", 4, "--eval_steps", 2]
    trainer = run(hub, tmp_path / "run", *options)
    metrics = evaluations(trainer)
    assert {2, 4} == metrics.keys() and {"mAP", "mMIoU", "mFMB", "text_contrast"} <= metrics[2].keys()
    shown = json.loads((tmp_path / "run" / "model_card.json").read_text())["evaluation"]["results"]["itsm"]
    assert shown["mMIoU"]["mmiou"] == metrics[trainer.state.best_global_step]["mMIoU"]
    save(tmp_path / "start", tiny_model(), tiny_processor)  # whose card has no results
    again = run(hub, tmp_path / "again", *options, "--model", tmp_path / "start", "--learning_rate", 1e-12)
    shown = json.loads((tmp_path / "again" / "model_card.json").read_text())["evaluation"]["results"]["itsm"]
    assert again.kept_start and shown["mMIoU"]["mmiou"] == evaluations(again)[0]["mMIoU"]


def test_masks_without_a_class_end_the_training_before_its_first_step(hub, tmp_path):
    """Such as binary masks, whose 255 is void."""
    (tmp_path / "masks").mkdir()
    masks = masks_folder(tmp_path / "masks", mask=index_mask(np.full((24, 30), 255, np.uint8)))
    options = ["--eval_dataset", "folder", "--eval_root", masks, "--max_steps", 4, "--eval_steps", 2]
    with pytest.raises(ValueError, match="None of the 1 images shows a class"):
        run(hub, tmp_path / "run", *options, "--validation_share", 0.5, "--metric_for_best_model", "loss")
    assert not (tmp_path / "run").exists()
