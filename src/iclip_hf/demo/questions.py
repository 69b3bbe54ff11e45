"""The questions of visitors of the demo, texts and an image, and the data of the answers."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..model.batches import PreparedImage
from ..model.engine import Engine
from ..model.explanation import Explanation
from ..model.images import load_image
from ..model.prompts import split_texts
from ..model.words import without_each_word
from ..web.viewer import MAX_CHARACTERS, MAX_TEXTS, shown_size


# The preparation for the model takes twenty bytes for each pixel. Models see fewer pixels.
MAX_SIDE = 2048
MAX_WORDS = 24


def asked_texts(typed: str, words: bool = False) -> list[str]:
    """
    Returns the texts that a visitor typed, each once, or the sentence and the sentence `without_each_word`. Raises
    `ValueError` for none, too many or too long texts.
    """
    if words:
        texts = without_each_word(typed)
        if len(texts) > MAX_WORDS + 1:
            raise ValueError(f"A sentence has at most {MAX_WORDS} words here, not {len(texts) - 1}.")
    else:
        texts = list(dict.fromkeys(split_texts(typed)))
        if not 1 <= len(texts) <= MAX_TEXTS:
            raise ValueError(f"Type 1 to {MAX_TEXTS} texts, between commas or one a line, not {len(texts)}.")
    longest = max(map(len, texts))
    if longest > MAX_CHARACTERS:
        raise ValueError(f"Texts have at most {MAX_CHARACTERS} characters, but one has {longest}; shorten it.")
    return texts


def read_photo(path: str) -> tuple[Image.Image, tuple[int, int]]:
    """Loads an image with at most `MAX_SIDE` pixels a side. Returns it, and the (width, height) that it had."""
    image = load_image(Path(path), Path(path).name)
    original_size = image.size
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image, original_size


class SeenImage(NamedTuple):
    """A visitor's image, kept for further texts."""

    prepared: PreparedImage  # encoded, without the image
    shown: dict  # what the page shows: `image` (a data URL), its `size`, and `original_size`, both (width, height)


def encode_photo(engine: Engine, image: Image.Image, original_size: tuple[int, int]) -> SeenImage:
    """
    Encodes an RGB image for any texts, and for engines as in [`Engine.encode_images`]. Maps get the size of the image
    on the page. `image` and `original_size` are those that `read_photo` returns.
    """
    size, jpeg = shown_size(image), io.BytesIO()
    image.resize(size).save(jpeg, "JPEG", quality=85)
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
    (prepared,) = engine.encode_images([engine.prepare(image, size[::-1])])
    return SeenImage(replace(prepared, image=None), {"image": url, "size": size, "original_size": original_size})


def viewer_value(seen: SeenImage, explanation: Explanation) -> dict:
    """
    Returns the data for `gradio_viewer.js`, with raw maps, which the browser enlarges. The values of a map are stored
    as `levels`, little-endian 16-bit numbers in base64. Level 0 stands for the value `low`, and level 65535 for
    `high`. Lists of numbers would take hundreds of megabytes, because twelve maps at two scales have three million.
    """
    unrefined = explanation.unrefined_maps
    presences, words = explanation.presences, explanation.presence_words
    return {
        **seen.shown,
        "made_by": explanation.made_by,
        "are_words": explanation.sentence is not None,
        "grid": list(explanation.raw_maps.shape[1:]),
        "unrefined_grid": None if unrefined is None else list(unrefined.shape[1:]),
        "texts": [
            {
                "text": text,
                "score": round(explanation.scores[index].item(), 4),
                "presence": presences[index],
                "word": words[index],
                "map": _levels(explanation.raw_maps[index]),
                "unrefined": None if unrefined is None else _levels(unrefined[index]),
            }
            for index, text in enumerate(explanation.labels)
        ],
    }


def _levels(raw_map: torch.Tensor) -> dict:
    low, high = (value.item() for value in raw_map.aminmax())
    levels = (raw_map - low) * (65535 / ((high - low) or 1))  # a constant map becomes zeros
    return {"low": low, "high": high, "levels": base64.b64encode(levels.round().numpy().astype("<u2")).decode()}


def to_npz(explanation: Explanation) -> memoryview:
    """Returns a NumPy archive: the [`Explanation.arrays`], and `maps` `(T, H, W)` in [0, 1], float16."""
    archive = io.BytesIO()
    # Compression would save a third, but takes longer than the maps of new texts for an encoded image.
    np.savez(archive, **explanation.arrays(), maps=explanation.maps.half().numpy())
    return archive.getbuffer()
