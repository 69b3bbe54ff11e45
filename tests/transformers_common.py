"""
Transformers' own common tests of a model, on ICLIP with every pair of towers, and of a processor.

`make test-transformers` runs them: the tests come from the source distribution of the installed version, fetched by
pip into `runs/`. What fails by design stands in `BY_DESIGN` with its reason, and must fail: the list stays short and
true.
"""

import itertools
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path

import pytest
import transformers
from conftest import TEXT, VISION, tiny_config, tiny_image_processor, tiny_inputs, tiny_tokenizer
from transformers.testing_utils import torch_device

from iclip_hf import ICLIPModel, ICLIPProcessor


RUNS = Path(__file__).parents[1] / "runs"


def common_tests() -> Path:
    """The folder `tests` of the installed version's source distribution."""
    name = f"transformers-{transformers.__version__}"
    folder = RUNS / name / "tests"
    if not folder.is_dir():
        options = "--quiet --no-deps --no-build-isolation --no-binary :all: --dest".split()
        pip = [sys.executable, "-m", "pip", "download", *options, RUNS, name.replace("-", "==")]
        subprocess.run(pip, check=True)
        with tarfile.open(RUNS / f"{name}.tar.gz") as archive:
            members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
            archive.extractall(RUNS, members, filter="data")
    return folder


def stub(name: str, **content) -> None:
    """A module that the tests import and the source distribution lacks."""
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)


# In place of the tests of exporters and of text generation.
stub("common", __path__=[str(common_tests())])
for module, tester in (
    ("exporters.test_export", "ExportTesterMixin"),
    ("generation.test_utils", "GenerationTesterMixin"),
):
    stub(f"common.{module.split('.')[0]}", __path__=[])
    stub(f"common.{module}", **{tester: type(tester, (), {})})

# Finds the test images of the Hub, which the tests of videos and audio alone read.
stub("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)

from common.test_modeling_common import ModelTesterMixin  # noqa: E402
from common.test_processing_common import ProcessorTesterMixin  # noqa: E402


class Tester:
    """What the common tests ask of a model: its configuration, inputs, and their numbers."""

    is_training = True
    batch_size, seq_length = 3, 7
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, config):
        self.config = config

    def get_config(self):
        return type(self.config)(**self.config.to_dict())

    def prepare_config_and_inputs_for_common(self):
        inputs = {name: value.to(torch_device) for name, value in tiny_inputs(batch=3, texts=3).items()}
        return self.get_config(), inputs | {"return_loss": True}


BY_DESIGN = {
    "test_can_set_attention_dynamically": "the image tower's fused attention is its own, which returns the class "
    "token's row",
    "test_can_set_attention_dynamically_composite_model": "the same",
    "test_sdpa_can_dispatch_composite_models": "the same",
    "test_hidden_states_output": "hidden states are those of a tower, in the outputs of either side",
    "test_attention_outputs": "and so are attentions",
    "test_retain_grad_hidden_states_attentions": "and so are attentions",
    "test_can_load_ignoring_mismatched_shapes": "it sets all options with _std to a number, and "
    "`feature_image_std` is a list",
    "test_model_weights_reload_no_missing_tied_weights": "a folder that lacks weights is refused, and not filled with "
    "random ones",
}
BY_DESIGN_OF_SIGLIP = dict.fromkeys(
    ("test_get_text_features_output_0", "test_get_text_features_output_2"),
    "texts are padded to the length that the tower was trained with",
)


def fails(name: str, reason: str, mixin: type = ModelTesterMixin):
    @pytest.mark.xfail(reason=reason, strict=True)
    def test(self):
        getattr(mixin, name)(self)

    return test


def reverse_loading(self):
    # Older scales are reshaped, under the same names.
    ModelTesterMixin.test_reverse_loading_mapping(self, check_keys_were_modified=False)


def common(config) -> type:
    """The tests of one configuration, none of them switched off."""
    by_design = BY_DESIGN | (BY_DESIGN_OF_SIGLIP if config.text_config.model_type == "siglip_text_model" else {})
    content = {
        "all_model_classes": (ICLIPModel,),
        "additional_model_inputs": ("pixel_values",),
        "_is_composite": True,
        "setUp": lambda self: setattr(self, "model_tester", Tester(config)),
        "test_reverse_loading_mapping": reverse_loading,
        **{name: fails(name, reason) for name, reason in by_design.items()},
    }
    return type("Common", (ModelTesterMixin, unittest.TestCase), content)


for vision, text in itertools.product(VISION, TEXT):
    # unlocked: the common tests train all parameters
    vars()[f"Test_{vision}_{text}"] = common(
        # A scale of 1: the usual one would enlarge the rounding of half precision beyond the tolerances.
        tiny_config(vision, text, lock_vision=False, logit_scale_init_value=0.0)
    )


PROCESSOR_BY_DESIGN = {
    "test_subprocessor_defaults_preserved_by_kwargs_0_images": "texts are padded and cut as the processor says, not "
    "the tokenizer",
    "test_call_arguments_not_in_attributes": "`templates` replaces the processor's own in one call",
}


class ProcessorComponents(ProcessorTesterMixin):
    """What the common tests ask of a processor: its class and parts."""

    processor_class = ICLIPProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer(Path(tempfile.mkdtemp()))

    @classmethod
    def _setup_image_processor(cls):
        return tiny_image_processor()

    @staticmethod
    def prepare_processor_dict():
        return {"patch_size": 8}


expected_failures = {name: fails(name, reason, ProcessorTesterMixin) for name, reason in PROCESSOR_BY_DESIGN.items()}
Test_processor = type("Test_processor", (ProcessorComponents, unittest.TestCase), expected_failures)
