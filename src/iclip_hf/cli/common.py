"""Shared parts of the commands: options, loading of models, checks of output paths, and printing."""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import math
import os
import re
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

from ..data.class_names import DATASETS
from ..explainers import METHOD_GROUP, METHODS
from ..models import DTYPES, check_model_name
from ..plots import COLORMAPS
from ..prompts import check_templates, check_text, split_texts


# Characters that control a terminal or cannot be printed: controls, line separators, marks of writing direction, surrogates.
_ACTING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Numbers of options in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Files of pictures.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf")


def checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """Makes a type for argparse of a function that raises `ValueError` or `OSError` for a wrong text; its sentence is then printed."""

    def parse(text: str) -> str:
        try:
            check(text)
        except (ValueError, OSError) as error:
            sentence = str(error).replace("Expected", "expected", 1).rstrip(".")
            raise argparse.ArgumentTypeError(sentence) from error
        return text

    return parse


def texts(typed: str) -> list[str]:
    """Parses the texts of one option, see [`split_texts`], as a type for argparse."""
    found = split_texts(typed)
    for text in found or [""]:
        checked(check_text)(text)
    return found


def check_method(name: str) -> None:
    """Raises `ValueError` unless this package or another one has this method."""
    if name not in METHODS and name not in (added := entry_points(group=METHOD_GROUP).names):
        names, hint = ", ".join([*METHODS, *sorted(added)]), ": put spaces between several" if "," in name else ""
        raise ValueError(f"Expected a method, one of {names}, got {name!r}{hint}.")


def share(text: str) -> float:
    """Parses a number in [0, 1], as a type for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {text}")
    return number


def at_least_1(text: str) -> int:
    """Parses a positive integer, as a type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


# Options that several commands have, for [`add_shared`].
MODEL, PROMPTS = ("--model", "--dtype", "--device"), ("--template", "--image-size")
DATASET = ("--dataset", "--data-root", "--split", "--overrides")
SHARED = {
    "--model": {
        "metavar": "FOLDER_OR_ID",
        "type": checked(check_model_name),
        "default": "embedded",
        "help": 'ICLIP or CLIP-like model, or "embedded" (default: the embedded model)',
    },
    "--dtype": {
        "choices": DTYPES,
        "help": "number format of the model; bfloat16 is faster on processors that support it (default: as saved)",
    },
    "--device": {
        "metavar": "NAME",
        "help": "cpu, cuda or mps (default: cuda if there is a GPU that it can use, otherwise cpu)",
    },
    "--template": {
        "action": "append",
        "dest": "templates",
        "type": checked(check_templates),
        "metavar": "PROMPT",
        "help": 'prompt with one {}; repeat the option to average several prompts; "{}" uses the texts unchanged, "imagenet" '
        "averages CLIP's 80 templates of ImageNet (default: the prompts of the model or the data set)",
    },
    "--image-size": {
        "type": at_least_1,
        "metavar": "PIXELS",
        "help": "height and width to which images are resized for the model (default: that of its processor)",
    },
    "--dataset": {
        "choices": DATASETS,
        "metavar": "NAME",
        "help": f"one of {', '.join(DATASETS)}; folder means images/, masks/ and classes.txt",
    },
    "--data-root": {"type": Path, "metavar": "FOLDER", "help": "folder of the data set"},
    "--split": {"help": "split of the data set (default: the official validation split)"},
    "--overrides": {
        "type": Path,
        "metavar": "FILE",
        "help": "other class names, synonyms and prompt templates: a JSON or YAML file, or a text file with a line for each class",
    },
    "--limit": {"type": at_least_1, "metavar": "N", "help": "use only the first N images (default: all)"},
    "--text": {
        "action": "extend",
        "dest": "texts",
        "type": texts,
        "metavar": "TEXT",
        "help": "what to look for, inserted into the prompts; several texts between commas, or by repeating the option; \\, is a comma "
        "within a text",
    },
    "--methods": {
        "nargs": "+",
        "type": checked(check_method),
        "default": ["itsm"],
        "metavar": "METHOD",
        "help": f"one or more of {', '.join(METHODS)} (default: itsm)",
    },
    "--colormap": {
        "default": COLORMAPS[0],
        "choices": COLORMAPS,
        "help": f"colours of the maps: cividis is safe for colour-blind readers, jet is the paper's (default: {COLORMAPS[0]})",
    },
    "--batch-size": {"type": at_least_1, "metavar": "N"},
    "--dpi": {
        "type": at_least_1,
        "default": 120,
        "metavar": "N",
        "help": "resolution of the figure in dots per inch, for example 300 for print (default: 120)",
    },
    "--overwrite": {
        "action": "store_true",
        "help": "also replace files whose names iclip chose; inputs are never replaced",
    },
    "--json": {"action": "store_true", "help": "print JSON instead of text"},
}


def add_shared(command: argparse._ActionsContainer, *names: str, **changes) -> None:
    """Adds options of [`SHARED`], all with these changes."""
    for name in names:
        command.add_argument(name, **{**SHARED[name], **changes})


def add_refine(command: argparse.ArgumentParser, default: bool = False) -> None:
    command.add_argument(
        "--refine",
        action=argparse.BooleanOptionalAction,
        default=default,
        help=f"refine the maps by the colours of the image (PAMR), so that they follow its edges (default: {'yes' if default else 'no'})",
    )


def add_picture(command: argparse.ArgumentParser, default: str) -> None:
    """Adds the options of a command that writes one picture."""
    command.add_argument("--output", type=Path, metavar="FILE", help=f"picture to write (default: {default})")
    add_shared(command, "--overwrite", "--dpi")


def sentence(description: str) -> str:
    """Returns a description, as the list of commands shows it, as a sentence."""
    return f"{description[0].upper()}{description[1:]}."


def data_inputs(options: argparse.Namespace, dataset) -> list[Path | None]:
    """Returns the files that are no pictures and that the options of [`DATASET`] and the model name."""
    return [options.overrides, *dataset.annotation_paths, *Path(options.model).glob("*")]


def load_silently(name: str, options: argparse.Namespace):
    """Like [`iclip_hf.load`], without output of Transformers, in a process that keeps its memory."""
    from ..models.loading import load

    silence_transformers()
    keep_memory()
    return load(name, dtype=options.dtype, device=options.device)


def keep_memory() -> None:
    """
    Makes the GNU C library keep freed memory for the next image. By default it gives large blocks back to the system, which has to map
    and clear them again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**30)  # free bytes from which memory is given back
        # Bytes from which a block is mapped by itself. Older versions allow 32 MiB at most.
        mallopt(_MMAP_THRESHOLD, 2**30) or mallopt(_MMAP_THRESHOLD, 2**25)


def silence_transformers() -> None:
    """Disables log messages and progress bars of Transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_file(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises `ValueError` for an `--output` that is no file of this kind."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(
            f"--output: expected a file name that ends in {' or '.join(suffixes)}, got {path}: choose another name."
        )


def check_output(options: argparse.Namespace, name: str, suffixes: tuple[str, ...], inputs: Iterable) -> None:
    """Sets `--output` to `name` if it is not given, and checks it before the model is loaded."""
    from ..utils.files import check_outputs

    given = options.output is not None
    options.output = options.output or Path(name)
    check_file(options.output, suffixes)
    check_outputs([options.output] * given, inputs, options.overwrite, [options.output] * (not given))


def check_folder(option: str, path: Path) -> None:
    """Raises `ValueError` for an output that is no folder, before the model is loaded."""
    if not path.is_dir() and (path.suffix or path.exists()):
        raise ValueError(f"{option}: expected a folder, got the file name {path}: name a folder.")


def save_figure(figure, path: Path, dpi: int = 120) -> None:
    """Writes a PIL image, or a figure of matplotlib, in the format of the file name's suffix."""
    from PIL import Image

    from ..utils.files import atomic_write

    form = path.suffix[1:].lower()
    with atomic_write(path) as temporary:
        if not isinstance(figure, Image.Image):
            figure.savefig(temporary, format=form, dpi=dpi)
            return
        # Run lengths: the PNG of a photograph is as small as by the default compression, in a quarter of the time.
        options = {"compress_type": zlib.Z_RLE} if form == "png" else {"quality": 92}
        figure.save(temporary, Image.registered_extensions()[f".{form}"], dpi=(dpi, dpi), **options)


def report_error(command: str, error: BaseException) -> None:
    """
    Prints an error as one line on stderr, and passes it to torchrun or `accelerate launch`, if one of them runs this process. They
    end their own report with the line of the process that failed first. Of processes that are all interrupted, the first prints it.
    """
    line = f"iclip {command}: {one_line(error)}"
    if not isinstance(error, KeyboardInterrupt) or os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))


def one_line(error: BaseException) -> str:
    """Returns the message of an error in one line for a terminal. Errors of the operating system get the form of our own."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: expected a path to read or write, but got: {error.strerror}; check the path."
    return printable(" ".join(text.split()) or type(error).__name__)


def printable(text) -> str:
    """
    Escapes characters that control a terminal, as in JSON: control characters (escape sequences, new lines), marks of writing
    direction, and bytes of file names that are not UTF-8.
    """
    return _ACTING.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text))


@contextmanager
def shown_steps() -> Iterator[None]:
    """Prints the steps that functions log at the level INFO, on stderr."""
    logger, handler = logging.getLogger(__package__.partition(".")[0]), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def echo_folder(folder: Path, *command: str) -> None:
    """Prints the size of a folder that was written, and a command that uses it."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    echo(f"{folder}: {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB. Next:\n  {shlex.join(command)}")


def echo_space(folder: Path) -> None:
    """Prints the size of the folder of a Space, and the command that publishes it."""
    echo_folder(folder, "hf", "upload", f"your-name/{folder.resolve().name}", str(folder), ".", "--repo-type", "space")


def echo(report) -> None:
    """Prints lines with [`printable`] characters, also into a pipe at once. The value of JSON text does not change."""
    print("\n".join(map(printable, str(report).split("\n"))), flush=True)
