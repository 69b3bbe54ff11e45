"""`iclip train DATA`: what is checked and chosen before the training, and what a run says at its end."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import noise, tiny_model
from PIL import Image
from training_runs import write_table

from iclip_hf import ICLIPModel, cli, embedded_model
from iclip_hf.data.pairs import load_pairs
from iclip_hf.training import preset, validation
from iclip_hf.training.checkpoints import RunState, kept_initial_model
from iclip_hf.training.inputs import open_pairs
from iclip_hf.training.preset import STEPS, check_pairs
from iclip_hf.training.settings import Settings
from iclip_hf.training.validation import change_interval, common_labels, draw_examples, regressed_metrics, report


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
        ".": "sub",
        "../cc3m/{00..31}.tar": "cc3m",
        "../cc3m/*.tar": "cc3m",
        "../cc3m/train-*.tar": "cc3m",
        ".pairs.csv": "sub",
        "/": "pairs",
        "my pets (1)": "my pets (1)",
    }.items(),
)
def test_a_run_has_the_name_of_its_data(tmp_path, monkeypatch, data, name):
    """Or of their folder: one in `runs/` itself, or in `runs/*`, would go with others."""
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "photos" / "sub")
    pairs = open_pairs([str(write_table(tmp_path / "table", 4))], {})
    assert preset.choose_settings({"data": [data]}, pairs)[0]["output_dir"] == f"runs/{name}"


def choose_settings(given: dict) -> dict:
    return preset.choose_settings(given, open_pairs(given["data"], given))[0]


@pytest.mark.parametrize("count", [2, 19, 20, 21, 300])
def test_what_is_chosen_makes_a_run(tmp_path, count):
    data = [str(write_table(tmp_path, count))]
    chosen = choose_settings({"data": data})
    settings = Settings(data=data, **chosen)
    held_out = -(-count // 10) if count >= 20 else 0  # rounded up
    assert settings.learning_rate == 1e-5 > settings.min_learning_rate
    assert 1 <= settings.batch_size <= count - held_out
    steps = (count - held_out) // settings.batch_size * settings.epochs
    assert 0 < settings.eval_steps <= steps and settings.warmup_epochs < settings.epochs
    assert (settings.model, settings.output_dir, settings.lock_text) == ("embedded", "runs/pairs", True)
    assert settings.validation_share == (0.1 if held_out else 0)


def test_captions_of_one_image_are_counted_together(tmp_path):
    """
    Images under one to six names: the part that is held out is not a tenth of the pairs, and no batch is too large.
    """
    table = write_table(tmp_path, 21)
    (tmp_path / "there").symlink_to(tmp_path)
    rows = [
        f"{number * 'there/'}{image}.png,caption {image} {number}"
        for image in range(21)
        for number in range(1 + image % 6)
    ]
    table.write_text("\n".join(["image,caption", *rows, ""]))
    training, held_out = load_pairs(table).split(0.1)
    batch = choose_settings({"data": [str(table)], "max_bad_share": 0.0})["batch_size"]
    assert batch == len(training) == len(rows) - len(held_out)


def test_what_is_given_takes_precedence_and_the_rest_follows(tmp_path, monkeypatch):
    given = {"data": [str(write_table(tmp_path, 40))], "epochs": 3, "batch_size": 8, "output_dir": "elsewhere"}
    chosen = choose_settings(given)
    assert given.keys().isdisjoint(chosen)
    assert chosen["cache_features"] == "elsewhere/cache"
    assert chosen["eval_steps"] <= 3 * (36 // 8)
    free = {name: value for name, value in given.items() if name != "epochs"}
    assert choose_settings(free)["epochs"] == round(STEPS / (36 // 8))  # 36 pairs are not held out
    monkeypatch.setenv("WORLD_SIZE", "8")
    del given["batch_size"]
    assert choose_settings(given)["batch_size"] == 32  # a multiple of the processes
    chosen = choose_settings({"data": given["data"], "max_steps": 20, "batch_size": 8})
    assert "epochs" not in chosen and chosen["eval_steps"] == 4
    assert chosen["warmup_epochs"] * (36 // 8) == pytest.approx(2)  # steps


@pytest.mark.parametrize("count", [99, 100])
def test_a_share_of_right_answers_needs_enough_held_out_pairs(tmp_path, count):
    """Also if they are named; a tenth of the pairs is fewer."""
    table = write_table(tmp_path, count)
    chosen = choose_settings({"data": [str(table)], "validation_data": [str(table)]})
    assert chosen.get("best_metric") == ("val_loss" if count < 100 else None) and "validation_share" not in chosen
    assert choose_settings({"data": [str(table)]})["best_metric"] == "val_loss"


def test_what_needs_locked_towers_is_not_chosen_for_towers_that_learn(tmp_path):
    given = {"data": [str(write_table(tmp_path, 4))]}
    tiny_model(lock_vision=False).save_pretrained(tmp_path / "unlocked")
    unlocked = {**given, "model": str(tmp_path / "unlocked")}
    of_locked = {"cache_features", "keep_presence"}
    assert of_locked.isdisjoint(choose_settings({**given, "model_options": ["lock_vision=false"]}))
    assert of_locked.isdisjoint(choose_settings(unlocked))
    assert of_locked <= choose_settings({**unlocked, "model_options": ["lock_vision=true"]}).keys()
    assert of_locked & choose_settings({**given, "lock_text": False}).keys() == {"cache_features"}


# -------------------------------------------------------------------------------------------------------------- checks


def said(arguments: list, capsys) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iclip_hf.training.train.train", lambda *arguments: pytest.fail("it trained"))
        code = cli.main(["train", *map(str, arguments)])
    message = capsys.readouterr().err
    assert code == 2 and message.count("\n") == 1, message
    return message


def test_bad_data_is_one_sentence(tmp_path, capsys):
    table = write_table(tmp_path, 30)
    for content, shown in (
        ("image,caption\n0.png,a dog\n", "this has 1"),
        ("image,caption\n0.png,a dog\n1.png,a dog\n2.png,a dog\n", "'a dog'"),
        (
            "image,caption\nx.png,a dog\ny.png,a cat\n",
            f"2 of the 2 pairs looked at have no image or no caption. The first: {tmp_path}/x.png: "
            "there is no such image",
        ),
        (
            "image,caption\n0.png,a dog\n1.png,\n2.png,a cat\n",
            f"1 of the 3 pairs looked at have no image or no caption. The first: {table}, row 2: no caption.",
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
    (tmp_path / "runs" / "pairs" / "checkpoint-0000003").mkdir(parents=True)
    (tmp_path / "runs" / "pairs" / "checkpoint-0000003" / "state.json").touch()
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    for arguments, shown in {
        "pairs.csv --output_dir runs/pairs": "runs/pairs: this folder holds a run already",
        "pairs.csv --output_dir clip": "clip: ",
        "pairs.csv --output_dir clip/new --model clip": "clip/new: ",
        "pairs.csv --caption_column label": "'label'",
        "pairs.csv --model clip": "clip: ",
        "--config iclip-dinov2-s14-minilm --data pairs.csv": "data/flickr8k/dev-00000.tar: ",
        "org/name --pairs_per_epoch 100": "config",
        "--config iclip-vit-b16 --data org/a org/b": "only one Hub dataset can be streamed",
        "pairs.csv --cache_features pairs.csv": "pairs.csv is not a folder that can be written",
        "pairs.csv --nouns absent.txt": "absent.txt: ",
        "pairs.csv --eval_dataset folder": "eval_root: ''",
        "pairs.csv --vision v --text t": "config: ",
    }.items():
        assert shown in said(["--output_dir", "new", *arguments.split()], capsys)
    assert "--output_dir" in said(["pairs.csv"], capsys)  # of runs/pairs, which another run may need
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------------------------------- run


def test_a_table_becomes_a_model(tmp_path, world, capsys):
    model = world.folder / "model"
    table = write_table(tmp_path, 30)
    (tmp_path / "0.png").write_bytes(b"no image")  # one bad pair of 30 is allowed
    arguments = [
        "--validation_data",
        str(table),
        "--epochs",
        "3",
        "--learning_rate",
        "1e-3",
        "--best_metric",
        "val_loss",
    ]
    arguments += ["--report_to", "none"]
    assert cli.main(["train", str(table), "--model", str(model), *arguments]) == 0
    out = capsys.readouterr().out
    assert "Chosen by the number of pairs" in out and re.search(r"batch_size +29\n", out)
    assert "29 held-out pairs" in out
    state = json.loads((tmp_path / "runs" / "pairs" / "results.json").read_text())
    assert f"val_loss{state['before']['val_loss']:>20.4g}{state['metrics']['val_loss']:>12.4g}" in out
    assert "The trained model is in runs/pairs.\nNext: iclip explain PHOTO " in out and "--model runs/pairs" in out
    before, after = ICLIPModel.from_pretrained(model), ICLIPModel.from_pretrained("runs/pairs")
    assert (before.recognition.visual_projection.weight != after.recognition.visual_projection.weight).any()
    text = zip(before.text_model.parameters(), after.text_model.parameters())
    assert all((one == other).all() for one, other in text)
    pictures = sorted(path.name for path in (tmp_path / "runs" / "pairs" / "pictures").iterdir())
    assert pictures == ["0000000.png", "0000001.png", "0000002.png", "0000003.png", "before.npz"]


def state_of(before: dict, after: dict) -> RunState:
    """The state of a run whose held-out pairs have these results, by metric."""
    means = ({name: np.mean(values) for name, values in scores.items()} for scores in (before, after))
    change = {name: change_interval(before[name], after[name]) for name in before}
    regressed = regressed_metrics(change, len(next(iter(before.values()))))
    state = RunState(before=next(means), metrics=next(means), change=change, regressed=regressed)
    state.best = next(iter(state.metrics.values()))
    return state


def test_the_report_shows_what_changed_and_where_the_model_is(tmp_path):
    held_out = load_pairs(write_table(tmp_path, 24, ["Two dogs run.", "A dog and a ball.", "A cat."] * 8))
    given = {"data": ["d"], "model": "m"}
    settings = Settings(**given, validation_share=0.1, output_dir="runs/my pairs")
    hits = {count: np.where(np.arange(24) < count, 100.0, 0.0) for count in (0, 6, 12)}

    def said_of(after: int) -> str:
        state = state_of({"text_to_image": hits[6]}, {"text_to_image": hits[after]})
        return "\n".join(report(settings, state, held_out))

    better = said_of(12).splitlines()
    low, high = re.fullmatch(r"text_to_image % +25 +50 +(\S+) to (\S+)", better[2]).groups()
    assert 0 < float(low) < 25 < float(high) and better[3] == "24 held-out pairs"
    assert better[4] == "The trained model is in 'runs/my pairs'."
    assert better[5] == "Next: iclip explain PHOTO --text 'dog, ball' --model 'runs/my pairs'"
    assert "'runs/my pairs' holds the model that you started from (m)" in said_of(0)
    few = load_pairs(write_table(tmp_path, 6))
    state = state_of({"val_loss": np.ones(6)}, {"val_loss": np.zeros(6)})
    said = "\n".join(report(settings, state, few))
    assert "6 held-out pairs, too few for an interval" in said and "95 %" not in said and " to " not in said
    said = "\n".join(report(settings, RunState(step=40, bad_steps=3), None))
    assert "\n3 of 40 steps had no finite loss" in said and "Nothing was measured" in said


def test_the_choice_is_over_all_metrics():
    """A loss that fell does not hide that retrieval fell too, and the folder then holds the start."""
    settings = Settings(data=["d"], model="m", output_dir="x", validation_share=0.1, best_metric="val_loss")
    hits, loss = np.where(np.arange(15) < 13, 100.0, 0.0), np.linspace(1, 3, 15)
    before = {"val_loss": loss, "text_to_image": hits}
    worse = state_of(before, {"val_loss": loss - 0.5, "text_to_image": np.where(np.arange(15) < 11, 100.0, 0.0)})
    assert worse.regressed == ["text_to_image"] and kept_initial_model(settings, worse)
    # One that was lost beside two that were gained is no loss that can be told.
    mixed = state_of(before, {"val_loss": loss - 0.5, "text_to_image": np.where(np.arange(15) > 0, 100.0, 0.0)})
    assert not mixed.regressed and not kept_initial_model(settings, mixed)
    assert state_of({"val_loss": loss}, {"val_loss": loss + 0.1}).regressed == ["val_loss"]
    # On a few pairs, nothing can be told: the best metric alone decides, and a model that is not changed is not
    # pushed.
    few = {name: values[:9] for name, values in before.items()}
    kept = state_of(few, {"val_loss": loss[:9] - 0.5, "text_to_image": np.zeros(9)})
    assert not kept.regressed and not kept_initial_model(settings, kept)


def test_the_interval_is_that_of_paired_changes():
    """Noise that both scores of a pair share does not widen it, and its width is that of a mean."""
    draws = np.random.default_rng(1)
    level, change = draws.normal(0, 10, 400), draws.normal(0.5, 1, 400)
    low, high = change_interval(level, level + change)
    assert [low, high] == change_interval(level, level + change)
    assert low + high == pytest.approx(2 * change.mean(), abs=0.01)
    assert high - low == pytest.approx(2 * 1.96 * change.std() / 20, rel=0.1)


def test_common_labels_are_classes_or_nouns(tmp_path):
    for name in ("oak_leaf/1", "oak_leaf/2", "oak_leaf/3", "birch/1", "ash/1", "ash/2"):
        (tmp_path / "leaves" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "leaves" / f"{name}.png")
    assert common_labels(load_pairs(tmp_path / "leaves")) == ["oak leaf", "ash"]
    table = write_table(tmp_path, 4, ["A cat.", "A dog on grass.", "A dog on grass.", "Qwerty."])
    assert common_labels(load_pairs(table)) == ["dog", "grass"]


def test_pictures_show_the_maps_of_the_images_own_captions(tiny_processor, tmp_path, recorded):
    model, drawn = tiny_model(), recorded(validation, "overlay")
    sheets = recorded(validation, "picture_grid", lambda pictures, *args: args)
    pairs = [
        {"image": noise(size), "caption": caption}
        for size, caption in (((60, 40), "a red ball"), ((30, 50), "the sky"), ((20, 20), "a dog"))
    ]
    captions = ["a red ball", "the sky"]
    draw_examples(model.train(), tiny_processor, pairs, 2, tmp_path / "pictures", 0)
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
    draw_examples(trained, tiny_processor, pairs, 2, tmp_path / "pictures", 7)
    assert sheets.pop() == (["", "before", "step 7", "", "", ""], 3, captions)
    for (image, heatmap), (first, now) in zip(before, (drawn[:2], drawn[2:])):
        assert first[0] is now[0] is image and first[1] == pytest.approx(heatmap, abs=1e-3)  # kept as float16
        assert abs(now[1] - heatmap).max() > 0.01
    written = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert written == ["0000000.png", "0000007.png", "before.npz"]


@pytest.mark.slow
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
    try:
        embedded_model()
    except OSError as error:
        pytest.skip(f"the embedded towers cannot be had here: {error}")
    for words in commands:
        assert cli.main(words) == 0, words
    out = capsys.readouterr().out
    assert "5 held-out pairs" in out and "model.safetensors" in out and len([*Path().glob("*-explanation.png")]) == 1


def test_the_script_and_the_command_are_one_program(tmp_path):
    script = Path(__file__).parents[1] / "train.py"
    done = subprocess.run([sys.executable, script, "absent.csv"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("iclip train: absent.csv: ")
