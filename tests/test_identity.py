"""The identity of a model: every change that can change a number counts, and nothing else."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT, VISION, tiny_inputs, tiny_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, CLIPImageProcessor, Dinov2Config, PreTrainedConfig

from iclip_hf import ICLIPConfig
from iclip_hf.backends import identity as module
from iclip_hf.backends.identity import changed, changed_model, identity
from iclip_hf.backends.loading import load_pretrained
from iclip_hf.hub.folders import export_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_processor) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model("dinov2").save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


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
    "two words": ("tokenizer", lambda f: edit_json(f, "tokenizer.json", "model", "vocab", to=swapped)),
    "case": ("tokenizer", lambda f: edit_json(f, "tokenizer_config.json", "do_lower_case", to=False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_number_counts(saved, tmp_path, change):
    part, edit = CHANGES[change]
    shutil.copytree(saved, tmp_path / "model")
    edit(tmp_path / "model")
    before, model = identity(*load_pretrained(saved)), load_pretrained(tmp_path / "model")
    assert changed(before, identity(*model)) == [part] == changed_model(before, *model)


def test_dtype_counts_and_versions_do_not(saved, monkeypatch):
    model, processor = load_pretrained(saved)
    before, rounded = identity(model, processor), load_pretrained(saved, dtype="bfloat16")
    assert changed(before, identity(*rounded)) == ["dtype", "weights"]
    assert identity(model, processor, "bfloat16")["weights"] == identity(*rounded)["weights"]
    assert changed_model(identity(*rounded), model, processor) == []  # measured in bfloat16
    assert changed_model(before, *rounded) == ["weights"]  # measured in more
    monkeypatch.setattr(module, "version", lambda package: "99.1.0")
    assert changed(before, identity(model, processor)) == [] == changed_model(before, model, processor)
    assert module.software() == "iclip-hf 99.1.0, torch 99.1, transformers 99.1"


class OnDisk:
    """An ONNX folder, without a runtime for its graphs."""

    dtype = torch.float32

    def __init__(self, folder: Path):
        self.folder, self.config = folder, tiny_model().config


def test_all_weights_of_an_onnx_folder_count(tmp_path, tiny_processor):
    """Graphs may name files of any name that hold their weights."""
    folder = tmp_path / "model"
    for file in ("vision_model.onnx", "text_model.onnx", "weights.bin", "data/more", "config.json", "README.md"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)
    before = identity(OnDisk(folder), tiny_processor)
    for file, parts in (
        ("text_model.onnx", ["weights"]),
        ("weights.bin", ["weights"]),
        ("data/more", ["weights"]),
        ("README.md", []),
        (".cache/huggingface/download.lock", []),
    ):
        shutil.copytree(folder, tmp_path / file)
        (tmp_path / file / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file / file).write_text("else")
        assert changed(before, identity(OnDisk(tmp_path / file), tiny_processor)) == parts


@pytest.mark.parametrize(("vision", "text"), [*zip(VISION, itertools.cycle(TEXT))])
def test_a_saved_and_exported_model_is_the_same(tmp_path, tiny_processor, vision, text):
    """Wherever it lies, whoever wrote its files, and however often it was used."""
    model = tiny_model(vision, text)
    before = identity(model, tiny_processor)
    tiny_processor(labels=["dog"] * 2, padding="max_length", max_length=9, truncation=True)
    model.save_pretrained(tmp_path / "saved")
    tiny_processor.save_pretrained(tmp_path / "saved")
    edit_json(tmp_path / "saved", CONFIG, "transformers_version", to="1.0")
    loaded = load_pretrained(tmp_path / "saved")
    export_model(*loaded, tmp_path / "exported")
    names = set()
    for one in (loaded, load_pretrained(tmp_path / "exported")):
        now = identity(*one)
        names.add(now["model"])
        assert changed(before, now) == []
    assert names == {str(tmp_path / "saved"), str(tmp_path / "exported")}


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
    usual = getattr(ICLIPConfig(), name)
    if isinstance(usual, (str, bool)):
        return others[name] if isinstance(usual, str) else not usual
    return type(usual)(usual / 2) if usual else 1


def test_options_of_the_model_count_for_a_configuration_unless_only_training_reads_them():
    digests = {}
    for name in {*ICLIPConfig.__annotations__} - {"vision_config", "text_config"}:
        config = ICLIPConfig()
        setattr(config, name, other_value(name))  # also where two options are checked against each other
        digests[name] = module.configuration_digest(config)
    usual = module.configuration_digest(ICLIPConfig())
    assert {name for name in digests if digests[name] == usual} == {*module.TRAINING_OPTIONS}
    counted = [value for value in digests.values() if value != usual]
    assert len({*counted}) == len(counted) > 10


@pytest.mark.parametrize("name", module.TRAINING_OPTIONS)
def test_no_output_depends_on_an_option_that_does_not_count(name):
    kind = {"max_over": "similarity", "map_attention": "signed", "logit_bias_init_value": -2}
    model = tiny_model(**kind)
    other = tiny_model(**kind, **{name: other_value(name)})
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        outputs = [one(**tiny_inputs(), output_similarity_maps=True) for one in (model, other)]
    assert torch.equal(outputs[0].similarity_maps, outputs[1].similarity_maps)
    assert torch.equal(outputs[0].logits_per_image, outputs[1].logits_per_image)


def test_models_of_open_clip_by_weights_layers_images_and_tokens():
    open_clip = pytest.importorskip("open_clip")
    settings = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    texts = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}

    def made(quick_gelu=False):
        torch.manual_seed(0)
        return open_clip.CLIP(32, vision_cfg=settings, text_cfg=texts, quick_gelu=quick_gelu).eval()

    model, tokenizer = made(), open_clip.SimpleTokenizer()
    model.visual.preprocess_cfg = {"mean": (0.5, 0.5, 0.5)}
    before = identity(model, tokenizer)
    tokenizer(["a dog"])
    other = made()
    other.visual.preprocess_cfg = {"mean": (0.5, 0.5, 0.5)}
    assert changed(before, identity(other, open_clip.SimpleTokenizer())) == []
    other.visual.preprocess_cfg = {"mean": (0.4, 0.5, 0.5)}
    assert changed(before, identity(other, open_clip.SimpleTokenizer(context_length=20))) == [
        "configuration",
        "tokenizer",
    ]
    other = made(quick_gelu=True)
    other.visual.preprocess_cfg = model.visual.preprocess_cfg
    assert changed(before, identity(other, tokenizer)) == ["configuration"]


def test_heads_of_a_model_of_open_clip_count():
    attention = torch.nn.MultiheadAttention(8, 2)
    before = module._plain_options(attention)
    assert module.digest(before) == module.digest(module._plain_options(attention.eval()))
    attention.num_heads = 4
    assert before != module._plain_options(attention)


def test_a_vocabulary_of_sentencepiece_counts():
    def tokenizer(model: bytes) -> SimpleNamespace:
        return SimpleNamespace(sp_model=SimpleNamespace(serialized_model_proto=lambda: model))

    assert module.tokenizer_digest(tokenizer(b"1")) == module.tokenizer_digest(tokenizer(b"1"))
    assert module.tokenizer_digest(tokenizer(b"1")) != module.tokenizer_digest(tokenizer(b"2"))


def test_weights_that_accelerate_offloads_count(tiny_processor):
    from accelerate import cpu_offload

    first, second = (identity(cpu_offload(tiny_model(seed=seed)), tiny_processor) for seed in (0, 1))
    assert changed(first, identity(tiny_model(), tiny_processor)) == []
    assert changed(first, second) == ["weights"]
