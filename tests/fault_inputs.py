"""Inputs that users bring by mistake or in bad faith, by name; what becomes of each stands in test_faults_*.py."""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(height: int, width: int, *channels: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (height, width, *channels), dtype, endpoint=True)


PHOTO = Image.fromarray(noise(24, 30, 3))
BY_FORMAT = {format: encoded(PHOTO, format) for format in ("JPEG", "PNG", "WEBP")}


def png(width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 8, kind: int = 2) -> bytes:
    """
    A PNG whose header states a size that its content need not have, and bit depth and colour type, by default RGB.
    """
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        parts += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(kind + data))]
    return b"".join(parts)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


# What the inputs are.
STRANGER = "a model folder or Hub id of a stranger"
PORT = "somebody who reaches the demo's port"
ARCHIVE = "a URL or an archive"
MISTAKE = "the user's likely mistakes"

UPLOADED_IMAGES = {  # by somebody who reaches the demo's port
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would run Ghostscript
    "pickle": pickle.dumps(Trap()),
    "bomb": png(60_000, 60_000),
}
MISTAKEN_IMAGES = {
    "empty": b"",
    "floating point": encoded(Image.fromarray(np.full((5, 5), np.nan, np.float32)), "TIFF"),
    "32-bit integers": encoded(Image.fromarray(np.full((5, 5), 70_000, np.int32)), "TIFF"),
    "no pixels": png(0, 8),
    "header alone": png(8, 8),
    **{f"half a {format}": data[: len(data) // 2] for format, data in BY_FORMAT.items()},
}

# For whoever reads JSON of a certain form.
BAD_JSON = {"truncated": '{"per_class": {"itsm": [{"na', "other object": '{"a": {"b": [1, null, "x"]}}'}


def written(folder: Path, content: str | bytes, name: str = "written.json") -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    return folder / name


def index_mask(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values), "PNG")


def masks_folder(
    folder: Path, image: bytes | None = None, mask: bytes | None = None, classes: str | bytes = "dog\ncat\n"
) -> Path:
    """A folder as `load_segmentation` takes it, of one image."""
    for name, content in (("images/image.png", image), ("masks/image.png", mask), ("classes.txt", classes)):
        (folder / name).parent.mkdir(exist_ok=True)
        content = BY_FORMAT["PNG"] if content is None else content
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def tar(*members: tuple[str, bytes | str], mode: str = "w", **attributes) -> bytes:
    """A tar file of (name, content); an attribute, such as the type, holds for all members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as opened:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for attribute, value in attributes.items():
                setattr(member, attribute, value)
            opened.addfile(member, io.BytesIO(content))
    return file.getvalue()


def edited_json(file: str, **changes) -> Callable[[Path], None]:
    """Sets entries of a JSON file of a folder; None removes one."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for name, value in changes.items():
            content.pop(name, None) if value is None else content.update({name: value})
        (folder / file).write_text(json.dumps(content))

    return edit


def removed(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / file).unlink() for file in files]


def edited_weights(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return apply


def truncated(file: str, share: float) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, int((folder / file).stat().st_size * share))


def with_code(folder: Path) -> None:
    """Code that a folder asks to be run, from outside of it by a link."""
    code = folder.parent / "code.py"
    code.write_text(
        "import os\nos.mkdir('executed')\nfrom iclip_hf import ICLIPConfig as Config, ICLIPModel as Model\n"
    )
    os.symlink(code, folder / "modeling_other.py")
    auto_map = {"AutoConfig": "modeling_other.Config", "AutoModel": "modeling_other.Model"}
    edited_json("config.json", model_type="other", auto_map=auto_map)(folder)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))


def outside_shard(folder: Path) -> None:
    os.replace(folder / "model.safetensors", folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"recognition.logit_scale": "../absent.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# Damages to a whole model folder, by the row of the threat model: the user's likely mistakes, a stranger's folder.
MISTAKEN_FOLDERS = {
    "missing": shutil.rmtree,
    "no config": removed("config.json"),
    "no weights": removed("model.safetensors"),
    "config is truncated": truncated("config.json", 0.5),
    "config of another model": edited_json("config.json", model_type="bert", vocab_size=9, num_hidden_layers=1),
    "config without a type": edited_json("config.json", model_type=None),
    "weights are truncated": truncated("model.safetensors", 0.9),
    "weights have another shape": edited_weights(
        lambda weights: weights.update({"recognition.visual_projection.weight": torch.zeros(3, 3)})
    ),
    "a shard is missing": outside_shard,
    "no processor": removed("processor_config.json"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("*token*")],
    "processor with a template without a place": edited_json("processor_config.json", templates=["a photo"]),
}
FOLDERS_OF_STRANGERS = {
    "pickled weights only": pickled,
    "weights hold NaN": edited_weights(
        lambda weights: weights["recognition.visual_projection.weight"][0].fill_(torch.nan)
    ),
    "symlinked code": with_code,
}
MODEL_FOLDERS = MISTAKEN_FOLDERS | FOLDERS_OF_STRANGERS
FEW_MODEL_FOLDERS = ("missing", "weights hold NaN", "symlinked code")
