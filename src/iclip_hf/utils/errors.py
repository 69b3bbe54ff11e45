"""Uniform errors of loading, whatever library loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import RevisionResolutionError


@contextmanager
def loading_errors(name: str | Path, cure: str = "correct the name, or download it again") -> Iterator[None]:
    """
    Converts any exception of loading, such as `KeyError`, into a `ValueError` or `OSError` whose message has the
    problem and the cure. The `ImportError` of a missing package stays.
    """
    try:
        yield
    except RevisionResolutionError as error:
        raise ConnectionError(
            f"{name}: there is no such folder, and the Hub cannot be reached; check the name or the connection."
        ) from error
    except Exception as error:
        if isinstance(error, ImportError) or str(error).startswith(f"{name}: "):  # these errors say what to do
            raise
        problem = f"loading failed ({' '.join(str(error).split()) or type(error).__name__})"
        if "ignore_mismatched_sizes" in problem:  # the details are in a log that the commands disable
            problem = "its weights have other shapes than its configuration says"
        error_type = OSError if isinstance(error, OSError) else ValueError
        raise error_type(f"{name}: expected a whole folder or a Hub id, but {problem}; {cure}.") from error
