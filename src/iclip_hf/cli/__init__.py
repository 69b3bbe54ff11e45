"""The `iclip` command. Invalid input ends with one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

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
    """A parser whose errors suggest a known name for an unknown one."""

    _typed: Sequence[str] = ()  # what the user typed

    def parse_args(self, args=None, namespace=None):
        self._typed = args or ()
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            takes_texts = any(action.dest == "texts" for action in self._actions)
            is_text = takes_texts and not unknown[0].startswith("-")
            hint = "; separate several texts by commas, as in --text 'dog, red ball'" if is_text else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed

    def error(self, message: str):
        known = self._option_string_actions
        typed_names = [argument.split("=")[0] for argument in self._typed if argument.startswith("--")]
        for name in typed_names:
            is_abbreviation = self.allow_abbrev and any(option.startswith(name) for option in known)
            if not (name in known or is_abbreviation):  # perhaps a required option that was mistyped
                message = f"unrecognized arguments: {name}{self._cure(name, known)}"
                break
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def _cure(self, name: str, known: Iterable[str]) -> str:
        """Returns the end of an error about an unknown option, which says what to use instead."""
        if self.get_default("command") == "train":
            from .train.arguments import cure_of

            if cure := cure_of(name[2:].replace("-", "_")):
                return cure
        return _suggestion(name, known)


def _suggestion(name: str, known: Iterable[str]) -> str:
    matches = get_close_matches(name, known, 1)
    return f"; did you mean {matches[0]}?" if matches else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        # The encoding of stdout may lack characters of names and texts.
        sys.stdout.reconfigure(errors="backslashreplace")
    if arguments is None:
        # The working directory may be the folder of a stranger's model. Processes that load data would import modules
        # from it. Python 3.10 does not read this variable.
        os.environ.setdefault("PYTHONSAFEPATH", "1")
        arguments = sys.argv[1:]
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python complains at exit
        return 141  # the code of a program that SIGPIPE ends; the signal itself would also end servers and downloads


def _run(arguments: Sequence[str]) -> int:
    """Runs a command and returns its exit code. Errors of the user become one line on stderr."""
    # Beside other jobs, threads that spin while they wait make an image ten times slower. Torch reads this when it is
    # imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = arguments[0] if arguments else None
    try:
        command_parser = parser(command)
        if command in COMMANDS:
            args = command_parser.parse_args(arguments[1:])
        elif command and command[0] != "-":
            command_parser.error(f"there is no command {command!r}{_suggestion(command, COMMANDS)}")
        else:
            args = command_parser.parse_args(arguments or ["--help"])
    except SystemExit as stop:  # after a wrong option or a help text
        return stop.code
    try:
        return args.run(args) or 0
    except BrokenPipeError:  # an OSError, which `main` handles
        raise
    except (OSError, ValueError, TypeError, ImportError, OverflowError) as error:
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
        epilog="Exit codes: 0 success; 2 invalid or unreadable input, with one line on stderr; 130 interrupted; "
        "141 if the output is a pipe that was closed.",
    )
    program.add_argument("--version", action="version", version=f"iclip {__version__}")
    commands = program.add_subparsers(metavar="COMMAND", required=True)
    for name, description in COMMANDS.items():
        commands.add_parser(name, help=description)
    return program
