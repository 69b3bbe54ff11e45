"""The `iclip` command. Invalid input ends with one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from .common import printable, report_error, sentence


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
    "export-metric": "write the files of a Space that computes a metric",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        print(f"{self.prog}: {printable(message)} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


class _Command(_Parser):
    """A command, which gets its options when it is used."""

    module: str | None = None

    def parse_known_args(self, args=None, namespace=None):
        self.complete()
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:  # said here, because the program's own help does not list the options of a command
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def complete(self) -> None:
        """Adds the options, once, and the function that runs the command."""
        name, self.module = self.module, None
        if name is not None:
            module = importlib.import_module(f".{name}", __package__)
            self.set_defaults(run=module.run)
            module.add_options(self)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # of a wrong option, or after a help text
        return stop.code
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return options.run(options) or 0
    except (OSError, ValueError, TypeError, ImportError) as error:
        report_error(options.command, error)
        return 2
    except KeyboardInterrupt as error:  # with a message if a training was interrupted
        report_error(options.command, KeyboardInterrupt(str(error) or "interrupted"))
        return 130


def _parser() -> _Parser:
    parser = _Parser(
        prog="iclip",
        description="Contrastive image-text models that explain themselves.",
        epilog="Exit codes: 0 success; 2 invalid or unreadable input, with one line on stderr; 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"iclip {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Command)
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=sentence(description))
        command.module = name.replace("-", "_")
    return parser
