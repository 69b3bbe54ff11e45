"""A server of static files for an exported page, on this machine. It does not load torch."""

from __future__ import annotations

import errno
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar


class _Handler(SimpleHTTPRequestHandler):
    # On Windows, the registry can name another type for .js, with which browsers do not run a module.
    extensions_map: ClassVar = {**SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript; charset=utf-8"}

    def end_headers(self) -> None:
        # With these two, browsers give the worker threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *arguments) -> None:
        pass


def web_server(folder: Path, host: str = "127.0.0.1", port: int | None = None) -> ThreadingHTTPServer:
    """
    Returns a server of a page's files, to be run by `serve_forever`.

    Args:
        folder: from `export_web`.
        host, port: address and port to listen on; the first free port from 7860 if not given.

    Raises:
        `ValueError`: the folder holds no page. `OSError`: the address is not of this machine, or the port is not free.
    """
    if not (folder / "settings.json").is_file():
        raise ValueError(f"{folder}: expected a folder of `iclip export --format web`, but it has no page; name one.")
    handler = partial(_Handler, directory=str(folder))
    for candidate in range(7860, 7960) if port is None else [port]:
        try:
            return ThreadingHTTPServer((host, candidate), handler)
        except OSError as error:
            problem = error.strerror
            if error.errno != errno.EADDRINUSE:  # such as an unknown host, for which no port works
                break
    raise OSError(f"{host}:{candidate}: cannot listen on this address and port: {problem}.")
