"""The identity of a model: every change that can change a number counts, and nothing else."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TEXT, VISION, save, tiny_inputs, tiny_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, CLIPImageProcessor, Dinov2Config, PreTrainedConfig

from iclip_hf import ICLIPConfig
from iclip_hf.backends import identity as module
from iclip_hf.backends.identity import changed_model, identity
from iclip_hf.backends.loading import load_pretrained
from iclip_hf.hub.folders import export_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_processor) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "model", tiny_model("dinov2"), tiny_processor)


def changed(then: dict, now: dict) -> list[str]:
    """The names of the entries that differ, but for `model`, the name."""
    return sorted(name for name in {*then, *now} - {"model"} if then.get(name) != now.get(name))


def edit_json(folder: Path, file: str, *place: str, to) -> None:
    content = inner = json.loads((folder / file).read_text())
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = to(inner.get(place[-1])) if callable(to) else to
    (folder / file).write_text(json.dumps(content))


def edit_weights(folder: Path, change) -> None:
    """Changes the values of a tensor; names, shapes and the size of the file stay."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.startswith("recognition") and weights[name].ndim == 2)
    weights[name] = change(weights[name])
    save_file(weights, file, {"format": "pt"})


def swapped(vocabulary: dict) -> dict:
    return {**vocabulary, "dog": vocabulary["cat"], "cat": vocabulary["dog"]}


CONFIG, PROCESSOR = "config.json", "processor_config.json"
CHANGES = {
    "weights permuted": ("weights", lambda f: edit_weights(f, lambda weight: weight.roll(1, 0))),
    "attention_norm": ("configuration", lambda f: edit_json(f, CONFIG, "attention_norm", to="quantile")),
    "layer_norm_eps": ("configuration", lambda f: edit_json(f, CONFIG, "vision_config", "layer_norm_eps", to=1e-3)),
    "hidden_act": ("configuration", lambda f: edit_json(f, CONFIG, "text_config", "hidden_act", to="relu")),
    "an option of tomorrow": ("configuration", lambda f: edit_json(f, CONFIG, "vision_config", "tomorrow", to=1)),
    "image_mean": ("processor", lambda f: edit_json(f, PROCESSOR, "image_processor", "image_mean", to=[0.5] * 3)),
    "text_padding": ("processor", lambda f: edit_json(f, PROCESSOR, "text_padding", to="max_length")),
    "templates": ("processor", lambda f: edit_json(f, PROCESSOR, "templates", to=["a {}"])),
    "two words": ("processor", lambda f: edit_json(f, "tokenizer.json", "model", "vocab", to=swapped)),
    "case": ("processor", lambda f: edit_json(f, "tokenizer_config.json", "do_lower_case", to=False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_number_counts(saved, tmp_path, change):
    part, edit = CHANGES[change]
    shutil.copytree(saved, tmp_path / "model")
    edit(tmp_path / "model")
    before, model = identity(*load_pretrained(saved)), load_pretrained(tmp_path / "model")
    assert changed(before, identity(*model)) == [part] == changed_model(before, *model)


def test_the_dtype_counts(saved):
    model, processor = load_pretrained(saved)
    before, rounded = identity(model, processor), load_pretrained(saved, dtype="bfloat16")
    assert changed(before, identity(*rounded)) == ["dtype", "weights"]
    assert identity(model, processor, "bfloat16")["weights"] == identity(*rounded)["weights"]
    assert changed_model(identity(*rounded), model, processor) == []  # measured in bfloat16
    assert changed_model(before, *rounded) == ["weights"]  # measured in more


class OnDisk:
    """An ONNX folder, without a runtime for its graphs."""

    dtype = torch.float32

    def __init__(self, folder: Path):
        self.folder, self.config = folder, tiny_model().config


def test_both_graphs_of_an_onnx_folder_count(tmp_path, tiny_processor):
    files = ("vision_model.onnx", "text_model.onnx", "config.json", "README.md")
    for file in files:
        (tmp_path / file).write_text(file)
    before = identity(OnDisk(tmp_path), tiny_processor)
    for file in files:
        (tmp_path / file).write_text("else")
        assert changed(before, identity(OnDisk(tmp_path), tiny_processor)) == ["weights"] * file.endswith("onnx")
        (tmp_path / file).write_text(file)


@pytest.mark.parametrize(("vision", "text"), [*zip(VISION, itertools.cycle(TEXT))])
def test_a_saved_and_exported_model_is_the_same(tmp_path, tiny_processor, vision, text):
    """Wherever it lies, whoever wrote its files, and however often it was used."""
    model = tiny_model(vision, text)
    before = identity(model, tiny_processor)
    tiny_processor(labels=["dog"] * 2, padding="max_length", max_length=9, truncation=True)
    edit_json(save(tmp_path / "saved", model, tiny_processor), CONFIG, "transformers_version", to="1.0")
    loaded = load_pretrained(tmp_path / "saved")
    export_model(*loaded, tmp_path / "exported")
    names = set()
    for one in (loaded, load_pretrained(tmp_path / "exported")):
        now = identity(*one)
        names.add(now["model"])
        assert changed(before, now) == []
    assert names == {"saved", "exported"}


def test_options_that_a_later_transformers_adds_do_not_count_unless_used(saved, tmp_path, monkeypatch):
    before = identity(*load_pretrained(saved))
    for part in (PreTrainedConfig, Dinov2Config, BertConfig, CLIPImageProcessor):
        original = part.to_dict
        monkeypatch.setattr(part, "to_dict", lambda self, of=original: {"tomorrow": 0, **of(self)})
    assert changed(before, identity(*load_pretrained(saved))) == []
    shutil.copytree(saved, tmp_path / "model")
    edit_json(tmp_path / "model", PROCESSOR, "image_processor", "tomorrow", to=1)
    edit_json(tmp_path / "model", CONFIG, "text_config", "tomorrow", to=1)
    assert changed(before, identity(*load_pretrained(tmp_path / "model"))) == ["configuration", "processor"]


def other_value(name: str):
    """A value of an option of the model that is not its default."""
    others = {"pooling": "max", "max_over": "similarity", "text_pooling": "mean"}
    others |= {"recognition_pooling": "class_and_average", "map_attention": "none", "attention_norm": "quantile"}
    others |= {"feature_image_mean": [0.5, 0.25, 0.0], "feature_image_std": [2.0, 3.0, 4.0]}
    usual = getattr(ICLIPConfig(), name)
    if name in others or isinstance(usual, bool):
        return others.get(name, not usual)
    return (usual / 2 or 0.5) if isinstance(usual, float) else 2 * (usual or 1)


WITHOUT_EFFECT = ICLIPConfig.option_names("training", "weights")


def test_cached_features_depend_on_the_known_competition_as_far_as_there_is_one():
    known = [ICLIPConfig(max_over="similarity", known_competition=weight).cache_options for weight in (0, 0.1, 0.2)]
    assert known[0] != known[1] == known[2]


def test_options_of_the_model_count_for_a_configuration_unless_only_training_reads_them():
    digests = {}
    for name in ICLIPConfig.option_names():
        config = ICLIPConfig()
        setattr(config, name, other_value(name))  # also where two options are checked against each other
        digests[name] = module.digest(config)
    usual = module.digest(ICLIPConfig())
    assert {name for name in digests if digests[name] == usual} == {*WITHOUT_EFFECT}
    counted = [value for value in digests.values() if value != usual]
    assert len({*counted}) == len(counted) > 10


def test_presence_of_an_onnx_folder_counts(tmp_path, tiny_processor):
    """It is computed from the configuration, which has the trained scale and bias."""
    (tmp_path / "vision_model.onnx").touch()
    options, found = {"logit_bias_init_value": -2.0}, []
    for change in ({}, {"logit_scale_init_value": 1.0}, {"logit_bias_init_value": -3.0}, {"noun_weight": 0.1}):
        model = OnDisk(tmp_path)
        model.config = tiny_model(**{**options, **change}).config
        found.append(identity(model, tiny_processor))
    assert [changed(found[0], one) for one in found] == [[], ["weights"], ["weights"], []]


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_no_output_depends_on_an_option_that_does_not_count(name):
    kind = {"max_over": "similarity", "map_attention": "signed", "logit_bias_init_value": -2}
    model = tiny_model(**kind)
    other = tiny_model(**{**kind, name: other_value(name)})
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        outputs = [one(**tiny_inputs(), output_similarity_maps=True) for one in (model, other)]
    assert torch.equal(outputs[0].similarity_maps, outputs[1].similarity_maps)
    assert torch.equal(outputs[0].logits_per_image, outputs[1].logits_per_image)


def test_models_of_open_clip_by_weights_layers_images_and_tokens():
    open_clip = pytest.importorskip("open_clip")
    settings = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    texts = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}

    def made(quick_gelu=False, **options):
        torch.manual_seed(0)
        return open_clip.CLIP(32, vision_cfg=settings | options, text_cfg=texts, quick_gelu=quick_gelu).eval()

    model, tokenizer = made(), open_clip.SimpleTokenizer()
    model.visual.preprocess_cfg = {"mean": (0.5, 0.5, 0.5)}
    before = identity(model, tokenizer)
    tokenizer(["a dog"])
    other = made().train()
    other.set_grad_checkpointing(True)
    other.visual.preprocess_cfg = {"mean": (0.5, 0.5, 0.5)}
    assert changed(before, identity(other, open_clip.SimpleTokenizer())) == []
    other.visual.preprocess_cfg = {"mean": (0.4, 0.5, 0.5)}
    assert changed(before, identity(other, open_clip.SimpleTokenizer(context_length=20))) == [
        "configuration",
        "processor",
    ]
    other = made(quick_gelu=True)
    other.visual.preprocess_cfg = model.visual.preprocess_cfg
    assert changed(before, identity(other, tokenizer)) == ["configuration"]
