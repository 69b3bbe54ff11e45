"""Optional dependencies and the extras that install them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def require_extra(name: str) -> Iterator[None]:
    """
    Wraps imports of optional packages. The error for a missing package names the extra that installs it.

    Raises:
        `ImportError`: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        raise ImportError(
            f"{package} is not installed: `pip install 'iclip-hf[{name}]'` brings it.", name=package
        ) from error
