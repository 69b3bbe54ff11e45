"""Uniform errors of reading and writing, whatever library reads or writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import RevisionResolutionError
from safetensors import SafetensorError


@contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """Converts the errors that libraries raise for a full disk or missing permissions into one `OSError`."""
    try:
        yield
    except Exception as error:
        if not is_writing_error(error):
            raise
        problem = str(error).partition("\n")[0]
        raise OSError(
            f"{path}: writing failed ({problem}); check free space and permissions, then run again."
        ) from error


def is_writing_error(error: Exception) -> bool:
    """Returns whether a full disk or missing permissions may be the cause of an error, whatever library raised it."""
    if isinstance(error, (OSError, SafetensorError)):
        return True
    # Torch's file writer and tokenizers raise other types, with these texts.
    return "inline_container" in str(error) or "(os error " in str(error)


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
