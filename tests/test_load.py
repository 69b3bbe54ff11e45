"""The loaded model: every way to get one, and that everything takes it."""

import base64
import io
import json
import pickle
import shutil
import time
from functools import partial
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TEXT, VISION, evaluate_model, explain, iclip, save, save_towers
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    pipeline,
)

from iclip_hf import ICLIPModel, load
from iclip_hf import explainers as registry
from iclip_hf.backends import check_model_name, loading
from iclip_hf.backends.explainable import RecordableModel
from iclip_hf.backends.loading import load_iclip
from iclip_hf.evaluation.metrics import make_metrics
from iclip_hf.evaluation.protocols import protocol_settings
from iclip_hf.explainers import Explainer, make_explainer, register_explainer
from iclip_hf.hub.folders import init_model
from iclip_hf.plots.colors import color_table
from iclip_hf.utils.published import is_hub_id
from iclip_hf.utils.tables import known


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_names_of_open_clip(made, monkeypatch):
    model, tokenizer, _ = made("open_clip")
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")
    with pytest.raises(ValueError, match=r"open_clip:ViT-B-7/webli: .*ViT-B-7.*list_pretrained"):
        load("open_clip:ViT-B-7/webli")
    asked = []
    monkeypatch.setattr(open_clip, "create_model", lambda *names, **options: asked.append((names, options)) or model)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: asked.append(name) or tokenizer)
    expected = explain((model, tokenizer), PHOTO, "dog")
    name = check_model_name("open_clip:ViT-B-16-SigLIP/webli")  # of a command line
    found = explain(load(name, device="cpu", dtype="float32"), PHOTO, "dog")
    torch.testing.assert_close(found.raw_maps, expected.raw_maps)
    load("open_clip:hf-hub:timm/PE-Core-B-16", device="cpu")
    of_hub, checked = "hf-hub:timm/PE-Core-B-16", {"require_pretrained": True}
    assert asked[:2] == [(("ViT-B-16-SigLIP", "webli"), checked), "ViT-B-16-SigLIP"]
    assert asked[2:] == [((of_hub, None), checked), of_hub]
    with pytest.raises(FileNotFoundError):
        check_model_name(name, ("iclip",))


def test_every_source_gives_the_same_model(world):
    loaded = load((world.model, world.processor))
    assert isinstance(loaded, RecordableModel) and load(loaded) is loaded
    by_name = load(world.folder / "model", dtype="float32", device="cpu")
    expected = explain(loaded, PHOTO, ["dog", "cat"])
    for source in (by_name, str(world.folder / "model"), (world.model, world.processor)):
        found = explain(source, PHOTO, ["dog", "cat"])
        torch.testing.assert_close(found.raw_maps.cpu(), expected.raw_maps, atol=1e-4, rtol=0)
    assert by_name.identity["weights"] == loaded.identity["weights"] and loaded.identity is loaded.identity
    assert load(world.folder / "model", dtype="bfloat16").identity["dtype"] == "bfloat16"
    for option, value in (("dtype", "float16"), ("device", "cpu")):
        with pytest.raises(ValueError, match=f"{value} was given"):
            load(loaded, **{option: value})


def test_a_loaded_model_can_be_pickled(world):
    """As `torch.save` and processes that are spawned do."""
    loaded = load((world.model, world.processor))
    expected, found = (explain(one, PHOTO, "dog", "grad_cam") for one in (loaded, pickle.loads(pickle.dumps(loaded))))
    torch.testing.assert_close(found.raw_maps, expected.raw_maps, atol=1e-6, rtol=0)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Without the Hub, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_models_of_other_types_are_refused_by_their_config(offline, tmp_path):
    config = BertConfig(num_hidden_layers=1)
    config.save_pretrained(tmp_path / "bert")
    snapshot = offline / "models--org--bert" / "snapshots" / ("0" * 40)
    config.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    for name, loader in ((tmp_path / "bert", load), ("org/bert", load_iclip)):
        with pytest.raises(ValueError, match=f"{name}: expected a model of type iclip.*, but got one of type bert"):
            loader(name)


@pytest.fixture
def two_folders(world, tmp_path) -> tuple[Path, Path]:
    """Folders of a CLIP and of an ICLIP model."""
    sides = {"vision_config": VISION["clip_vision_model"], "text_config": TEXT["clip_text_model"]}
    torch.manual_seed(0)
    parts = {"image_processor": world.processor.image_processor, "tokenizer": world.processor.tokenizer}
    save(tmp_path / "clip", CLIPModel(CLIPConfig(**sides)), CLIPProcessor(**parts))
    shutil.copytree(world.folder / "model", tmp_path / "iclip")
    return tmp_path / "clip", tmp_path / "iclip"


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_a_folder_names_no_kernel_of_the_hub(world, two_folders, tmp_path, monkeypatch, name):
    """Transformers would download its code and run it."""
    from transformers import modeling_utils

    fetched = []
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda kernel, **_: fetched.append(kernel))
    for folder in two_folders:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: "org/kernel"}))
        load(folder)
    AutoModel.from_pretrained(tmp_path / "iclip")
    ICLIPModel.from_vision_text_pretrained(str(tmp_path / "clip"), str(tmp_path / "clip"))
    init_model(tmp_path / "iclip", tmp_path / "new", *save_towers(tmp_path, world.model, world.processor))
    assert not fetched


def test_a_folder_of_the_name_of_an_owner_hides_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai" / "local").mkdir(parents=True)
    assert is_hub_id("openai/clip-vit-base-patch16") and not is_hub_id("openai/local")
    assert check_model_name("openai/clip-vit-base-patch16") == "openai/clip-vit-base-patch16"


@pytest.mark.parametrize("name", ["model/model.safetensors", "towers", "absent"])
def test_a_name_of_no_model_is_refused(world, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "towers").mkdir()
    shutil.copytree(world.folder / "model", tmp_path / "model")
    with pytest.raises(OSError, match=f"^{name}: "):
        load(name)


def test_without_the_hub_a_model_is_refused_at_once(offline, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # a port that nothing listens on
    monkeypatch.setattr(loading, "resolve_revision", huggingface_hub.HfApi().resolve_revision)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a request was tried again"))
    with pytest.raises(OSError, match="^org/clip: .*the Hub could not be reached"):
        load("org/clip")


# ------------------------------------------------------------------------------------- whole folders, and nothing else


def words(count: int, first: str = "a photo of dog [PAD] [UNK] [CLS] [SEP] [MASK]") -> list[str]:
    return [*first.split(), *(f"word{number}" for number in range(count))][:count]


@pytest.mark.parametrize("count", [0, 40, 63, 1000])
def test_a_tokenizer_fits_its_text_tower(world, tmp_path, count):
    """
    One without words is what transformers makes of a folder that lacks tokenizer.json. The tower may have a few
    embeddings more than there are tokens; 40 and 1000 tokens are of other models.
    """
    folder = shutil.copytree(world.folder / "model", tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    if count:
        (tmp_path / "vocab.txt").write_text("\n".join(words(count)))
        BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    if count == 63:
        assert len(load(folder).processor.tokenizer) == 63
        return
    doors = [load, load_iclip, partial(pipeline, "image-text-similarity-map")]
    for door in doors if count else [*doors, AutoProcessor.from_pretrained]:
        with pytest.raises(ValueError, match=r"model: expected the tokenizer of the model, .* such as tokenizer.json"):
            door(str(folder))


def test_an_image_comes_in_any_form(world, tmp_path):
    model, array = load((world.model, world.processor)), np.asarray(PHOTO)
    expected = explain(model, PHOTO, ["dog"])
    PHOTO.save(tmp_path / "a.png")
    file = io.BytesIO()
    PHOTO.save(file, format="PNG")
    data = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), data, array, file.getvalue()]
    forms += [torch.from_numpy(array.copy()).movedim(-1, 0), array / 255]
    found = [explain(model, str(tmp_path / "a.png"), "dog")]
    for column in (forms, pd.Series(forms), np.array([str(tmp_path / "a.png")] * 2)):
        found += explain(model, column, "dog")
    assert len(found) == 1 + 2 * len(forms) + 2
    for one in found:
        assert one.size == (40, 60)
        torch.testing.assert_close(one.raw_maps, expected.raw_maps, atol=1e-5, rtol=0)
    assert len(explain(model, np.stack([array] * 2), [["dog"], ["cat", "sky"]])) == 2
    gray = explain(model, array[..., :1], ["dog"])
    torch.testing.assert_close(gray.raw_maps, explain(model, PHOTO.getchannel(0), ["dog"]).raw_maps)


class Corner(Explainer):
    """1 at the first patch."""

    needs_layers = False

    def forward(self, pixel_values, texts):
        image = self.model.get_image_features(pixel_values)
        maps = torch.zeros(len(pixel_values), texts.text_embeds.shape[-2], *image.grid)
        maps[..., 0, 0] = 1
        return maps, image


def test_a_method_of_another_package(world, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    model = (world.model, world.processor)
    with pytest.raises(ValueError, match="corner.*random"):
        make_explainer(model, "corner")
    register_explainer("corner")(Corner)
    assert explain(model, PHOTO, ["dog"], "corner").raw_maps.flatten().tolist() == [1, *[0] * 15]
    assert evaluate_model(model, dataset[:2], ["corner"]).results["corner"]["mMIoU"]["mmiou"] > 0

    registry._registered.clear()
    PHOTO.save(tmp_path / "a.png")
    command = ["compare", tmp_path / "a.png", "--text", "dog", "--methods", "gem", "corner"]
    command += ["--model", world.folder / "model", "--output", tmp_path / "out.png"]
    assert iclip(*command) == 2
    point = EntryPoint("corner", f"{__name__}:Corner", "iclip_hf.explainers")
    monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints([point]).select(group=group))
    assert iclip(*command) == 0 and (tmp_path / "out.png").is_file()


# ------------------------------------------------------------------------------------------ devices, sizes, processors


@pytest.mark.parametrize(("available", "expected"), [("mps", "mps"), (None, "cpu")])
def test_the_gpu_is_the_default_where_there_is_one(monkeypatch, world, available, expected):
    """Of any kind that torch knows, such as those of a Mac."""
    moved = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: available and torch.device(available))
    monkeypatch.setattr(loading, "_usable", torch.device)
    monkeypatch.setattr(type(world.model), "to", lambda model, device: moved.append(device) or model)
    load(world.folder / "model")
    assert moved == [torch.device(expected)]


def test_a_processor_of_another_kind_is_refused(world):
    parts = {"image_processor": world.processor.image_processor, "tokenizer": world.processor.tokenizer}
    for processor in (CLIPProcessor(**parts), *parts.values()):
        with pytest.raises(ValueError, match=f"expected an ICLIPProcessor, got {type(processor).__name__}"):
            load((world.model, processor))


# ------------------------------------------------------------------------------------------- methods and their options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methd": "gem"}, TypeError, "'methd'; did you mean 'method'"),
        ({"method": "gem", "dept": 3}, TypeError, "'dept'; did you mean 'depth'"),
        ({"method": "magic"}, ValueError, "'magic'. Choose one of itsm, .*, random"),
    ],
)
def test_a_wrong_method_or_option_is_named_with_what_it_resembles(world, options, error, message):
    with pytest.raises(error, match=message):
        explain((world.model, world.processor), PHOTO, ["dog"], **options)


def test_names_differ_neither_by_case_nor_by_hyphens(world):
    names = ["grad_cam", "other-one", "sharp", "Sharp"]
    typed = ["GRAD-CAM", "other_One", "Sharp", "sharp"]
    assert [known(name, names, "method") for name in typed] == ["grad_cam", "other-one", "Sharp", "sharp"]
    assert make_explainer((world.model, world.processor), "ITSM").name == "itsm"
    assert [metric.name for metric in make_metrics(["MMIOU", "deletion-insertion"])] == ["mMIoU", "deletion_insertion"]
    assert make_metrics("segmentation", protocol="NACLIP")[0].protocol == "naclip"
    assert protocol_settings("SCLIP", "voc21") == protocol_settings("sclip", "voc21")
    assert (color_table("HEAT") == color_table("heat")).all()
