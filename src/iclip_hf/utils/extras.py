"""Optional dependencies and the extras that install them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, requires


@contextmanager
def require_extra(name: str) -> Iterator[None]:
    """
    Wraps imports of the packages of an extra. If one is missing, the `ImportError` names the command that installs all
    of them.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        packages = []
        with suppress(PackageNotFoundError):
            for requirement in requires("iclip-hf") or ():
                specification, _, marker = requirement.partition(";")
                if marker.replace("'", '"').strip() == f'extra == "{name}"':
                    packages.append(specification.strip())
        command = shlex.join(["pip", "install", *(packages or [package])])
        sentence = f"{package} is not installed: install the extra [{name}] with `{command}`."
        raise ImportError(sentence, name=package) from error
