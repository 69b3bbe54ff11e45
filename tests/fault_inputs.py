"""Files that tests write in memory: images, masks, tar files and folders of masks."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(height: int, width: int, *channels: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (height, width, *channels), dtype, endpoint=True)


PHOTO = Image.fromarray(noise(24, 30, 3))
PHOTO_PNG = encoded(PHOTO)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 8, kind: int = 2) -> bytes:
    """
    A PNG whose header states a size that its content need not have, and bit depth and colour type, by default RGB.
    """
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        parts += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(kind + data))]
    return b"".join(parts)


def written(folder: Path, content: str | bytes, name: str = "written.json") -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    return folder / name


def index_mask(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values))


def masks_folder(
    folder: Path, image: bytes = PHOTO_PNG, mask: bytes = PHOTO_PNG, classes: str | bytes = "dog\ncat\n"
) -> Path:
    """A folder as `load_segmentation` takes it, of one image."""
    for name, content in (("images/image.png", image), ("masks/image.png", mask), ("classes.txt", classes)):
        (folder / name).parent.mkdir(exist_ok=True)
        written(folder, content, name)
    return folder


def tar(*members: tuple[str, bytes | str] | tarfile.TarInfo) -> bytes:
    """A tar file of (name, content), or of ready members without content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as opened:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                opened.addfile(member)
                continue
            content = member[1].encode() if isinstance(member[1], str) else member[1]
            info = tarfile.TarInfo(member[0])
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return file.getvalue()
