"""
What a run reads and where it writes, opened and checked without torch, so that a mistake is reported within a second.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..backends import check_model_name
from ..data.nouns import NounPrompts
from ..data.pairs import PairDataset, load_pairs
from ..data.segmentation import SegmentationDataset, load_segmentation
from ..utils.files import check_new_folder, check_outputs, check_outside
from ..utils.hub_ids import is_hub_id
from .settings import Settings


if TYPE_CHECKING:
    from ..data.streams import PairStream

logger = logging.getLogger(__name__)

# Settings of the run in its folder, which thereby is known as that of a training.
STATE_FILE = ".iclip-train.json"


class Inputs(NamedTuple):
    """What a run reads. Pairs are opened, and read when they are needed."""

    pairs: PairDataset | PairStream
    held_out: PairDataset | None
    nouns: NounPrompts | None
    segmentation: SegmentationDataset | None  # for the evaluation of maps


def open_pairs(sources: Sequence[str], settings: Mapping, **options) -> PairDataset | PairStream:
    """Opens pairs by the settings that are parameters of [`~iclip_hf.data.pairs.load_pairs`]."""
    names = ("split", "image_column", "caption_column", "seed", "max_bad_share")
    options |= {name: settings[name] for name in names if name in settings}
    return load_pairs(sources[0] if len(sources) == 1 else sources, **options)


def hold_out(
    pairs: PairDataset | PairStream, settings: Mapping
) -> tuple[PairDataset | PairStream, PairDataset | None]:
    """
    Returns the training pairs and the held-out ones, which are `validation_data`, or a share of the pairs, or None.

    Raises:
        `FileNotFoundError`: a file does not exist. `ValueError`: it is not as described, or a share of a stream is to
        be held out.
    """
    streamed = not isinstance(pairs, PairDataset)
    if settings.get("validation_data"):
        held_out = open_pairs(settings["validation_data"], settings, streaming=False)
        if not streamed and (common := pairs.files() & held_out.files()):
            logger.warning(
                "%d files are in data and validation_data, such as %r: scores on them say nothing of other images.",
                len(common),
                min(common),
            )
        return pairs, held_out
    if settings.get("validation_share"):
        if streamed:
            raise ValueError("validation_share: no part of a stream can be held out; name local validation_data.")
        return pairs.split(settings["validation_share"])
    return pairs, None


def open_inputs(settings: Settings, opened: tuple[PairDataset, PairDataset | None] | None = None) -> Inputs:
    """
    Opens what the settings name. `opened` are the result of [`hold_out`], if it is there already.

    Raises:
        `FileNotFoundError`: something does not exist. `ValueError`: it is not as described, or `batch_size` does not
        fit. Also as [`hold_out`].
    """
    rank, world_size = (int(os.environ.get(name, usual)) for name, usual in (("RANK", 0), ("WORLD_SIZE", 1)))
    segmentation = None
    if settings.eval_dataset != "none":  # first, because it is quickly found to be missing
        segmentation = load_segmentation(settings.eval_dataset, settings.eval_root, settings.eval_split or None)
    if opened is None:
        streaming = settings.pairs_per_epoch > 0
        if streaming and len(settings.data) > 1 and any(map(is_hub_id, settings.data)):
            raise ValueError(
                "pairs_per_epoch: only one Hub dataset can be streamed; name one, or set pairs_per_epoch to 0."
            )
        options = {"streaming": streaming, "rank": rank, "world_size": world_size}
        opened = hold_out(open_pairs(settings.data, vars(settings), **options), vars(settings))
    pairs, held_out = opened
    streamed = not isinstance(pairs, PairDataset)
    check_batch(settings.pairs_per_epoch if streamed else len(pairs), settings.batch_size, world_size)
    nouns = NounPrompts.from_file(settings.nouns, seed=settings.seed) if settings.nouns else None
    if nouns and rank == 0:
        warn_of_unknown_labels(pairs, nouns)
    return Inputs(pairs, held_out, nouns, segmentation)


def warn_of_unknown_labels(pairs: PairDataset | PairStream, nouns: NounPrompts) -> None:
    """Logs the labels that are neither in `complete` nor in the vocabulary, of some of the pairs."""
    of_pairs = [nouns.unknown_labels(texts) for texts in pairs.some_texts()]
    counts = Counter(chain.from_iterable(of_pairs))
    if counts:
        most = ", ".join(f"{label!r:.50} ({count})" for label, count in counts.most_common(5))
        logger.warning(
            "labels: %d names are neither in complete nor in nouns, and teach nothing; of %d pairs, they are of %s%s",
            len(counts),
            len(of_pairs),
            most,
            ", ..." if len(counts) > 5 else "",
        )


def check_batch(rows: int, batch_size: int, world_size: int) -> None:
    """Raises `ValueError` if the processes cannot share a batch, or an epoch of so many pairs has none."""
    if batch_size % world_size:
        raise ValueError(f"batch_size: {batch_size} is no multiple of the {world_size} processes.")
    if rows < batch_size:
        raise ValueError(f"batch_size: an epoch has {rows} pairs, fewer than a batch of {batch_size}; lower it.")


def check_run(settings: Settings) -> None:
    """
    Checks what a run needs besides its data.

    Raises:
        `FileNotFoundError`: a file or folder does not exist. `PermissionError`: the feature cache cannot be written.
        `ValueError`: something is not as described.
    """
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":  # Accelerate would divide the gradients
        raise ValueError(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: all pairs of a batch contrast, so gradients are not accumulated; "
            "leave it out, and limit the memory by chunk_size."
        )
    check_output_dir(settings)
    features = Path(settings.cache_features, "training")
    if settings.cache_features and not features.is_dir():  # a complete cache may be read-only
        check_outputs([features], _model_folders(settings))
    if settings.model:
        check_model_name(settings.model, ("iclip",))
    if settings.nouns and not Path(settings.nouns).is_file():
        raise FileNotFoundError(f"{settings.nouns}: there is no such file of nouns.")
    if settings.eval_dataset != "none" and not (settings.eval_root and Path(settings.eval_root).is_dir()):
        raise FileNotFoundError(f"eval_root: {settings.eval_root!r} is no folder; name that of the data set.")


def check_output_dir(settings: Settings) -> None:
    """
    Checks that a run can begin in its folder, or continue there with `resume`.

    Raises:
        `FileExistsError`: the folder is in that of the model or of a tower, or holds files of others. `ValueError`: it
            holds a run, but not `resume`; or a run that has ended and whose checkpoints are gone, so that it would be
            made anew.
    """
    folder = Path(settings.output_dir)
    for read in _model_folders(settings):
        check_outside(folder, read)
    saved = checkpoints(folder)
    if not saved:
        check_new_folder(folder, STATE_FILE)
    if not settings.resume and (saved or (folder / "model.safetensors").is_file()):
        raise ValueError(
            f"{folder}: this folder holds a run already; add --resume to continue it, or name another by --output_dir."
        )
    if not saved and (folder / "results.json").is_file():
        raise ValueError(f"{folder}: the run has ended and its checkpoints are gone; name another by --output_dir.")


def _model_folders(settings: Settings) -> list[str]:
    """Returns the names of the model or the towers that a run begins with."""
    return [name for name in (settings.model, settings.vision, settings.text) if name and name != "embedded"]


def checkpoints(output_dir: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    return sorted(state.parent for state in output_dir.glob(f"checkpoint-{'[0-9]' * 7}/state.json"))
