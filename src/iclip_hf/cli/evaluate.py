"""`iclip evaluate`: interpretability or faithfulness of maps, or segmentation by them, on a segmentation data set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..evaluation.metrics import METRICS, OPTIONS, TASKS
from ..evaluation.protocols import protocol_settings
from ..utils.files import check_new_folder, check_outputs, check_outside
from .inputs import load_model
from .options import DATASET, MODEL, add_shared, at_least_1, fraction, name_of, number, seed, texts
from .output import check_output_file, model_folders, print_lines, print_to_stderr


# Keywords of `add_argument` for each form in `metrics.OPTIONS`.
_FORMS = {
    "pixels": {"type": at_least_1, "metavar": "PIXELS"},
    "count": {"type": at_least_1, "metavar": "N"},
    "seed": {"type": seed, "metavar": "N"},
    "share": {"type": fraction, "metavar": "NUMBER"},
    "positive": {"type": number(float, sys.float_info.min), "metavar": "NUMBER"},
    "texts": {"action": "extend", "type": texts, "metavar": "TEXT"},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    tasks = "; ".join(f"{task}: {', '.join(names)}" for task, names in TASKS.items())
    task_or_metrics = parser.add_mutually_exclusive_group()
    task_or_metrics.add_argument(
        "--task",
        type=name_of(TASKS, "task"),
        choices=tuple(TASKS),
        default="interpretability",
        help=f"metrics to compute: {tasks} (default: interpretability)",
    )
    add_shared(parser, *DATASET[:2], required=True)
    add_shared(parser, *DATASET[2:])
    parser.add_argument("--limit", type=at_least_1, metavar="N", help="use only the first N images (default: all)")
    add_shared(parser, *MODEL, "--template", "--methods", "--multi-scale")
    add_shared(parser, "--refine", default=False)
    size = parser.add_mutually_exclusive_group()
    add_shared(size, "--image-size")
    size.add_argument(
        "--short-side",
        type=at_least_1,
        metavar="PIXELS",
        help="short side of images that keep their proportions (default: a square, or 336 with --window)",
    )
    task_or_metrics.add_argument(
        "--metrics",
        action="extend",
        nargs="+",
        type=name_of(METRICS, "metric"),
        metavar="METRIC",
        help=f"one or more of {', '.join(METRICS)} instead of those of a task",
    )
    for name, (form, help_text) in OPTIONS.items():
        keywords = {"type": name_of(form, name), "choices": form} if isinstance(form, tuple) else _FORMS[form]
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords, help=help_text)
    add_shared(parser, "--batch-size", default=8)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON file to write; scores of the classes are written beside it as CSV, with a number if such a file "
        "exists",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="new folder for a page, index.html, that shows the maps of each class, worst or best first",
    )
    add_shared(parser, "--json")


def run(args: argparse.Namespace) -> None:
    from ..data.segmentation import load_segmentation

    overrides, methods = args.overrides, args.methods
    if args.protocol:
        settings = protocol_settings(args.protocol, args.dataset)
        overrides, methods = overrides or settings.overrides, methods or settings.methods
    dataset = load_segmentation(args.dataset, args.data_root, args.split, overrides)
    if args.output:
        check_output_file(args.output, (".json",))
        check_outputs([args.output], [args.overrides, *dataset.files, *model_folders(args.model)])
    if args.report:
        check_new_folder(args.report)
        check_outside(args.report, args.model)
    from ..evaluation.metrics import make_metrics

    metric_options = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    metrics = make_metrics(args.metrics or args.task, **metric_options)
    from ..evaluation.evaluate import evaluate_model
    from ..utils.distributed import partial_state

    size = {"shortest_edge": args.short_side} if args.short_side else args.image_size
    state = partial_state("eval")  # selects the device, before the model is loaded
    result = evaluate_model(
        load_model(args.model, args),
        dataset,
        methods,
        metrics,
        image_size=size,
        templates=args.templates,
        refine=args.refine,
        multi_scale=args.multi_scale,
        limit=args.limit,
        batch_size=args.batch_size,
        report=args.report,
    )
    if state.is_main_process:
        if args.report:
            print_to_stderr("evaluate", f"wrote {args.report / 'index.html'}")
        try:
            if args.output:  # written before the table is printed, because a pipe may be closed
                written = " and ".join(map(str, result.save(args.output)))
                print_to_stderr("evaluate", f"wrote {written}")
        finally:  # scores that a full disk does not take are not lost
            print_lines(result.to_json() if args.json else result.table())
    state.destroy_process_group()
