"""`iclip demo`: the live demo in a browser, or the page that runs a model in the browser."""

from __future__ import annotations

import argparse
from pathlib import Path

from .inputs import silence_transformers
from .options import MODEL, add_shared
from .output import print_lines, print_to_stderr


def add_options(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, *MODEL)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: of this machine only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free port from 7860)")
    parser.add_argument(
        "--web", type=Path, metavar="DIR", help="serve the page of `iclip export --format web` instead"
    )


def run(args: argparse.Namespace) -> None:
    if args.web:
        from ..web.server import web_server

        with web_server(args.web, args.host, args.port) as server:
            print_lines(f"http://{args.host}:{server.server_port}/")
            server.serve_forever()
        return
    print_to_stderr("demo", f"loading Gradio and {args.model}, which may take a minute")
    from ..demo.app import launch

    silence_transformers()
    app = launch(
        args.model,
        args.host,
        args.port,
        dtype=args.dtype,
        device=args.device,
        quiet=True,  # otherwise Gradio advertises its Python option for sharing
        prevent_thread_lock=True,
    )
    print_lines(app.local_url)
    app.block_thread()
