"""`iclip evaluate`: interpretability, or faithfulness, of maps on a segmentation data set."""

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


# Names instead of imports, so that the help does not load torch.
# Tasks, and the options that not all of them have.
OPTIONS = {
    "interpretability": ("batch_size", "aggregate"),
    "faithfulness": ("batch_size", "measures", "steps", "seed"),
}
MEASURES = ("deletion_insertion", "max_sensitivity", "randomization", "pointing_game")


def register(commands) -> None:
    command = add_command(
        commands,
        "evaluate",
        run,
        "measure how well maps mark classes, or how faithful they are, on a segmentation data set",
    )
    command.add_argument(
        "--task",
        choices=tuple(OPTIONS),
        default="interpretability",
        help="interpretability: mAP, mMIoU, mFMB and text contrast; faithfulness: deletion and insertion, pointing game, "
        "max-sensitivity and randomised layers (default: interpretability)",
    )
    add_dataset_options(command)
    add_limit_option(command)
    add_model_options(command)
    add_methods_option(command)
    command.add_argument(
        "--aggregate",
        choices=("image", "pixel"),
        help="interpretability: image is the mean over the images of a class, pixel pools the pixels of all its images "
        "(default: image)",
    )
    command.add_argument(
        "--measures",
        nargs="+",
        choices=MEASURES,
        metavar="MEASURE",
        help=f"faithfulness: one or more of {', '.join(MEASURES)} (default: all)",
    )
    command.add_argument(
        "--steps",
        type=at_least_1,
        metavar="N",
        help="faithfulness: steps of deletion and of insertion (default: 10)",
    )
    command.add_argument("--seed", type=int, metavar="N", help="faithfulness: seed of all random values (default: 0)")
    command.add_argument(
        "--batch-size",
        type=at_least_1,
        metavar="N",
        help="images in one forward pass (default: 8; faithfulness 32)",
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

    own = OPTIONS[options.task]
    given = {name: getattr(options, name) for name in own if getattr(options, name) is not None}
    for name in ("aggregate", "measures", "steps", "seed"):
        if name not in own and getattr(options, name) is not None:
            raise ValueError(f"Expected --{name} with another --task, got it with {options.task}.")
    if options.output:
        check_file("--output", options.output, (".json",))
    dataset = load_segmentation(options.dataset, options.data_root, options.split, options.overrides)
    from ..evaluation.evaluate import evaluate
    from ..evaluation.faithfulness import evaluate_faithfulness
    from ..utils.distributed import partner_errors, this_process

    measure = evaluate_faithfulness if options.task == "faithfulness" else evaluate
    state = this_process("eval")  # selects the device before the model is loaded
    with partner_errors("run it again"):
        result = measure(
            *load_silently(options.model, options.dtype),
            dataset,
            options.methods,
            image_size=options.image_size,
            templates=options.templates,
            limit=options.limit,
            **given,
        )
    if state.is_main_process:
        if options.output:
            result.save(options.output)
        echo(result.to_json() if options.json else result.table())
    return 0
