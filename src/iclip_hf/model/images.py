"""Loads images of any form as upright 8-bit RGB, with uniform error messages."""

from __future__ import annotations

import base64
import io
import os
from functools import cache
from typing import TYPE_CHECKING

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


if TYPE_CHECKING:
    import torch

# Other formats are excluded, because Pillow reads some of them with external programs (EPS with Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "HEIF")


def is_url(name: object) -> bool:
    """Returns whether `name` is a URL of http or https, from which an image is downloaded."""
    return isinstance(name, str) and name.lower().startswith(("http://", "https://"))


def _download(url: str, timeout: float) -> bytes:
    import httpx

    try:  # some sites refuse the user agent of httpx
        answer = httpx.get(url, timeout=timeout, follow_redirects=True, headers={"User-Agent": "iclip-hf"})
        return answer.raise_for_status().content
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OSError(f"{url[:100]!r}: the image cannot be downloaded: {error}") from error


@cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes of readable images, in lower case. HEIC is readable only with `pillow-heif`."""
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:
        pass
    format_of_suffix = Image.registered_extensions()
    return frozenset(suffix for suffix, file_format in format_of_suffix.items() if file_format in _FORMATS)


def open_image(
    source: str | os.PathLike | bytes | Image.Image, name: str | None = None, decode: bool = True
) -> Image.Image:
    """
    Decodes the first frame of an image, with its stored mode and orientation.

    Args:
        source: path of an image file; the bytes of one; or a PIL image, which is returned unchanged.
        name (`str`, *optional*): name of the image in errors; its path if not given.
        decode (`bool`): whether to read the pixels, or only the header.

    Raises:
        `FileNotFoundError`: there is no file at the path. `ValueError`: the image is not readable, or has more pixels
        than Pillow allows. `TypeError`: `source` has none of these types.
    """
    name = name or _name(source)
    # Reading a pipe or a device may never end.
    if isinstance(source, (str, os.PathLike)) and not os.path.isfile(source):
        problem = "this is a folder instead of an image" if os.path.isdir(source) else "there is no such image file"
        raise FileNotFoundError(f"{name}: {problem}.")
    try:
        if isinstance(source, Image.Image):
            source.load()
            if 0 in source.size:
                raise ValueError("it has no pixels")
            return source
        image_suffixes()  # registers the optional formats that are installed
        formats = [file_format for file_format in _FORMATS if file_format in Image.OPEN]
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            if decode:
                image.load()
        return image  # its file is closed
    except UnidentifiedImageError:
        problem = f"its content is none of {', '.join(formats)}"
        if "HEIF" not in formats:
            problem += ", and HEIC needs `pip install pillow-heif`"
    except Image.DecompressionBombError:
        problem = f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
    except MemoryError:
        problem = "it takes too much memory"
    except Exception as error:  # decoders raise various errors, such as SyntaxError and struct.error, on damaged files
        if "DataLoader worker" in str(error):  # raised by torch's signal handler, which can run anywhere
            raise
        problem = f"it is damaged ({str(error) or type(error).__name__}); replace it by an undamaged copy"
    raise ValueError(f"{name}: expected a readable image, but {problem}.")


def load_image(image, name: str | None = None, timeout: float = 60) -> Image.Image:
    """
    Loads the first frame of an image upright, as 8-bit RGB, with transparent parts on white. A given image is not
    modified. 16-bit grayscale is scaled (65535 becomes 255). 32-bit integers count as 16-bit grayscale if a value is
    above 255, otherwise as 8-bit grayscale.

    Args:
        image (`str`, `os.PathLike`, `bytes`, `PIL.Image.Image`, array or tensor): a path; a URL; a "data:" URL in
            base64; the bytes of a file; an image of any mode; or the pixels, in the ranges of [`to_8_bit`]. An
            `os.PathLike` is always a path.
        name (`str`, *optional*): name of the image in errors; its path if not given.
        timeout (`float`): time limit in seconds for the answer to a download.

    Raises:
        `FileNotFoundError`, `ValueError`, `TypeError`: as [`open_image`] and [`to_8_bit`]. Also `ValueError`: the
        range of a PIL image's values is not known (floats, or integers outside 0..65535). `OSError`: the download
        fails.
    """
    if hasattr(image, "shape") and not isinstance(image, (str, bytes)):  # numpy's strings have a shape too
        return Image.fromarray(to_8_bit(image).movedim(0, -1).numpy(force=True))
    if isinstance(image, str) and not os.path.exists(image):
        name = name or repr(image[:100])
        if is_url(image):
            image = _download(image, timeout)
        elif image.startswith("data:"):
            image = base64.b64decode(image.partition(",")[2])
    name = name or _name(image)
    return to_rgb(upright(open_image(image, name)), name)


def to_rgb(image: Image.Image, name: str | None = None) -> Image.Image:
    """Converts a PIL image to 8-bit RGB as [`load_image`] does, but without rotation."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # "I;16" in its byte orders, or "I"
        import numpy as np  # not above, because commands check their files before they import it

        values = np.asarray(image).astype(np.int32)
        if values.min() >= 0 and values.max() <= 65535:
            is_8_bit = image.mode == "I" and values.max() <= 255  # white is not defined for "I", which has 32 bits
            gray = values if is_8_bit else (values + 128) // 257  # 65535 / 255 = 257; rounded to the nearest
            gray[values == image.info.get("transparency", -1)] = 255
            return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(
            f"{name or _name(image)}: the pixels are floating-point or of more than 16 bits, so their range is not "
            "known; convert it to RGB or to 8- or 16-bit grayscale."
        )
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def to_8_bit(image) -> torch.Tensor:
    """
    Returns the pixels of an array or tensor as uint8 `(3, H, W)`, see [`to_pixels`]. White is 1 in floats and
    booleans, and 255 in integers. Raises `ValueError` if a value is outside of this range.
    """
    import torch

    pixels = to_pixels(image)
    white = 1 if pixels.is_floating_point() or pixels.dtype == torch.bool else 255
    levels = (pixels.double() * (255 / white)).round()
    if levels.min() < 0 or levels.max() > 255:
        raise ValueError(
            f"An image of {pixels.dtype} has values in [0, {white}], but this one has {levels.min() * white / 255:g} "
            f"to {levels.max() * white / 255:g}: convert it to uint8."
        )
    return levels.to(torch.uint8)


def to_pixels(image) -> torch.Tensor:
    """
    Returns the pixels of an array or tensor as a tensor `(3, H, W)`, in any range. The shape is `(H, W)`, `(H, W, C)`
    or `(C, H, W)`, where C is 1 or 3. If both ends could be the channels, they are last in a numpy array, and first in
    a tensor. Raises `ValueError` for another shape, and for NaN and infinity.
    """
    import numpy as np
    import torch

    is_array = isinstance(image, np.ndarray)
    if is_array:
        # torch takes neither a foreign byte order nor negative strides, as of image[:, :, ::-1]. It warns of
        # read-only arrays, such as those of PIL images.
        image = np.require(image, image.dtype.newbyteorder("="), requirements="CW")
    pixels = torch.as_tensor(image)
    if pixels.ndim == 2:
        pixels = pixels.unsqueeze(0)
    elif pixels.ndim == 3 and pixels.shape[-1] in (1, 3) and (is_array or pixels.shape[0] not in (1, 3)):
        pixels = pixels.movedim(-1, 0)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(
            f"An image has the shape (H, W), (H, W, C) or (C, H, W) with C = 1 or 3, not {tuple(image.shape)}."
        )
    if not torch.isfinite(pixels).all():
        raise ValueError("The image holds NaN or infinity.")
    return pixels.expand(3, -1, -1)


def _name(source: str | os.PathLike | bytes | Image.Image) -> str:
    """Returns the name of an image in errors. Raises `TypeError` for other types."""
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    if isinstance(source, Image.Image):
        return repr(getattr(source, "filename", None) or "PIL image")
    if isinstance(source, bytes):
        return "image bytes"
    raise TypeError(
        f"Expected the path of an image, its bytes or a PIL image, but got {type(source).__name__}: convert it."
    )


def upright(image: Image.Image) -> Image.Image:
    """Rotates an image from [`open_image`] by its orientation in EXIF."""
    try:
        is_rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if is_rotated else image  # exif_transpose would copy an upright image
    except Exception:  # damaged EXIF raises various errors; like viewers, show the pixels as stored
        return image
