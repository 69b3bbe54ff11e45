"""`iclip evaluate`: interpretability or faithfulness of maps, or segmentation by them, on a segmentation data set."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from ..prompts import check_text
from ..utils.names import MEASURES
from .common import (
    add_dataset_options,
    add_limit_option,
    add_methods_option,
    add_model_options,
    add_refine_option,
    at_least_1,
    check_file,
    checked,
    echo,
    load_silently,
    share,
)


# Tasks, and the options that not all of them have.
OPTIONS = {
    "interpretability": ("batch_size", "aggregate", "refine"),
    "segmentation": (
        "batch_size",
        "short_side",
        "window",
        "stride",
        "background",
        "threshold",
        "logit_scale",
        "min_presence",
        "refine",
    ),
    "faithfulness": ("batch_size", "measures", "steps", "seed"),
}


def add_options(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run)
    command.add_argument(
        "--task",
        choices=tuple(OPTIONS),
        default="interpretability",
        help="interpretability: mAP, mMIoU, mFMB and text contrast; segmentation: mIoU of label maps; faithfulness: deletion and "
        "insertion, pointing game, max-sensitivity and randomised layers (default: interpretability)",
    )
    add_dataset_options(command)
    add_limit_option(command)
    add_model_options(command)
    add_methods_option(command)
    add_refine_option(command, "interpretability and segmentation: ", default=None)
    command.add_argument(
        "--aggregate",
        choices=("image", "pixel"),
        help="interpretability: image is the mean over the images of a class, pixel pools the pixels of all its images "
        "(default: image)",
    )
    _add_segmentation_options(command)
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


def _add_segmentation_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--short-side",
        type=at_least_1,
        metavar="PIXELS",
        help="segmentation: short side of images that keep their proportions (default: a square; with --window 336)",
    )
    command.add_argument(
        "--window",
        type=at_least_1,
        metavar="PIXELS",
        help="segmentation: side of windows that slide over the image, for example 224 (default: the whole image)",
    )
    command.add_argument(
        "--stride",
        type=at_least_1,
        metavar="PIXELS",
        help="segmentation: distance of the windows (default: half of the window)",
    )
    command.add_argument(
        "--background",
        action="append",
        type=checked(check_text),
        metavar="TEXT",
        help="segmentation: text that describes the background, such as sky; repeat the option for several texts",
    )
    command.add_argument(
        "--threshold",
        type=share,
        metavar="NUMBER",
        help="segmentation: confidence up to which a pixel is background, in [0, 1] (default: the best one for the images at "
        "even positions is used for those at odd positions, and the reverse; none with texts for the background)",
    )
    command.add_argument(
        "--logit-scale",
        type=float,
        metavar="NUMBER",
        help="segmentation: take as confidence the softmax of similarities times this number, for example 40 (default: the "
        "map of the best class, stretched to [0, 1])",
    )
    command.add_argument(
        "--min-presence",
        type=share,
        metavar="NUMBER",
        help="segmentation: a class with a lower presence gets no pixel; 0 to 1 (default: 0)",
    )


def run(options: argparse.Namespace) -> int:
    from ..data.segmentation import load_segmentation

    own = OPTIONS[options.task]
    given = {name: getattr(options, name) for name in own if getattr(options, name) is not None}
    for name in dict.fromkeys(itertools.chain(*OPTIONS.values())):
        if name not in own and getattr(options, name) is not None:
            raise ValueError(
                f"Expected --{name.replace('_', '-')} with another --task, got it with {options.task}: leave it out."
            )
    if options.output:
        check_file("--output", options.output, (".json",))
    dataset = load_segmentation(options.dataset, options.data_root, options.split, options.overrides)
    from ..evaluation.evaluate import evaluate
    from ..evaluation.faithfulness import evaluate_faithfulness
    from ..evaluation.segmentation import evaluate_segmentation
    from ..utils.distributed import partner_errors, this_process

    measure = {"segmentation": evaluate_segmentation, "faithfulness": evaluate_faithfulness}.get(
        options.task, evaluate
    )
    state = this_process("eval")  # selects the device before the model is loaded
    with partner_errors("run it again"):
        result = measure(
            load_silently(options.model, options),
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
    state.destroy_process_group()
    return 0
