"""
Model folders: joined from towers, exported with their code, described by a card, pushed to a stand-in of the Hub.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from conftest import iclip, noise, save, save_towers, tiny_model
from huggingface_hub import ModelCard
from training_runs import run, write_table
from transformers import AutoModel, AutoProcessor, pipeline

from iclip_hf import ICLIPModel, ICLIPProcessor
from iclip_hf.backends.embedded import embedded_folder
from iclip_hf.backends.identity import identity
from iclip_hf.cli.train.arguments import resolve_arguments
from iclip_hf.cli.train.training import card_settings
from iclip_hf.data.class_names import COCO_THINGS, VOC
from iclip_hf.evaluation.evaluate import EvaluationResult
from iclip_hf.hub.configs import config_folder
from iclip_hf.hub.folders import code_files, export_model, init_model, join_towers
from iclip_hf.hub.model_card import card_licence, write_model_card
from iclip_hf.hub.record import read_record


ROOT = Path(__file__).parents[1]
METRICS = {
    "protocol": {
        "model": "/home/someone/model",
        "dataset": {"name": "voc2012", "split": "val", "images": 1449, "images_in_split": 1449}
        | {"fingerprint": "0123456789abcdef"},
        "image_size": {"height": 224, "width": 160},
        "resize": "whole image, no crop",
        "templates": ["a photo of the {}"],
        "class_names": VOC,
        "metrics": {"mMIoU": {"aggregate": "image"}},
        "refine": False,
        "versions": {"iclip-hf": "0.1.0", "torch": "2.13.0"},
    },
    "results": {
        "itsm": {
            "mAP": {"map": 78.0612},
            "mMIoU": {"mmiou": 50.3149, "floor": 21.5},
            "mFMB": {"mfmb": 0.30551},
            "presence": {"passed": 5.0},
        },
        "reversed_itsm": {
            "mAP": {"map": 78.0612},
            "mMIoU": {"mmiou": 18.0, "floor": 21.5},
            "mFMB": {"mfmb": -0.30551},
            "text_contrast": {"text_contrast": None},  # not measurable
        },
    },
    "per_class": {},
    "timing": {},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_processor) -> Path:
    """A tiny trained model with its card, and a photograph."""
    folder = tmp_path_factory.mktemp("source")
    model = tiny_model()
    model.config.vision_config.name_or_path = "/home/someone/vit"
    model.config.text_config.name_or_path = "openai/clip-vit-base-patch16"
    save(folder / "model", model, tiny_processor)
    data = ["pixparse/cc3m-wds", "org/name.v2"]
    # Files and folders that are named like known data, or like data of the Hub.
    data += ["/home/someone/photos.v2", "/mnt/Photos/Pairs.CSV", "/home/me/cc3m-wds.csv", "data/coco2014"]
    data += ["/home/someone/data/flickr8k/train-{00..05}.tar", "/home/someone/cats|dogs.csv"]
    training = {"data": data, "num_train_epochs": 7, "seed": 3, "weight_decay": 0, "lock_text": False}
    training |= {"auto_augment": "", "nouns": "", "output_dir": "/home/someone/runs"}
    training |= {"vision": "/home/someone/vit", "text": "openai/clip-vit-base-patch16"}
    write_model_card(model, tiny_processor, folder / "model", metrics=METRICS, training=shown_of(**training))
    noise((6, 4)).resize((60, 40)).save(folder / "photograph.png")
    return folder


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "export"
    assert iclip("export", source / "model", folder) == 0
    return folder


# ------------------------------------------------------------------------------------------------------------- export


# Without the packages that are named `absent`
FRESH = """
import json, sys

folder, photograph, *absent = sys.argv[1:]

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *place):
        return None if name.split(".")[0] in absent else self.finder.find_spec(name, *place)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
ANSWERS = """
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline

model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
classifier = AutoModelForZeroShotImageClassification.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    inputs = processor(images=Image.open(photograph), labels=["dog", "red ball"])
    outputs = model(**inputs, output_similarity_maps=True)
explained, segmented = (
    pipeline(task, model=folder, trust_remote_code=True)(photograph, candidate_labels=["dog", "sky"], min_presence=0)
    for task in ("image-text-similarity-map", "zero-shot-image-segmentation")
)
names = [type(one).__name__ for one in (model, processor, classifier)]
names += [one["label"] for one in explained + segmented]
numbers = {
    "logits": outputs.logits_per_image.tolist(),
    "maps": outputs.similarity_maps.tolist(),
    "scores": [one["score"] for one in explained],
    "boxes": [box for one in explained for box in one["boxes"]],
    "enlarged": [one["map"].mean().item() for one in explained],
    "masks": [sum(one["mask"].getdata()) / (255 * 60 * 40) for one in segmented],
}
"""


def test_a_fresh_process_without_the_package_gives_the_same_numbers(exported, source, tmp_path):
    """With nothing installed but what a reader of the card has."""
    absent = "iclip_hf accelerate datasets evaluate pycocotools scipy sklearn matplotlib timm torchmetrics".split()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ""}
    script, photograph = f"{FRESH}{ANSWERS}print(json.dumps([names, numbers]))", str(source / "photograph.png")
    command = [sys.executable, "-c", script, str(exported), photograph, *absent]
    fresh = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr
    names, numbers = json.loads(fresh.stdout.splitlines()[-1])
    expected = {"folder": str(source / "model"), "photograph": photograph}
    exec(ANSWERS, expected)
    assert names == expected["names"] and numbers.keys() == expected["numbers"].keys()
    for name, values in expected["numbers"].items():
        np.testing.assert_allclose(numbers[name], values, atol=1e-2 if name == "masks" else 1e-4, err_msg=name)


def test_with_the_package_a_folders_code_is_not_run(exported, tmp_path):
    folder = tmp_path / "poisoned"
    folder.mkdir()
    for file in filter(Path.is_file, exported.iterdir()):
        poison = f"open({str(tmp_path / 'ran')!r}, 'w')\n" if file.suffix == ".py" else ""
        (folder / file.name).write_bytes(file.read_bytes() + poison.encode())
    assert type(AutoModel.from_pretrained(folder)) is ICLIPModel
    assert type(AutoProcessor.from_pretrained(folder)) is ICLIPProcessor
    with pytest.raises(ValueError, match="trust_remote_code"):
        pipeline("image-text-similarity-map", model=str(folder))
    assert iclip("export", folder, tmp_path / "again") == 0
    assert not (tmp_path / "ran").exists()
    for file in exported.glob("*.py"):  # the package's own code, not the folder's
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def files_of(folder: Path | str) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}


def test_an_exported_folder_holds_what_it_needs(exported):
    expected = {"config.json", "model.safetensors", "processor_config.json", "README.md", "tokenizer.json"}
    expected |= {"tokenizer_config.json", "model_card.json"}
    assert files_of(exported).keys() == expected | {path.name for path in code_files()}
    weights = ICLIPModel.from_pretrained(exported).state_dict()
    assert all(torch.equal(weights[name], w) for name, w in tiny_model().state_dict().items())


def test_what_is_saved_names_no_code_of_the_folder_that_was_loaded(source, tmp_path):
    """Who trusts the new folder, as its card says, does not trust the old one."""
    shutil.copytree(source / "model", tmp_path / "model")
    code = {"auto_map": {"AutoTokenizer": [None, "evil/repo--trap.T"]}, "custom_pipelines": {"x": {"impl": "trap.P"}}}
    for name, part in (("config", "vision_config"), ("processor_config", "image_processor"), ("tokenizer_config", "")):
        file = tmp_path / "model" / f"{name}.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | code | ({part: content[part] | code} if part else {})))
    assert iclip("export", tmp_path / "model", tmp_path / "exported") == 0
    command = ["train", write_table(tmp_path / "data", 8), "--model", tmp_path / "model"]
    assert iclip(*command, "--output_dir", tmp_path / "run", "--max_steps", 1, "--save_steps", 1) == 0
    for folder in (tmp_path / "exported", tmp_path / "run" / "checkpoint-1"):
        saved = "".join(path.read_text() for path in folder.glob("*.json"))
        assert saved and "evil/repo" not in saved and "trap" not in saved


# --------------------------------------------------------------------------------------------------------------- push


def test_push_uploads_what_the_dry_run_lists(exported, source, monkeypatch, capsys):
    api, uploaded = Mock(), {}

    def upload_folder(repo_id, folder_path, **options):
        uploaded.update({name: file.read_bytes() for name, file in files_of(folder_path).items()})
        return SimpleNamespace(commit_url=f"{repo_id}/commit")

    api.create_repo.return_value.repo_id = "org/tiny"
    api.upload_folder = upload_folder
    monkeypatch.setattr("iclip_hf.hub.folders.HfApi", lambda: api)
    assert iclip("push", source / "model", "org/tiny", "--dry-run", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert not api.mock_calls and listed["files"].keys() == files_of(exported).keys()
    assert listed["data_terms"]["pixparse/cc3m-wds"].startswith("Conceptual Captions")
    assert listed["licence"] == "unknown"  # of its towers
    assert iclip("push", source / "model", "org/tiny", "--private", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["commit"] == "org/tiny/commit" and report["files"] == listed["files"]
    api.create_repo.assert_called_once_with("org/tiny", private=True, exist_ok=True)
    assert {name: len(content) for name, content in uploaded.items()} == listed["files"]
    assert b'model="org/tiny"' in uploaded["README.md"]


def test_push_asks_for_the_token_before_its_work(source, monkeypatch, capsys):
    monkeypatch.setattr("iclip_hf.cli.push.export", None)
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    assert iclip("push", source / "model", "org/tiny") == 2
    assert "hf auth login" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- init


@pytest.fixture(scope="module")
def towers(tmp_path_factory, tiny_processor) -> Path:
    """Tower checkpoints, and a configuration for them whose epsilon differs from the image tower's file."""
    folder = tmp_path_factory.mktemp("towers")
    model = tiny_model()
    model.vision_model.config.layer_norm_eps = 1e-12
    save_towers(folder, model, tiny_processor)
    save(folder / "config", tiny_model(pooling="max").config)
    options = {
        "processor_class": "ICLIPProcessor",
        "patch_size": 8,
        "templates": ["{}"],
        "image_processor": {"image_processor_type": "BitImageProcessor", "size": {"height": 32, "width": 32}}
        | {"do_center_crop": False},
    }
    (folder / "config" / "processor_config.json").write_text(json.dumps(options))
    return folder


def init(towers: Path, output: Path, **options) -> int:
    options = {"config": towers / "config", "vision": towers / "vision", "text": towers / "text", **options}
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    return iclip("init", *arguments, "--output", output)


def test_init_joins_towers_as_the_configuration_says(towers, tmp_path):
    assert init(towers, tmp_path / "new") == 0
    model, processor = ICLIPModel.from_pretrained(tmp_path / "new"), ICLIPProcessor.from_pretrained(tmp_path / "new")
    expected = tiny_model().state_dict()
    kept = [name for name in expected if name.startswith(("vision_model", "text_model"))]
    assert kept and all(torch.equal(model.state_dict()[name], expected[name]) for name in kept)
    fresh = model.recognition.visual_projection.weight
    assert not torch.allclose(fresh, expected["recognition.visual_projection.weight"])
    assert fresh.std().item() == pytest.approx(32**-0.5, rel=0.2)
    assert model.config.vision_config.layer_norm_eps == 1e-6 and model.config.pooling == "max"
    assert (processor.templates, processor.patch_size, processor.image_processor.size["height"]) == (["{}"], 8, 32)
    card = ModelCard.load(tmp_path / "new" / "README.md")
    assert "It was not trained: train it before use" in card.text and "Not measured" in card.text


def test_init_takes_the_options_and_the_size_of_a_train_yaml(towers, tmp_path, capsys):
    """As `iclip train --config` does. A model with a bias is to be trained with nouns."""
    (tmp_path / "own").mkdir()
    file, given = tmp_path / "own" / "train.yaml", f"vision: {towers / 'vision'}\ntext: {towers / 'text'}\n"
    options = "max_over=similarity, logit_bias_init_value=-3"
    file.write_text(f"{given}image_size: 64\nmodel_options: [{options}]\n")
    assert iclip("init", "--config", tmp_path / "own", "--output", tmp_path / "new") == 0
    assert "--nouns" in capsys.readouterr().out.split()
    model, processor = ICLIPModel.from_pretrained(tmp_path / "new"), ICLIPProcessor.from_pretrained(tmp_path / "new")
    assert (model.config.max_over, model.config.logit_bias_init_value) == ("similarity", -3)
    assert processor.image_processor.size["height"] == 64
    for content, named in (
        (f"{given}model_options: pooling_x=1\n", "'pooling_x'"),
        (f"{given}model_options: max_over=banana\n", "'max_over'"),
        ("- vision\n", "train.yaml"),
    ):
        file.write_text(content)
        assert iclip("init", "--config", tmp_path / "own", "--output", tmp_path / "other") == 2
        assert named in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_a_configuration_needs_no_more_than_the_names_of_the_towers(towers, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.yaml").write_text(f"vision: {towers / 'vision'}\ntext: {towers / 'text'}\n")
    init_model(tmp_path / "own", tmp_path / "new")
    model, processor = ICLIPModel.from_pretrained(tmp_path / "new"), ICLIPProcessor.from_pretrained(tmp_path / "new")
    assert (model.config.vision_config.layer_norm_eps, model.config.vision_config.hidden_size) == (1e-12, 32)
    assert (model.config.pooling, model.config.text_pooling) == ("masked_max", "mean")
    assert processor.patch_size == 8 and dict(processor.image_processor.size) == {"height": 224, "width": 224}
    _, small = join_towers(tmp_path / "own", *map(str, (towers / "vision", towers / "text")), image_size=48)
    assert dict(small.image_processor.size) == {"height": 48, "width": 48}


def test_init_refuses_what_does_not_fit(towers, tmp_path, capsys):
    assert init(towers, tmp_path / "new", config="iclip-vit-s16") == 2
    assert str(towers / "vision") in capsys.readouterr().err
    assert iclip("init", "--config", towers / "config", "--output", tmp_path / "new") == 2
    assert "give vision and text" in capsys.readouterr().err
    assert init(towers, tmp_path / "new", text=towers / "config") == 2
    assert f"{towers / 'config'}: this is an ICLIP model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert init(towers, towers / "vision" / "new") == 2  # a folder that it reads
    assert str(towers / "vision" / "new") in capsys.readouterr().err and not (towers / "vision" / "new").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_folder")
def test_init_writes_the_embedded_model_with_its_figures(tmp_path):
    init_model("iclip-dinov2-s14-minilm", tmp_path / "model")
    model, card = ICLIPModel.from_pretrained(tmp_path / "model"), ModelCard.load(tmp_path / "model" / "README.md")
    assert model.config.max_over == "similarity"
    towers = ["facebook/dinov2-small", "sentence-transformers/all-MiniLM-L6-v2", "timm/tf_efficientnet_lite2.in1k"]
    assert card.data.base_model == towers
    # Its data are Flickr8k and others for research.
    assert (card.data.license, card.data.license_name) == ("other", "apache-2.0-trained-on-research-data")
    assert str(Path.home()) not in str(card)
    sources = yaml.safe_load((config_folder("iclip-dinov2-s14-minilm") / "data.yaml").read_text())
    assert all(f"| training data {name} | {entry['terms']} |" in card.text for name, entry in sources.items())
    assert card.data.datasets is None  # on the Hub


def test_figures_of_the_embedded_model_are_those_of_the_readme():
    results = json.loads((config_folder("iclip-dinov2-s14-minilm") / "results.json").read_text())["results"]
    scores = [results["itsm"][name][name.lower()] for name in ("mAP", "mMIoU", "mFMB")]
    row = "| `itsm`, the model's map | {:.2f} | {:.2f} | {:.4f} |".format(*scores)
    assert row in (ROOT / "README.md").read_text()


# --------------------------------------------------------------------------------------------------------------- card


def shown_of(**values) -> dict:
    """What the card shows of a training with these arguments."""
    towers = {} if "model" in values or "vision" in values else {"model": "org/model"}
    return card_settings(resolve_arguments({"data": ["d"], "output_dir": "new", **towers, **values}), num_processes=1)


def card_of(folder: Path, processor, model=None, **options) -> ModelCard:
    return ModelCard.load(write_model_card(model or tiny_model(), processor, folder, **options))


def check_golden(card: Path, golden: str) -> None:
    """Compares a card with a file of tests/cards. `ICLIP_WRITE_CARDS=1` writes the file anew; read the difference."""
    file, content = ROOT / "tests" / "cards" / golden, card.read_text()
    if os.environ.get("ICLIP_WRITE_CARDS"):
        file.write_text(content)
    assert content == file.read_text()


def test_the_card_of_a_model_that_was_trained_from_towers(source):
    """One tower is known, the other is a folder."""
    check_golden(source / "model" / "README.md", "trained.md")


def test_the_card_of_a_model_that_was_trained_further(source, tmp_path, tiny_processor):
    """Both towers are known. Values of any form stay values."""
    model = tiny_model("dinov2", logit_bias_init_value=-2.0)
    model.config.vision_config.name_or_path = "facebook/dinov2-small"
    model.config.text_config.name_or_path = "openai/clip-vit-base-patch16"
    processor = ICLIPProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, templates=["a|b {}"])
    changes = {"refine": True, "note": 'a: "b" # {{ name }} 猫\n---\nend', "templates": ["'{}': #1", "yes {}"]}
    scores = {**METRICS["results"]["itsm"], "mAP": {"map": None}}
    measured = {**METRICS, "protocol": METRICS["protocol"] | changes, "results": {"itsm": scores}}
    again = {"model": "org/first", "data": ["own.csv"], "cache_features": "/home/me/cache"}
    again = shown_of(**again, gradient_accumulation_steps=4)
    before = {"source": source / "model", "source_identity": read_record(source / "model")["identity"]}
    results = EvaluationResult(**measured)
    card = write_model_card(model, processor, tmp_path, name="org/two", metrics=results, training=again, **before)
    check_golden(card, "trained_further.md")


@pytest.mark.parametrize(
    ("name", "split", "images", "names", "shown"),
    [
        ("coco2017", "val2017", (5000, 5000), COCO_THINGS, "COCO 2017 val2017"),
        ("coco2017", "val2017", (1449, 1449), COCO_THINGS, "COCO 2017 val2017, 1449 of 5000 images"),
        # More images than the data set has are another data set in its form.
        ("coco2017", "val2017", (5000, 5001), COCO_THINGS, "with custom classes or images, 5000 of 5001 images"),
        ("voc2012", "mine", (1449, 1449), VOC, "PASCAL VOC 2012 mine, with custom classes or images"),
        ("ade20k", "validation", (2000, 2000), ["screw", "nut"], "validation, with custom classes or images"),
    ],
)
def test_a_card_shows_figures_of_other_data_as_such(tmp_path, tiny_processor, name, split, images, names, shown):
    """And not in the header, where the Hub's page of the model cannot say so."""
    metrics = copy.deepcopy(METRICS)
    counts = dict(zip(("images", "images_in_split"), images))
    metrics["protocol"]["dataset"] |= {"name": name, "split": split, **counts}
    metrics["protocol"]["class_names"] = list(names)
    for options in ({"metrics": metrics}, {"source": tmp_path}):  # the record keeps it
        card = card_of(tmp_path, tiny_processor, **options)
        assert f"{shown} | `itsm` |" in card.text
        assert (card.data.eval_results is None) == ("images" in shown)


def test_the_card_leaves_out_arguments_without_effect():
    cached, plain = shown_of(cache_features="/home/someone/cache"), shown_of(auto_augment="")
    assert cached["cache_features"] is True and not {"crop_scale", "auto_augment"} & cached.keys()
    assert plain["crop_scale"] == 0.08 and "lock_text" not in plain and "max_steps" not in plain


def test_a_card_keeps_what_an_earlier_one_tells_unless_measured_again(source, exported, tmp_path, tiny_processor):
    first, second = (ModelCard.load(folder / "README.md") for folder in (source / "model", exported))
    assert first.data.to_dict() == second.data.to_dict()
    measured = {**METRICS["protocol"], **identity(tiny_model().to(torch.bfloat16), tiny_processor)}
    results = {**METRICS, "protocol": measured, "results": {"itsm": METRICS["results"]["itsm"]}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert iclip("export", exported, tmp_path / "again", "--results", tmp_path / "results.json") == 0
    third = ModelCard.load(tmp_path / "again" / "README.md")
    assert len(third.data.eval_results) == 3 and "| `num_train_epochs` | 7 |" in third.text


def test_a_card_does_not_tell_results_of_another_model(exported, tmp_path):
    """Also where only an option of its configuration was edited."""
    shutil.copytree(exported, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 1e-3
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert iclip("export", tmp_path / "model", tmp_path / "again") == 0
    cards = [ModelCard.load(folder / "README.md") for folder in (exported, tmp_path / "again")]
    assert [card.data.eval_results is None for card in cards] == [False, True]


def test_results_of_another_model_or_task_are_refused(exported, tmp_path, capsys, tiny_processor):
    """Or of nobody knows which."""
    other_mean = copy.deepcopy(tiny_processor)
    other_mean.image_processor.image_mean = [0.5] * 3
    results, command = tmp_path / "results.json", ["export", exported, tmp_path / "a", "--results"]
    segmentation = {"results": {"itsm": {"segmentation": {"miou": 40.0}}}}
    for protocol, figures, said in (
        (identity(tiny_model(seed=1), other_mean), {}, "other processor, weights;"),
        ({}, {}, "other configuration, processor, weights;"),
        (identity(tiny_model(), tiny_processor), segmentation, "mMIoU"),
    ):
        results.write_text(json.dumps({**METRICS, "protocol": {**METRICS["protocol"], **protocol}, **figures}))
        assert iclip(*command, results) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "a").exists()


RESTRICTED, FREE = {"terms": "CC BY-NC 4.0", "restricted": True}, {"terms": "CC BY; thanks to a research institute"}


@pytest.mark.parametrize(
    ("tower", "entry", "licence", "printed"),
    [
        ("facebook/dino-vitb16", FREE, "apache-2.0", "apache-2.0"),
        ("facebook/dino-vitb16", RESTRICTED, "other", "apache-2.0-trained-on-research-data"),
        ("facebook/dinov3-vitb16-pretrain-lvd1689m", FREE, "other", "dinov3-license"),
        ("someone/vit", RESTRICTED, "unknown", "unknown"),
    ],
)
def test_the_licence_is_that_of_the_towers_and_of_the_data(tmp_path, tiny_processor, tower, entry, licence, printed):
    model, source = tiny_model(), tmp_path / "source"
    model.config.vision_config.name_or_path = tower
    model.config.text_config.name_or_path = "openai/clip-vit-base-patch16"
    record = {"training": {"epochs": 7}, "data": {"photos": entry}, "identity": identity(model, tiny_processor)}
    source.mkdir()
    (source / "model_card.json").write_text(json.dumps(record))
    # Also if the model is trained further on data of the same name
    for training in (None, {"data": ["photos", "more"], "epochs": 1}):
        card = card_of(tmp_path / "new", tiny_processor, model, source=source, training=training)
        assert card.data.license == licence and card_licence(tmp_path / "new") == printed
        assert card.data.base_model == [tower, "openai/clip-vit-base-patch16"]
        assert f"| training data photos | {entry['terms']} |" in card.text
        assert ("| training data more | not known here |" in card.text) == (training is not None)


# ------------------------------------------------------------------------------------------------------------- record


def recorded(folder: Path) -> tuple[dict | None, list[str]]:
    """The settings of the last run, and the names of all data."""
    record = json.loads((folder / "model_card.json").read_text())
    return record["training"], [*record["data"]]


def test_the_record_has_the_last_run_and_all_data(hub, tmp_path, capsys):
    """And stays with the weights where no model of a run was better than its start."""
    (tmp_path / "own").mkdir()
    data = shutil.copy(hub / "pairs.tar", tmp_path / "own" / "own.tar")
    run(hub, tmp_path / "first", "--max_steps", 1, "--data", data)
    more = ["--model", tmp_path / "first", "--max_steps", 1, "--pictures", 0]
    run(hub, tmp_path / "second", *more)
    rates = [f"--{name}learning_rate={rate}" for name, rate in (("", 1e-30), ("warmup_", 0), ("min_", 0))]
    run(hub, tmp_path / "kept", *more, *rates, "--validation_data", hub / "held_out.tar")
    assert iclip("export", tmp_path / "second", tmp_path / "exported") == 0
    assert "own.tar: not known here" in capsys.readouterr().out
    first, of_first = recorded(tmp_path / "first")
    second, of_second = recorded(tmp_path / "second")
    assert of_first == first["data"] == ["own.tar"] and "model" not in first
    assert second["data"] == ["pairs.tar"] and of_second == ["own.tar", "pairs.tar"] and second["model"] == "first"
    assert recorded(tmp_path / "kept") == (first, of_first) and recorded(tmp_path / "exported") == (second, of_second)
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "| training data own.tar |" in card and str(tmp_path) not in card


def test_a_run_that_starts_from_the_embedded_model_has_its_terms(tmp_path, tiny_processor):
    training = shown_of(model="embedded", data=["pairs.csv"], num_train_epochs=2)
    before = read_record("embedded")["identity"]
    card = card_of(tmp_path, tiny_processor, training=training, source="embedded", source_identity=before)
    assert "| training data imagenet1k_sample | ImageNet: non-commercial research" in card.text
    assert "| training data pairs.csv | not known here |" in card.text and "Not measured" in card.text
    assert read_record(embedded_folder()) == read_record("embedded")


def test_all_data_of_the_embedded_model_have_terms():
    folder = config_folder("iclip-dinov2-s14-minilm")
    sources = yaml.safe_load((folder / "data.yaml").read_text())
    trained_on = {name.split("/")[1] for name in yaml.safe_load((folder / "train.yaml").read_text())["data"]}
    stuff = {"cityscapes", "nyu", "facades", "landscapes", "msrc"}
    assert trained_on == sources.keys() - stuff | {"stuff"}


def test_what_is_not_recorded_is_said(tmp_path, tiny_processor, monkeypatch):
    """Also of a model that was changed since, and of one of no folder, where the working directory holds a record."""
    model, training = tiny_model(), {"data": ["pairs.csv"], "epochs": 7}
    model.save_pretrained(tmp_path / "model")
    loaded = ICLIPModel.from_pretrained(tmp_path / "model")
    export_model(loaded, tiny_processor, tmp_path / "unknown")
    write_model_card(loaded, tiny_processor, tmp_path / "model", training=training)
    export_model(loaded, tiny_processor, tmp_path / "known")
    with torch.no_grad():
        loaded.recognition.visual_projection.weight.add_(1)
    export_model(loaded, tiny_processor, tmp_path / "changed")
    monkeypatch.chdir(tmp_path / "model")
    export_model(model, tiny_processor, tmp_path / "in memory")
    for name, record in (
        ("unknown", (None, ["(not recorded)"])),
        ("in memory", (None, ["(not recorded)"])),
        ("known", (training, ["pairs.csv"])),
        ("changed", (None, ["pairs.csv", "(not recorded)"])),
    ):
        assert recorded(tmp_path / name) == record
        card = (tmp_path / name / "README.md").read_text()
        assert ("The training of these weights is not recorded." in card) == (name != "known")
