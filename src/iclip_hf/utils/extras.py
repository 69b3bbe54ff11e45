"""Optional dependencies and the extras that install them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, requires


def not_installed(package: str, extra: str) -> ImportError:
    """
    Returns the error for a missing package. It names the command that installs all packages of the extra, from a clone
    or a wheel.
    """
    needed = []
    with suppress(PackageNotFoundError):
        marked = (requirement.partition(";") for requirement in requires("iclip-hf") or ())
        needed = [
            name.strip() for name, _, marker in marked if marker.replace("'", '"').strip() == f'extra == "{extra}"'
        ]
    command = shlex.join(["pip", "install", *(needed or [package])])
    return ImportError(f"{package} is not installed: install the extra [{extra}] with `{command}`.", name=package)


@contextmanager
def require_extra(name: str) -> Iterator[None]:
    """
    Wraps imports of optional packages. The `ImportError` for a missing package names the command that installs the
    extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise not_installed(error.name.partition(".")[0], name) from error
