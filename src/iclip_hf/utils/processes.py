"""Modules that run in a Python process of their own."""

from __future__ import annotations

import sys


def module_command(module: str) -> list[str]:
    """
    Returns the beginning of a command line that runs a module as `python -m` does, but imports nothing from the
    working directory, which may be the folder of a stranger's model.
    """
    # The option -P does this too, but Python 3.10 does not have it.
    code = "import sys; sys.path = [*filter(None, sys.path)]; import runpy; "
    return [sys.executable, "-c", f"{code}runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"]
