import json
import math

import pytest
from conftest import TEXT, VISION, tiny_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from iclip_hf import ICLIPConfig, ICLIPModel


def test_defaults_are_the_papers_model():
    config = ICLIPConfig()
    assert config.vision_config.model_type == "vit" and config.vision_config.layer_norm_eps == 1e-6
    assert config.vision_config.patch_size == 16 and config.vision_config.hidden_size == 768
    assert config.text_config.model_type == "clip_text_model" and config.text_config.eos_token_id == 49407
    assert config.pooling == "masked_max" and config.dual_projection and config.lock_vision


def test_round_trip_keeps_every_option(tmp_path):
    options = {"projection_dim": 48, "dual_projection": False, "map_affinity": 4, "attention_norm": "quantile"}
    config = tiny_config("dinov2_with_registers", "bert", **options)
    config.save_pretrained(tmp_path)
    for loaded in (ICLIPConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert {name: getattr(loaded, name) for name in options} == options
    assert json.loads(config.to_json_string())["vision_config"]["num_register_tokens"] == 3


@pytest.mark.parametrize("repository", ["org/name", "org/name-v1.5"])
def test_pipelines_whose_code_is_on_the_hub_stay(tmp_path, repository):
    config = tiny_config()
    config.custom_pipelines = {"task": {"impl": f"{repository}--pipeline_iclip.Pipeline"}}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["custom_pipelines"] == config.custom_pipelines


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("map_attention", True),
        ("text_pooling", "pooler"),
        ("max_sharpness", 0),
        ("value_share", 1.5),
        ("center_tokens", True),
        ("max_over", "similarity"),
        ("known_competition", 1.0),
        ("known_competition", -0.5),
        ("noun_weight", 1.1),
        ("unknown_weight", -0.1),
        ("noun_competition", 2),
        ("map_tokens", 4),
        ("map_tokens", 8.5),
        ("recognition_pooling", "class_and_average"),
        ("vision_downsampling", 0),
        ("map_atention", "none"),
    ],
)
def test_bad_options_are_refused(option, value):
    with pytest.raises((ValueError, StrictDataclassError), match=option):
        ICLIPConfig(dual_projection=False, **{option: value})


@pytest.mark.parametrize("option", ["presence_bias", "logit_bias_init_value", "map_affinity"])
def test_numbers_that_are_not_finite_are_refused(option):
    """Python reads NaN in a config.json, and a presence would be NaN."""
    for value in (math.nan, math.inf):
        with pytest.raises(StrictDataclassError, match=option):
            ICLIPConfig.from_dict({option: value})


def test_towers_that_do_not_fit_are_refused():
    no_class_token = {"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="class token.*siglip_vision_model"):
        ICLIPModel(ICLIPConfig(vision_config=no_class_token, text_config=TEXT["clip_text_model"]))
    with pytest.raises(ValueError, match='text_pooling="eos".*bert'):
        ICLIPModel(ICLIPConfig(vision_config=VISION["vit"], text_config=TEXT["bert"]))


def test_features_need_a_pooling_of_patches():
    features = {"feature_config": {"model_type": "timm_wrapper", "architecture": "test_resnet"}}
    assert ICLIPConfig(**features, feature_dim=8).patch_dim == 768 + 8 and ICLIPConfig().patch_dim == 768
    with pytest.raises(StrictDataclassError, match="feature_config needs another pooling"):
        ICLIPConfig(**features, pooling="class_token")
