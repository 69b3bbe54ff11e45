"""Names and defaults that options take. Imports only Python's library, so that the help of a command does not load torch."""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path


# Explanation methods: for each its label in the demo, and the module and class in `iclip_hf.explainers`.
METHODS = {
    "itsm": ("Similarity map (ITSM)", "itsm:ITSM"),
    "reversed_itsm": ("Reversed similarity map", "itsm:ReversedITSM"),
    "attention": ("Attention, the same for every text", "attention:Attention"),
    "attention_affinity": ("Attention spread by affinity, the same for every text", "attention:AttentionAffinity"),
    "grad_cam": ("Grad-CAM", "grad_cam:GradCAM"),
    "grad_eclip": ("Grad-ECLIP", "grad_eclip:GradECLIP"),
    "legrad": ("LeGrad", "legrad:LeGrad"),
    "bi_modal": ("Bi-modal relevance", "bi_modal:BiModal"),
    "clip_surgery": ("CLIP Surgery", "clip_surgery:CLIPSurgery"),
    "gem": ("GEM", "gem:GEM"),
    "maskclip": ("MaskCLIP", "last_block:MaskCLIP"),
    "sclip": ("SCLIP", "last_block:SCLIP"),
    "clearclip": ("ClearCLIP", "last_block:ClearCLIP"),
    "naclip": ("NACLIP", "last_block:NACLIP"),
    "proxyclip": ("ProxyCLIP", "proxyclip:ProxyCLIP"),
    "random": ("Random, independent of image and text", "random_map:RandomMap"),
}
# The group of entry points by which other packages add methods: a name, and module and class.
METHOD_GROUP = "iclip_hf.explainers"
# Poolings whose channels are compared.
POOLINGS = ("class_token", "average", "max", "own")
# Models of transformers that explain: for each type, as config.json names it, the class in `iclip_hf.models.families`.
MODEL_TYPES = {
    "iclip": "ExplainableICLIP",
    "clip": "ExplainableCLIP",
    "metaclip_2": "ExplainableCLIP",
    "siglip": "ExplainableSiglip",
    "siglip2": "ExplainableSiglip2",
    "tipsv2": "ExplainableTipsv2",
}
DTYPES = ("float32", "bfloat16", "float16")
# Colours of maps, see `iclip_hf.figures.colors`; the first is the default.
COLORMAPS = ("heat", "cividis", "jet")
# The folder of the runs of `iclip train`, if no other is named.
RUNS = "runs"


def may_be_hub_id(name: str) -> bool:
    """Whether this can name a repository of the Hub: `name`, or `org/name` where `org` is no folder here, as it is for a mistyped path."""
    owner = os.path.dirname(name)
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is not None and owner != RUNS and not os.path.exists(owner)


def check_model_name(name: str, types: Collection[str] = MODEL_TYPES) -> str:
    """
    Returns the name of a model: `"embedded"`, a folder, or a Hub id, which is checked when it is loaded.

    Raises:
        `FileNotFoundError`: it is no path that exists, and cannot be a Hub id. `OSError`, `ValueError`: the folder has no readable
            config.json, or holds a model of none of these types.
    """
    if name == "embedded" or (not os.path.exists(name) and may_be_hub_id(name)):
        return name
    if not os.path.exists(name):
        raise FileNotFoundError(
            f"{name}: expected a folder or a Hub id of a model, but there is none; check the path."
        )
    from .files import loading_errors  # which imports slower packages

    with loading_errors(name):
        kind = json.loads(Path(name, "config.json").read_text(encoding="utf-8")).get("model_type")
        check_model_type(name, kind, types)
    return name


def check_model_type(name: str | Path, kind: str | None, types: Collection[str]) -> None:
    """Raises `ValueError` unless the type of a model is one of these."""
    if kind not in types:
        raise ValueError(
            f"{name}: expected a model of type {', '.join(types)}, but got one of type {kind}; name another, or join its towers by "
            "`iclip init` first."
        )
