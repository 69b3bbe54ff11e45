"""The embedded model: pretrained towers joined with the projections that this package contains."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from ..utils.files import atomic_write, build_once, cache_folder
from .towers import embedded_towers


PROJECTIONS = Path(__file__).with_name("projections.safetensors")


def embedded_model() -> Path:
    """
    Returns the folder of a trained ICLIP model (DINOv2 ViT-S/14 and MiniLM-L6), for `ICLIPModel.from_pretrained` and
    `ICLIPProcessor.from_pretrained`. The first call downloads the towers (174 MB), joins them and caches the result.

    Raises:
        `OSError`: the towers cannot be downloaded, see `embedded_towers`.
    """
    # The name of the folder contains the version of the projections, so other projections get another folder.
    version = hashlib.sha256(PROJECTIONS.read_bytes()).hexdigest()[:12]
    return build_once(cache_folder() / f"iclip-dinov2-s14-minilm-{version}", _join)


class _Default:
    """A model and its revision, as transformers unpacks and logs them. Only then is the model downloaded."""

    def __iter__(self) -> Iterator[str]:
        return iter((str(embedded_model()), "main"))


def set_as_default() -> None:
    """Makes the embedded model the one that the pipelines take if none is named."""
    from transformers.pipelines import PIPELINE_REGISTRY

    from ..pipeline_iclip import PIPELINES

    tasks = PIPELINE_REGISTRY.supported_tasks
    for task in PIPELINES:
        tasks[task] = {**tasks[task], "default": {"model": _Default()}}  # a copy: a saved pipeline holds the original


def _join(folder: Path) -> None:
    from ..modeling_iclip import ICLIPModel
    from ..processing_iclip import ICLIPProcessor

    vision, text = map(str, embedded_towers())
    with safe_open(PROJECTIONS, framework="pt") as file:
        weights = {name: file.get_tensor(name).float() for name in file.keys()}
        metadata = file.metadata()
    model = ICLIPModel.from_vision_text_pretrained(vision, text, **json.loads(metadata["config"]))
    model.load_state_dict({**model.state_dict(), **weights})
    model.save_pretrained(folder)
    ICLIPProcessor.from_vision_text_pretrained(vision, text, **json.loads(metadata["processor"])).save_pretrained(
        folder
    )


def save_projections(model_folder: str | Path, path: Path = PROJECTIONS) -> None:
    """
    Saves the weights that a training on the embedded towers changes, projections and temperatures, in half precision, with the options
    of the model, an ICLIP model with locked towers.
    """
    from ..modeling_iclip import ICLIPModel
    from ..processing_iclip import ICLIPProcessor

    model, processor = ICLIPModel.from_pretrained(model_folder), ICLIPProcessor.from_pretrained(model_folder)
    learned = ("recognition.", "interpretability.", "token_mean", "attention_direction")
    weights = {name: w.half().contiguous() for name, w in model.state_dict().items() if name.startswith(learned)}
    options = {name: getattr(model.config, name) for name in type(model.config).__annotations__}
    options = {name: value for name, value in options.items() if name not in ("vision_config", "text_config")}
    parts = {"config": options, "processor": {"templates": processor.templates}}
    metadata = {"format": "pt", **{name: json.dumps(part) for name, part in parts.items()}}
    with atomic_write(path) as partial:
        save_file(weights, partial, metadata=metadata)


if __name__ == "__main__":
    save_projections(sys.argv[1])
