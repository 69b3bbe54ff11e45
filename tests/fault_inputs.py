"""Inputs that users bring by mistake or in bad faith, by name; what becomes of each stands in test_faults_*.py."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
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
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
BY_FORMAT = {format: encoded(PHOTO, format) for format in FORMATS}


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG whose header states a size that its content need not have."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        parts += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(kind + data))]
    return b"".join(parts)


def webp_bomb() -> bytes:
    """A lossless WebP of one colour that decodes to its largest size, 16,383 x 16,383."""
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    data[21:25] = struct.pack("<I", 16_382 << 14 | 16_382)
    return bytes(data)


def jpeg_2000_bomb() -> bytes:
    """A JPEG 2000 file that states 60,000 x 60,000 pixels, in the header of the file and in that of its codestream."""
    size, stated = struct.pack(">II", 8, 8), struct.pack(">II", 60_000, 60_000)
    return encoded(Image.new("RGB", (8, 8)), "JPEG2000").replace(size, stated)


def damaged(data: bytes, seed: int) -> bytes:
    """Ten bytes after the signature replaced."""
    draws, changed = random.Random(seed), bytearray(data)
    for _ in range(10):
        changed[draws.randrange(12, len(data))] = draws.randrange(256)
    return bytes(changed)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def zip_archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("../escaped.png", BY_FORMAT["PNG"])
    return file.getvalue()


# Every one is readable, and becomes RGB.
UNUSUAL_IMAGES = {
    "gray": encoded(PHOTO.convert("L"), "PNG"),
    "bilevel": encoded(PHOTO.convert("1"), "PNG"),
    "palette": encoded(PHOTO.convert("P"), "PNG"),
    "palette with transparency": encoded(PHOTO.convert("P"), "PNG", transparency=3),
    "gray with alpha": encoded(PHOTO.convert("LA"), "PNG"),
    "rgba": encoded(PHOTO.convert("RGBA"), "WEBP", lossless=True),
    "16-bit": encoded(Image.fromarray(noise(24, 30, dtype=np.uint16)), "PNG"),
    "cmyk": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "lab": encoded(Image.merge("LAB", PHOTO.split()), "TIFF"),
    "animated gif": encoded(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(90)]),
    "animated png": encoded(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(180)]),
    "animated webp": encoded(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(180)]),
    "pages": encoded(PHOTO, "TIFF", save_all=True, append_images=[Image.new("RGB", (7, 900))]),
    "progressive": encoded(PHOTO, "JPEG", progressive=True),
    "one pixel": encoded(Image.new("RGB", (1, 1)), "PNG"),
    "one column": encoded(Image.new("RGB", (1, 3000)), "PNG"),
    "one row": encoded(Image.new("RGB", (3000, 1)), "PNG"),
    "rotated by EXIF": encoded(
        PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    ),
    "rubbish after the end": BY_FORMAT["JPEG"] + b"rubbish" * 999,
    "broken colour profile": encoded(PHOTO, "PNG", icc_profile=b"no profile"),
}
UNREADABLE_IMAGES = {
    "empty": b"",
    "text": b"not an image",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "pdf": b"%PDF-1.7\n%\xe2\xe3",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "zip": zip_archive(),
    "pickle": pickle.dumps(Trap()),
    "numbers of numpy": (lambda file: (np.save(file, noise(4, 4)), file.getvalue())[1])(io.BytesIO()),
    "floating point": encoded(Image.fromarray(np.full((5, 5), np.nan, np.float32)), "TIFF"),
    "32-bit integers": encoded(Image.fromarray(np.full((5, 5), 70_000, np.int32)), "TIFF"),
    "bomb": png(60_000, 60_000),
    "bomb that decodes": encoded(Image.new("1", (20_000, 20_000)), "PNG"),
    "bomb of WebP": webp_bomb(),
    "bomb of JPEG 2000": jpeg_2000_bomb(),
    "bomb of text": png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(99_000_000)))),
    "no pixels": png(0, 8),
    "negative height": struct.pack("<2sIIIIiiHHIIiiII", b"BM", 54, 0, 54, 40, 8, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
    "huge header": b"P6 99999999999 99999999999 255\n",
    "header alone": png(8, 8),
    **{f"signature of {format}": data[:8] for format, data in BY_FORMAT.items()},
    **{f"half a {format}": data[: len(data) // 2] for format, data in BY_FORMAT.items()},
}
# Some are readable all the same.
DAMAGED_IMAGES = {f"damaged {format}": damaged(data, 1) for format, data in BY_FORMAT.items()} | {
    f"{format} without its last byte": data[:-1] for format, data in BY_FORMAT.items()
}

# One for each way through a reader: nothing, another format, code, a bomb, a part.
FEW_UNREADABLE = ("empty", "svg", "pickle", "bomb", "half a JPEG")

STRANGE_TEXTS = {
    "many words": "dog " * 25_000,
    "a million without a space": "d" * 1_000_000,
    "control characters": "dog\x00\x07\x1b[31mred\x7f\r",
    "right to left": "كلب \u202e אדום",
    "braces and percent": "{} {0} {dog!r} {{ 100% %s %(dog)s",
    "dollar signs": "$\\frac{1}{0$ costs $5",
    "shell and path": "$(touch escaped); `id` | rm -rf . & '\" ../../etc/passwd",
    "emoji and noncharacters": "👩‍👩‍👧 🐕 \ufffe\uffff\U0010ffff",
    "combining": "e\u0301" * 300,
    "special tokens": "[SEP] [CLS] <|endoftext|>",
}

DEEP = 20_000
# JSON and near JSON, for whoever reads JSON and expects something of a certain form.
BAD_JSON = {
    "empty": "",
    "truncated": '{"per_class": {"itsm": [{"na',
    "no json": "<html>",
    "huge number": "9" * 5000,
    "null": "null",
    "list": "[]",
    "empty object": "{}",
    "deep lists": "[" * DEEP + "]" * DEEP,
    "other object": json.dumps({"a": {"b": [1, None, "x"]}}),
    "lone surrogate": '"\\ud800"',
    "byte order mark of UTF-16": "\ufeff{}".encode("utf-16"),
    "no UTF-8": b'{"a": "\xff"}',
    "pickle": pickle.dumps(Trap()),
}
# A list that would hold a thousand million letters if it were printed.
BOMB_OF_ALIASES = f"[{', '.join(f'&{name} [{part}]' for name, part in zip('abcdefghi', ['x, ' * 10, *(f'*{name}, ' * 10 for name in 'abcdefgh')]))}]"


def evaluation(**changes) -> str:
    row = {"name": "dog", "AP": 50.0, "MIoU": 20.0, "FMB": 0.1, "threshold": 0.4, **changes}
    return json.dumps({"per_class": {"itsm": [row, {**row, "name": "cat"}]}})


BAD_EVALUATIONS = BAD_JSON | {
    "no methods": '{"per_class": {}}',
    "methods as a list": '{"per_class": []}',
    "rows as a number": '{"per_class": {"itsm": 3}}',
    "rows of numbers": '{"per_class": {"itsm": [3]}}',
    "name as a list": evaluation(name=["dog"]),
    "scores as text": evaluation(AP="high", threshold="high"),
    "threshold above 1": evaluation(threshold=7, AP="high"),
    "no score at all": evaluation(AP=None, threshold=None),
}


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


def huge_member(size: int, type: bytes = b"0") -> bytes:
    """A tar file whose only member states this size and has no content."""
    header = bytearray(tar(("a.png", b""), type=type))
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


def edited_json(file: str, **changes) -> Callable[[Path], None]:
    """Sets entries of a JSON file of a folder; None removes one."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for name, value in changes.items():
            content.pop(name, None) if value is None else content.update({name: value})
        (folder / file).write_text(json.dumps(content))

    return edit


def replaced(file: str, content: bytes | str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


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


def lacking(name: str) -> Callable[[dict], None]:
    return lambda weights: [weights.pop(key) for key in list(weights) if name in key]


# What is done to a whole model folder.
MODEL_FOLDERS = {
    "missing": shutil.rmtree,
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("no folder")),
    "no config": removed("config.json"),
    "no weights": removed("model.safetensors"),
    "config is truncated": truncated("config.json", 0.5),
    "config of another model": edited_json("config.json", model_type="bert", vocab_size=9, num_hidden_layers=1),
    "config of an unknown model": edited_json("config.json", model_type="no such model"),
    "config without a type": edited_json("config.json", model_type=None),
    "config with a misspelt option": edited_json("config.json", poolings="max"),
    "config with an option of another type": edited_json("config.json", projection_dim="many"),
    "config with a negative size": edited_json("config.json", projection_dim=-1),
    "config with a huge size": edited_json("config.json", projection_dim=10**12),
    "config of another size": edited_json("config.json", projection_dim=17),
    "config of another tower": edited_json("config.json", vision_config={"model_type": "resnet"}),
    "config whose tower is no object": edited_json("config.json", vision_config=3),
    "weights are truncated": truncated("model.safetensors", 0.9),
    "weights are empty": replaced("model.safetensors", b""),
    "weights are text": replaced("model.safetensors", "version https://git-lfs.github.com/spec/v1\nsize 99\n"),
    "weights with a huge header": replaced("model.safetensors", b"\xff" * 64),
    "weights are a pickle": replaced("model.safetensors", pickle.dumps(Trap())),
    "pickled weights only": pickled,
    "weights lack a branch": edited_weights(lacking("recognition")),
    "weights lack a tower": edited_weights(lacking("vision_model")),
    "weights hold NaN": edited_weights(
        lambda weights: weights["recognition.visual_projection.weight"][0].fill_(torch.nan)
    ),
    "weights hold infinity": edited_weights(
        lambda weights: weights["text_model.embeddings.LayerNorm.bias"][:1].fill_(torch.inf)
    ),
    "weights have another shape": edited_weights(
        lambda weights: weights.update({"recognition.visual_projection.weight": torch.zeros(3, 3)})
    ),
    "a shard is missing": outside_shard,
    "no processor": removed("processor_config.json"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("*token*")],
    "processor is truncated": truncated("processor_config.json", 0.5),
    "processor with a template without a place": edited_json("processor_config.json", templates=["a photo"]),
    "processor of another class": edited_json("processor_config.json", processor_class="NoProcessor"),
    "tokenizer is truncated": truncated("tokenizer.json", 0.5),
    "tokenizer of another kind": replaced("tokenizer.json", "{}"),
    "symlinked code": with_code,
}
FEW_MODEL_FOLDERS = (
    "missing",
    "no weights",
    "config of another model",
    "weights hold NaN",
    "no tokenizer",
    "symlinked code",
)
# The same by what a JSON file of it holds.
MODEL_JSON = {
    **{f"config is {name}": replaced("config.json", content) for name, content in BAD_JSON.items()},
    **{f"processor is {name}": replaced("processor_config.json", content) for name, content in BAD_JSON.items()},
}
