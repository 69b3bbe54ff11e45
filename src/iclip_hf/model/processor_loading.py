"""
Loads tokenizers and image processors without code of their folder. A file of the folder can name any class of
Transformers, programs with options, and other files of this machine. Such files are refused.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    ImageProcessingMixin,
    PreTrainedTokenizer,
    SentencePieceBackend,
    TokenizersBackend,
)
from transformers.models.auto import image_processing_auto, tokenization_auto
from transformers.utils import cached_file


# Arguments of `from_pretrained` that locate its files.
FILE_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Functions of Transformers (5.24) that find a class by its name in a file, and the bases of classes that may be
# loaded. Transformers would also load a model, and download code that its configuration names. Tokenizers with other
# bases can run programs or libraries that a file names.
_FINDERS = (
    (tokenization_auto, "tokenizer_class_from_name", (TokenizersBackend, SentencePieceBackend)),
    (image_processing_auto, "get_image_processor_class_from_name", (ImageProcessingMixin,)),
)


def read_json(name, file: str, **kwargs) -> dict:
    """
    Returns the content of a JSON file of a folder or Hub id, empty if there is no such file. `kwargs` are those of
    `cached_file`. Raises `ValueError` if the file is no JSON object.
    """
    path = cached_file(name, file, **kwargs, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{content!r:.100}")
        return content
    except ValueError as error:
        raise ValueError(f"{path}: this file is no JSON object: {error}.") from error


@contextmanager
def only_processors(name) -> Iterator[None]:
    """
    Raises `ValueError` where a file of the folder or Hub id `name` names another class than one of an image processor
    or of a tokenizer that the libraries tokenizers or sentencepiece run.
    """

    def find(original, bases: tuple[type, ...], class_name: str):
        found = original(class_name)
        if found is PreTrainedTokenizer:  # PreTrainedTokenizerFast without "Fast"; Transformers replaces it, too
            found = TokenizersBackend
        # A class whose package is missing is a dummy that says so.
        is_fit = isinstance(found, type) and (issubclass(found, bases) or getattr(found, "is_dummy", False))
        if found is not None and not is_fit:
            expected = " or ".join(base.__name__ for base in bases)
            raise ValueError(f"{name}: {class_name!r:.100} in its files is no {expected}; correct it.")
        return found

    originals = [getattr(module, function) for module, function, _ in _FINDERS]
    try:
        for original, (module, function, bases) in zip(originals, _FINDERS):
            setattr(module, function, partial(find, original, bases))
        yield
    finally:
        for original, (module, function, _) in zip(originals, _FINDERS):
            setattr(module, function, original)


def check_tokenizer_files(name, **kwargs) -> None:
    """
    Raises `ValueError` if the options of a tokenizer name a file. The vocabulary could be any file of this machine,
    which would be published with the model.
    """
    kwargs = {argument: value for argument, value in kwargs.items() if argument in FILE_ARGUMENTS}
    # Without a connection, Transformers takes a file that is not in the cache for missing.
    kwargs["_raise_exceptions_for_connection_errors"] = False
    options, tokens = (
        read_json(name, file, **kwargs) for file in ("tokenizer_config.json", "special_tokens_map.json")
    )
    wrong = [option for option in ("vocab", "merges", "gguf_file") if isinstance(options.get(option), str)]
    # Paths of another machine are no files here. Only tokenizers of sentencepiece read this option.
    if isinstance(options.get("vocab_file"), str) and Path(options["vocab_file"]).is_file():
        wrong.append("vocab_file")
    if options.get("init_inputs"):  # options without names
        wrong.append("init_inputs")
    # Transformers takes any option from the map of special tokens, too.
    wrong += [option for option in tokens if not option.endswith(("_token", "_tokens"))]
    if wrong:
        raise ValueError(f"{name}: the files of its tokenizer have the option {wrong[0]!r:.100}; remove it.")


def check_image_processor(name, image_processor) -> None:
    """Raises `ValueError` for an image processor that runs Tesseract, with any options of a file."""
    if hasattr(image_processor, "tesseract_config"):
        raise ValueError(f"{name}: {type(image_processor).__name__} reads texts in images; use another one.")


def load_tokenizer(name, **kwargs):
    """Loads the tokenizer of a folder or Hub id by its Auto class. `kwargs` are those of `from_pretrained`."""
    check_tokenizer_files(name, **kwargs)
    with only_processors(name):
        tokenizer = AutoTokenizer.from_pretrained(name, **{**kwargs, "trust_remote_code": False})
    tokenizer.chat_template = None  # from files that may be links to others, and would be published with the model
    return tokenizer


def load_image_processor(name, **kwargs):
    """Loads the image processor of a folder or Hub id by its Auto class. `kwargs` are those of `from_pretrained`."""
    with only_processors(name):
        image_processor = AutoImageProcessor.from_pretrained(name, **{**kwargs, "trust_remote_code": False})
    check_image_processor(name, image_processor)
    return image_processor
