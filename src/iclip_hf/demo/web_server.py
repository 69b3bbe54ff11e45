"""A server of static files for the page of `web`, on this machine. It does not load torch."""

from __future__ import annotations

import errno
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Handler(SimpleHTTPRequestHandler):
    # Of Python's own table, which on Windows the registry can change.
    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".md": "text/plain; charset=utf-8",
        ".json": "application/json",
        ".gz": "application/gzip",
    }

    def end_headers(self) -> None:
        # With these two, browsers give the worker threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
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
    if not (folder / "settings.json").is_file() or not (folder / "index.html").is_file():
        raise ValueError(f"{folder}: expected a folder of `iclip export --format web`, but it has no page; name one.")
    handler = partial(_Handler, directory=str(folder))
    for candidate in range(7860, 7960) if port is None else [port]:
        try:
            return ThreadingHTTPServer((host, candidate), handler)
        except OSError as error:
            problem = error.strerror or error
            if error.errno != errno.EADDRINUSE:  # such as an unknown host, which other ports do not help
                break
    raise OSError(
        f"{host}:{candidate}: expected an address and a free port of this machine, but: {problem}; give others."
    )
