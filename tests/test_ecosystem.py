"""The model in the hands of Accelerate, Trainer and torch's parallelism: hooks, gathering, sharding."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import cpu_offload, infer_auto_device_map
from accelerate.utils import pad_across_processes
from conftest import FEATURES, TEXT, VISION, noise, save, tiny_inputs, tiny_model
from processes import run_script
from training_runs import outputs_of, write_table
from transformers import Trainer, TrainingArguments, default_data_collator

from iclip_hf import ICLIPModel, embedded_model, explain
from iclip_hf.data.nouns import NounPrompts
from iclip_hf.data.pairs import load_pairs
from iclip_hf.training import CachedPairs, ICLIPTrainer, PairCollator


@pytest.mark.parametrize(("vision", "features"), [*((vision, {}) for vision in VISION), ("vit", FEATURES)])
def test_offloaded_weights_give_the_same(vision, features):
    """The hooks copy what passes, and load a module's parameters only before its forward."""
    inputs, layers = tiny_inputs(batch=3, size=(32, 48)), {"recognition_pooling": "class_and_average", **features}
    expected, offloaded = (tiny_model(vision, "clip_text_model", **layers) for _ in range(2))
    cpu_offload(offloaded, torch.device("cpu"), preload_module_classes=sorted(expected._no_split_modules))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    with torch.no_grad():
        for option, name in (("output_similarity_maps", "similarity_maps"), ("return_loss", "loss")):
            found, of_whole = (model(**inputs, **{option: True})[name] for model in (offloaded, expected))
            torch.testing.assert_close(found, of_whole)


def test_a_device_map_splits_no_projection():
    """
    It adds the outputs of two layers, which must be on one device, wherever the memory of the first one ends. A
    feature tower is not split either.
    """
    hidden = {"image_hidden_size": 64, "text_hidden_size": 64, "recognition_pooling": "class_and_average"}
    for model, step in ((tiny_model(**hidden), 2000), (tiny_model(**hidden, **FEATURES), 50_000)):
        for limit in range(0, sum(4 * weight.numel() for weight in model.parameters()), step):
            devices = infer_auto_device_map(model, {"cpu": limit, "disk": 10**9}, model._no_split_modules)
            assert not [name for name in devices if "_projection." in name or "feature_model." in name]


def test_outputs_gather(tmp_path):
    model, inputs = tiny_model(), tiny_inputs(batch=3, size=(32, 48))
    with torch.no_grad():
        outputs = model(**inputs, output_similarity_maps=True)
    assert pad_across_processes(outputs).vision_model_output.grid == (4, 6)

    pairs = [{name: value[i] for name, value in inputs.items()} for i in range(3)]
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=3, report_to=[], use_cpu=True)
    trainer = Trainer(
        model, arguments, data_collator=lambda batch: {**default_data_collator(batch), "output_similarity_maps": True}
    )
    predicted = dict(zip(list(outputs), trainer.predict(pairs).predictions))
    for name in ("logits_per_image", "similarity_maps"):
        np.testing.assert_allclose(predicted[name], outputs[name], atol=1e-5)


@pytest.mark.parametrize("vision", VISION)
def test_trainer_resumes_with_the_weights_of_its_checkpoint(vision, tmp_path):
    """It loads a file, where weights have other names than in the model."""
    inputs = tiny_inputs(batch=4, texts=4)
    pairs = [{name: value[i] for name, value in inputs.items()} for i in range(4)]
    options = {"num_train_epochs": 1, "save_strategy": "epoch", "learning_rate": 0.01}
    arguments = TrainingArguments(tmp_path, **options, report_to=[], use_cpu=True)

    def collate(rows):
        return default_data_collator(rows) | {"return_loss": True}

    trained, resumed = (tiny_model(vision, "clip_text_model", seed=seed, lock_vision=False) for seed in range(2))
    Trainer(trained, arguments, collate, train_dataset=pairs).train()
    Trainer(resumed, arguments, collate, train_dataset=pairs).train(resume_from_checkpoint=True)
    torch.testing.assert_close(dict(resumed.state_dict()), dict(trained.state_dict()))


NOUNS = ["dog", "cat", "red ball", "grass (background) (below)", "sky (background) (above)"]
KNOWN = {"labels": ["dog", "grass"], "complete": ["dog", "cat", "grass", "sky"]}


def rows_of_pairs() -> list[dict]:
    """Two images whose labels are known, one with several captions, and two with a sentence alone."""
    captions = [{"captions": ["a dog", "a red dog"]}, {"caption": "grass"}]
    captions += [{"caption": "a red ball"}, {"text": "a car"}]
    known = [KNOWN, KNOWN, {}, {}]
    return [{"image": noise((40, 36), seed=i)} | captions[i] | known[i] for i in range(4)]


@pytest.mark.parametrize("nouns", [None, NounPrompts(NOUNS)], ids=["captions", "nouns"])
def test_the_model_has_the_loss_of_iclip_train_for_rows_of_a_trainer(tiny_processor, nouns):
    options = {"max_over": "similarity", "map_attention": "signed", "logit_bias_init_value": -2.0}
    model = tiny_model(**options, noun_competition=0.5, known_competition=0.7)
    batch = PairCollator(tiny_processor, nouns)(rows_of_pairs())
    assert batch.pop("return_loss") is True and len(batch["pixel_values"]) == 4
    assert len(batch["input_ids"]) == (4 if nouns is None else 4 + 3 * 4)
    if nouns is not None:
        assert batch["nouns"]["noun_labels"].tolist() == [[1, -1, 0, 1, -1]] * 2 + [[0, 0, 1, 0, 0], [0] * 5]
    with torch.no_grad():
        loss, expected = model(**batch, return_loss=True).loss, outputs_of(model, batch)["loss"]
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    if nouns is not None:  # which have a part in it
        captions = {name: batch[name][:4] for name in ("pixel_values", "input_ids", "attention_mask")}
        assert (model(**captions, return_loss=True).loss - loss).abs() > 1e-3


def test_rows_sample_captions_and_prompts_anew_for_each_batch(tiny_processor):
    torch.manual_seed(0)
    collator, rows = PairCollator(tiny_processor, NounPrompts(NOUNS)), rows_of_pairs()[:1]
    batches = [collator(rows)["input_ids"].tolist() for _ in range(16)]
    torch.manual_seed(0)
    assert [collator(rows)["input_ids"].tolist() for _ in range(16)] == batches
    assert len({str(texts[0][:4]) for texts in batches}) == 2 and len({str(texts) for texts in batches}) > 8
    with pytest.raises(ValueError, match="title"):
        collator([*rows, {"image": rows[0]["image"], "title": " "}])


def recipe_of_the_guide(monkeypatch, folder: Path) -> ICLIPTrainer:
    """Runs the lines of the guide in a folder with `pairs.csv`."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ICLIP_CACHE", str(folder / "cache"))
    guide = (Path(__file__).parents[1] / "docs" / "guide" / "train.md").read_text(encoding="utf-8")
    (recipe,) = re.findall("^```py\n(.*?PairCollator.*?)^```", guide, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(recipe, names)
    return names["trainer"]


def test_the_recipe_of_the_guide_trains(tiny_processor, tmp_path, monkeypatch):
    model = tiny_model(max_over="similarity", logit_bias_init_value=-1)
    save(tmp_path / "start", model, tiny_processor)
    monkeypatch.setattr("iclip_hf.embedded_model", lambda: "start")
    monkeypatch.setattr("iclip_hf.training.arguments.FEW_PAIRS_STEPS", 20)
    monkeypatch.setattr("iclip_hf.training.arguments.FEW_PAIRS_RATE", 1e-2)
    write_table(tmp_path, 20)
    trainer = recipe_of_the_guide(monkeypatch, tmp_path)
    assert trainer.state.global_step == 20 and (Path("runs/trainer") / "README.md").is_file()
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [0, 4, 8, 12, 16, 20]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
def test_the_recipe_of_the_guide_learns_from_sixty_photographs(iclip_data, tmp_path, monkeypatch):
    """On photographs that the embedded model did not learn from."""
    pairs = load_pairs(iclip_data / "flickr8k" / "dev-00000.tar")
    for name, numbers in {"pairs.csv": range(60), "others.csv": range(60, 100)}.items():
        for number in numbers:
            (tmp_path / f"{number}.jpg").write_bytes(pairs.raw(number).image)
        rows = [(f"{number}.jpg", pairs.captions(number)[0]) for number in numbers]
        pd.DataFrame(rows, columns=["image", "caption"]).to_csv(tmp_path / name, index=False)
    trainer = recipe_of_the_guide(monkeypatch, tmp_path)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert trainer.state.global_step == 200 and losses[-1] < losses[0] - 0.5
    # The loss of forty others falls too. Six held-out photographs alone do not show it.
    collator = trainer.data_collator
    others, losses = CachedPairs(load_pairs("others.csv"), collator.text_features, collator), []
    for folder in (embedded_model(), "runs/trainer/checkpoint-200"):
        trainer.model.load_state_dict(ICLIPModel.from_pretrained(folder).state_dict())
        losses.append(trainer.evaluate(others)["eval_loss"])
    assert losses[1] < losses[0] - 0.005


SHARDED = """
import torch
from iclip_hf.utils.distributed import partial_state

torch.set_num_threads(1)
state = partial_state("train")
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from conftest import tiny_inputs, tiny_model

def shard(model, kind):
    if kind == "FSDP2":
        for block in (*model.vision_model.modules(), *model.text_model.modules()):
            if type(block).__name__ in model._no_split_modules:
                fully_shard(block)
        return fully_shard(model)
    casts = MixedPrecision(cast_forward_inputs=True, cast_root_forward_inputs=True)
    return FullyShardedDataParallel(model, use_orig_params=True, mixed_precision=casts, device_id=torch.device("cpu"))

def losses(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        loss = model(**tiny_inputs(batch=4, texts=4), return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()

for lock in (True, False):
    whole, *sharded = [tiny_model("dinov2", lock_vision=lock) for _ in range(3)]
    expected = torch.tensor([*losses(whole)])
    for model, kind in zip(sharded, ("FSDP2", "FSDP")):
        torch.testing.assert_close(torch.tensor([*losses(shard(model, kind))]), expected)
    print(lock)
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_parameters():
    """FSDP in both its versions, which shard no scalars: the same losses as of the whole model."""
    for done in run_script(SHARDED, processes=2):
        assert (done.returncode, done.stdout) == (0, "True\nFalse\n"), done.stderr


SIMILARITY = {"max_over": "similarity", "map_attention": "signed", "map_affinity": 5.0}


@pytest.mark.parametrize("options", [{}, SIMILARITY], ids=["paper", "similarity"])
@pytest.mark.parametrize(("vision", "text"), [*zip(VISION, itertools.cycle(TEXT))])
def test_every_trained_parameter_gets_a_gradient_under_checkpointing(vision, text, options):
    """DDP waits for those of all."""
    model = tiny_model(vision, text, lock_vision=False, **options).train()
    model.gradient_checkpointing_enable()
    model(**tiny_inputs(batch=3, texts=3), return_loss=True).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.slow
def test_the_guide_explains_a_dataset_in_two_processes(world, tmp_path):
    guide = (Path(__file__).parents[1] / "docs" / "guide" / "tools.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```py\n(.*?)```", guide, re.DOTALL) if "with_rank" in block)
    for written, here in (("torch.cuda.device_count(),", "2,"), ('"embedded"', repr(str(world.folder / "model")))):
        assert written in code
        code = code.replace(written, here)
    (tmp_path / "script.py").write_text(code)
    photos = [tmp_path / "photos" / f"{number}.jpg" for number in range(5)]
    photos[0].parent.mkdir()
    photos[0].write_text("no image")
    for number, photo in enumerate(photos[1:]):
        noise((60, 40 + number), seed=number).save(photo)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "num_proc=2" in done.stderr, done.stderr
    rows = pd.read_parquet(tmp_path / "regions.parquet").to_dict("records")
    assert [row["image"] for row in rows] == [f"photos/{photo.name}" for photo in photos]
    assert rows[0]["presence"] is None and len(rows[0]["boxes"]) == 0
    for photo, row in zip(photos[1:], rows[1:], strict=True):
        expected = explain((world.model, world.processor), photo, ["dog", "red ball"])
        np.testing.assert_allclose(row["presence"], expected.presence, atol=1e-5)
        regions = [(label, region) for label in expected.labels for region in expected.regions(label)]
        assert [*row["labels"]] == [label for label, _ in regions] and len(regions) > 0
        assert [[*box] for box in row["boxes"]] == [[*region.box] for _, region in regions]
        np.testing.assert_allclose(row["scores"], [region.mean for _, region in regions], atol=1e-4)
