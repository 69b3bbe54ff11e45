"""Which names can be repositories of the Hub."""

import os
import re


# The folder of the runs of `iclip train`, if no other is named.
RUNS = "runs"
# Folders that a path of this machine, or of another one, usually begins with.
_USUAL_FOLDERS = (RUNS, "data")
# Files of data and nouns.
FILES = (".tar", ".csv", ".tsv", ".jsonl", ".parquet", ".arrow", ".txt")


def may_be_hub_id(name: str) -> bool:
    """Whether this can name a repository of the Hub: `name`, or `org/name` where `org` is no folder here, as it is for a mistyped path."""
    owner = os.path.dirname(name)
    is_form = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is not None
    return is_form and owner not in _USUAL_FOLDERS and not os.path.exists(owner)


def is_hub_id(name: str) -> bool:
    """Whether this names a repository as `org/name`, and no file."""
    return "/" in name and may_be_hub_id(name) and not name.lower().endswith(FILES)
