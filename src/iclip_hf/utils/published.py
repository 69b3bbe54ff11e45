"""Names and configurations as others may see them: no path of this machine, and no code of a stranger."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path


# Usual first folders of relative paths. Such a path, also one of another machine, is no Hub id.
_USUAL_FOLDERS = ("runs", "data")
# Keys whose value is the path or Hub id that a configuration or tokenizer was loaded from.
_SOURCES = ("_name_or_path", "name_or_path")


def is_hub_id(name: str) -> bool:
    """Returns whether a name can be a repository of the Hub, `org/name`, and is no file or folder here."""
    has_form = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
    return has_form and os.path.dirname(name) not in _USUAL_FOLDERS and not os.path.exists(name)


def public_name(name: str) -> str:
    """Returns a Hub id unchanged, and only the last part of a path, whose folders may name the user."""
    return name if is_hub_id(name) else Path(name).name


def folder_name(folder: str | os.PathLike) -> str:
    """Returns the [`public_name`] of a folder, also of "." or a link."""
    return public_name(str(Path(folder).resolve()))


def without_path(value):
    """Returns a setting as others may see it: of a file or folder, only its [`public_name`]."""
    if isinstance(value, (list, tuple)):
        return [without_path(part) for part in value]
    is_path = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))
    return public_name(os.fspath(value)) if is_path or isinstance(value, os.PathLike) else value


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
