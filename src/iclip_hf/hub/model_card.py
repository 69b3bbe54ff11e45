"""The model card: `model_card.md`, filled with the record of a model and what the model itself tells."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..data.class_names import DATASETS
from ..models.identity import identity
from ..utils.files import atomic_write, cache_folder
from .configs import SHIPPED
from .record import (
    DIGITS,
    RECORD,
    continued,
    data_terms,
    is_hub_id,
    measured,
    public_settings,
    read_record,
    start_of_training,
)


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..evaluation.evaluate import EvaluationResult
    from ..modeling_iclip import ICLIPModel
    from ..processing_iclip import ICLIPProcessor


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
# Hub ids of the towers of `embedded_towers`, by the name of their folder in the cache.
_EMBEDDED_FOLDERS = {
    "dinov2-small": "facebook/dinov2-small",
    "minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
}
# Ids of the data sets on the Hub, for the results on a model's page.
_DATASET_IDS = {"coco2017": "detection-datasets/coco", "voc2012": "nateraw/pascal-voc-2012"}
_WIDGET = {
    "src": "https://huggingface.co/datasets/mishig/sample_images/resolve/main/cat-dog-music.png",
    "example_title": "Cat and dog",
}
# The file with the results of data sets on the Hub, from which it makes its tables.
HUB_RESULTS = ".eval_results/iclip.yaml"
# Characters of a text on the card.
_LONGEST = 500


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
    labels: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Writes the model card, `README.md`, into a model's folder, and `model_card.json`, the record of what the card was filled with. Results
    of data sets on the Hub are also written to `.eval_results/iclip.yaml`, which the Hub reads.

    Args:
        model, processor: model and processor that the card describes.
        folder: folder of the model.
        name (`str`, *optional*): name of the model, such as its Hub id; the folder's name if not given.
        source (`str` or `Path`, *optional*): folder or Hub id of the same model, or `"embedded"`, whose record is continued; what
            the model was loaded from, if not given.
        training (`dict`, *optional*): settings of the run of `iclip train` that made these weights. Then the record of the run's
            start is continued: the model that `training["model"]` names, or without one the towers. Empty for towers that were
            joined and not trained.
        start (`dict`, *optional*): identity of the model that the run started from, see [`~identity.identity`].
        metrics ([`EvaluationResult`] or `dict`, *optional*): an evaluation of this model, or the content of its JSON file.
        labels (*optional*): nouns that the model was trained on, which the widget of the card offers.
        overwrite (`bool`): whether the files of an earlier card are replaced.

    Returns:
        `Path`: path of the card. Its front matter contains the results in the Hub's model-index format.

    Raises:
        `ValueError`: `metrics` has another form. `FileExistsError`: the folder has a card, and not `overwrite`.
    """
    files = [Path(folder, file) for file in ("README.md", RECORD, HUB_RESULTS)]
    if not overwrite and (there := [str(file) for file in files if file.exists()]):
        raise FileExistsError(f"{there[0]} exists: write the card into another folder, or with overwrite=True.")
    if training is None:
        record = continued(read_record(source or model.name_or_path), model, processor)
    else:
        record = start_of_training(training["model"], start or {}) if training.get("model") else {"training": []}
        record["training"] += [public_settings(training)] if training else []
    record["identity"] = identity(model, processor)
    del record["identity"]["model"]  # a local path
    if metrics is not None:
        record["evaluation"] = measured(metrics)
    if labels is not None:
        record["labels"] = list(labels)

    card, entries = _filled(record, model, processor, name or Path(folder).resolve().name)
    contents = [f"{card}\n", json.dumps(record, indent=2) + "\n"]
    if entries:
        contents.append(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))
    else:
        files[-1].unlink(missing_ok=True)  # results of an earlier card
    for file, content in zip(files, contents):
        with atomic_write(file) as partial:
            partial.write_text(content, encoding="utf-8")
    return files[0]


def _filled(
    record: Mapping, model: ICLIPModel, processor: ICLIPProcessor, name: str
) -> tuple[ModelCard, list[EvalResultEntry]]:
    """Fills the template. Returns the card, and the results in the Hub's newer format."""
    sides = {side: getattr(model.config, side) for side in ("vision_config", "text_config")}
    towers, terms = [describe_tower(config) for config in sides.values()], data_terms(record)
    evaluation = record.get("evaluation")
    results, entries = _for_the_hub(evaluation) if evaluation else ([], [])
    data = ModelCardData(
        **_license([tower["licence"] for tower in towers]),
        language="en",
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["iclip", "explainability", "image-text-similarity-map"],
        base_model=[tower["id"] for tower in towers if tower["id"]] or None,
        datasets=[data for data in terms if is_hub_id(data)] or None,
        metrics=["mmiou", "mfmb", "text_contrast"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
        widget=[{**_WIDGET, "candidate_labels": ", ".join(record.get("labels") or ["cat", "dog", "guitar"])}],
    )
    shape = ("model_type", "num_hidden_layers", "hidden_size", "patch_size")
    options = {option: getattr(model.config, option) for option in sorted(type(model.config).__annotations__)}
    values = {
        "name": name,
        "towers": towers,
        "projections": sum(p.numel() for key, p in model.named_parameters() if not key.startswith(("vision", "text"))),
        "options": {key: value for key, value in options.items() if key not in sides}
        | {"templates": processor.templates},
        **{side: {key: getattr(config, key, None) for key in shape} for side, config in sides.items()},
        "training": record["training"],
        "data_terms": terms,
        "evaluation": evaluation,
        "titles": DATASETS,
    }
    return ModelCard.from_template(
        data, template_path=str(SHIPPED.with_name("model_card.md")), **_plain(values)
    ), entries


def _plain(value):
    """Returns a value with its texts on short lines, without what Markdown, HTML or a table would act on."""
    if isinstance(value, str):
        return " ".join(re.sub(r"[<>`|\[\]\x00-\x1f\x7f]+", " ", value).split())[:_LONGEST]
    if isinstance(value, dict):
        return {_plain(name): _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _for_the_hub(evaluation: Mapping) -> tuple[list[EvalResult], list[EvalResultEntry]]:
    """
    Returns an evaluation as results of the front matter, and for a data set of the Hub in its newer format. Both are empty for an
    evaluation of the first images only, which the pages of the Hub could not say.
    """
    protocol, dataset = evaluation["protocol"], evaluation["protocol"]["dataset"]
    if dataset["images"] != dataset["images_in_split"]:
        return [], []
    conditions = {name: value for name, value in protocol.items() if name != "dataset" and value}
    notes = f"{dataset['images']} images of {dataset['split']}{', refined maps' if protocol['refine'] else ''}"
    results, entries = [], []
    for method, scores in evaluation["results"].items():
        for metric in (name for name in DIGITS if name in scores):
            value = round(scores[metric], DIGITS[metric])
            results.append(
                EvalResult(
                    task_type="zero-shot-image-classification",
                    task_name="Image-text similarity maps",
                    dataset_type=dataset["name"],
                    dataset_name=DATASETS.get(dataset["name"], dataset["name"]),
                    dataset_split=dataset["split"],
                    dataset_args={"images": dataset["images"], "fingerprint": dataset["fingerprint"], **conditions},
                    metric_type=metric.lower(),
                    metric_name=metric,
                    metric_config=method,
                    metric_value=value,
                    metric_args={"floor": round(scores["floor"], 2)} if metric == "mMIoU" else None,
                )
            )
            if dataset["name"] in _DATASET_IDS:
                task = f"{method}_{metric.lower()}"
                entries.append(EvalResultEntry(_DATASET_IDS[dataset["name"]], task, value, notes=notes))
    return results, entries


def front_matter(data: Mapping) -> str:
    """Returns values as the front matter of a card, with the lines around it. Values of any form stay values."""
    return f"---\n{yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)}---\n"


def describe_tower(config: PreTrainedConfig) -> dict[str, str | None]:
    """
    Returns `name`, Hub `id` and `licence` of a tower by the name it was loaded from. The last two are None for a local folder, except for
    the embedded towers.
    """
    tower_id = config.name_or_path or ""
    folder = Path(tower_id)
    if folder.parent == cache_folder() and folder.name in _EMBEDDED_FOLDERS:
        tower_id = _EMBEDDED_FOLDERS[folder.name]
    elif not is_hub_id(tower_id):
        return {"name": f"{config.model_type} tower", "id": None, "licence": None}
    name, licence = _TOWERS.get(tower_id, (tower_id, None))
    return {"name": name, "id": tower_id, "licence": licence}


def _license(licences: list[str | None]) -> dict[str, str]:
    """Returns the licence fields of the card: this project's licence if the towers' licences allow it."""
    if "DINOv3 License" in licences:
        return {
            "license": "other",
            "license_name": "dinov3-license",
            "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
        }
    return {"license": "unknown" if None in licences else "apache-2.0"}
