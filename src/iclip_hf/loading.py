"""Models from folders and the Hub: whole or not at all, and nothing in them is executed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoModel, AutoProcessor, ProcessorMixin


def load_whole(name: str | Path, **options):
    """
    Model and processor of a folder or Hub id, from safetensors; code that lies beside them is not run.

    Args:
        name: of an ICLIP model or another that the Auto classes know.
        options: of the model's configuration.

    Returns:
        `tuple`: model, in eval mode, and processor.

    Raises:
        `OSError`: there is none, or a file of it is missing. `ValueError`: a file is damaged, or lacks weights, which
        `from_pretrained` alone would fill with random numbers.
    """
    with loading_errors(name):
        model, loading = AutoModel.from_pretrained(
            name, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **options
        )
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{name}: expected all weights of {type(model).__name__}, but {len(missing)} are missing, such as {missing[0]}; "
            "get it again."
        )
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{name}: expected a processor of images and texts, got {type(processor).__name__}; get it again."
        )
    return model, processor


@contextmanager
def loading_errors(name: str | Path) -> Iterator[None]:
    """Whatever loading raises inside, which may be anything from KeyError to RecursionError, becomes one clear error."""
    try:
        yield
    except Exception as error:
        problem = f"loading failed ({str(error) or type(error).__name__})"
        if "ignore_mismatched_sizes" in problem:  # details are in a log that commands silence
            problem = "its weights have other shapes than its config.json says"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{name}: expected a whole folder or a Hub id, but {problem}; correct the name, or get it again."
        ) from error
