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
from ..backends.identity import changed_model, identity
from ..data.class_names import COCO_THINGS
from ..data.layouts import DATASETS
from ..evaluation.results import EvaluationResult
from ..model.modeling_iclip import ICLIPModel
from ..model.processing_iclip import ICLIPProcessor
from .configs import EMBEDDED


logger = logging.getLogger(__name__)

# The file beside the card that holds the record.
RECORD = "model_card.json"
DIGITS = {"mAP": 2, "mMIoU": 2, "mFMB": 4, "text_contrast": 2}
# Training data by their Hub id. `restricted` marks terms that do not free them for every use. Those of the embedded
# model are in its `data.yaml`.
_DATA_TERMS = {
    "pixparse/cc3m-wds": {"terms": "Conceptual Captions: free for any purpose; the images are their owners'"},
}
NOT_KNOWN = {"terms": "not known here"}
# Of a model whose training is not recorded.
_UNKNOWN = {"training": None, "data": {"(not recorded)": NOT_KNOWN}}
# What the card shows of an evaluation's protocol and of its data.
_PROTOCOL = ("templates", "image_size", "versions", "refine", "multi_scale", "note")
_DATASET = ("name", "split", "fingerprint", "images", "images_in_split")


def read_record(source: str | Path) -> dict:
    """
    Reads the record of a model by its folder, its Hub id or `"embedded"`: `training`, the settings of the run that
    made the weights (empty for towers that were joined and not trained, None if it is not recorded); `data`, for each
    name of data that the weights were trained on, also by earlier runs, its `terms`, and whether they are
    `restricted`; and, if they are known, `evaluation` and `identity`.
    """
    if str(source) in ("embedded", str(embedded_folder())):
        return _embedded_record()
    try:
        if (file := _record_file(source)) is None:
            return {**_UNKNOWN}
        content = json.loads(file.read_text(encoding="utf-8"))
        data = {name: dict(entry) for name, entry in content["data"].items()}  # earlier versions had a text
        names = ("training", "identity", *["evaluation"] * ("evaluation" in content))
        return {"data": data, **{name: content[name] for name in names}}
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s: its %s is unreadable or not of iclip, so nothing is taken over.", source, RECORD)
        return {**_UNKNOWN}


def _embedded_record() -> dict:
    training, data = (yaml.safe_load((EMBEDDED / name).read_text("utf-8")) for name in ("train.yaml", "data.yaml"))
    results = json.loads((EMBEDDED / "results.json").read_text())
    return {"training": training, "data": data, "evaluation": shown_results(results), "identity": results["protocol"]}


def _record_file(source: str | Path) -> Path | None:
    """Returns the file with the record of a folder or Hub id, None if there is none."""
    if not source:  # of a model in memory
        return None
    if Path(source).is_dir():
        file = Path(source, RECORD)
        return file if file.is_file() else None
    try:
        # Fails at once without a network, where the download would be retried.
        revision = resolve_revision(str(source))
        return Path(hf_hub_download(str(source), RECORD, revision=revision))
    except (FileNotFoundError, EntryNotFoundError, RevisionResolutionError):
        return None


def assemble_record(model: ICLIPModel, processor: ICLIPProcessor, source, training, start) -> dict:
    """Returns the record of a model. The arguments are those of [`~model_card.write_model_card`]."""
    record = {"data": {}}  # of towers
    if source or training is None:  # the record of a model goes on, for what the model is now
        source = source or model.name_or_path
        record = read_record(source)
        differing = changed_model(record["identity"], model, processor, start) if "identity" in record else []
        if differing and record.pop("evaluation", None):
            parts = " and ".join(differing)
            logger.warning("The results of %s are left out: they were measured with another %s.", source, parts)
        if "weights" in differing:
            record |= {"training": None, "data": record["data"] | _UNKNOWN["data"]}
    if training is not None:  # other weights: no earlier training and results, but all earlier data
        data = {name: _DATA_TERMS.get(name, NOT_KNOWN) for name in training.get("data", [])}
        record = {"training": dict(training), "data": record["data"] | data}
    described = identity(model, processor)
    del described["model"]  # the name of a folder
    return record | {"identity": described}


def shown_results(metrics: EvaluationResult | Mapping) -> dict:
    """Returns the parts of an evaluation, or of its JSON file, that the card shows."""
    metrics = asdict(metrics) if is_dataclass(metrics) else metrics
    protocol = metrics["protocol"]
    results = {  # of metrics that were measurable on the data
        method: {name: scores[name] for name in DIGITS if name in scores and scores[name][name.lower()] is not None}
        for method, scores in metrics["results"].items()
    }
    if not any(results.values()):
        raise ValueError(f"Expected results of {', '.join(DIGITS)}, which `iclip evaluate` measures, but got none.")
    shown = {name: protocol[name] for name in _PROTOCOL if name in protocol}
    options = {name: protocol["metrics"].get(name, {}) for name in DIGITS}
    shown["metrics"] = {name: {"aggregate": of["aggregate"]} for name, of in options.items() if "aggregate" in of}
    shown["dataset"], shown["own_data"] = _data(protocol)
    return {"protocol": shown, "results": results}


def _data(protocol: Mapping) -> tuple[dict, bool]:
    """Returns what the card shows of the data, and whether they only have the layout of a known data set."""
    data = {name: protocol["dataset"][name] for name in _DATASET}
    layout = DATASETS.get(data["name"])
    if layout is None or not layout.split_sizes:
        return data, False
    usual, size = layout.classes or COCO_THINGS, layout.split_sizes.get(data["split"], 0)
    own = data["images_in_split"] > size or tuple(protocol["class_names"]) != tuple(usual)
    return data if own else {**data, "images_in_split": size}, own  # not all images may be there
