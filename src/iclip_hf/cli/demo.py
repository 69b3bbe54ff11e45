"""`iclip demo`: the live demo in a browser, or as a Space; or the page that runs a model in the browser."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import MODEL, add_shared, keep_memory, refuse, silence_transformers
from .output import echo, echo_space


def add_options(command: argparse.ArgumentParser) -> None:
    add_shared(command, *MODEL, default=None)
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: of this machine only)")
    command.add_argument("--port", type=int, help="port to listen on (default: the first free port from 7860)")
    command.add_argument(
        "--export-space", type=Path, metavar="DIR", help="write the files of a Space with the demo, and exit"
    )
    command.add_argument(
        "--web", type=Path, metavar="DIR", help="serve the page of `iclip export --format web` instead"
    )


def run(options: argparse.Namespace) -> None:
    if options.web:
        refuse(options, ["model", "dtype", "device", "export_space"], "the page of --web")
        from ..demo.web_server import web_server

        with web_server(options.web, options.host, options.port) as server:
            echo(f"http://{options.host}:{server.server_port}/")
            server.serve_forever()
        return
    if options.export_space:
        refuse(options, ["dtype", "device"], "--export-space")
        if options.model not in (None, "embedded") and Path(options.model).exists():
            raise ValueError(f"A Space needs the Hub id of its model, not the folder {options.model}: push it first.")
    from ..demo.app import export_space, launch

    if options.export_space:
        export_space(options.export_space, options.model or "embedded")
        echo_space(options.export_space)
    else:
        silence_transformers()
        keep_memory()
        launch(options.model or "embedded", options.host, options.port, dtype=options.dtype, device=options.device)
