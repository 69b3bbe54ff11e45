"""The page that runs an exported model in the visitor's browser, a folder of static files."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import logging
import math
import re
import shutil
import string
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard, SpaceCardData
from PIL import Image

from ..backends.onnx import TEXT_FILE, VISION_FILE, export_onnx, trained_config
from ..hub.model_card import write_model_card
from ..model.modeling_iclip import ICLIPModel
from ..model.presence import MIN_PRESENCE, SURE_PRESENCE
from ..model.processing_iclip import MAX_PIXELS, ICLIPProcessor
from ..utils.files import atomic_folder, write_image
from ..utils.published import folder_name, public_name
from .viewer import (
    MAX_CHARACTERS,
    MAX_TEXTS,
    SHOWN_SIDE,
    Example,
    examples,
    introduction,
    read_asset,
    shown_size,
    viewer_theme,
)


logger = logging.getLogger(__name__)

_PAGE = ("index.html", "page.css", "page.js", "worker.js", "numerics.js", "viewer.css", "viewer.js")
_KERNELS = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers
# The header of `README.md` that makes the folder a static Space. Its custom headers allow the page to use threads.
_STATIC_SPACE = {
    "emoji": "🔍",
    "colorFrom": "blue",
    "colorTo": "red",
    "pinned": False,
    "short_description": "Which pixels of an image match a text",
    "sdk": "static",
    "custom_headers": {
        "cross-origin-embedder-policy": "require-corp",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "cross-origin",
    },
}
CDN = "https://cdn.jsdelivr.net/npm"
# Files of npm packages of fixed versions: for the tokenizer, and for ONNX Runtime on WebAssembly and WebGPU. Each has
# its digest in the notation of `integrity` in HTML, and its compressed size in bytes.
_RUNTIME = json.loads(read_asset("runtime.json"))
RUNTIME_FILES = [_RUNTIME["tokenizers"], *_RUNTIME["wasm"].values(), *_RUNTIME["webgpu"].values()]


def export_web(
    model: ICLIPModel,
    processor: ICLIPProcessor,
    folder: str | Path,
    weights: str = "int8",
    cdn: str = CDN,
    **card,
) -> Path:
    """
    Writes a page that runs a model in the browser: static files for any server, which are also a static Space.

    The page computes the model's own maps and scores, and the presence if the model has one. ONNX Runtime and the
    tokenizer are npm packages of fixed versions, whose digests browsers check. Graphs in 8 bits run on WebAssembly,
    the others on WebGPU where the browser has it.

    Args:
        model, processor: an ICLIP model on the CPU, in float32, and its processor.
        folder: new or empty.
        weights (`str`): `"int8"`, `"bfloat16"` or `"float32"`, as for [`export_onnx`].
        cdn (`str`): address of a server of npm packages, from which the page loads them.
        card: arguments of [`write_model_card`].

    Returns:
        The folder.
    """
    folder = Path(folder)
    settings = {
        "model": {name: getattr(model.config, name) for name in ("map_attention", "max_sharpness", "peak_share")},
        "image": _image_settings(processor),
        "text": _text_settings(processor),
        "presence": _presence_settings(model),
        "max_texts": MAX_TEXTS,
        "max_characters": MAX_CHARACTERS,
        "shown_side": SHOWN_SIDE,
        "theme": viewer_theme(),
    }
    with atomic_folder(folder) as built, tempfile.TemporaryDirectory() as scratch:
        runtimes = ["wasm"] if weights == "int8" else ["wasm", "webgpu"]
        settings["runtime"] = {
            name: {part: _at_cdn(file, cdn) for part, file in _RUNTIME[name].items()} for name in runtimes
        }
        settings["files"] = {"tokenizers": _at_cdn(_RUNTIME["tokenizers"], cdn)}

        graphs = export_onnx(model, processor, Path(scratch, "onnx"), weights)
        logger.info("Compressing the graphs")
        for name in (VISION_FILE, TEXT_FILE, "tokenizer.json", "tokenizer_config.json"):
            # "vision", "text", "tokenizer" and "tokenizer_config", beside "tokenizers", the npm package
            part = name.removesuffix("_model.onnx").removesuffix(".json")
            settings["files"][part] = _write_compressed(built, name, (graphs / name).read_bytes())
        # The page states this size before it knows whether the browser has WebGPU, whose runtime is larger.
        downloads = [*settings["runtime"]["wasm"].values(), *settings["files"].values()]
        settings["bytes"] = sum(file["bytes"] for file in downloads)
        settings["examples"] = [_write_example(example, built) for example in examples()]

        _write_page(built, settings, cdn)
        # The card names the model and not this folder, which does not hold it.
        name = public_name(model.name_or_path) or folder_name(folder)
        card_file = write_model_card(model, processor, scratch, name=name, **card)
        shutil.copyfile(card_file, built / "model_card.md")
        (built / "README.md").write_text(_readme(card_file, folder_name(folder)), encoding="utf-8")
    return folder


def _write_page(folder: Path, settings: dict, cdn: str) -> None:
    """Writes the files of the page itself, and the service worker that keeps them and the examples for use offline."""
    values = {
        "package_urls": " ".join(f"{cdn}/{package}/" for package in _packages()),
        "introduction": introduction(settings["presence"] is not None),
    }
    contents = {name: read_asset(name) for name in _PAGE} | {"settings.json": json.dumps(settings)}
    contents["index.html"] = string.Template(contents["index.html"]).substitute(values)
    for name, content in _with_version(contents).items():
        (folder / name).write_text(content, encoding="utf-8")
    page_files = [*contents, *(example["file"] for example in settings["examples"])]
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in page_files}
    offline = string.Template(read_asset("offline.js"))
    offline = offline.substitute(files=json.dumps({"./": digests["index.html"], **digests}))
    (folder / "offline.js").write_text(offline, encoding="utf-8")


def _packages() -> list[str]:
    """Returns the npm packages that a page loads: the tokenizer, then ONNX Runtime."""
    return sorted({file["package"] for file in RUNTIME_FILES})


def _at_cdn(file: dict, cdn: str) -> dict:
    """Returns URL, digest and size of a file of an npm package."""
    return {"url": f"{cdn}/{file['package']}/{file['path']}", "integrity": file["integrity"], "bytes": file["bytes"]}


def _with_version(contents: dict[str, str]) -> dict[str, str]:
    """Adds a version to the references between the files of a page, so that a cache does not mix two exports."""
    version = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:8]
    reference = re.compile(rf'"(?:\./)?(?:{"|".join(map(re.escape, contents))})(?=")')
    return {name: reference.sub(rf"\g<0>?{version}", content) for name, content in contents.items()}


def _image_settings(processor: ICLIPProcessor) -> dict:
    """Returns the settings by which `worker.js` prepares an image as the processor does."""
    image_processor = processor.image_processor
    size = {name: side for name, side in dict(image_processor.size).items() if side is not None}
    kernel = _KERNELS.get(int(image_processor.resample))
    crop = getattr(image_processor, "do_center_crop", False)
    if not image_processor.do_resize or crop or kernel is None:
        raise ValueError(
            "The page resizes the whole image with bilinear or bicubic resampling, not with "
            f"do_resize={image_processor.do_resize}, do_center_crop={crop} and resample={image_processor.resample}: "
            "set these of the image processor."
        )
    return {
        "size": size,
        "patch": processor.patch_size,
        "kernel": kernel,
        "factor": image_processor.rescale_factor if image_processor.do_rescale else 1,
        "mean": list(image_processor.image_mean) if image_processor.do_normalize else [0, 0, 0],
        "std": list(image_processor.image_std) if image_processor.do_normalize else [1, 1, 1],
        "max_pixels": MAX_PIXELS,
    }


def _text_settings(processor: ICLIPProcessor) -> dict:
    """Returns the settings by which `worker.js` prepares a text as the processor does."""
    if not processor.tokenizer.is_fast:
        raise ValueError("The page needs a tokenizer with a tokenizer.json: convert this slow one to a fast one.")
    return {
        "templates": list(processor.templates),
        "max_length": processor.max_text_length,
        "pad_to_max": processor.text_padding == "max_length",
        "pad_id": processor.tokenizer.pad_token_id or 0,
    }


def _presence_settings(model: ICLIPModel) -> dict | None:
    """Returns the settings by which `numerics.js` computes the presence; None for a model without presence."""
    config = trained_config(model)
    if config.logit_bias_init_value is None:
        return None
    scale, bias = math.exp(config.logit_scale_init_value), config.logit_bias_init_value + config.presence_bias
    return {"scale": scale, "bias": bias, "min_presence": MIN_PRESENCE, "present": SURE_PRESENCE}


def _write_compressed(folder: Path, name: str, data: bytes) -> dict:
    """
    Writes a compressed file, and returns what the worker needs to load and check it: a URL with a digest, the
    compressed size (`bytes`), the size of the data (`length`), and their digest (`integrity`).
    """
    packed = gzip.compress(data, mtime=0)
    (folder / f"{name}.gz").write_bytes(packed)
    return {
        "url": f"{name}.gz?{hashlib.sha256(packed).hexdigest()[:12]}",
        "bytes": len(packed),
        "length": len(data),
        "integrity": f"sha256-{base64.b64encode(hashlib.sha256(data).digest()).decode()}",
    }


def _write_example(example: Example, folder: Path) -> dict:
    """Writes an example photograph as JPEG, and returns its settings. A small JPEG is copied unchanged."""
    name = f"{example.file.stem}.jpg"
    with Image.open(example.file) as photo:
        if example.file.suffix == ".jpg" and shown_size(photo) == photo.size:
            shutil.copyfile(example.file, folder / name)
        else:
            reduced = photo.convert("RGB").resize(shown_size(photo), Image.Resampling.BICUBIC)
            write_image(reduced, folder / name, format="JPEG", quality=90)
    return {"file": name, "title": example.title, "texts": example.texts}


def _readme(card_file: Path, name: str) -> str:
    licence = ModelCard.load(card_file, ignore_metadata_errors=True).data.license
    photographs = [f"| photograph `{example.file.stem}.jpg` | {example.origin} |" for example in examples()]
    tokenizers, ort = _packages()
    page = string.Template(read_asset("README.md")).substitute(
        name=name, ort=ort, tokenizers=tokenizers, photographs="\n".join(photographs)
    )
    header = SpaceCardData(title=name, license=licence, **_STATIC_SPACE)
    return f"---\n{header.to_yaml()}\n---\n{page}"
