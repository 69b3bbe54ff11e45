"""The model and the images that a command line names."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.files import images_of
from ..model.images import is_url


if TYPE_CHECKING:
    from PIL import Image

    from ..backends.explainable import ExplainableModel


def load_model(name: str, args: argparse.Namespace) -> ExplainableModel:
    """Loads a model by [`iclip_hf.load`], without output of Transformers."""
    from ..backends.loading import load

    silence_transformers()
    return load(name, dtype=args.dtype, device=args.device)


def silence_transformers() -> None:
    """Disables log messages and progress bars of Transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_named_image(name: str) -> Image.Image:
    """Loads the image of a path or a URL. Raises as [`iclip_hf.model.images.load_image`]."""
    from ..model import images

    return images.load_image(name if is_url(name) else Path(name))


def image_names(names: Sequence[str]) -> list[str]:
    """Replaces folders by their images. Raises `FileNotFoundError` for a name without an image."""
    if missing := [name for name in names if not is_url(name) and not Path(name).exists()]:
        raise FileNotFoundError(f"{missing[0]!r}: there is no such image file or folder; write --text before a text.")
    return [str(image) for name in names for image in (images_of(name) if os.path.isdir(name) else [name])]
