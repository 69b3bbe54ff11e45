"""The data of a training: pairs, held-out pairs, nouns, and images with masks."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import NamedTuple

from ...data.nouns import NounPrompts
from ...data.pairs import PairDataset, load_pairs
from ...data.segmentation import SegmentationDataset, load_segmentation
from ...data.streams import PairStream
from ...utils.published import is_hub_id
from .arguments import Arguments, EvaluationArguments


logger = logging.getLogger(__name__)


class Data(NamedTuple):
    """What a training reads."""

    pairs: PairDataset | PairStream
    held_out: PairDataset | None
    nouns: NounPrompts | None
    map_dataset: SegmentationDataset | None  # to evaluate maps on

    @property
    def is_stream(self) -> bool:
        return isinstance(self.pairs, PairStream)


def open_pairs(sources: list[str], values: Mapping, **kwargs) -> PairDataset | PairStream:
    """Opens pairs by [`load_pairs`], with `kwargs` and those of its arguments that are among the `values`."""
    names = ("split", "image_column", "caption_column", "seed", "max_bad_share")
    kwargs = {"streaming": False, **kwargs, **{name: values[name] for name in names if name in values}}
    return load_pairs(sources[0] if len(sources) == 1 else sources, **kwargs)


def open_data(arguments: Arguments, pairs: PairDataset | None = None) -> Data:
    """Opens the data of a training. `pairs` are the training pairs, if they are open already."""
    args, evaluation, map_dataset = arguments.training, arguments.evaluation, None
    if evaluation.eval_dataset != "none":
        if not os.path.isdir(evaluation.eval_root):
            raise FileNotFoundError(f"eval_root: {evaluation.eval_root!r} is no folder; name that of the data set.")
        map_dataset = load_segmentation(evaluation.eval_dataset, evaluation.eval_root, evaluation.eval_split or None)
        map_dataset.check_classes()
    values = {**vars(arguments.data), "seed": args.seed}
    if pairs is None:
        is_stream = arguments.data.pairs_per_epoch > 0 and any(map(is_hub_id, arguments.data.data))
        process = {"rank": args.process_index, "world_size": args.world_size}
        pairs = open_pairs(arguments.data.data, values, streaming=is_stream, **process)
    pairs, held_out = _hold_out(pairs, evaluation, values)
    nouns = NounPrompts.from_file(arguments.data.nouns, args.seed) if arguments.data.nouns else None
    if nouns:
        warn_of_unknown_labels(pairs, nouns)
    return Data(pairs, held_out, nouns, map_dataset)


def _hold_out(
    pairs: PairDataset | PairStream, evaluation: EvaluationArguments, values: Mapping
) -> tuple[PairDataset | PairStream, PairDataset | None]:
    """Returns the pairs to train on, and the held-out pairs without those that cannot be read, or None."""
    if evaluation.validation_data:
        held_out = open_pairs(evaluation.validation_data, values)
        if not isinstance(pairs, PairStream) and (common := pairs.files() & held_out.files()):
            logger.warning(
                "%d files are in data and validation_data, such as %r: scores on them say nothing of other images.",
                len(common),
                min(common),
            )
    elif evaluation.validation_share:
        if isinstance(pairs, PairStream):
            raise ValueError("validation_share: no part of a stream can be held out; name local validation_data.")
        pairs, held_out = pairs.split(evaluation.validation_share)
    else:
        return pairs, None
    # One broken pair may be a large share of few held-out pairs. Each is logged and left out.
    held_out.max_bad_share = 1.0
    return pairs, held_out.readable()


def warn_of_unknown_labels(pairs: PairDataset | PairStream, nouns: NounPrompts) -> None:
    """Logs those labels of some of the pairs that are neither in `complete` nor in the vocabulary."""
    unknown = [nouns.unknown_labels(texts) for texts in pairs.some_texts()]
    counts = Counter(chain.from_iterable(unknown))
    if counts:
        most_frequent = ", ".join(f"{label!r:.50} ({count})" for label, count in counts.most_common(5))
        logger.warning(
            "labels: in %d pairs, %d names are neither in complete nor in nouns, and teach nothing: %s%s",
            len(unknown),
            len(counts),
            most_frequent,
            ", ..." if len(counts) > 5 else "",
        )
