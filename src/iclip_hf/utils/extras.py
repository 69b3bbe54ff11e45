"""Optional dependencies and the extras that install them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


# Names the package for pip, in a clone of its repository. Once it is on PyPI, `iclip-hf` works everywhere.
PACKAGE = "."


def not_installed(package: str, extra: str) -> ImportError:
    """Returns the error for a missing package. It names the command that installs the extra."""
    where = " in a clone of iclip-hf" if PACKAGE == "." else ""
    return ImportError(
        f"{package} is not installed: install it with `pip install '{PACKAGE}[{extra}]'`{where}.", name=package
    )


@contextmanager
def require_extra(name: str) -> Iterator[None]:
    """Wraps imports of optional packages. The `ImportError` for a missing package names the extra that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise not_installed(error.name.partition(".")[0], name) from error
