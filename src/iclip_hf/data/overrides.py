"""The user's class names, texts of the background and prompt templates for a segmentation data set."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..model.prompts import check_templates
from .files import read_text
from .layouts import DATASETS


def read_overrides(
    overrides: str | os.PathLike | Mapping, dataset: str, class_names: Sequence[str]
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...], tuple[str, ...]]:
    """
    Returns the names of each of these classes, the texts of the background and the templates. Overrides and errors are
    described in [`~iclip_hf.data.segmentation.load_segmentation`].
    """
    layout, where = DATASETS[dataset], "overrides"
    if not isinstance(overrides, Mapping):
        where = Path(overrides)
        is_text = where.suffix.lower() == ".txt"
        overrides = _read_class_lines(where, dataset, class_names) if is_text else _read_mapping(where)

    def as_texts(value: str | Sequence[str]) -> tuple[str, ...]:
        items = (value,) if isinstance(value, str) else value
        is_list = isinstance(items, Sequence) and len(items) > 0
        if not is_list or not all(isinstance(text, str) and text.strip() for text in items):
            raise ValueError(f"{where}: {value!r:.100} is neither text (quoted, in YAML) nor a list of texts.")
        return tuple(items)

    names = overrides.get("names") or {}
    if not isinstance(names, Mapping):
        raise ValueError(f"{where}: names must map class names to other names, but is {names!r:.100}.")
    entries = ("names", "background", "templates")
    if unknown := [
        *(key for key in overrides if key not in entries),
        *(key for key in names if key not in class_names),
    ]:
        raise ValueError(
            f"{where}: {unknown[0]!r} is neither an entry ({', '.join(entries)}) nor a class of {dataset!r}."
        )
    synonyms = tuple(as_texts(names.get(name, name)) for name in class_names)
    background = as_texts(overrides["background"]) if "background" in overrides else ()
    if background and not layout.background_values:
        raise ValueError(f"{where}: the background of {dataset!r} is void; leave out its texts.")
    # A text of the background may also name a class, as in papers.
    all_texts = [text for class_texts in synonyms for text in class_texts]
    if twice := [text for text in all_texts if all_texts.count(text) > 1]:
        raise ValueError(f"{where}: {twice[0]!r} names two classes, or one class twice.")
    return synonyms, background, tuple(check_templates(overrides.get("templates", layout.templates)))


def _read_class_lines(path: Path, dataset: str, class_names: Sequence[str]) -> Mapping:
    """
    Reads a text file with a line for each class, which a line for the background can precede. Synonyms are separated
    by semicolons if the file has any, otherwise by commas.
    """
    content = read_text(path).rstrip()
    separator = ";" if ";" in content else ","
    lines = [[text.strip() for text in line.split(separator)] for line in content.splitlines()]
    has_background = DATASETS[dataset].background_values and len(lines) == len(class_names) + 1
    background = {"background": lines.pop(0)} if has_background else {}
    if len(lines) != len(class_names):
        raise ValueError(
            f"{path}: {dataset!r} has {len(class_names)} classes, but this file has {len(lines)} lines; write a line "
            "for each class. If the data set has a background, a line with its texts can come first."
        )
    return {"names": dict(zip(class_names, lines)), **background}


def _read_mapping(path: Path) -> Mapping:
    import yaml

    parse = json.loads if path.suffix.lower() == ".json" else yaml.safe_load
    try:
        content = parse(read_text(path))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except (ValueError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{path}: this file must be a mapping in JSON or YAML, by its suffix: {problem}") from error
