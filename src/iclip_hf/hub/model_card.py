"""The model card: the template `model_card.md`, rendered with the record and the configuration of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from jinja2 import Template
from transformers import PreTrainedConfig

from ..backends.identity import identity
from ..data.layouts import DATASETS
from ..evaluation.results import EvaluationResult
from ..model.modeling_iclip import ICLIPModel
from ..model.processing_iclip import ICLIPProcessor
from ..utils.files import atomic_write
from ..utils.hub_ids import is_hub_id
from .configs import SHIPPED
from .record import DIGITS, RECORD, continued, data_terms, shown_results


# Known towers by Hub id: display name and licence.
_TOWERS = {
    "facebook/dino-vitb16": ("DINO ViT-B/16 (Meta AI)", "Apache-2.0"),
    "facebook/dino-vits16": ("DINO ViT-S/16 (Meta AI)", "Apache-2.0"),
    "facebook/dino-vitb8": ("DINO ViT-B/8 (Meta AI)", "Apache-2.0"),
    "facebook/dinov2-base": ("DINOv2 ViT-B/14 (Meta AI)", "Apache-2.0"),
    "facebook/dinov2-small": ("DINOv2 ViT-S/14 (Meta AI)", "Apache-2.0"),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": ("DINOv3 ViT-B/16 (Meta AI)", "DINOv3 License"),
    "openai/clip-vit-base-patch16": ("CLIP ViT-B/16's text tower (OpenAI)", "MIT"),
    "sentence-transformers/all-MiniLM-L6-v2": ("all-MiniLM-L6-v2 (sentence-transformers)", "Apache-2.0"),
}
# Ids of the data sets on the Hub, for the results on a model's page.
_DATASET_IDS = {"coco2017": "detection-datasets/coco", "voc2012": "nateraw/pascal-voc-2012"}
# The file with the results of data sets on the Hub, from which it makes its tables.
HUB_RESULTS = ".eval_results/iclip.yaml"


def write_model_card(
    model: ICLIPModel,
    processor: ICLIPProcessor,
    folder: str | Path,
    *,
    name: str | None = None,
    source: str | Path | None = None,
    training: Mapping | None = None,
    start: Mapping | None = None,
    metrics: EvaluationResult | Mapping | None = None,
) -> Path:
    """
    Writes the model card, `README.md`, into a model's folder, and `model_card.json`, the record of what the card was
    filled with. Results of data sets on the Hub are also written to `.eval_results/iclip.yaml`, which the Hub reads.

    Args:
        model, processor: model and processor that the card describes.
        folder: new folder of the model.
        name (`str`, *optional*): name of the model, such as its Hub id; the folder's name if not given.
        source (`str` or `Path`, *optional*): folder or Hub id of the model whose record is continued, or `"embedded"`:
            this model, or the one that the run of `training` began with. What the model was loaded from, if neither is
            given.
        training (`dict`, *optional*): what the card shows of the run that made these weights: settings by their names,
            of which `data` lists names of data. Empty for towers that were joined and not trained.
        start (`dict`, *optional*): identity, see [`~identity.identity`], that the model of `source` had when the run
            began.
        metrics ([`EvaluationResult`] or `dict`, *optional*): an evaluation of this model, or the content of its JSON
            file.

    Returns:
        `Path`: path of the card. Its front matter contains the results in the Hub's model-index format.

    Raises:
        `ValueError`: `metrics` has another form.
    """
    record = {"data": {}}
    if source or training is None:
        record = continued(source or model.name_or_path, model, processor, start)
    if training is not None:
        data = record["data"] | data_terms(training.get("data", []))
        record = {"training": dict(training), "data": data}
    record["identity"] = identity(model, processor)
    del record["identity"]["model"]  # a local path
    if metrics is not None:
        record["evaluation"] = shown_results(metrics)

    evaluation = record.get("evaluation")
    figures = _figures(evaluation) if evaluation else []
    values = _values(record, model, processor) | {"name": name or Path(folder).resolve().name, "figures": figures}
    template = Template(SHIPPED.with_name("model_card.md").read_text(encoding="utf-8"))
    files = {"README.md": f"{template.render(values)}\n", RECORD: json.dumps(record, indent=2) + "\n"}
    if figures and evaluation["protocol"]["dataset"]["name"] in _DATASET_IDS:
        files[HUB_RESULTS] = yaml.safe_dump(_hub_results(evaluation["protocol"], figures), sort_keys=False)
    for file, content in files.items():
        with atomic_write(Path(folder, file)) as temporary:
            temporary.write_bytes(content.encode())
    return Path(folder, "README.md")


def _values(record: Mapping, model: ICLIPModel, processor: ICLIPProcessor) -> dict:
    """Returns what the template is filled with, but for the name and the figures."""
    sides = {side: getattr(model.config, side) for side in ("vision_config", "text_config")}
    shape = ("model_type", "num_hidden_layers", "hidden_size", "patch_size")
    names = sorted(model.config.option_names())
    options = {name: value for name in names if (value := getattr(model.config, name)) is not None}
    return {
        "towers": [describe_tower(config) for config in sides.values()],
        "projections": sum(p.numel() for key, p in model.named_parameters() if not key.startswith(("vision", "text"))),
        "options": options | {"templates": processor.templates},
        **{side: {key: getattr(config, key, None) for key in shape} for side, config in sides.items()},
        "training": record["training"],
        "data_terms": record["data"],
        # The weights are published under Apache-2.0, but who trains on such data accepts terms that do not end there.
        "has_restricted_data": any("research" in terms or "none stated" in terms for terms in record["data"].values()),
        "datasets": [data for data in record["data"] if is_hub_id(data)],
        "evaluation": record.get("evaluation"),
        "titles": {name: layout.title for name, layout in DATASETS.items()},
    }


def _figures(evaluation: Mapping) -> list[dict]:
    """Returns the figures for the front matter; none of some images only, or of own images or names."""
    data = evaluation["protocol"]["dataset"]
    if data["images"] != data["images_in_split"] or evaluation["protocol"].get("own_data"):
        return []
    figures = []
    for method, by_metric in evaluation["results"].items():
        for metric, scores in by_metric.items():
            if metric == "mAP" and figures:  # the same for all methods
                continue
            value = round(scores[metric.lower()], DIGITS[metric])
            figures.append({"type": metric.lower(), "name": metric, "config": method, "value": value})
            if "floor" in scores:
                figures[-1]["args"] = {"floor": round(scores["floor"], 2)}
    return figures


def _hub_results(protocol: Mapping, figures: list[dict]) -> list[dict]:
    """Returns figures in the Hub's newer format, from which the page of a data set makes its table."""
    data = protocol["dataset"]
    notes = f"{data['images']} images of {data['split']}"
    notes += ", refined maps" if protocol.get("refine") else ""
    notes += ", at two scales" if protocol.get("multi_scale") else ""
    return [
        {
            "dataset": {"id": _DATASET_IDS[data["name"]], "task_id": f"{figure['config']}_{figure['type']}"},
            "value": figure["value"],
            "notes": notes,
        }
        for figure in figures
    ]


def card_licence(folder: Path) -> str:
    """Returns the licence on the card in a folder, such as "apache-2.0", or the name of one that the Hub lacks."""
    data = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data
    return data.license_name if data.license == "other" else data.license


def front_matter(data: Mapping) -> str:
    """Returns values as the front matter of a card, with the lines around it. Values of any form stay values."""
    return f"---\n{yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)}---\n"


def describe_tower(config: PreTrainedConfig) -> dict[str, str | None]:
    """Returns `name`, Hub `id` and `licence` of a tower; the last two are None for a local folder."""
    tower_id = config.name_or_path or ""
    if not is_hub_id(tower_id):
        return {"name": f"{config.model_type} tower", "id": None, "licence": None}
    name, licence = _TOWERS.get(tower_id, (tower_id, None))
    return {"name": name, "id": tower_id, "licence": licence}
