"""A server of static files for the page of `web`, on this machine. It does not load torch."""

from __future__ import annotations

import errno
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar


class _Handler(SimpleHTTPRequestHandler):
    # On Windows, the registry can tell otherwise, and browsers run no other script.
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
        host, port: address and port to listen on; 7860 or another free port if not given.

    Raises:
        `ValueError`: the folder holds no page. `OSError`: the address is not of this machine, or the port is not free.
    """
    if not (folder / "settings.json").is_file():
        raise ValueError(f"{folder}: expected a folder of `iclip export --format web`, but it has no page; name one.")
    handler = partial(_Handler, directory=str(folder))
    try:
        return ThreadingHTTPServer((host, 7860 if port is None else port), handler)
    except OSError as error:
        if port is None and error.errno == errno.EADDRINUSE:
            return ThreadingHTTPServer((host, 0), handler)
        raise OSError(f"{host}: cannot listen on this address or port: {error.strerror}.") from error
