import copy
import math

import onnx
import onnxruntime
import pytest
import torch
from conftest import FEATURES, explain, iclip, noise, save, tiny_inputs, tiny_model
from torch.nn import functional as F

from iclip_hf import ICLIPConfig, load
from iclip_hf.backends import onnx as onnx_export
from iclip_hf.backends.onnx import ONNXModel, export_onnx, trained_config
from iclip_hf.evaluation.evaluate import evaluate_model
from iclip_hf.evaluation.metrics.faithfulness import LayerRandomization
from iclip_hf.explainers import METHODS, explainer_class, make_explainer


IMAGE = ("image_embeds", "patch_embeds", "cell_embeds", "attention", "map_attention")
TEXT = ("text_embeds", "map_text_embeds", "attention_weights")


@pytest.fixture(scope="module")
def model():
    """As the embedded model, with a feature tower, and trained values that are not those of its configuration."""
    options = {"max_over": "similarity", "center_tokens": True, "map_attention": "signed", "map_affinity": 10.0}
    options |= {"recognition_pooling": "class_and_average", "recognition_share": 0.4, "map_cell_size": 10}
    options |= {"peak_share": 0.3, "image_hidden_size": 12, "text_hidden_size": 20}
    options |= {"logit_bias_init_value": -6.0, "presence_bias": 0.5}
    options |= {**FEATURES, "feature_image_mean": [0.1, 0.0, -0.1], "feature_image_std": [2.0, 1.0, 0.5]}
    model = tiny_model("dinov2", attention_norm="quantile", **options)
    with torch.no_grad():
        model.token_mean.copy_(torch.linspace(-1, 1, len(model.token_mean)))
        model.attention_direction.copy_(torch.linspace(-1, 1, len(model.attention_direction)))
        model.recognition.logit_scale.fill_(3.0)
        model.recognition.logit_bias.fill_(-1.5)
    return model


@pytest.fixture(scope="module")
def processor(tiny_processor):
    processor = copy.copy(tiny_processor)
    processor.templates = ["a photo of the {}", "{}"]
    return processor


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    named = copy.deepcopy(model)
    named.config.auto_map = {"AutoConfig": "org/repo--code.Config"}
    return export_onnx(named, processor, tmp_path_factory.mktemp("onnx") / "exported")


def test_an_exported_folder_names_no_code_of_the_folder_that_was_loaded(folder):
    assert not any("org/repo" in file.read_text() for file in folder.glob("*.json"))


def run(path, inputs):
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    outputs = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.from_numpy(output) for name, output in zip(names, outputs)}


def images_and_texts(names=("input_ids", "attention_mask", "token_type_ids")):
    """Batches of other numbers and sizes than the graphs were made with."""
    for batch, size in [(1, (32, 32)), (3, (16, 80)), (2, (56, 24))]:
        yield {"pixel_values": torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))}
    for labels, prompts, length in [(1, 1, 5), (4, 1, 7), (1, 3, 4), (3, 4, 7)]:
        tokens = tiny_inputs(texts=labels * prompts)
        tokens["token_type_ids"] = torch.zeros_like(tokens["input_ids"])
        yield {name: tokens[name][:, :length].unflatten(0, (labels, prompts)) for name in names}


@torch.no_grad()
def check_agreement(model, folder, batches):
    for inputs in batches:
        if "pixel_values" in inputs:
            outputs, expected = run(folder / "vision_model.onnx", inputs), model.get_image_features(**inputs)
            assert [*outputs] == [name for name in IMAGE if getattr(expected, name) is not None]
        else:
            outputs, prompts = run(folder / "text_model.onnx", inputs), inputs["input_ids"].shape[1]
            flat = {name: value.flatten(0, 1) for name, value in inputs.items()}
            expected = model.get_text_features(**flat, num_templates=prompts)
            assert tuple(outputs) == (TEXT if model.config.map_attention == "signed" else TEXT[:-1])
        for name, output in outputs.items():
            torch.testing.assert_close(output, expected[name], atol=1e-5, rtol=0)


def test_onnxruntime_agrees_at_any_number_length_and_size(model, folder):
    check_agreement(model, folder, images_and_texts())


def test_graphs_run_by_cuda_or_on_the_cpu(folder, monkeypatch):
    names = [f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU")]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    asked, session = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, providers: asked.append(providers) or session(path)
    )
    ONNXModel(folder)
    assert asked == [names[1:]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "text", "tokens"),
    [
        ("vit", "clip_text_model", ["input_ids", "attention_mask"]),
        ("dinov2_with_registers", "siglip_text_model", ["input_ids"]),
        ("dinov3_vit", "bert", ["input_ids", "attention_mask"]),
        ("clip_vision_model", "clip_text_model", ["input_ids"]),
    ],
)
def test_every_tower(tiny_processor, tmp_path, vision, text, tokens):
    model, processor = tiny_model(vision, text, pooling="masked_max"), copy.deepcopy(tiny_processor)
    processor.tokenizer.model_input_names = tokens
    export_onnx(model, processor, tmp_path / "exported")
    check_agreement(model, tmp_path / "exported", images_and_texts(tokens))


WITHOUT_LAYERS = [method for method in METHODS if not explainer_class(method).needs_layers]


@pytest.mark.parametrize("method", WITHOUT_LAYERS)
@pytest.mark.parametrize("templates", [None, ["{}"]], ids=["two templates", "one"])
def test_explanations_are_the_models(model, folder, processor, method, templates):
    images = [noise(size) for size in [(60, 40), (30, 90)]]
    texts = [["dog", "red ball"], ["sky"]]
    options = {"method": method, "templates": templates, "image_size": {"shortest_edge": 24}}
    expected = explain((model, processor), images, texts, **options)
    for one, other in zip(explain(folder, images, texts, **options), expected):
        torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.raw_maps, other.raw_maps, atol=1e-5, rtol=0)


@torch.no_grad()
def test_texts_for_each_image_keep_their_shape_and_presence_is_that_of_the_trained_model(model, folder):
    tokens = {name: value.view(2, 4, -1) for name, value in tiny_inputs(texts=8).items() if name != "pixel_values"}
    tokens["token_type_ids"], exported = torch.zeros_like(tokens["input_ids"]), ONNXModel(folder)
    for num_templates in (1, 2):
        found = exported.get_text_features(**tokens, num_templates=num_templates)
        expected = model.get_text_features(**tokens, num_templates=num_templates)
        for name in TEXT:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)
    scores = torch.linspace(-1, 1, 9)
    torch.testing.assert_close(exported.presence(scores), model.presence(scores), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_configuration_holds_what_a_model_was_trained_to():
    model = tiny_model()
    model.recognition.logit_scale.fill_(9.0)  # a scale is at most 100
    config = ICLIPConfig.from_dict(trained_config(model).to_dict())
    assert config.logit_scale_init_value == pytest.approx(math.log(100)) and config.logit_bias_init_value is None
    assert model.config.logit_scale_init_value == 2.6592


def test_what_cannot_be_exported_is_said_before(tiny_processor, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_vision_program", None)
    for model, weights, said in ((tiny_model(), "int4", "int4"), (tiny_model().half(), "int8", "float16")):
        with pytest.raises(ValueError, match=said):
            export_onnx(model, tiny_processor, tmp_path / "exported", weights)


def test_a_damaged_graph_is_refused(folder, tmp_path):
    for path in folder.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".onnx" else content)
    with pytest.raises(ValueError, match=f"{tmp_path}: .* download it again"):
        load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "error"), [("bfloat16", 0.01), ("int8", 0.01)])
def test_reduced_weights(model, folder, tiny_processor, tmp_path, capsys, weights, error):
    save(tmp_path / "model", model, tiny_processor)
    assert iclip("export", tmp_path / "model", tmp_path / "exported", "--format", f"onnx-{weights}") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'exported'}: ")
    for inputs in images_and_texts():
        file = "vision_model.onnx" if "pixel_values" in inputs else "text_model.onnx"
        name = "patch_embeds" if "pixel_values" in inputs else "map_text_embeds"
        reduced, exact = (run(path / file, inputs)[name] for path in (tmp_path / "exported", folder))
        distance = 1 - F.cosine_similarity(reduced, exact, dim=-1)
        assert 1e-7 < distance.max() < error
        assert (tmp_path / "exported" / file).stat().st_size < (folder / file).stat().st_size
    for name in ("vision_model.onnx", "text_model.onnx"):  # all matrices, those of the hidden layers too
        stored = onnx.load(tmp_path / "exported" / name).graph.initializer
        whole = [one for one in stored if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) > 1]
        assert [one.name for one in whole if math.prod(one.dims) != max(one.dims)] == []  # but scales of kernels


def test_what_looks_inside_the_tower_is_refused(folder, tiny_processor):
    loaded = load((ONNXModel(folder), tiny_processor))
    for method in set(METHODS).difference(WITHOUT_LAYERS):
        with pytest.raises(ValueError, match="needs the layers of a PyTorch model"):
            make_explainer(loaded, method)
    with pytest.raises(ValueError, match="needs the layers of a PyTorch model"):
        LayerRandomization(loaded)


def test_faithfulness_is_measured_but_for_what_needs_layers(model, folder, tiny_processor, dataset):
    options = {"metrics": "faithfulness", "methods": ["itsm"], "limit": 2}
    expected = evaluate_model((model, tiny_processor), dataset, **options).results["itsm"]
    found = evaluate_model((ONNXModel(folder), tiny_processor), dataset, **options).results["itsm"]
    assert expected.keys() - found.keys() == {"randomization"}
    for name in ("insertion_probability", "deletion_cosine"):
        assert found["deletion_insertion"][name] == pytest.approx(expected["deletion_insertion"][name], abs=1e-4)
