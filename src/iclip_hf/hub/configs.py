"""The model configurations that the package ships, by name, and options that override them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import yaml


# Folder of the shipped configurations.
SHIPPED = Path(str(files("iclip_hf.hub_configs")))
# Folder of the configuration of the embedded model.
EMBEDDED = SHIPPED / "iclip-dinov2-s14-minilm"


def config_folder(name: str | Path) -> Path:
    """Returns the folder of a shipped configuration, or `name` itself if it is a folder with a configuration."""
    for folder in (Path(name), SHIPPED / name):
        if any((folder / file).is_file() for file in ("config.json", "train.yaml")):
            return folder
    names = sorted(path.parent.name for path in SHIPPED.glob("*/train.yaml"))
    raise FileNotFoundError(
        f"{name}: expected a folder with a config.json or a train.yaml, or one of {', '.join(names)}, but got "
        "neither; name one."
    )


def parse_options(model_options: Sequence[str]) -> dict[str, object]:
    """Returns the values of `model_options` by name. Raises `ValueError` for an option that is not name=value."""
    parsed = {}
    for option in model_options:
        try:
            name, value = option.split("=", 1)
            number = re.fullmatch(r"[-+]?\d+\.?\d*e[-+]?\d+", value, re.IGNORECASE)  # for YAML, 1e-3 is a text
            parsed[name] = float(value) if number else yaml.safe_load(value)
        except (AttributeError, ValueError, yaml.YAMLError):  # a train.yaml may list values that are not strings
            raise ValueError(f"model_options: expected name=value, but got {option!r}.") from None
    return parsed
