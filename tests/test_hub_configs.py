"""Every shipped configuration: of the published size, runnable, and agreed with what lies beside it."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_inputs
from transformers import AutoConfig, AutoImageProcessor

from iclip_hf import ICLIPConfig, ICLIPModel, ICLIPProcessor
from iclip_hf.model.configuration_iclip import patch_side


FOLDER = Path(__file__).parents[1] / "hub_configs"
CONFIGS = sorted(path.parent for path in FOLDER.glob("*/config.json"))
# In millions: the image tower as its authors publish it, CLIP's or MiniLM's text tower without what ICLIP leaves out
# (pooler), and the rest: the projections and, if there is one, the feature tower. The README counts this tower as an
# image tower.
SIZES = {
    "iclip-vit-b16": (85.8, 63.2, 1.3),
    "iclip-vit-s16": (21.7, 63.2, 0.9),
    "iclip-vit-b8": (85.8, 63.2, 1.3),
    "iclip-dinov2-b14": (86.6, 63.2, 1.7),
    "iclip-dinov3-b16": (85.7, 63.2, 1.3),
    "iclip-dinov2-s14-minilm": (22.1, 22.6, 9.3),
}


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("folder", CONFIGS, ids=lambda folder: folder.name)
def test_size(folder):
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = ICLIPModel(config)
    vision = config.vision_config
    image, language = parameters(model.vision_model), parameters(model.text_model)
    sizes = image, language, parameters(model) - image - language
    assert tuple(round(size / 1e6, 1) for size in sizes) == SIZES[folder.name]
    assert vision.model_type != "vit" or vision.layer_norm_eps == 1e-6


@pytest.mark.parametrize("folder", CONFIGS, ids=lambda folder: folder.name)
def test_a_tiny_version_runs(folder):
    options = json.loads((folder / "config.json").read_text())
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 64}
    vision = {**options.pop("vision_config"), **small}
    text = {**options.pop("text_config"), **small, "vocab_size": 64, "eos_token_id": 63, "pad_token_id": 1}
    config = ICLIPConfig(**options, vision_config=vision, text_config=text)
    model = ICLIPModel(config).eval()
    height, width = 2 * patch_side(config), 3 * patch_side(config)
    with torch.no_grad():
        outputs = model(**tiny_inputs(size=(height, width)), output_similarity_maps=True)
    cell_size = config.map_cell_size or patch_side(config)
    assert outputs.similarity_maps.shape == (2, 3, height // cell_size, width // cell_size)
    assert outputs.similarity_maps.isfinite().all() and outputs.similarity_maps.std() > 0
    assert (model.interpretability is not None) == config.dual_projection


@pytest.mark.parametrize("folder", CONFIGS, ids=lambda folder: folder.name)
def test_processor_fits_the_tower(folder):
    options, _ = ICLIPProcessor.get_processor_dict(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder)
    pixels = image_processor(images=torch.zeros(3, 50, 80), return_tensors="pt")["pixel_values"]
    config = ICLIPConfig.from_pretrained(folder)
    side = 224 if config.feature_config is None else 504
    assert pixels.shape == (1, 3, side, side)  # the whole image, whatever its proportions
    assert pixels.std((0, 2, 3)).max() < 1e-6
    assert options["patch_size"] == patch_side(config) and side % options["patch_size"] == 0


@pytest.mark.parametrize("studies", sorted(FOLDER.glob("*/studies.yaml")), ids=lambda path: path.parent.name)
def test_every_baseline_is_another_model(studies):
    options = yaml.safe_load(studies.read_text())
    models = set()
    for changes in options["runs"].values():
        changes = dict(change.split("=") for change in [*options["model_options"], *changes])
        changes = {name: yaml.safe_load(value) for name, value in changes.items()}
        known, _ = ICLIPConfig.get_config_dict(studies.parent)
        config = ICLIPConfig(**{**known, **changes})
        # A logit bias learns from nouns.
        assert options["arguments"].get("nouns") or config.logit_bias_init_value is None
        with torch.device("meta"):
            assert (ICLIPModel(config).interpretability is not None) == changes["dual_projection"]
        models.add(config.to_json_string())
    assert len(models) == len(options["runs"]) >= 5


@pytest.mark.slow
def test_the_embedded_model_is_what_its_configuration_says(embedded_folder):
    trained = ICLIPConfig.from_pretrained(embedded_folder).to_dict()
    written = ICLIPConfig.from_pretrained(FOLDER / "iclip-dinov2-s14-minilm").to_dict()
    from_tower_files = {"_name_or_path", "architectures", "dtype", "gradient_checkpointing", "position_embedding_type"}
    from_tower_files |= {"label_names", "model_args", "num_labels", "id2label", "label2id", "initializer_range"}
    for name in ICLIPConfig.__annotations__:
        if name.endswith("_config") and trained[name] is not None:
            names = (set(trained[name]) | set(written[name])) - from_tower_files
            assert [option for option in names if trained[name].get(option) != written[name].get(option)] == []
        elif not name.startswith("feature_image_"):  # computed when towers are joined
            assert trained[name] == written[name]
