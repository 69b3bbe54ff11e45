"""What is meant for others tells nothing of the machine that wrote it."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import evaluate_model, iclip, save_towers, tiny_model, write_folder, write_pairs
from PIL import ExifTags, Image

from iclip_hf import ICLIPModel, example_image, load
from iclip_hf.data.segmentation import load_segmentation


NAME = "telling-name"
# Places of this machine: of the data and models, the package, other packages and Python, and the user.
PLACES = {NAME, *map(str, (Path(example_image()).parents[1], *Path(torch.__file__).parents[1:2], sys.prefix))}
PLACES |= {str(Path.home())} - {str(Path("/"))}


def unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


@pytest.fixture
def home(tmp_path, tiny_processor, monkeypatch) -> Path:
    """The working directory, of somebody who names everything by its whole path: two towers, pairs, masks, images."""
    home = tmp_path / NAME
    for folder in ("data", "images"):
        (home / folder).mkdir(parents=True)
    save_towers(home, tiny_model("dinov2", logit_bias_init_value=0.0), tiny_processor)
    write_folder(home / "data", [[0, 1, 2], [0, 3, 255]], 60)
    write_pairs(home / "pairs.tar", 8)
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = NAME
    Image.effect_noise((60, 40), 80).save(home / "images" / "a.jpg", comment=NAME, exif=exif)
    monkeypatch.chdir(home)
    return home


def test_nothing_that_is_published_names_a_place_of_the_machine(home, tmp_path):
    options = {"logit_bias_init_value": 0.0, "projection_dim": 16, "text_pooling": "mean"}
    command = ["train", home / "pairs.tar", "--vision", home / "vision", "--text", home / "text", "--image_size", 32]
    command += ["--nouns", home / "nouns.txt", "--output_dir", home / "run", "--max_steps", 1]
    command += ["--validation_share", 0.5, "--per_device_train_batch_size", 4]
    (home / "nouns.txt").write_text("dog\ncat\nball\n")
    settings = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    assert iclip(*command, *(part for setting in settings for part in ("--model_options", setting))) == 0
    model, published = home / "run", tmp_path / "published"
    assert ICLIPModel.from_pretrained(model).config.vision_config.model_type == "dinov2"
    evaluation = ["evaluate", "--dataset", "folder", "--data-root", home / "data", "--model", model]
    assert iclip(*evaluation, "--output", published / "results.json", "--report", published / "report") == 0
    explanation = ["explain", home / "images", "--text", "dog", "--model", model]
    assert iclip(*explanation, "--report", published / "explained") == 0
    assert iclip("export", model, published / "model", "--results", published / "results.json") == 0
    for form in ("onnx", "web"):
        assert iclip("export", model, published / form, "--format", form) == 0
    files = [path for path in (*published.rglob("*"), *model.glob("*.*")) if path.is_file()]
    assert {"vision_model.onnx.gz", "README.md", "results.csv", "model_card.md", "data.js"} <= {
        path.name for path in files
    }
    telling = {(path.name, place) for path in files for place in PLACES if place.encode() in unpacked(path)}
    assert telling == set()


def test_a_result_names_no_path_of_a_proxy(home, world):
    dataset = load_segmentation("folder", home / "data")
    for proxy in (home / "vision", "vision"):
        methods = {"proxyclip": {"proxy": proxy, "beta": 1.0}}
        result = evaluate_model((world.model, world.processor), dataset, methods, ["mAP"])
        assert result.protocol["methods"] == {"proxyclip": {"proxy": "vision", "beta": 1.0}}
        result.save(home / "results.json")
        assert NAME not in (home / "results.json").read_text()


def test_a_result_names_no_relative_path_after_a_change_of_the_working_directory(home, world, tmp_path, monkeypatch):
    shutil.copytree(world.folder / "model", home / "secret" / "model")
    models = [load("secret/model"), (ICLIPModel.from_pretrained("secret/model"), world.processor)]
    dataset = load_segmentation("folder", home / "data")
    monkeypatch.chdir(tmp_path)
    for model in models:
        assert evaluate_model(model, dataset, None, ["mAP"]).protocol["model"] == "model"


def test_a_model_of_local_towers_that_transformers_saves_names_no_path(home, tmp_path):
    """As by `push_to_hub` of the model."""
    model = ICLIPModel.from_vision_text_pretrained(home / "vision", home / "text")
    towers = [model.config.vision_config._name_or_path, model.config.text_config._name_or_path]
    model.save_pretrained(tmp_path / "saved")
    assert NAME not in (tmp_path / "saved" / "config.json").read_text()
    assert [model.config.vision_config._name_or_path, model.config.text_config._name_or_path] == towers
    model.config.vision_config._name_or_path = "facebook/dino-vitb16"
    model.config.save_pretrained(tmp_path / "config")
    assert "facebook/dino-vitb16" in (tmp_path / "config" / "config.json").read_text()
