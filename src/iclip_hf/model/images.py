"""Reading of image files as upright 8-bit RGB, with uniform error messages."""

from __future__ import annotations

import base64
import io
import os
import threading
import time
import urllib.parse
import urllib.request
from concurrent import futures
from http.client import HTTPException

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")

MAX_DOWNLOAD = 64 * 2**20  # largest size of an image at a URL, in bytes

# Other decoders of Pillow are excluded, because some start external programs (EPS runs Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")


def open_image(
    source: str | os.PathLike | bytes | Image.Image, name: str | None = None, decode: bool = True
) -> Image.Image:
    """
    Decodes the first frame of an image, with its stored mode and orientation.

    Args:
        source: path of an image file, its bytes, or a PIL image, which is returned unchanged.
        name (`str`, *optional*): name of the image in errors; its path if not given.
        decode (`bool`): whether to read the pixels too, or the header alone.

    Raises:
        `FileNotFoundError`: there is no file at the path. `ValueError`: the image is not readable, or has more than
        `PIL.Image.MAX_IMAGE_PIXELS` pixels. `TypeError`: `source` has another type.
    """
    name = name or _name(source)
    # Reading a pipe or a device may never end.
    if isinstance(source, (str, os.PathLike)) and not os.path.isfile(source):
        raise FileNotFoundError(f"{name}: there is no such image file.")
    try:
        if isinstance(source, Image.Image):
            source.load()
            return source
        Image.init()  # registers the optional formats, so that the absent ones are known
        formats = [format for format in _FORMATS if format in Image.OPEN]
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            # Pillow itself only warns between one and two times its limit.
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            if decode:
                image.load()
        return image  # its file is closed
    except UnidentifiedImageError:
        problem = f"its content is none of {', '.join(_FORMATS)}"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        problem = f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except Exception as error:  # decoders raise various errors, such as SyntaxError and struct.error, on damaged files
        if "DataLoader worker" in str(error):  # from torch's signal handler, which can raise anywhere
            raise
        problem = f"it is damaged ({str(error) or type(error).__name__}); replace it by an undamaged copy"
    raise ValueError(f"{name}: expected a readable image, but {problem}.")


def load_image(source: str | os.PathLike | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """
    Opens an image as browsers display it: upright, 8-bit RGB, transparent parts on white, first frame. Arguments are those of
    [`open_image`]. A given PIL image is not modified.

    The orientation is that of EXIF in JPEG, PNG, TIFF and AVIF. As in browsers, an orientation in a WebP file or in XMP does not count.
    16-bit grayscale is scaled (65535 becomes 255).

    Raises:
        `FileNotFoundError`, `ValueError`, `TypeError`: as [`open_image`]. Also `ValueError`: the range of the pixels is not
        defined (floats, or integers of more than 16 bits).
    """
    return to_rgb(_upright(open_image(source, name)), name)


def read_image(image: str | os.PathLike | bytes | Image.Image, timeout: float = 60) -> Image.Image:
    """
    Like [`load_image`], and reads URLs and base64 text too. A string that is no file is base64 text if it begins with "data:" or
    an image comes out.

    Args:
        image (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`): path, URL, base64 text, bytes of a file, or a PIL image.
        timeout (`float`): time limit in seconds for a download, of at most `MAX_DOWNLOAD` bytes.

    Raises:
        As [`load_image`]; also `OSError`: the download fails.
    """
    if not isinstance(image, str) or os.path.exists(image):
        return load_image(image)
    name = repr(image[:100])
    if image.startswith(("http://", "https://")):
        try:
            content = _download(image, timeout)
        except (OSError, HTTPException, ValueError) as error:
            raise OSError(f"{name}: the image cannot be downloaded: {error}") from error
        return load_image(content, name)
    try:
        content = base64.b64decode("".join(image.rpartition(",")[2].split()), validate=True)
        return load_image(content, name)
    except ValueError:
        if image.startswith("data:"):
            raise
    return load_image(image, name)  # a path that is not there can consist of letters that base64 has, such as data/dog


def _download(url: str, timeout: float) -> bytes:
    """Downloads a URL with a limit of time and size."""
    url = urllib.parse.quote(url, safe="%/:?#[]@!$&'()*+,;=~")  # quotes spaces and non-ASCII letters
    request = urllib.request.Request(url, headers={"User-Agent": "iclip-hf"})  # some sites refuse Python's default
    answer, late = futures.Future(), TimeoutError(f"it did not end within {timeout:g} seconds")
    end = time.monotonic() + timeout

    def fetch() -> None:
        content = bytearray()
        try:
            with urllib.request.urlopen(request, timeout=timeout + 1) as opened:  # the thread is left before that
                while part := opened.read1(2**16):
                    content += part
                    if len(content) > MAX_DOWNLOAD:
                        raise OSError(f"it has more than {MAX_DOWNLOAD // 2**20} MiB")
                    if time.monotonic() > end:
                        raise late
            answer.set_result(bytes(content))
        except Exception as error:
            answer.set_exception(error)

    # A thread, because the timeout of a socket restarts with every byte, also of the headers.
    threading.Thread(target=fetch, daemon=True).start()
    try:
        return answer.result(timeout)
    except futures.TimeoutError:
        raise late from None


def to_rgb(image: Image.Image, name: str | None = None) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB, as [`load_image`] does and with its errors, but without rotation."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # "I;16" in its byte orders, "I" in older Pillow
        import numpy as np  # not above, because commands check their files before they load anything

        values = np.asarray(image).astype(np.int32)
        if values.min() >= 0 and values.max() <= 65535:
            return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")  # rounded
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(
            f"{name or _name(image)}: the pixels are floating-point or of more than 16 bits, so their range is not known; convert it to "
            "RGB or to 8- or 16-bit grayscale."
        )
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def _name(source: str | os.PathLike | bytes | Image.Image) -> str:
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    if isinstance(source, Image.Image):
        return repr(getattr(source, "filename", None) or "PIL image")
    if isinstance(source, bytes):
        return "image bytes"
    raise TypeError(
        f"Expected the path of an image, its bytes or a PIL image, but got {type(source).__name__}: convert it."
    )


def _upright(image: Image.Image) -> Image.Image:
    try:
        exif = image.getexif()
        if "exif" in image.info:  # else of a TIFF file, or given by the user
            exif = Image.Exif()
            exif.load(image.info["exif"])
        # Elsewhere Pillow found it in XMP or in the text of a PNG file, where browsers do not look.
        elif image.format not in (None, "TIFF"):
            return image
        is_turned = image.format != "WEBP" and exif.get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if is_turned else image
    except Exception:  # damaged EXIF raises anything; like viewers, show the pixels as stored
        return image
