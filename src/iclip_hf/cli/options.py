"""Options that several commands have."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from ..backends import DTYPES, check_model_name
from ..data.layouts import DATASETS
from ..evaluation.metrics import MAX_SEED
from ..explainers import METHODS, check_method
from ..model.prompts import check_templates, check_text, split_texts
from ..plots import COLORMAPS
from ..utils.tables import known


Value = TypeVar("Value")


def option_type(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """
    Makes a type for argparse from a function that raises `ValueError` or `OSError` for a wrong text. The command
    prints the sentence of this error.
    """

    def parse_option(text: str) -> Value:
        try:
            return parse(text)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error

    return parse_option


@option_type
def texts(typed: str) -> list[str]:
    # `check_text` refuses the empty text of an option without any.
    parsed = [check_text(text) for text in split_texts(typed) or [""]]
    if files := [text for text in parsed if os.path.splitext(text)[1] and os.path.isfile(text)]:
        raise ValueError(f"{files[0]!r} is a file, not a text: name images before the options")
    return parsed


def name_of(names: Iterable[str], kind: str) -> Callable[[str], str]:
    """Makes a type for argparse: one of `names`, in the spelling of `names`, see [`known`]."""
    return option_type(lambda typed: known(typed, names, kind))


def number(kind: Callable[[str], Value], low: float, high: float = math.inf) -> Callable[[str], Value]:
    """Makes a type for argparse: numbers of a `kind`, `int` or `float`, from `low` to `high`."""

    def parse(text: str) -> Value:
        if not low <= kind(text) <= high:
            raise ValueError(f"{text} is not in [{low}, {high}]")
        return kind(text)

    return option_type(parse)


method = option_type(check_method)
fraction, at_least_1, seed = number(float, 0, 1), number(int, 1), number(int, 0, MAX_SEED)


_DEFAULT_METHOD_HELP = "itsm for ICLIP; for other models the one that shows where a text is, such as naclip for CLIP"
_METHOD_HELP = f"{', '.join(METHODS)} (default: {_DEFAULT_METHOD_HELP})"
# Names of options that commands add together by [`add_shared`].
MODEL = ("--model", "--dtype", "--device")
PREPARATION = ("--template", "--image-size")  # of texts and images
DATASET = ("--dataset", "--data-root", "--split", "--overrides")
# The keywords of `add_argument` for each option that several commands have.
SHARED = {
    "--model": {
        "metavar": "FOLDER_OR_ID",
        "type": option_type(check_model_name),
        "default": "embedded",
        "help": 'ICLIP or CLIP-like model; "open_clip:MODEL/WEIGHTS"; or "embedded" (default: the embedded model)',
    },
    "--dtype": {
        "type": name_of(DTYPES, "dtype"),
        "choices": DTYPES,
        "help": "number format of the model (default: as saved)",
    },
    "--device": {"metavar": "NAME", "help": "cpu, cuda or mps (default: the GPU if there is one, otherwise cpu)"},
    "--template": {
        "action": "extend",
        "dest": "templates",
        "type": option_type(check_templates),
        "metavar": "TEMPLATE",
        "help": 'template with one {}; repeat the option to average several templates; "{}" uses the texts unchanged, '
        '"imagenet" averages CLIP\'s 80 templates of ImageNet (default: the templates of the model or the data set)',
    },
    "--image-size": {
        "type": at_least_1,
        "metavar": "PIXELS",
        "help": "height and width to which images are resized for the maps (default: the model's own size, at which "
        "scores and presence of whole images are always computed)",
    },
    "--dataset": {
        "type": name_of(DATASETS, "data set"),
        "metavar": "NAME",
        "help": f"one of {', '.join(DATASETS)}; folder means images/, masks/ and classes.txt",
    },
    "--data-root": {"type": Path, "metavar": "FOLDER", "help": "folder of the data set"},
    "--split": {"help": "split of the data set (default: the official validation split, if the data set has splits)"},
    "--overrides": {
        "type": Path,
        "metavar": "FILE",
        "help": "other class names, synonyms and templates: a JSON or YAML file, or a text file with a line for each "
        "class",
    },
    "--text": {
        "action": "extend",
        "dest": "texts",
        "type": texts,
        "metavar": "TEXT",
        "help": "what to look for, in the language of the model, which is English for the embedded one; inserted into "
        "the templates; separate several texts by commas, or repeat the option; \\, is a comma within a text",
    },
    "--method": {"type": method, "metavar": "METHOD", "help": f"method that computes the maps, one of {_METHOD_HELP}"},
    "--methods": {
        "action": "extend",
        "nargs": "+",
        "type": method,
        "metavar": "METHOD",
        "help": f"one or more of {_METHOD_HELP}",
    },
    "--refine": {
        "action": argparse.BooleanOptionalAction,
        "default": True,
        "help": "refine the maps by the colours of the image (PAMR), so that they follow edges of the image, even "
        "edges that the model does not use (default: on, but off for `evaluate`)",
    },
    "--multi-scale": {
        "action": "store_true",
        "help": "compute maps and scores of the whole image and of 3x3 windows at twice the scale, which is finer and "
        "takes ten times as long",
    },
    "--colormap": {
        "default": COLORMAPS[0],
        "type": name_of(COLORMAPS, "colour map"),
        "choices": COLORMAPS,
        "help": "cividis is safe for colour-blind readers, jet is the paper's (default: %(default)s)",
    },
    "--batch-size": {"type": at_least_1, "metavar": "N", "help": "images in one forward pass (default: %(default)s)"},
    "--json": {"action": "store_true", "help": "print JSON instead of text"},
}


def add_shared(parser: argparse._ActionsContainer, *names: str, **changes) -> None:
    """Adds options of [`SHARED`], each with the same changes."""
    for name in names:
        parser.add_argument(name, **{**SHARED[name], **changes})


def refuse(args: argparse.Namespace, names: Iterable[str], context: str) -> None:
    """Raises `ValueError` if an option was given that does not apply to the context."""
    for name in names:
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} does not apply to {context}: leave it out.")
