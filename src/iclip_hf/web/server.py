"""A server of static files for an exported page, on this machine. It does not load torch."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar


class _Handler(SimpleHTTPRequestHandler):
    # On Windows, the registry may name another type for .js. Browsers run a module only as text/javascript.
    extensions_map: ClassVar = {**SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript; charset=utf-8"}

    def end_headers(self) -> None:
        # With these two, browsers allow the worker to use threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *arguments) -> None:
        pass


def web_server(folder: Path, host: str = "127.0.0.1", port: int | None = None) -> ThreadingHTTPServer:
    """
    Returns a server of the files of a page, which `serve_forever` runs.

    Args:
        folder: a folder that `export_web` wrote.
        host, port: address and port to listen on. If no port is given, the first free one from 7860.
    """
    if not (folder / "settings.json").is_file():
        raise ValueError(f"{folder}: expected a folder of `iclip export --format web`, but it has no page; name one.")
    handler = partial(_Handler, directory=str(folder))
    if port is not None:
        return ThreadingHTTPServer((host, port), handler)
    for candidate in range(7860, 7960):
        with suppress(OSError):
            return ThreadingHTTPServer((host, candidate), handler)
    return ThreadingHTTPServer((host, 0), handler)  # any port, or the error of a host that is none
