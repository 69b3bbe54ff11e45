"""`iclip analyze`: semantic shift, pooled channels, and recognition against interpretability."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

from ..utils.names import POOLINGS
from .common import (
    CHARTS,
    DATASET,
    MODEL,
    add_picture,
    add_shared,
    check_output,
    data_inputs,
    echo,
    load_silently,
    save_figure,
    sentence,
)


def add_options(command: argparse.ArgumentParser) -> None:
    analyses = command.add_subparsers(required=True, metavar="ANALYSIS")

    shift = _add_analysis(
        analyses, "shift", _shift, "count the channels that move from foreground to background (Tables 6, 7)"
    )
    add_shared(shift, *DATASET[:2], required=True)
    add_shared(shift, *DATASET[2:], "--limit", *MODEL)
    shift.add_argument("--before", choices=POOLINGS, default="max", help="first pooling (default: max)")
    shift.add_argument("--after", choices=POOLINGS, default="average", help="second pooling (default: average)")
    shift.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write")
    add_shared(shift, "--overwrite", "--json")

    channels = _add_analysis(
        analyses, "channels", _channels, "draw the patches that pooled channels come from (Fig. 3)"
    )
    channels.add_argument("images", nargs="+", metavar="IMAGE", help="image files, one row of the figure each")
    add_shared(channels, *MODEL)
    add_picture(channels, "channels.png")

    relation = _add_analysis(
        analyses, "relation", _relation, "compare recognition and interpretability of each class (Fig. 9)"
    )
    relation.add_argument(
        "evaluation", type=Path, metavar="JSON", help="JSON file written by `iclip evaluate --output`"
    )
    relation.add_argument("--method", help="method whose scores are used (default: the first method in the file)")
    add_picture(relation, "relation.png")
    add_shared(relation, "--json")


def _add_analysis(analyses, name: str, run: Callable, description: str) -> argparse.ArgumentParser:
    analysis = analyses.add_parser(name, help=description, description=sentence(description))
    analysis.set_defaults(run=run)
    return analysis


def _shift(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from tqdm import tqdm

    from ..data.segmentation import load_segmentation
    from ..utils.files import atomic_write

    dataset = load_segmentation(options.dataset, options.data_root, options.split, options.overrides)
    if options.output:
        check_output(options, "", (".json",), data_inputs(options, dataset))
    from ..evaluation.analysis import semantic_shift

    count = min(len(dataset), options.limit or len(dataset))
    samples = tqdm(itertools.islice(dataset, count), total=count, unit="image")
    model = load_silently(options.model, options)
    shift = semantic_shift(model, samples, options.before, options.after)
    data = {"name": dataset.name, "split": dataset.split, "images": count, "fingerprint": dataset.fingerprint()}
    protocol = {**model.identity, "dataset": data, "before": options.before, "after": options.after}
    report = json.dumps({"protocol": protocol, **asdict(shift)}, indent=2)
    echo(report if options.json else shift.table())  # first, because writing may fail
    if options.output:
        with atomic_write(options.output) as temporary:
            temporary.write_text(report + "\n", encoding="utf-8")


def _channels(options: argparse.Namespace) -> None:
    from ..images import load_image

    check_output(options, "channels.png", CHARTS, options.images)
    images = [load_image(path) for path in options.images]
    from ..evaluation.analysis import channel_matches
    from ..evaluation.analysis_plots import channel_scatter

    model = load_silently(options.model, options)
    matches = [channel_matches(model, image) for image in images]
    save_figure(channel_scatter(images, matches), options.output, options.dpi)
    echo(options.output)


def _relation(options: argparse.Namespace) -> None:
    check_output(options, "relation.png", CHARTS, [options.evaluation])
    from ..evaluation.results import class_figures

    method, recognition = class_figures(options.evaluation, "AP", options.method)
    _, interpretability = class_figures(options.evaluation, "MIoU", method)
    from ..evaluation.analysis import relation
    from ..evaluation.analysis_plots import relation_plot

    found = relation(recognition, interpretability)
    if not found.names:
        raise ValueError(
            f"{options.evaluation}: expected a class with both AP and MIoU, but got none; evaluate others."
        )
    labels = ("average precision, %", f"IoU at the best threshold, % ({method})")
    save_figure(relation_plot(found, *labels), options.output, options.dpi)
    correlation = None if math.isnan(found.correlation) else found.correlation
    report = {
        "method": method,
        "classes": len(found.names),
        "correlation": correlation,
        "picture": str(options.output),
    }
    shown = "-" if correlation is None else f"{correlation:.2f}"
    said = f"{method}: {len(found.names)} classes, correlation {shown} -> {options.output}"
    echo(json.dumps(report) if options.json else said)
