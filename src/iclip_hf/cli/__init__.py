"""The `iclip` command. Invalid input ends with one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from .output import report_error


# The commands and their descriptions. The module of a command has its name and is imported when it is used.
COMMANDS = {
    "explain": "show which pixels of images match which texts",
    "segment": "assign each pixel of images to the text that matches it best",
    "compare": "draw the maps of several methods or models side by side",
    "demo": "start the live demo: drop an image, type texts, see one map for each text",
    "evaluate": "measure how well maps mark or segment classes, or how faithful they are, on a segmentation data set",
    "train": "train a model on your own image-text pairs, or by the settings of a configuration",
    "init": "join an image tower and a text tower into a new model",
    "export": "write a model folder with code and model card for the Hub, an ONNX folder, or a web page",
    "push": "upload a model folder with code and model card to the Hub",
    "install-metrics": 'make evaluate.load work for "mmiou", "mfmb" and "text_contrast" in any folder',
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of many options."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. Errors of the user become one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if hasattr(sys.stdout, "reconfigure"):
        # The encoding of stdout may lack characters of names and texts.
        sys.stdout.reconfigure(errors="backslashreplace")
    # Beside other jobs, threads that spin while they wait make an image ten times slower. Torch reads this when it is
    # imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = arguments[0] if arguments else None
    try:
        command_parser = parser(command)
        if command in COMMANDS:
            args = command_parser.parse_args(arguments[1:])
        else:
            args = command_parser.parse_args(arguments or ["--help"])
    except SystemExit as stop:  # after a wrong option or a help text
        return stop.code
    try:
        return args.run(args) or 0
    except _user_errors() as error:
        report_error(command, error)
        return 2
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        size_options = {"train": "--chunk_size or --per_device_train_batch_size", "compare": "--image-size"}
        size_option = size_options.get(command, "--batch-size or --image-size")
        report_error(command, MemoryError(f"the memory of the GPU is full; set a smaller {size_option}"))
        return 2
    except KeyboardInterrupt as error:  # an interrupted training has a message
        report_error(command, KeyboardInterrupt(str(error) or "interrupted"))
        return 130


def _user_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import StrictDataclassError  # of a wrong model option

    return OSError, ValueError, TypeError, ImportError, ArithmeticError, StrictDataclassError


def parser(command: str | None) -> argparse.ArgumentParser:
    """
    Returns the parser of a command, and imports its module. Returns the parser of `iclip` if there is no such command.
    """
    if command in COMMANDS:
        module = importlib.import_module(f".{command.replace('-', '_')}", __package__)
        description = f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}."
        parents = module.parents() if hasattr(module, "parents") else []
        command_parser = _Parser(prog=f"iclip {command}", description=description, parents=parents)
        command_parser.set_defaults(command=command, run=module.run)
        module.add_options(command_parser)
        return command_parser
    program = _Parser(
        prog="iclip",
        description="Contrastive image-text models that explain themselves.",
        epilog="Exit codes: 0 success; 2 invalid or unreadable input, with one line on stderr; 130 interrupted.",
    )
    program.add_argument("--version", action="version", version=f"iclip {__version__}")
    commands = program.add_subparsers(metavar="COMMAND", required=True)
    for name, description in COMMANDS.items():
        commands.add_parser(name, help=description)
    return program
