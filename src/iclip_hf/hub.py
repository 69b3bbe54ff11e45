"""Model folders for the Hub: two towers joined to a new one, a trained one with its code and card, and the way up."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ViTConfig, ViTModel
from transformers.dynamic_module_utils import get_relative_import_files

from .cache import loading_errors, new_folder
from .configuration_iclip import ICLIPConfig
from .demo.checkpoint import embedded_model
from .demo.towers import embedded_towers
from .loading import load_whole
from .model_card import describe_tower, write_model_card
from .modeling_iclip import ICLIPModel, load_tower
from .pipeline_iclip import ImageTextSimilarityMapPipeline
from .processing_iclip import ICLIPProcessor


_SHIPPED = Path(str(files("iclip_hf.hub_configs")))
_EMBEDDED = _SHIPPED / "iclip-dinov2-s14-minilm"

# Where Transformers finds each class in a folder that carries its code.
_AUTO_MAP = {
    "AutoConfig": "configuration_iclip.ICLIPConfig",
    "AutoModel": "modeling_iclip.ICLIPModel",
    "AutoModelForZeroShotImageClassification": "modeling_iclip.ICLIPModel",
    "AutoProcessor": "processing_iclip.ICLIPProcessor",
}
_CUSTOM_PIPELINES = {
    "image-text-similarity-map": {
        "impl": f"pipeline_iclip.{ImageTextSimilarityMapPipeline.__name__}",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}
# What must be the same in a checkpoint as in the configuration; the rest (such as DINO's epsilon) the configuration decides.
_TOWER_SHAPE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "mlp_ratio",
    "image_size",
    "patch_size",
    "num_register_tokens",
    "max_position_embeddings",
    "vocab_size",
)


# ------------------------------------------------------------------------------------------------------ a new model


def config_folder(name: str | Path) -> Path:
    """
    The folder of a shipped configuration by its name, or any other folder with a `config.json`.

    Raises:
        `FileNotFoundError`: there is none.
    """
    for folder in (Path(name), _SHIPPED / name):
        if (folder / "config.json").is_file():
            return folder
    names = sorted(path.parent.name for path in _SHIPPED.glob("*/config.json"))
    raise FileNotFoundError(f"{name}: expected a folder with a config.json, or one of {', '.join(names)}.")


def init_model(config: str | Path, output: str | Path, vision: str | None = None, text: str | None = None) -> Path:
    """
    Writes the folder of a new model: the towers of two checkpoints, fresh projections, processor and tokenizer.

    Args:
        config: name of a shipped configuration (`"iclip-vit-b16"`) or a folder with `config.json` and `processor_config.json`.
        output: the folder to write; new or empty.
        vision (*optional*): image tower: a folder or Hub id, or a DINO checkpoint in its authors' form (`.pth`).
        text (*optional*): text tower, a folder or Hub id, also of a two-tower model such as CLIP.
            Towers that are not given are those that the configuration's `train.yaml` names; the embedded model's
            configuration without other towers gives that model as it was trained.

    Returns:
        The folder.

    Raises:
        `FileExistsError`: there is something in `output`.
        `OSError` or `ValueError`: a checkpoint cannot be had, or is not of the configuration's shape.
    """
    source = config_folder(config)
    settings = source / "train.yaml"
    named = (yaml.safe_load(settings.read_text()) if settings.is_file() else None) or {}
    trained = vision is None and text is None and source.resolve() == _EMBEDDED.resolve()
    vision, text = vision or named.get("vision"), text or named.get("text")
    if not (vision and text):
        raise ValueError(f"Expected an image and a text tower, which {source} does not name: give vision and text.")
    known = {}
    with new_folder(output) as folder:
        if trained:
            model, processor = load_iclip(embedded_model())
            known = {"training": named, "metrics": json.loads((source / "results.json").read_text())}
        else:
            model, processor = join_towers(source, vision, text)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_model_card(model, processor, folder, **known)
    return Path(output)


def join_towers(
    source: Path, vision: str, text: str, image_size: int | None = None, **options
) -> tuple[ICLIPModel, ICLIPProcessor]:
    """
    Two towers with fresh projections, and their processor.

    Args:
        source: folder of a configuration, with `config.json` and `processor_config.json`.
        vision, text: as for [`init_model`], or `"embedded"` for those of the embedded model.
        image_size (*optional*): height and width in pixels; the configuration's if not given.
        options: of [`ICLIPConfig`], over the configuration's.

    Raises:
        `OSError` or `ValueError`: as [`init_model`].
    """
    if "embedded" in (vision, text):
        towers = map(str, embedded_towers())
        vision, text = (tower if name == "embedded" else name for name, tower in zip((vision, text), towers))
    config = ICLIPConfig(**{**ICLIPConfig.get_config_dict(source)[0], **options})
    image_tower = _image_tower(config.vision_config, vision)
    model = ICLIPModel(config, image_tower, _checked_tower(config.text_config, text, "text_config")).eval()

    size = {} if image_size is None else {"size": {"height": image_size, "width": image_size}}
    image_processor = AutoImageProcessor.from_pretrained(source, **size)
    known, _ = ICLIPProcessor.get_processor_dict(source)
    known = {name: value for name, value in known.items() if name not in ("processor_class", "image_processor")}
    with loading_errors(text):
        tokenizer = AutoTokenizer.from_pretrained(text, trust_remote_code=False)
    return model, ICLIPProcessor(image_processor, tokenizer, **known)


def _image_tower(config, checkpoint: str):
    if Path(checkpoint).suffix == ".pth":
        return load_dino_checkpoint(checkpoint, config)
    return _checked_tower(config, checkpoint, "vision_config")


def _checked_tower(config, checkpoint: str, side: str):
    """A tower in the configuration's form: other shapes would load in part, with random numbers for the rest."""
    with loading_errors(checkpoint):
        found = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    found = getattr(found, side, found)
    differences = [
        f"{name} is {getattr(found, name, None)!r}, expected {getattr(config, name, None)!r}"
        for name in _TOWER_SHAPE
        if getattr(found, name, None) != getattr(config, name, None)
    ]
    if differences:
        raise ValueError(f"{checkpoint}: not a tower of this configuration: {'; '.join(differences)}.")
    with loading_errors(checkpoint):
        return load_tower(config, checkpoint)


# ----------------------------------------------------------------------------------- DINO in its authors' form


# Names of the authors' code -> names in the files of `ViTModel`.
_DINO_NAMES = {
    r"cls_token": "embeddings.cls_token",
    r"pos_embed": "embeddings.position_embeddings",
    r"patch_embed\.proj\.(\w+)": r"embeddings.patch_embeddings.projection.\1",
    r"blocks\.(\d+)\.norm1\.(\w+)": r"encoder.layer.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.norm2\.(\w+)": r"encoder.layer.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.attn\.proj\.(\w+)": r"encoder.layer.\1.attention.output.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc1\.(\w+)": r"encoder.layer.\1.intermediate.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(\w+)": r"encoder.layer.\1.output.dense.\2",
    r"norm\.(\w+)": r"layernorm.\1",
}


def load_dino_checkpoint(path: str | Path, config: ViTConfig) -> ViTModel:
    """
    DINO's ViT from the authors' file: the backbone alone, or a whole training state, of which the teacher is taken.

    Nothing in the file is executed, and the projection head is left out. `config.layer_norm_eps` becomes 1e-6, with which DINO
    was trained.

    Raises:
        `ValueError`: it holds no ViT, or one of another shape than `config` says.
        `FileNotFoundError`: it does not exist.
    """
    if config.model_type != "vit":
        raise ValueError(
            f"{path}: a DINO checkpoint needs a configuration of model_type vit, got {config.model_type}."
        )
    weights = _convert_dino(_read_state_dict(path))
    config.layer_norm_eps = 1e-6
    model, loading = ViTModel.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        add_pooling_layer=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    if wrong:
        few = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items())
        raise ValueError(f"{path}: not a ViT of this configuration ({few}).")
    return model


def _read_state_dict(path: str | Path) -> Mapping[str, torch.Tensor]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a DINO checkpoint, but there is no such file.")
    try:
        # A training state holds its command line beside the weights: names and numbers, which is all that is let through.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of unpickling, of the zip archive, or of reading
        raise ValueError(f"{path}: expected a file of weights alone, but reading it failed: {error}") from error
    for key in ("teacher", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    return state if isinstance(state, Mapping) else {}


def _convert_dino(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in state.items():
        name = re.sub(r"^(module\.|teacher\.|backbone\.)+", "", name)
        if qkv := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name):
            for part, third in zip(("query", "key", "value"), tensor.chunk(3)):
                weights[f"encoder.layer.{qkv[1]}.attention.attention.{part}.{qkv[2]}"] = third
            continue
        if name.startswith("head."):
            continue
        for pattern, replacement in _DINO_NAMES.items():
            if re.fullmatch(pattern, name):
                name = re.sub(pattern, replacement, name)
                break
        weights[name] = tensor
    return weights


# --------------------------------------------------------------------------------------------------- export and push


def load_iclip(name: str | Path, **options) -> tuple[ICLIPModel, ICLIPProcessor]:
    """
    Model and processor of a folder or Hub id, with other options of the configuration if given.

    Raises:
        `ValueError`: it is a model of another kind, or damaged. `OSError`: there is none.
    """
    with loading_errors(name):
        model_type = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    if model_type != "iclip":
        raise ValueError(f"{name}: expected an ICLIP model, got one of type {model_type}.")
    return load_whole(name, **options)


def code_files() -> list[Path]:
    """The package's files that a model folder carries: those the auto map names, and what they import of one another."""
    package = Path(__file__).parent
    modules = {impl.split(".")[0] for impl in _AUTO_MAP.values()} | {
        task["impl"].split(".")[0] for task in _CUSTOM_PIPELINES.values()
    }
    entries = [package / f"{module}.py" for module in modules]
    return sorted({*entries, *(Path(file) for entry in entries for file in get_relative_import_files(entry))})


def export_model(
    model: ICLIPModel,
    processor: ICLIPProcessor,
    folder: str | Path,
    *,
    name: str | None = None,
    source: str | Path | None = None,
    metrics=None,
    training: Mapping | None = None,
) -> Path:
    """
    Writes a folder that the Auto classes and `pipeline` load with `trust_remote_code=True` where this package is not
    installed: weights (safetensors), configuration, processor, code and model card.

    Args:
        model, processor: to write; they stay as they are.
        folder: new or empty.
        name, source, metrics, training: for the card, see [`write_model_card`].

    Returns:
        The folder.

    Raises:
        `FileExistsError`: there is something in `folder`.
    """
    with new_folder(folder) as built:
        model.save_pretrained(built)
        processor.save_pretrained(built)
        config = json.loads((built / "config.json").read_text())
        for side in ("vision_config", "text_config"):  # in place of folders of this machine
            config[side]["_name_or_path"] = describe_tower(getattr(model.config, side))["id"] or ""
        config |= {"auto_map": _AUTO_MAP, "custom_pipelines": _CUSTOM_PIPELINES}
        _write_json(built / "config.json", config)
        # AutoProcessor looks here first, and then no further.
        options = json.loads((built / "processor_config.json").read_text())
        auto_map = {"AutoProcessor": _AUTO_MAP["AutoProcessor"]}
        _write_json(built / "processor_config.json", {**options, "auto_map": auto_map})
        for file in code_files():
            shutil.copyfile(file, built / file.name)
        write_model_card(model, processor, built, name=name, source=source, metrics=metrics, training=training)
    return Path(folder)


def _write_json(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def push_model(folder: str | Path, repo_id: str, private: bool | None = None) -> str:
    """
    Uploads an exported folder to a Hub repository, which is made if there is none, in one commit.

    Args:
        folder: of [`export_model`].
        repo_id (`str`): such as `"org/iclip-vit-b16"`.
        private: whether a new repository is private; as the account is set if not given.

    Returns:
        The address of the commit.

    Raises:
        `OSError` (`HfHubHTTPError`): the Hub refuses, or there is no token. `ValueError`: for a name that cannot be one.
    """
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload model").commit_url
