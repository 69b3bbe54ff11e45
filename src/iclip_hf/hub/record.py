"""
The record of a model: the settings and data of its training, its results and its identity. It is saved beside the
model card, which is rendered from it.
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
from ..utils.published import without_path
from .configs import EMBEDDED


logger = logging.getLogger(__name__)

# The file beside the card that holds the record.
RECORD = "model_card.json"
# The metrics that the card shows, with their number of decimals.
METRIC_DECIMALS = {"mAP": 2, "mMIoU": 2, "mFMB": 4, "text_contrast": 2}
# Terms of training data by their Hub id. `restricted` marks data that are not free for every use. Data of the embedded
# model are in its `data.yaml`.
_DATA_TERMS = {
    "pixparse/cc3m-wds": {"terms": "Conceptual Captions: free for any purpose; the images are their owners'"},
}
NOT_KNOWN = {"terms": "not known here"}
# The record of a model whose training is not recorded.
_UNRECORDED = {"training": None, "data": {"(not recorded)": NOT_KNOWN}}
# What the card shows of an evaluation's protocol and of its data.
_PROTOCOL = ("templates", "image_size", "versions", "refine", "multi_scale", "note")
_DATASET = ("name", "split", "fingerprint", "images", "images_in_split")


def read_record(source: str | Path) -> dict:
    """
    Reads the record of a model by its folder, its Hub id or `"embedded"`.

    Returns:
        `dict` with

        - **training**: settings of the run that made the weights; empty if the towers were joined and not trained,
          None if the run is not recorded
        - **data**: the training data sets of this and earlier runs by their names, each with its `terms` and, if it is
          not free for every use, `restricted`
        - **evaluation** (*optional*): protocol and results, see [`card_results`]
        - **identity** (*optional*): identity of the model, see [`~identity.identity`]
    """
    if str(source) in ("embedded", str(embedded_folder())):
        training, data = (yaml.safe_load((EMBEDDED / name).read_text("utf-8")) for name in ("train.yaml", "data.yaml"))
        results = json.loads((EMBEDDED / "results.json").read_text())
        evaluation = card_results(results)
        return {"training": training, "data": data, "evaluation": evaluation, "identity": results["protocol"]}
    try:
        if (file := _record_file(source)) is None:
            return {**_UNRECORDED}
        content = json.loads(file.read_text(encoding="utf-8"))
        record = {name: content[name] for name in ("training", "data", "identity")}
        return record | {"evaluation": content["evaluation"]} if "evaluation" in content else record
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s: its %s is unreadable or not of iclip, so nothing is taken over.", source, RECORD)
        return {**_UNRECORDED}


def _record_file(source: str | Path) -> Path | None:
    """Returns the file with the record of a folder or Hub id, None if there is none."""
    if not source:  # the model was made in memory
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


def assemble_record(model: ICLIPModel, processor: ICLIPProcessor, source, training, source_identity) -> dict:
    """Returns the record of a model. The arguments are those of [`~model_card.write_model_card`]."""
    if training is None:
        record = _valid_record(source or model.name_or_path, model, processor)
    else:
        earlier_data = _valid_record(source, model, processor, source_identity)["data"] if source else {}
        # Terms that an earlier record knows stay known, such as those of the data of the embedded model.
        terms = earlier_data | _DATA_TERMS
        training = {name: without_path(value) for name, value in training.items()}
        data = {name: terms.get(name, NOT_KNOWN) for name in training.get("data", [])}
        record = {"training": training, "data": earlier_data | data}
    described = identity(model, processor)
    del described["model"]  # the name of a folder
    return record | {"identity": described}


def _valid_record(
    source: str | Path, model: ICLIPModel, processor: ICLIPProcessor, source_identity: Mapping | None = None
) -> dict:
    """
    Returns the record of `source` as far as it is valid. The identity in the record is compared with that of the model
    or, if given, with `source_identity`, which was computed before a training. If any part differs, the results are
    left out. If the weights differ, the settings of the training are left out, too.
    """
    record = read_record(source)
    differing = changed_model(record["identity"], model, processor, source_identity) if "identity" in record else []
    if differing and record.pop("evaluation", None):
        parts = " and ".join(differing)
        logger.warning("The results of %s are left out: they were measured with another %s.", source, parts)
    if "weights" in differing:
        record |= {"training": None, "data": record["data"] | _UNRECORDED["data"]}
    return record


def card_results(evaluation: EvaluationResult | Mapping) -> dict:
    """Returns the parts of an evaluation, or of its JSON file, that the card shows."""
    evaluation = asdict(evaluation) if is_dataclass(evaluation) else evaluation
    protocol = evaluation["protocol"]
    results = {  # a metric is None if it could not be measured on the data
        method: {
            name: scores[name] for name in METRIC_DECIMALS if name in scores and scores[name][name.lower()] is not None
        }
        for method, scores in evaluation["results"].items()
    }
    if not any(results.values()):
        raise ValueError(f"Expected results of {', '.join(METRIC_DECIMALS)}, but got none: run `iclip evaluate`.")
    card_protocol = {name: protocol[name] for name in _PROTOCOL if name in protocol}
    settings = {name: protocol["metrics"].get(name, {}) for name in METRIC_DECIMALS}
    card_protocol["metrics"] = {
        name: {"aggregate": values["aggregate"]} for name, values in settings.items() if "aggregate" in values
    }
    card_protocol["dataset"], card_protocol["own_data"] = _card_data(protocol)
    return {"protocol": card_protocol, "results": results}


def _card_data(protocol: Mapping) -> tuple[dict, bool]:
    """Returns what the card shows of the data, and whether images or class names are the user's own."""
    data = {name: protocol["dataset"][name] for name in _DATASET}
    layout = DATASETS.get(data["name"])
    if layout is None or not layout.split_sizes:
        return data, False
    # The layout of COCO lists no classes, because its files of instances do.
    classes, split_size = layout.classes or COCO_THINGS, layout.split_sizes.get(data["split"], 0)
    if data["images_in_split"] > split_size or tuple(protocol["class_names"]) != tuple(classes):
        return data, True
    return {**data, "images_in_split": split_size}, False  # the folder may hold only a part of the split
