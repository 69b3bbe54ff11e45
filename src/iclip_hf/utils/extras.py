"""Optional dependencies and the extras that install them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, requires


@contextmanager
def require_extra(name: str) -> Iterator[None]:
    """
    Wraps imports of the optional packages of an extra. The `ImportError` for a missing one names the command that
    installs all.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package, packages = error.name.partition(".")[0], []
        with suppress(PackageNotFoundError):
            requirements = (requirement.partition(";") for requirement in requires("iclip-hf") or ())
            extra = f'extra == "{name}"'
            packages = [what.strip() for what, _, marker in requirements if marker.replace("'", '"').strip() == extra]
        command = shlex.join(["pip", "install", *(packages or [package])])
        sentence = f"{package} is not installed: install the extra [{name}] with `{command}`."
        raise ImportError(sentence, name=package) from error
