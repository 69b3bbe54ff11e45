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


# Each is a module here, which is imported when the command is used.
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
    def parse_args(self, args=None, namespace=None):
        self._arguments = args or []
        return super().parse_args(args, namespace)

    def error(self, message: str):
        if "are required" in message or "unrecognized arguments: --" in message:  # it may be mistyped
            known = self._option_string_actions
            typed = [word.split("=")[0] for word in self._arguments if word.startswith("--")]
            short = [name for name in typed if self.allow_abbrev and any(full.startswith(name) for full in known)]
            if wrong := [name for name in typed if name not in (*known, *short)]:
                message = f"unrecognized arguments: {wrong[0]}{self._cure(wrong[0], known)}"
        if message.startswith("argument COMMAND"):
            message += self._cure(self._arguments[0], COMMANDS)
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message and unknown[:1] != "-" and any(action.dest == "texts" for action in self._actions):
            message += "; several texts stand between commas, as in --text 'dog, red ball'"
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def _cure(self, wrong: str, known: Iterable[str]) -> str:
        """Returns what may be meant by an option or a command that is not known."""
        if self.get_default("command") == "train":
            from ..training.arguments import cure_of

            if cure := cure_of(wrong[2:].replace("-", "_")):
                return cure
        return "".join(f"; did you mean {option}?" for option in get_close_matches(wrong, known, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files and texts may not fit its encoding
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python complains at exit
        return 141  # as of a program that SIGPIPE ends, which servers and downloads must not be


def _run(arguments: Sequence[str]) -> int:
    # Read when torch is imported. Threads that wait sleep: beside other jobs, spinning makes an image ten times
    # slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = arguments[0] if arguments else None
    try:
        options = parser(command).parse_args(arguments[1:] if command in COMMANDS else arguments or ["--help"])
    except SystemExit as stop:  # of a wrong option, or after a help text
        return stop.code
    try:
        return options.run(options) or 0
    except BrokenPipeError:
        raise
    except (OSError, ValueError, TypeError, ImportError, OverflowError) as error:
        report_error(command, error)
        return 2
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        smaller = {"train": "--chunk_size or --per_device_train_batch_size", "compare": "--image-size"}
        smaller = smaller.get(command, "--batch-size or --image-size")
        report_error(command, MemoryError(f"the memory of the GPU is full; set a smaller {smaller}"))
        return 2
    except KeyboardInterrupt as error:  # with a message if a training was interrupted
        report_error(command, KeyboardInterrupt(str(error) or "interrupted"))
        return 130


def parser(command: str | None) -> argparse.ArgumentParser:
    """Returns the parser of a command, whose module is imported for it, or that of `iclip` itself."""
    if command in COMMANDS:
        module = importlib.import_module(f".{command.replace('-', '_')}", __package__)
        description = f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}."
        parents = module.parents() if hasattr(module, "parents") else []
        of_command = _Parser(prog=f"iclip {command}", description=description, parents=parents)
        of_command.set_defaults(command=command, run=module.run)
        module.add_options(of_command)
        return of_command
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
