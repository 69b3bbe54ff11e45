"""
`iclip export`: a model folder with its code for Transformers, an ONNX folder, or a page that runs the model in the
browser.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from ..backends import check_model_name
from .inputs import silence_transformers
from .options import option_type, refuse
from .output import print_folder, print_lines, printed_steps


def add_options(parser: argparse.ArgumentParser) -> None:
    add_source_options(parser)
    parser.add_argument("directory", type=Path, metavar="DIR", help="new folder to write")
    parser.add_argument(
        "--format",
        choices=("transformers", "onnx", "onnx-bfloat16", "onnx-int8", "web", "web-bfloat16", "web-float32"),
        default="transformers",
        help="onnx: two graphs for ONNX Runtime, with float32 weights unless the format names another type; web: a "
        "page that runs the model in the browser, with int8 weights unless the format names another type (default: "
        "transformers)",
    )
    parser.add_argument(
        "--cdn",
        metavar="URL",
        help="server of npm packages, from which the page loads ONNX Runtime (default: cdn.jsdelivr.net)",
    )


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that [`export`] reads: a model, and results for its card."""
    parser.add_argument(
        "model",
        type=option_type(partial(check_model_name, types=("iclip",))),
        metavar="MODEL",
        help='folder or Hub id of an ICLIP model, or "embedded"',
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="JSON file of `iclip evaluate --output`; its scores are written into the model card",
    )


def run(args: argparse.Namespace) -> None:
    from ..utils.files import check_new_folder, check_outside

    if args.model != "embedded":
        check_outside(args.directory, args.model)
    check_new_folder(args.directory)
    target, _, weight_type = args.format.partition("-")
    if target != "web":
        refuse(args, ["cdn"], f"--format {args.format}")
    if target == "transformers":
        folder = export(args, args.directory)
        print_terms(**terms_of(folder))
        print_folder(folder, "iclip", "push", str(folder), f"your-name/{folder.resolve().name}", "--dry-run")
        return
    refuse(args, ["results"], f"--format {args.format}")
    print(f"Loading {args.model} and exporting two graphs, which takes some minutes.", file=sys.stderr)
    from ..backends.loading import load_iclip

    silence_transformers()
    model, processor = load_iclip(args.model, dtype="float32")
    with printed_steps():
        if target == "onnx":
            from ..backends.onnx import export_onnx

            folder = export_onnx(model, processor, args.directory, weight_type or "float32")
            next_command = ("explain", "photo.jpg", "--text", "dog", "--model", str(folder))
        else:
            from ..web.export import export_web

            server = {"cdn": args.cdn.rstrip("/")} if args.cdn else {}
            folder = export_web(model, processor, args.directory, weight_type or "int8", source=args.model, **server)
            next_command = ("demo", "--web", str(folder))
    print_folder(folder, "iclip", *next_command)


def export(args: argparse.Namespace, directory: Path, name: str | None = None) -> Path:
    """Exports the model of a command line to a folder. The card gets the scores of `--results`."""
    results = None
    if args.results is not None:
        from ..evaluation.results import read_results

        results = read_results(args.results, "protocol", "results")
    # Not by `print_to_stderr`: a command that fails prints one line with its name.
    print(f"Loading {args.model} and writing its files, which may take a minute.", file=sys.stderr)
    from ..backends.identity import changed_model
    from ..backends.loading import load_iclip
    from ..hub.folders import export_model

    silence_transformers()
    model, processor = load_iclip(args.model)
    if results is not None and (differing := changed_model(results["protocol"], model, processor)):
        raise ValueError(
            f"--results {args.results}: expected scores of this model, got scores of a model with other "
            f"{', '.join(differing)}; measure this model by `iclip evaluate --output`."
        )
    return export_model(model, processor, directory, name=name, source=args.model, metrics=results)


def terms_of(folder: Path) -> dict[str, str | dict[str, str]]:
    """Returns `licence`, that on the card of an exported model, and `data_terms`, by training data set."""
    from ..hub.model_card import card_licence
    from ..hub.record import read_record

    data_terms = {name: data["terms"] for name, data in read_record(folder)["data"].items()}
    return {"licence": card_licence(folder), "data_terms": data_terms}


def print_terms(licence: str, data_terms: Mapping[str, str]) -> None:
    print_lines(f"Licence on the model card: {licence}.")
    if data_terms:
        print_lines(
            "The model was trained on data with these terms:",
            *(f"  {data}: {terms}" for data, terms in data_terms.items()),
        )
