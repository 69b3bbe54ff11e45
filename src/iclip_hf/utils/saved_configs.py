"""Configurations that Transformers saved, cleaned before they are published."""

from __future__ import annotations

import json
from pathlib import Path

from .hub_ids import is_hub_id


# Keys whose value is the path or Hub id that a configuration or tokenizer was loaded from.
_SOURCES = ("_name_or_path", "name_or_path")


def clean_configs(folder: str | Path) -> None:
    """
    Removes two things from the configurations in a saved folder: the path on this machine that the model was loaded
    from, and the code that this model named, which would run for anybody who trusts the new folder.
    """

    def stays(name: str, value) -> bool:
        return name not in ("auto_map", "custom_pipelines") and (name not in _SOURCES or is_hub_id(value or ""))

    def cleaned(value):
        if not isinstance(value, dict):
            return value
        return {name: cleaned(part) for name, part in value.items() if stays(name, part)}

    for file in Path(folder).glob("*config.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if (kept := cleaned(content)) != content:
            file.write_text(json.dumps(kept, indent=2) + "\n")
