"""A server of npm packages on this machine, in place of the CDN from which an exported page loads them."""

import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from iclip_hf.web.export import RUNTIME_FILES


class _Handler(SimpleHTTPRequestHandler):
    """Lets the pages of other servers read its files, as a CDN does."""

    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")
        super().end_headers()

    def log_message(self, *arguments) -> None:
        pass


@contextmanager
def npm_server(folder: Path) -> Iterator[str]:
    """Downloads the files that pages load into a folder by npm, serves them, and yields the address."""
    for package in {file["package"] for file in RUNTIME_FILES}:
        command = ["npm", "pack", package, "--prefer-offline", "--loglevel=error", "--pack-destination", folder]
        packed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout.split()[-1]
        with tarfile.open(folder / packed) as tar:
            for file in RUNTIME_FILES:
                if file["package"] == package:
                    target = folder / package / file["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(tar.extractfile(f"package/{file['path']}").read())
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
