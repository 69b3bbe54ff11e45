"""`iclip evaluate`: mAP, mMIoU, mFMB and text contrast on a segmentation data set."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import (
    add_command,
    add_dataset_options,
    add_limit_option,
    add_methods_option,
    add_model_options,
    at_least_1,
    check_file,
    echo,
    load_silently,
)


def register(commands) -> None:
    command = add_command(
        commands, "evaluate", run, "measure mAP, mMIoU, mFMB and text contrast on a segmentation data set"
    )
    add_dataset_options(command)
    add_limit_option(command)
    add_model_options(command)
    add_methods_option(command)
    command.add_argument(
        "--aggregate",
        choices=("image", "pixel"),
        default="image",
        help="image: mean over the images of a class; pixel: pool the pixels of all its images (default: image)",
    )
    command.add_argument(
        "--batch-size",
        type=at_least_1,
        default=8,
        metavar="N",
        help="images in one forward pass (default: 8)",
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON file to write; a CSV file with the scores of each class is written beside it",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(options: argparse.Namespace) -> int:
    from ..data.segmentation import load_segmentation

    if options.output:
        check_file("--output", options.output, (".json",))
    dataset = load_segmentation(options.dataset, options.data_root, options.split, options.overrides)
    from ..evaluation.evaluate import evaluate
    from ..utils.distributed import partner_errors, this_process

    state = this_process("eval")  # selects the device before the model is loaded
    with partner_errors("run it again"):
        result = evaluate(
            *load_silently(options.model, options.dtype),
            dataset,
            options.methods,
            image_size=options.image_size,
            templates=options.templates,
            aggregate=options.aggregate,
            limit=options.limit,
            batch_size=options.batch_size,
        )
    if state.is_main_process:
        if options.output:
            result.save(options.output)
        echo(result.to_json() if options.json else result.table())
    return 0
