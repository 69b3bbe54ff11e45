"""Model folders: initialisation from two towers, export with code and model card, and upload to the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

import yaml
from huggingface_hub import HfApi
from transformers import AutoImageProcessor

from ..backends.loading import load_iclip
from ..backends.towers import embedded_feature_tower, embedded_towers, name_towers
from ..model.configuration_iclip import ICLIPConfig, patch_side, without_attention
from ..model.modeling_iclip import ICLIPModel
from ..model.pipeline_iclip import PIPELINES
from ..model.processing_iclip import ICLIPProcessor, check_tokenizer
from ..model.tower_loading import tower_config
from ..utils.errors import loading_errors
from ..utils.files import atomic_folder
from ..utils.published import clean_configs
from .configs import EMBEDDED, config_folder, parse_options
from .model_card import write_model_card


# Maps the Auto classes to the classes in a folder with code.
_AUTO_MAP = {
    "AutoConfig": "configuration_iclip.ICLIPConfig",
    "AutoModel": "modeling_iclip.ICLIPModel",
    "AutoModelForZeroShotImageClassification": "modeling_iclip.ICLIPModel",
    "AutoProcessor": "processing_iclip.ICLIPProcessor",
}
_CUSTOM_PIPELINES = {
    task: {"impl": f"pipeline_iclip.{implementation.__name__}", "pt": ["AutoModel"], "type": "multimodal"}
    for task, implementation in PIPELINES.items()
}


# ------------------------------------------------------------ a new model


def is_embedded(config: str | Path, *towers: str | None) -> bool:
    """Returns whether [`init_model`] writes the embedded model, which is trained."""
    return not any(towers) and config_folder(config).resolve() == EMBEDDED.resolve()


def init_model(
    config: str | Path,
    output: str | Path,
    vision: str | None = None,
    text: str | None = None,
    feature_tower: str | None = None,
) -> Path:
    """
    Writes the folder of a new model, and returns it: pretrained towers, untrained projections, processor and
    tokenizer. With the configuration of the embedded model and no tower given, it writes the embedded model itself,
    which is trained.

    Args:
        config: name of a shipped configuration (`"iclip-vit-b16"`), or a folder with `train.yaml` or `config.json`,
            see [`join_towers`].
        output: the folder to write; new or empty.
        vision, text, feature_tower (`str`, *optional*): folders or Hub ids of the image tower, of the text tower or a
            two-tower model such as CLIP, and of a convolutional backbone of timm; those of `train.yaml` if not given.

    Raises:
        `FileExistsError`: `output` is not empty. `OSError`, `ValueError`: a checkpoint cannot be loaded.
    """
    configuration = config_folder(config)
    file = configuration / "train.yaml"
    arguments = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    embedded = is_embedded(config, vision, text, feature_tower)
    vision, text = vision or arguments.get("vision"), text or arguments.get("text")
    feature_tower = feature_tower or arguments.get("feature_tower") or ""
    if not (vision and text):
        raise ValueError(f"{configuration}: this configuration does not name both towers: give vision and text.")
    model_options = arguments.get("model_options") or []
    options = options_of_model([model_options] if isinstance(model_options, str) else model_options)
    image_size = int(arguments.get("image_size") or 0) or None
    with atomic_folder(output) as folder:
        if embedded:
            save_model(*load_iclip("embedded"), folder, source="embedded")
        else:
            joined = join_towers(configuration, vision, text, image_size, feature_tower, **options)
            save_model(*joined, folder, training={})
    return Path(output)


def options_of_model(model_options: Sequence[str]) -> dict[str, object]:
    """
    Returns the values of `model_options` by name. Raises `ValueError` for an option that is not name=value, or that
    [`ICLIPConfig`] does not have.
    """
    options = parse_options(model_options)
    if unknown := options.keys() - ICLIPConfig.option_names():
        raise ValueError(f"model_options: {min(unknown)!r} is no option of ICLIPConfig.")
    return options


def join_towers(
    configuration: Path,
    vision: str,
    text: str,
    image_size: int | None = None,
    feature_tower: str = "",
    **model_options,
) -> tuple[ICLIPModel, ICLIPProcessor]:
    """
    Checks the files of towers, and joins the towers with untrained projections. Returns the model, and a processor
    joined from those of the towers. Raises the errors of [`init_model`].

    Args:
        configuration: its folder. The `config.json` and `processor_config.json` override those of the towers.
        vision, text, feature_tower: folders, Hub ids or `"embedded"`.
        image_size (`int`, *optional*): height and width in pixels; if not given, the size of `processor_config.json`,
            or else 224 pixels for the image tower.
        model_options: options of [`ICLIPConfig`], which override the configuration.
    """
    towers = {"vision_config": vision, "text_config": text, "feature_config": feature_tower}
    embedded_configs = [sub_config for sub_config, tower in towers.items() if tower == "embedded"]
    if "embedded" in (vision, text):
        embedded_vision, embedded_text = map(str, embedded_towers())
        vision = embedded_vision if vision == "embedded" else vision
        text = embedded_text if text == "embedded" else text
    if feature_tower == "embedded":
        feature_tower = str(embedded_feature_tower())
    config_content, processor_options = {}, {}
    if (configuration / "config.json").is_file():
        content, _ = ICLIPConfig.get_config_dict(configuration)
        config_content = without_attention(content)
    if (configuration / "processor_config.json").is_file():
        content, _ = ICLIPProcessor.get_processor_dict(configuration)
        processor_options = {name: content[name] for name in signature(ICLIPProcessor).parameters if name in content}
    if "image_processor" in processor_options:
        size = {} if image_size is None else {"size": {"height": image_size, "width": image_size}}
        processor_options["image_processor"] = AutoImageProcessor.from_pretrained(
            configuration, trust_remote_code=False, **size
        )
    model_options = {**config_content, **model_options}
    config = ICLIPConfig(**model_options)
    if "image_processor" not in processor_options:
        processor_options["image_size"] = image_size or 224 * config.vision_downsampling
    for tower, sub_config in ((vision, "vision_config"), (text, "text_config"), (feature_tower, "feature_config")):
        if tower:
            with loading_errors(tower):  # of the files of each tower, before any weights are loaded
                tower_config(tower, sub_config)
    model = ICLIPModel.from_vision_text_pretrained(
        vision, text, feature_tower, processor_options.get("image_processor"), **model_options
    )
    name_towers(model, *embedded_configs)
    processor_options.setdefault("patch_size", patch_side(model.config))
    with loading_errors(f"{vision}, {text}"):
        processor = ICLIPProcessor.from_vision_text_pretrained(vision, text, **processor_options)
    check_tokenizer(text, processor.tokenizer, model.config)
    return model, processor


# ------------------------------------------------------------ export and push


def code_files() -> list[Path]:
    """Returns the modules that an exported model contains: those of the subpackage `model`."""
    modules = (Path(__file__).parents[1] / "model").glob("*.py")
    return sorted(path for path in modules if path.name != "__init__.py")


def export_model(model: ICLIPModel, processor: ICLIPProcessor, folder: str | Path, **card) -> Path:
    """
    Exports a model, and returns the folder: weights (safetensors), configuration, processor, code and model card. With
    `trust_remote_code=True`, the Auto classes and `pipeline` also load the folder where this package is not installed.

    Args:
        model, processor: model to export and its processor; they are not changed.
        folder: folder to write; new or empty, otherwise `FileExistsError` is raised.
        card: arguments of [`write_model_card`].
    """
    with atomic_folder(folder) as built:
        save_model(model, processor, built, **card)
        _edit_json(built / "config.json", {"auto_map": _AUTO_MAP, "custom_pipelines": _CUSTOM_PIPELINES})
        # AutoProcessor reads the auto map of this file only.
        _edit_json(built / "processor_config.json", {"auto_map": {"AutoProcessor": _AUTO_MAP["AutoProcessor"]}})
        for file in code_files():
            shutil.copyfile(file, built / file.name)
    return Path(folder)


def save_model(model: ICLIPModel, processor: ICLIPProcessor, folder: Path, **card) -> None:
    """
    Saves a model, its processor and its card into a new folder, for `from_pretrained` of this package. `card` are
    arguments of [`write_model_card`]. The new folder has no paths of this machine, and no code of the folder that the
    model was loaded from.
    """
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    clean_configs(folder)
    write_model_card(model, processor, folder, **card)


def _edit_json(path: Path, changes: Mapping) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def push_model(folder: str | Path, repo_id: str, private: bool | None = None) -> str:
    """
    Uploads an exported folder to a Hub repository, such as "org/iclip-vit-b16", in one commit, and returns the URL of
    the commit. A repository that does not exist is created, with `private` as given. Raises `OSError` if the Hub
    cannot be reached or refuses the upload, and `ValueError` for an invalid name.
    """
    api = HfApi()
    with hub_errors(api):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload model").commit_url


def check_login() -> None:
    """Raises `OSError` if there is no token, the Hub refuses it, or the Hub cannot be reached."""
    api = HfApi()
    with hub_errors(api):
        api.whoami()


@contextmanager
def hub_errors(api: HfApi) -> Iterator[None]:
    """
    Converts errors of the HTTP library, which differs between versions of huggingface_hub, to `ConnectionError`.
    """
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ConnectionError(f"The connection to {api.endpoint} failed: {error}.") from error
