"""Which names can be repositories of the Hub."""

import os
import re


# The folder of the runs of `iclip train`, if no other is named.
RUNS = "runs"


def may_be_hub_id(name: str) -> bool:
    """Whether this can name a repository of the Hub: `name`, or `org/name` where `org` is no folder here, as it is for a mistyped path."""
    owner = os.path.dirname(name)
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is not None and owner != RUNS and not os.path.exists(owner)
