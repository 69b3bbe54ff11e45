"""Which names can be repositories of the Hub."""

import os
import re
from pathlib import Path


# Usual first folders of relative paths. Such a path, also one of another machine, is no Hub id.
_USUAL_FOLDERS = ("runs", "data")


def is_hub_id(name: str) -> bool:
    """Returns whether a name can be a repository of the Hub, `org/name`, and is no file or folder here."""
    has_form = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
    return has_form and os.path.dirname(name) not in _USUAL_FOLDERS and not os.path.exists(name)


def public_name(name: str) -> str:
    """
    Returns a Hub id unchanged, and only the last part of a path, because its folders may name the user.
    """
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
