"""Which names can be repositories of the Hub."""

import os
import re
from pathlib import Path


# Usual first folders of relative paths, on this machine or another one.
_USUAL_FOLDERS = ("runs", "data")


def is_hub_id(name: str) -> bool:
    """Whether this can name a repository of the Hub, `org/name`: it is no file and no folder here."""
    is_form = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
    return is_form and os.path.dirname(name) not in _USUAL_FOLDERS and not os.path.exists(name)


def public_name(name: str) -> str:
    """Returns a Hub id unchanged, and the last part of a path, which says nothing of this machine."""
    return name if is_hub_id(name) else Path(name).name
