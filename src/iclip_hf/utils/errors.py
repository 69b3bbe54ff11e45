"""Errors of loading and of missing packages, in the same form whatever library raises them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path


@contextmanager
def loading_errors(name: str | Path, cure: str = "correct the name, or download it again") -> Iterator[None]:
    """
    Converts any exception of loading, such as `KeyError`, into a `ValueError` or `OSError` whose message has the
    problem and the cure. The `ImportError` of a missing package stays.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ImportError) or str(error).startswith(f"{name}: "):  # these errors say what to do
            raise
        problem = f"loading failed ({' '.join(str(error).split()) or type(error).__name__})"
        if "ignore_mismatched_sizes" in problem:  # the details are in a log that the commands disable
            problem = "its weights have other shapes than its configuration says"
        # huggingface_hub's error if the Hub cannot be reached is no `OSError`.
        is_missing = isinstance(error, OSError) or type(error).__name__ == "RevisionResolutionError"
        error_type = OSError if is_missing else ValueError
        raise error_type(f"{name}: expected a whole folder or a Hub id, but {problem}; {cure}.") from error


@contextmanager
def require_extra(name: str) -> Iterator[None]:
    """Makes the `ImportError` of a missing package name the command that installs its extra."""
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
