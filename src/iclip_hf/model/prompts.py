"""Templates of prompts by name, texts in a string, and checks of texts and templates."""

import re
from collections.abc import Iterable, Mapping, Sequence


_KINDS_OF_PHOTO = (
    "bad", "low resolution", "cropped", "bright", "dark", "close-up", "black and white", "pixelated", "jpeg corrupted",
    "blurry", "good",
)  # fmt: skip
_KINDS_OF_OBJECT = ("", "hard to see ", "clean ", "dirty ", "cool ", "nice ", "weird ", "small ", "large ")
_WORKS = (
    "a sculpture", "a rendering", "a tattoo", "a drawing", "a painting", "a doodle", "a sketch", "a rendition",
    "graffiti", "art", "itap",
)  # fmt: skip
_MATERIALS = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")

# The 80 templates that CLIP's authors average on ImageNet.
IMAGENET_TEMPLATES = (
    *(f"a {kind} photo of {article} {{}}." for kind in _KINDS_OF_PHOTO for article in ("a", "the")),
    *(f"a photo of {article} {kind}{{}}." for kind in _KINDS_OF_OBJECT for article in ("a", "the")),
    *(f"{work} of {article} {{}}." for work in _WORKS for article in ("a", "the")),
    *(f"{article} {material} {{}}." for material in _MATERIALS for article in ("a", "the")),
    *(f"{article} {{}} in a video game." for article in ("a", "the")),
    "a photo of many {}.",
    "a photo of one {}.",
    "a photo of my {}.",
    "itap of my {}.",
)
NAMED_TEMPLATES = {"imagenet": IMAGENET_TEMPLATES}


def split_texts(texts: str | Sequence[str]) -> list[str]:
    """
    Splits a string into texts: at line breaks if it has several lines, otherwise at commas. `\\,` is a comma within a
    text. Items of a list are not split. Raises `ValueError` for other types, such as a `dict` of texts and priors,
    which only `explain` and [`Engine.run`] take.
    """
    if isinstance(texts, Mapping):
        raise ValueError("Texts are a list here: only iclip_hf.explain takes priors of texts.")
    if not isinstance(texts, Iterable):
        raise ValueError(f"Texts are a string or a list of strings, not {texts!r:.100}.")
    if not isinstance(texts, str):
        return list(texts)
    parts = texts.split("\n") if "\n" in texts.strip() else re.split(r"(?<!\\),", texts)
    return [part.replace("\\,", ",").strip() for part in parts if part.strip()]


def check_text(text: str) -> str:
    """
    Returns the text. Raises `ValueError` unless it is a string of valid Unicode with a character that is not white
    space.
    """
    if not isinstance(text, str):
        raise ValueError(f"A text is a string, not {text!r:.100}.")
    if not text.strip():
        raise ValueError(f"A text has at least one character, not {text!r}.")
    text.encode()  # raises UnicodeEncodeError, which is a ValueError, for a lone surrogate
    return text


def check_templates(templates: str | Sequence[str]) -> list[str]:
    """
    Returns templates as a list. A name in `NAMED_TEMPLATES` is replaced by its templates. Raises `ValueError` unless
    each template has exactly one `{}`.
    """
    is_list = isinstance(templates, Sequence) and not isinstance(templates, str)
    templates = list(templates) if is_list else [templates]
    for name, named in NAMED_TEMPLATES.items():
        if templates == [name]:
            return list(named)
    if not templates or any(not isinstance(item, str) or item.count("{}") != 1 for item in templates):
        names = list(NAMED_TEMPLATES)
        raise ValueError(
            f'A template has one {{}}, such as "a photo of the {{}}", or is one of {names}, not {templates}.'
        )
    return templates
