"""
The record of a model: what it was trained from, with what and on what, and its results. It is saved beside the card,
which is rendered from it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download, resolve_revision
from huggingface_hub.errors import EntryNotFoundError, RevisionResolutionError

from ..backends.embedded import embedded_folder
from ..backends.identity import changed_model
from ..data.class_names import COCO_THINGS
from ..data.layouts import DATASETS
from ..evaluation.results import EvaluationResult
from ..model.modeling_iclip import ICLIPModel
from ..model.processing_iclip import ICLIPProcessor
from ..utils.hub_ids import is_hub_id
from .configs import EMBEDDED


logger = logging.getLogger(__name__)

# The file beside the card that holds the record.
RECORD = "model_card.json"
DIGITS = {"mAP": 2, "mMIoU": 2, "mFMB": 4, "text_contrast": 2}
# Terms of training data by their Hub id. Those of the embedded model are in its `data.yaml`.
_DATA_TERMS = {"pixparse/cc3m-wds": "Conceptual Captions: free for any purpose; the images are their owners'"}
NOT_KNOWN = "not known here"
# Of a model whose training is not recorded.
_UNKNOWN = {"training": None, "data": {"(not recorded)": NOT_KNOWN}}


def read_record(source: str | Path) -> dict:
    """
    Reads the record of a model by its folder, its Hub id or `"embedded"`: `training`, the settings of the run that
    made the weights (empty for towers that were joined and not trained, None if it is not recorded); `data`, the terms
    of all data that the weights were trained on, also by earlier runs, by their names; and, if they are known,
    `evaluation` and `identity`.
    """
    if str(source) in ("embedded", str(embedded_folder())):
        training, data = (yaml.safe_load((EMBEDDED / name).read_text("utf-8")) for name in ("train.yaml", "data.yaml"))
        results = json.loads((EMBEDDED / "results.json").read_text())
        return {
            "training": training,
            "data": data,
            "evaluation": shown_results(results),
            "identity": results["protocol"],
        }
    if not source:
        return {**_UNKNOWN}
    try:
        path = Path(source, RECORD)
        if not Path(source).is_dir():
            # Fails at once without a network, where the download would be retried.
            revision = resolve_revision(str(source))
            path = Path(hf_hub_download(str(source), RECORD, revision=revision))
        content = json.loads(path.read_text(encoding="utf-8"))
        training, data = content["training"], {name: str(terms) for name, terms in content["data"].items()}
        record = {"training": training and dict(training), "data": data, "identity": dict(content["identity"])}
        return record | ({"evaluation": shown_results(content["evaluation"])} if content.get("evaluation") else {})
    except (FileNotFoundError, EntryNotFoundError, RevisionResolutionError):
        return {**_UNKNOWN}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        logger.warning("%s: its %s is unreadable or not of iclip, so nothing is taken over.", source, RECORD)
        return {**_UNKNOWN}


def continued(
    source: str | Path, model: ICLIPModel, processor: ICLIPProcessor, start: Mapping[str, str] | None = None
) -> dict:
    """
    Returns the record of the model that `source` names, for what it is now: without results if anything differs, and
    with a training that is not recorded if the weights do. `start` is the identity that it had, if it was trained
    since.
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
        record |= {"training": None, "data": record["data"] | _UNKNOWN["data"]}
    return record


def data_terms(names: list[str]) -> dict[str, str]:
    """Returns the terms of training data by their names, which [`public_name`] returned."""
    return {name: _DATA_TERMS.get(name, NOT_KNOWN) for name in names}


def shown_results(metrics: EvaluationResult | Mapping) -> dict:
    """Returns the parts of an evaluation, or of its JSON file, that the card shows."""
    metrics = asdict(metrics) if is_dataclass(metrics) else metrics
    try:
        protocol, results = metrics["protocol"], {}
        data = {"images_in_split": protocol["dataset"]["images"], **protocol["dataset"]}
        for method, by_metric in metrics["results"].items():
            shown = {name: by_metric[name] for name in DIGITS if name in by_metric}
            # Those that were measurable on these data
            results[method] = {name: scores for name, scores in shown.items() if scores[name.lower()] is not None}
        if not any(results.values()):
            raise ValueError
        names = ("name", "split", "fingerprint", "images", "images_in_split")
        layout = DATASETS.get(data["name"])
        if layout and layout.split_sizes:
            usual, size = tuple(layout.classes or COCO_THINGS), layout.split_sizes.get(data["split"], 0)
            if data["images_in_split"] > size or tuple(protocol.get("class_names", usual)) != usual:
                protocol = {**protocol, "own_data": True}
            elif "own_data" not in protocol:
                data["images_in_split"] = size
        shown = {"dataset": {name: data[name] for name in names}, "templates": list(protocol["templates"])}
        shown |= {name: dict(protocol[name]) for name in ("image_size", "versions")}
        shown |= {name: protocol[name] for name in ("refine", "multi_scale", "note", "own_data") if name in protocol}
        options = {name: protocol["metrics"].get(name, {}) for name in DIGITS}
        shown["metrics"] = {name: {"aggregate": of["aggregate"]} for name, of in options.items() if "aggregate" in of}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            "These results are not the interpretability of a model, as `iclip evaluate --output` writes it."
        ) from error
    return {"protocol": shown, "results": results}


def public_name(name: str) -> str:
    """Returns a Hub id as it is, and of a path its last part, which says nothing of this machine."""
    return name if is_hub_id(name) else Path(name).name
