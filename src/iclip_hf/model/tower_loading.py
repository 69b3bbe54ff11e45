"""Loads a tower from a checkpoint, or initialises it, and checks that its weights are complete and finite."""

import inspect
import os
from collections.abc import Iterable
from itertools import chain

import torch
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_iclip import ICLIPConfig
from .feature_tower import FeatureTower


def tower_config(checkpoint: str, sub_config: str) -> PreTrainedConfig:
    """
    Returns the configuration of a tower checkpoint. In a two-tower checkpoint, `sub_config` names the tower, such as
    `"vision_config"`. Raises `ValueError` for an ICLIP model, because its weights have other names than the weights of
    a tower.
    """
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    if config.model_type == ICLIPConfig.model_type:
        raise ValueError(
            f"{checkpoint}: this is an ICLIP model, not a tower; train it further by `iclip train --model`."
        )
    config._attn_implementation = None  # a file could name code of the Hub
    return getattr(config, sub_config, config)


# Supported text towers by model type. They are encoders whose output for a text does not depend on its padding.
TEXT_TOWERS = (
    "albert",
    "bert",
    "camembert",
    "clip_text_model",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "eurobert",
    "gte",
    "jina_embeddings_v3",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "rembert",
    "roberta",
    "siglip_text_model",
    "tipsv2_text_model",
    "xlm-roberta",
)


def check_text_tower(config: PreTrainedConfig) -> None:
    """Raises `ValueError` unless the type of a text tower is supported."""
    if config.model_type not in TEXT_TOWERS:
        raise ValueError(f"A text tower is one of {', '.join(TEXT_TOWERS)}, not {config.model_type!r}.")


def load_tower(config: PreTrainedConfig, checkpoint: str | None = None) -> PreTrainedModel:
    """Loads a tower from a checkpoint, or initialises it. The tower has no pooler, which would not be trained."""
    if config.model_type == "siglip_text_model":  # not in the Auto classes, and slow to import
        from transformers import SiglipTextModel as tower_class
    elif config.model_type == "timm_wrapper":
        tower_class = FeatureTower
    else:
        tower_class = MODEL_MAPPING[type(config)]
    takes_pooler = "add_pooling_layer" in inspect.signature(tower_class.__init__).parameters
    kwargs = {"add_pooling_layer": False} if takes_pooler else {}
    if checkpoint is None:
        return tower_class._from_config(config, **kwargs)
    # Transformers would report weights that the tower does not use, such as a pooler's. Missing weights are checked
    # below.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tower, loading = tower_class.from_pretrained(
            checkpoint, config=config, dtype=torch.float32, output_loading_info=True, **kwargs
        )
    except ImportError:  # a package is missing
        raise
    except Exception as error:  # its message may not name the tower
        problem = str(error)
        if "ignore_mismatched_sizes" in problem:  # the details are in a log
            problem = "its weights have other shapes than the configuration says"
        raise OSError(f"{checkpoint}: the tower cannot be loaded: {problem}; download it again.") from error
    finally:
        logging.set_verbosity(verbosity)
    check_weights(checkpoint, tower, loading["missing_keys"])
    keep_absolute_path(checkpoint, tower)
    return tower


def keep_absolute_path(checkpoint: str | os.PathLike, model: PreTrainedModel) -> None:
    """
    Makes the name of a model that was loaded from a folder an absolute path. From another working directory, a
    relative path would look like a Hub id.
    """
    if os.path.isdir(checkpoint):
        model.config._name_or_path = os.path.abspath(checkpoint)


def check_weights(checkpoint, model: PreTrainedModel, missing: Iterable[str]) -> None:
    """
    Raises `ValueError` if weights of a loaded model are missing, or contain NaN or infinity. `from_pretrained` fills
    missing weights with random numbers.
    """
    if missing := sorted(missing):
        raise ValueError(
            f"{checkpoint}: {len(missing)} weights of {type(model).__name__} are missing, such as {missing[0]}; "
            "download it again."
        )
    for name, weight in chain(model.named_parameters(), model.named_buffers()):
        # Offloaded and quantized weights are not read.
        readable = weight.is_floating_point() and not weight.is_meta and type(weight.data) is torch.Tensor
        if readable and not weight.detach().sum(dtype=torch.float32).isfinite():  # a sum reads each number only once
            raise ValueError(f"{checkpoint}: {name} holds NaN or infinity; download it again.")
