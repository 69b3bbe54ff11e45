"""The `iclip` command. Invalid input ends with one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import analyze, compare, demo, evaluate, explain, export, init, metrics, push, segment, train
from .common import printable, report_error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        print(f"{self.prog}: {printable(message)} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (OSError, ValueError, TypeError, ImportError) as error:
        report_error(options.command, error)
        return 2
    except KeyboardInterrupt:
        report_error(options.command, KeyboardInterrupt("interrupted"))
        return 130


def _parser() -> _Parser:
    parser = _Parser(
        prog="iclip",
        description="Contrastive image-text models that explain themselves.",
        epilog="Exit codes: 0 success; 2 invalid or unreadable input, with one line on stderr; 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"iclip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (explain, segment, compare, demo, evaluate, analyze, train, init, export, push, metrics):
        module.register(commands)
    return parser
