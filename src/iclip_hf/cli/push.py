"""`iclip push`: uploads a model with its code and card to the Hub."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from .export import add_source_options, export, print_terms, terms_of
from .options import add_shared
from .output import print_lines


def add_options(parser: argparse.ArgumentParser) -> None:
    add_source_options(parser)
    parser.add_argument(
        "repo_id",
        metavar="REPO_ID",
        help="repository, for example org/iclip-vit-b16; it is created if it does not exist",
    )
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="list the files and upload nothing")
    add_shared(parser, "--json")


def run(args: argparse.Namespace) -> None:
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(args.repo_id)
    if "/" not in args.repo_id:  # the model card names the owner
        raise ValueError(f"Expected REPO_ID with an owner, such as org/iclip-vit-b16, got {args.repo_id}.")
    if not args.dry_run:
        from ..hub.folders import check_login

        check_login()
    with tempfile.TemporaryDirectory() as scratch:
        folder = export(args, Path(scratch, "model"), name=args.repo_id)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        terms = terms_of(folder)
        entry = {"repo_id": args.repo_id, "files": sizes, **terms}
        if not args.dry_run:
            from ..hub.folders import push_model

            entry["commit"] = push_model(folder, args.repo_id, args.private)
    if args.json:
        print_lines(json.dumps(entry, indent=2))
    else:
        print_lines(*(f"{size:>13,}  {name}" for name, size in sizes.items()))
        print_terms(**terms)
        print_lines(f"{sum(sizes.values()):>13,}  bytes: {entry.get('commit', 'a dry run, nothing was uploaded')}")
