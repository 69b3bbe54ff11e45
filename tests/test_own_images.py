"""`iclip train DATA`: what is checked and chosen before the training, and what a run says at its end."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import iclip, noise, tiny_model
from training_runs import write_table
from transformers import TrainerState

from iclip_hf import ICLIPModel
from iclip_hf.cli.train.arguments import resolve_arguments
from iclip_hf.cli.train.chosen_arguments import check_pairs, few_pairs_arguments
from iclip_hf.cli.train.data import open_pairs
from iclip_hf.cli.train.summary import summary
from iclip_hf.data.pairs import load_pairs
from iclip_hf.training import evaluation
from iclip_hf.training.arguments import FEW_PAIRS_STEPS, best_metric
from iclip_hf.training.evaluation import change_interval, plot_examples


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)


# ---------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize(
    "data, name",
    {
        "pets.v2.csv": "pets",
        "..": "photos",
        "../cc3m/{00..31}.tar": "cc3m",
        "../cc3m/train-*.tar": "cc3m",
        ".pairs.csv": "sub",
        "/": "pairs",
    }.items(),
)
def test_a_run_has_the_name_of_its_data(tmp_path, monkeypatch, data, name):
    """Or of their folder: one in `runs/` itself, or in `runs/*`, would go with others."""
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "photos" / "sub")
    pairs = open_pairs([str(write_table(tmp_path / "table", 4))], {})
    assert few_pairs_arguments({"data": [data]}, pairs)["output_dir"] == f"runs/{name}"


def chosen_for(given: dict) -> dict:
    return few_pairs_arguments(given, open_pairs(given["data"], given))


@pytest.mark.parametrize("count", [2, 19, 20, 21, 300])
def test_what_is_chosen_makes_a_run(tmp_path, count):
    data = [str(write_table(tmp_path, count))]
    chosen = chosen_for({"data": data})
    model, _, validation, training = resolve_arguments({"data": data, **chosen})
    held_out = -(-count // 10) if count >= 20 else 0  # rounded up
    assert training.learning_rate == 1e-5 > training.min_learning_rate
    batch = training.per_device_train_batch_size
    assert 1 <= batch <= count - held_out and training.max_steps == FEW_PAIRS_STEPS
    assert training.eval_steps == training.save_steps == FEW_PAIRS_STEPS / 5
    assert (model.model, training.output_dir, model.lock_text) == ("embedded", "runs/pairs", True)
    assert validation.validation_share == (0.1 if held_out else 0)
    assert training.eval_on_start == training.load_best_model_at_end == bool(held_out)


def test_what_is_given_takes_precedence_and_the_rest_follows(tmp_path, monkeypatch):
    given = {"data": [str(write_table(tmp_path, 40))], "num_train_epochs": 3, "per_device_train_batch_size": 8}
    assert given.keys().isdisjoint(chosen_for(given))
    monkeypatch.setenv("WORLD_SIZE", "8")
    of_eight = chosen_for({"data": given["data"]})  # of each process 35 // 8 pairs
    assert (of_eight["per_device_train_batch_size"], of_eight["max_steps"]) == (4, FEW_PAIRS_STEPS)


def test_a_share_of_right_answers_needs_enough_held_out_pairs(tmp_path):
    """A tenth of the pairs is fewer."""
    assert chosen_for({"data": [str(write_table(tmp_path, 100))]})["metric_for_best_model"] == "loss"
    assert (best_metric(99), best_metric(100)) == ("loss", "text_to_image")
    given = {"data": [str(write_table(tmp_path / "data", 300))]}
    for count, metric in ((99, "loss"), (100, "text_to_image")):
        given["validation_data"] = [str(write_table(tmp_path / f"held_out_{count}", count))]
        assert chosen_for(given)["metric_for_best_model"] == metric


def test_what_needs_locked_towers_is_not_chosen_for_towers_that_learn(tmp_path):
    given = {"data": [str(write_table(tmp_path, 4))]}
    tiny_model(lock_vision=False).save_pretrained(tmp_path / "unlocked")
    unlocked = {**given, "model": str(tmp_path / "unlocked")}
    of_locked = {"cache_features", "keep_presence"}
    assert of_locked.isdisjoint(chosen_for({**given, "model_options": ["lock_vision=false"]}))
    assert of_locked.isdisjoint(chosen_for(unlocked))
    assert of_locked <= chosen_for({**unlocked, "model_options": ["lock_vision=true"]}).keys()
    assert of_locked & chosen_for({**given, "lock_text": False}).keys() == {"cache_features"}


# -------------------------------------------------------------------------------------------------------------- checks


def said(arguments: list, capsys) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iclip_hf.training.trainer.ICLIPTrainer.train", lambda *_, **__: pytest.fail("it trained"))
        code = iclip("train", *arguments)
    message = capsys.readouterr().err
    assert code == 2 and message.count("\n") == 1, message
    return message


def test_bad_data_is_one_sentence(tmp_path, capsys):
    table = write_table(tmp_path, 30)
    for content, shown in (
        ("image,caption\n0.png,a dog\n", "two pairs, got 1"),
        ("image,caption\n0.png,a dog\n1.png,a dog\n2.png,a dog\n", "'a dog'"),
        (
            "image,caption\nx.png,a dog\ny.png,a cat\n",
            f"2 of the 2 checked pairs have no image or no caption. The first: {tmp_path}/x.png: "
            "there is no such image",
        ),
        (
            "image,caption\n0.png,a dog\n1.png,\n2.png,a cat\n",
            f"1 of the 3 checked pairs have no image or no caption. The first: {table}, row 2: no caption.",
        ),
        ("image,caption\n0.png,a dog, a cat\n1.png,a cat\n", "pairs.csv, line 2: "),
    ):
        table.write_text(content)
        assert shown in said([table], capsys)
    two = write_table(tmp_path, 2).rename(tmp_path / "two.csv")
    table.write_text("image,caption\n0.png,a dog\n1.png,\n")
    assert f"The first: {table.name}, row 2" in said([two.name, table.name], capsys)  # of its own table
    table.write_text("\n".join(["image,caption", *(f"{number}.png,dog {number}" for number in range(19)), "19.png,"]))
    check_pairs(load_pairs(table, max_bad_share=0.05))  # as many are bad as may be


def test_bad_settings_are_one_sentence(tmp_path, capsys):
    write_table(tmp_path, 30)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    for arguments, shown in {
        "pairs.csv --model clip": "clip: ",
        "--config iclip-dinov2-s14-minilm --data pairs.csv": "data/flickr8k/dev-00000.tar: ",
        "pairs.csv --eval_dataset folder": "eval_root: ''",
    }.items():
        assert shown in said(["--output_dir", "new", *arguments.split()], capsys)
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------------------------------- run


def test_a_table_becomes_a_model(tmp_path, world, capsys):
    model = world.folder / "model"
    table = write_table(tmp_path, 30)
    (tmp_path / "0.png").write_bytes(b"no image")  # one bad pair of 30 is allowed
    arguments = ["--validation_data", table, "--num_train_epochs", 3, "--learning_rate", 1e-3]
    arguments += ["--metric_for_best_model", "loss", "--eval_steps", 1, "--cache_features", tmp_path / "cache"]
    assert iclip("train", table, "--model", model, *arguments) == 0
    out = capsys.readouterr().out
    assert "Chosen by the number of pairs" in out and re.search(r"per_device_train_batch_size +29\n", out)
    assert "29 held-out pairs" in out
    (last,) = Path("runs/pairs").glob("checkpoint-3")
    state = TrainerState.load_from_json(last / "trainer_state.json")
    rows = {row["step"]: row["eval_loss"] for row in state.log_history if "eval_loss" in row}
    assert re.search(rf"loss +{rows[0]:.4g} +{rows[state.best_global_step]:.4g} ", out)
    assert (
        "The trained model, the best by loss, is in runs/pairs.\nNext: iclip explain PHOTO " in out
        and "--model runs/pairs" in out
    )
    before, after = ICLIPModel.from_pretrained(model), ICLIPModel.from_pretrained("runs/pairs")
    assert (before.recognition.visual_projection.weight != after.recognition.visual_projection.weight).any()
    text = zip(before.text_model.parameters(), after.text_model.parameters())
    assert all((one == other).all() for one, other in text)
    pictures = sorted(path.name for path in (tmp_path / "runs" / "pairs" / "pictures").iterdir())
    assert pictures == ["0000000.png", "0000001.png", "0000002.png", "0000003.png", "before.npz"]


def test_the_summary_names_no_best_model_if_it_is_not_loaded(tmp_path, world, capsys):
    table = write_table(tmp_path, 30)
    arguments = ["--validation_data", table, "--max_steps", 2, "--eval_steps", 1, "--save_steps", 1]
    arguments += ["--metric_for_best_model", "loss", "--load_best_model_at_end", False, "--eval_on_start", False]
    assert iclip("train", table, "--model", world.folder / "model", *arguments) == 0
    assert TrainerState.load_from_json("runs/pairs/checkpoint-2/trainer_state.json").best_global_step
    assert "The trained model is in runs/pairs." in capsys.readouterr().out


def history_of(before: dict, after: dict | None) -> list[dict]:
    """The log of a run whose held-out pairs have these results, by metric, before and after seven steps."""
    rows = [{f"eval_{name}": np.mean(values) for name, values in before.items()} | {"step": 0}]
    if after:
        change = {name: change_interval(before[name], after[name]) for name in before}
        bounds = {
            f"eval_{name}_change_{end}": bound for name in change for end, bound in zip(("low", "high"), change[name])
        }
        rows.append({f"eval_{name}": np.mean(values) for name, values in after.items()} | bounds | {"step": 7})
    return [{"loss": 1.0, "step": 3}, *rows]


def test_the_summary_shows_what_changed_and_where_the_model_is(tmp_path):
    held_out = load_pairs(write_table(tmp_path, 24, ["Two dogs run.", "A dog and a ball.", "A cat."] * 8))
    folder = Path("runs/my pairs")
    hits = {count: np.where(np.arange(24) < count, 100.0, 0.0) for count in (6, 12)}
    better = summary(
        history_of({"text_to_image": hits[6]}, {"text_to_image": hits[12]}), 7, "text_to_image", folder, held_out, ""
    )
    low, high = re.fullmatch(r" *text_to_image % +25 +50 +(\S+) to (\S+)", better[2]).groups()
    assert 0 < float(low) < 25 < float(high) and better[3] == "24 held-out pairs"
    assert better[4] == "The trained model, the best by text_to_image, is in 'runs/my pairs'."
    assert better[5] == "Next: iclip explain PHOTO --text ... --model 'runs/my pairs'"
    kept = summary(history_of({"text_to_image": hits[6]}, None), None, "", folder, held_out, "m")
    assert "'runs/my pairs' holds the model that you started from (m)" in "\n".join(kept)
    few = load_pairs(write_table(tmp_path, 6))
    said = "\n".join(summary(history_of({"loss": np.ones(6)}, {"loss": np.zeros(6)}), 7, "loss", folder, few, ""))
    assert "6 held-out pairs, too few to tell a change" in said and "95 %" not in said and " to 0" not in said
    evaluations = [{"eval_loss": 2.0, "step": 1}, {"eval_loss": 3.0, "step": 2}]
    assert summary(evaluations, None, "loss", folder, few, "")[2].split() == ["loss", "3"]
    assert summary(evaluations, 1, "loss", folder, few, "")[2].split() == ["loss", "2"]
    assert "Nothing was measured" in "\n".join(summary([], None, "", folder, None, ""))


def test_the_interval_is_that_of_paired_changes():
    """Noise that both scores of a pair share does not widen it, and its width is that of a mean."""
    draws = np.random.default_rng(1)
    level, change = draws.normal(0, 10, 400), draws.normal(0.5, 1, 400)
    low, high = change_interval(level, level + change)
    assert [low, high] == change_interval(level, level + change)
    assert low + high == pytest.approx(2 * change.mean(), abs=0.01)
    assert high - low == pytest.approx(2 * 1.96 * change.std() / 20, rel=0.1)


def test_pictures_show_the_maps_of_the_images_own_captions(tiny_processor, tmp_path, recorded):
    model, drawn = tiny_model(), recorded(evaluation, "overlay")
    sheets = recorded(evaluation, "picture_grid", lambda pictures, *args: args)
    pairs = [
        {"image": noise(size), "caption": caption}
        for size, caption in (((60, 40), "a red ball"), ((30, 50), "the sky"), ((20, 20), "a dog"))
    ]
    captions = ["a red ball", "the sky"]
    plot_examples(model, tiny_processor, pairs[:2], tmp_path / "pictures", 0)
    assert sheets.pop() == (["", "step 0", "", ""], 2, captions)
    before, drawn[:] = list(drawn), []
    for (image, heatmap), pair in zip(before, pairs):
        with torch.no_grad():
            inputs = tiny_processor(pair["image"], text=[pair["caption"]])
            maps = model.eval()(**inputs, output_similarity_maps=True).similarity_maps
        (expected,) = tiny_processor.post_process_similarity_maps(maps, [(image.height, image.width)])
        assert image is pair["image"] and heatmap == pytest.approx(expected[0].numpy(), abs=1e-5)
    assert len(before) == 2

    trained = tiny_model(seed=1)
    plot_examples(trained, tiny_processor, pairs[:2], tmp_path / "pictures", 7)
    assert sheets.pop() == (["", "before", "step 7", "", "", ""], 3, captions)
    for (image, heatmap), (first, now) in zip(before, (drawn[:2], drawn[2:])):
        assert first[0] is now[0] is image and first[1] == pytest.approx(heatmap, abs=1e-3)  # kept as float16
        assert abs(now[1] - heatmap).max() > 0.01
    written = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert written == ["0000000.png", "0000007.png", "before.npz"]


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_folder")
def test_the_guide_ends_with_a_model_for_the_hub(tmp_path, iclip_data, capsys):
    """Its commands with 50 real pairs, from the table on."""
    (tmp_path / "photos").mkdir()
    real = load_pairs(iclip_data / "flickr8k" / "test-00000.tar")
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for number in range(1, 51):
            pair = real.read(number)
            pair["image"].save(tmp_path / "photos" / f"{number}.jpg")
            table.writerow([f"photos/{number}.jpg", pair["captions"][0]])
    guide = (Path(__file__).parents[1] / "docs" / "guide" / "own-images.md").read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^iclip (.*)", guide, re.MULTILINE)]
    assert [words[0] for words in commands] == ["train", "explain", "push"]
    for words in commands:
        assert iclip(*words) == 0, words
    out = capsys.readouterr().out
    assert "5 held-out pairs" in out and "model.safetensors" in out and len([*Path().glob("*-explanation.png")]) == 1


@pytest.mark.slow
def test_the_script_and_the_command_are_one_program(tmp_path):
    script = Path(__file__).parents[1] / "train.py"
    done = subprocess.run([sys.executable, script, "absent.csv"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("iclip train: absent.csv: ")
