"""A report: a page of pictures of maps with their numbers, which a browser opens from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..model.presence import MIN_PRESENCE
from ..model.similarity import resize_and_normalize
from ..utils.files import atomic_write, write_image
from .colors import overlay


if TYPE_CHECKING:
    import torch


# Longest side of a picture in pixels. A page shows 24 images, each with a picture for every method.
_SIDE = 240
_OUTLINE = (0, 229, 255)  # the colour map of a report, "heat", has no such colour


class ReportFolder:
    """
    Writes the files of a report: pictures, which several threads and processes may write at once, and the page at the
    end.

    Args:
        folder: new or empty. The pictures are written into its subfolder `images`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._images = self.folder / "images"
        self._images.mkdir(parents=True, exist_ok=True)

    def save_image(self, image_index: int, image: Image.Image) -> None:
        """Writes an RGB image under the name of its index, such as `0.jpg`."""
        _save(_reduced(image), self._images / f"{image_index}.jpg")

    def save_map(
        self,
        image_index: int,
        text_index: int,
        image: Image.Image,
        heatmap: torch.Tensor,
        mask: np.ndarray,
        method_index: int = 0,
        unrefined: torch.Tensor | None = None,
    ) -> None:
        """
        Writes the map of a text, `(H, W)` in [0, 1], over its image and with the outline of a mask, `(H, W)` boolean,
        under the name of its three indices, such as `0-2-1.jpg`. If `unrefined` is given, the raw map before the
        refinement, `(h, w)`, it is written too, as `0-2-1-unrefined.jpg`.
        """
        small, name = _reduced(image), f"{image_index}-{text_index}-{method_index}"
        if unrefined is not None:
            unrefined_map = resize_and_normalize(unrefined[None], small.size[::-1])[0]
            _save(overlay(small, unrefined_map.numpy()), self._images / f"{name}-unrefined.jpg")
        values = Image.fromarray(np.asarray(heatmap, np.float32)).resize(small.size, Image.Resampling.BILINEAR)
        picture = overlay(small, np.asarray(values))
        inside = np.asarray(Image.fromarray(mask).resize(small.size, Image.Resampling.NEAREST))
        padded = np.pad(inside, 1, mode="edge")
        surrounded = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        picture.paste(_OUTLINE, mask=Image.fromarray(inside & ~surrounded))
        _save(picture, self._images / f"{name}.jpg")

    def write_page(self, **data) -> Path:
        """
        Writes the page, `index.html`, after its data in JSON, and returns its path.

        Args:
            title (`str`): title of the page.
            images, texts, methods (`list[str]`): names, which the indices below refer to.
            value (`str`): what the values in `rows` are: `"IoU"`, in [0, 1], or `"score"`.
            rows: for each pair of an image and a text: the index of the image, that of the text, the share of the
                image in the mask, the presence or None, and a list with a value for each method.
            refined (`bool`): whether the maps are refined. Each then also has a picture before the refinement.
            alarms (*optional*): for each text that the model calls present in an image that does not show it: the
                index of the image, that of the text, and the presence.
            tables (`list[str]`, *optional*): tables and lists in Markdown.
            scores (`dict`, *optional*): by the name of a score and by method, the numbers of all texts, None if not
                measured.
        """
        data = {"alarms": [], "tables": [], "scores": {}, "min_presence": MIN_PRESENCE, **data}
        # A script, because a page on disk may not fetch a file.
        script = f"const REPORT = {json.dumps(data, allow_nan=False, separators=(',', ':'))};\n"
        page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
        for name, content in (("data.js", script), ("index.html", page)):
            with atomic_write(self.folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        return self.folder / "index.html"


def _reduced(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.info.clear()  # Pillow would write the comment of the photograph, which may name its author
    image.thumbnail((_SIDE, _SIDE))
    return image


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        write_image(picture, temporary, format="JPEG", quality=80)
