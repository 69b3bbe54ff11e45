"""Packages that only some parts of this one need, and the extras that bring them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def require_extra(name: str) -> Iterator[None]:
    """
    Around imports: tells which extra to install where a package of it is missing.

    Raises:
        `ImportError`: naming package and extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        raise ImportError(
            f"{package} is not installed: `pip install 'iclip-hf[{name}]'` brings it.", name=package
        ) from error
