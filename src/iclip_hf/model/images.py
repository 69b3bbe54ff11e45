"""Loads images of any form as upright 8-bit RGB, with uniform error messages."""

from __future__ import annotations

import base64
import io
import os
from functools import cache
from typing import TYPE_CHECKING

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .downloads import download, is_url


if TYPE_CHECKING:
    import torch

# The first characters of a JPEG, PNG, GIF and WebP file in base64. Those of JPEG differ in base64's alphabet for URLs.
_BASE64 = ("/9j/", "_9j_", "iVBORw0KGgo", "R0lGOD", "UklGR")
# Other formats are excluded, because Pillow reads some of them with external programs (EPS with Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "HEIF")


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
        `FileNotFoundError`: there is no file at the path. `ValueError`: the image is not readable, or has more than
        `PIL.Image.MAX_IMAGE_PIXELS` pixels. `TypeError`: `source` has none of these types.
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
            # Pillow itself only warns between one and two times its limit.
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            if decode:
                image.load()
        return image  # its file is closed
    except UnidentifiedImageError:
        problem = f"its content is none of {', '.join(formats)}"
        if "HEIF" not in formats:
            problem += ", and HEIC needs `pip install pillow-heif`"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        problem = f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels"
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
        image (`str`, `os.PathLike`, `bytes`, `PIL.Image.Image`, array or tensor): a path; a URL; a "data:" URL, or the
            base64 text of a JPEG, PNG, GIF or WebP file, in either alphabet of base64; the bytes of a file; an image
            of any mode; or the pixels, in the ranges of [`to_8_bit`]. An `os.PathLike` is always a path.
        name (`str`, *optional*): name of the image in errors; its path if not given.
        timeout (`float`): time limit in seconds for a download, which has at most `MAX_DOWNLOAD` bytes.

    Raises:
        `FileNotFoundError`, `ValueError`, `TypeError`: as [`open_image`] and [`to_8_bit`]. Also `ValueError`: the
        range of a PIL image's values is not known (floats, or integers outside 0..65535). `OSError`: the download
        fails.
    """
    if hasattr(image, "shape") and not isinstance(image, (str, bytes)):  # numpy's strings have a shape too
        return _from_array(to_8_bit(image))
    if isinstance(image, str) and not os.path.exists(image):
        name = name or repr(image[:100])
        text = image.strip()
        if is_url(image):
            image = download(image, timeout)
        elif text.startswith("data:") or (text.startswith(_BASE64) and "." not in text):  # a path has a dot
            try:
                letters = (text.partition(",")[2] or text).replace("-", "+").replace("_", "/")
                image = base64.b64decode(letters + "==")  # the padding may be missing, and surplus padding is ignored
            except ValueError as error:
                raise ValueError(f"{name}: this is no base64 text ({error}).") from error
    name = name or _name(image)
    return to_rgb(upright(open_image(image, name)), name)


def to_rgb(image: Image.Image, name: str | None = None) -> Image.Image:
    """Converts a PIL image to 8-bit RGB as [`load_image`] does, but without rotation. Raises as [`load_image`]."""
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
    Scales the pixels of an array or tensor to 0..255 and rounds them to uint8, on the same device. The result has 3
    channels.

    Args:
        image: array or tensor of shape `(H, W, C)` or `(C, H, W)`, where C is 1 or 3. If the first and the last
            dimension both could be the channels, the last one counts in a numpy array, which becomes `(C, H, W)`, and
            the first one in a tensor. White is 65535 in uint16, 127 in int8, 1 in floats and booleans, and 255 in all
            other integers.

    Raises:
        `ValueError`: the shape is wrong, or a value is NaN, infinite or outside of the range of its type.
        `TypeError`: the values are no numbers.
    """
    import torch

    pixels = to_pixels(image)
    if pixels.dtype == torch.uint8:
        return pixels
    integer_white = {torch.bool: 1, torch.int8: 127, torch.uint16: 65535}.get(pixels.dtype, 255)
    white = 1 if pixels.is_floating_point() else integer_white
    levels = (pixels.double() * (255 / white)).round()
    if levels.min() < 0 or levels.max() > 255:
        low, high = pixels.double().aminmax()  # torch has no minimum of some integer types
        raise ValueError(
            f"An image of {pixels.dtype} has values in [0, {white}], but this one has {low:g} to {high:g}: convert it "
            "to uint8, or to uint16 if white is 65535."
        )
    return levels.to(torch.uint8)


def to_pixels(image) -> torch.Tensor:
    """Returns the pixels of an array or tensor as a tensor with 3 channels, in any range. Raises as [`to_8_bit`]."""
    import numpy as np
    import torch

    if len(image.shape) != 3 or 0 in image.shape or not {1, 3} & {image.shape[0], image.shape[-1]}:
        raise ValueError(
            f"An array of an image has the shape (H, W, C) or (C, H, W) with C = 1 or 3 channels, not "
            f"{tuple(image.shape)}: array[..., None] adds a channel to (H, W)."
        )
    if isinstance(image, np.ndarray):
        if image.shape[0] in (1, 3) and image.shape[-1] in (1, 3):
            image = np.moveaxis(image, -1, 0)  # the image processor would take the first dimension for the channels
        # torch takes neither a foreign byte order nor negative strides, as of image[:, :, ::-1]. It warns of
        # read-only arrays, such as those of PIL images.
        image = np.require(image, image.dtype.newbyteorder("="), requirements="CW")
    pixels = torch.as_tensor(image)
    if not torch.isfinite(pixels).all():
        raise ValueError("The image holds NaN or infinity.")
    return pixels.expand(3, -1, -1) if pixels.shape[0] in (1, 3) else pixels.expand(-1, -1, 3)


def _from_array(pixels: torch.Tensor) -> Image.Image:
    """Returns the RGB image of pixels from [`to_8_bit`]."""
    pixels = pixels.movedim(0, -1) if pixels.shape[0] == 3 else pixels
    return Image.fromarray(pixels.numpy(force=True))


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
