"""`iclip train`: trains a model on image-text pairs, with [`ICLIPTrainer`]."""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from ..backends import check_model_name
from ..data.formats import is_hub_dataset
from ..data.nouns import NounPrompts
from ..data.pairs import PairDataset, load_pairs
from ..data.segmentation import SegmentationDataset, load_segmentation
from ..data.streams import PairStream
from ..training.arguments import Arguments, ICLIPTrainingArguments, argument_parser, complete, read_arguments
from ..training.presets import preset
from ..utils.files import check_outside


if TYPE_CHECKING:
    from ..training.trainer import ICLIPTrainer

logger = logging.getLogger(__name__)


def parents() -> list[argparse.ArgumentParser]:
    return [argument_parser(add_help=False)]


def add_options(command: argparse.ArgumentParser) -> None:
    command.allow_abbrev = False


def run(options: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(options).items() if name not in ("command", "run")}
    if given.get("model") and not (given.get("data") or given.get("config")):
        raise ValueError(f"data: name pairs to train {given['model']} on, as in `iclip train pairs.csv`, or a config.")
    pairs, chosen = None, {}
    if given.get("config") or not given.get("data"):
        arguments = read_arguments(given)
    else:
        pairs = open_pairs(given["data"], {"seed": ICLIPTrainingArguments.seed, **given})
        chosen = preset(given, pairs)
        arguments = complete(chosen, given)
    check_output_dir(arguments)
    train(arguments, pairs, chosen)


def open_pairs(sources: list[str], given: Mapping, **options) -> PairDataset | PairStream:
    """Opens pairs by the arguments that are parameters of [`~iclip_hf.data.pairs.load_pairs`]."""
    names = ("split", "image_column", "caption_column", "seed", "max_bad_share")
    options = {"streaming": False, **options, **{name: given[name] for name in names if name in given}}
    return load_pairs(sources[0] if len(sources) == 1 else sources, **options)


def check_output_dir(arguments: Arguments) -> None:
    """
    Raises `FileExistsError` unless the folder of a run is new or empty, or holds checkpoints of ICLIP to resume from,
    and nothing is written into the folders of the model and the towers.
    """
    folder, model = Path(arguments.training.output_dir), arguments.model
    for read in (model.model, model.vision, model.text, model.feature_tower):
        for written in filter(None, (folder, arguments.data.cache_features)):
            if read and read != "embedded":
                check_outside(written, read)
    if model.model:
        check_model_name(model.model, ("iclip",))
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not (arguments.training.resume and _is_training(folder, names)):
        raise FileExistsError(
            f"{folder}: this folder holds files already; name another by --output_dir, or add --resume to continue a "
            "training from its last checkpoint."
        )


def _is_training(folder: Path, names: set[str]) -> bool:
    """Whether a folder with these names is that of a training of ICLIP, which may have no checkpoint yet."""
    from ..training.callbacks import START  # imports torch
    from ..training.trainer import last_checkpoint

    if (last := last_checkpoint(folder)) is None:
        parts = (START, "pictures", "evaluations", "runs", "checkpoint-")
        return all(name.startswith(parts) or name.endswith(".partial") for name in names)
    return json.loads(Path(last, "config.json").read_text()).get("model_type") == "iclip"


class Data(NamedTuple):
    """What a training reads."""

    pairs: PairDataset | PairStream
    held_out: PairDataset | None
    nouns: NounPrompts | None
    maps: SegmentationDataset | None  # to evaluate maps on


def open_data(arguments: Arguments, pairs: PairDataset | None = None) -> Data:
    """Opens what the arguments name, apart from `pairs` if they are open already."""
    _, of_data, of_evaluation, args = arguments
    maps = None
    if of_evaluation.eval_dataset != "none":
        if not Path(of_evaluation.eval_root or "?").is_dir():
            raise FileNotFoundError(f"eval_root: {of_evaluation.eval_root!r} is no folder; name that of the data set.")
        maps = load_segmentation(of_evaluation.eval_dataset, of_evaluation.eval_root, of_evaluation.eval_split or None)
        maps.check_classes()
    if pairs is None:
        options = {"rank": args.process_index, "world_size": args.world_size}
        options["streaming"] = of_data.pairs_per_epoch > 0 and any(map(is_hub_dataset, of_data.data))
        pairs = open_pairs(of_data.data, {**vars(of_data), "seed": args.seed}, **options)
    streamed, held_out = isinstance(pairs, PairStream), None
    if of_evaluation.validation_data:
        held_out = open_pairs(of_evaluation.validation_data, {**vars(of_data), "seed": args.seed})
        if not streamed and (common := pairs.files() & held_out.files()):
            logger.warning(
                "%d files are in data and validation_data, such as %r: scores on them say nothing of other images.",
                len(common),
                min(common),
            )
    elif of_evaluation.validation_share:
        if streamed:
            raise ValueError("validation_share: no part of a stream can be held out; name local validation_data.")
        pairs, held_out = pairs.split(of_evaluation.validation_share)
    if held_out is not None:
        held_out.max_bad_share = 1.0  # one of few is a large share; each is named and left out
        held_out = held_out.readable()
        if not len(held_out):
            raise ValueError("validation_data, validation_share: no held-out pair can be read; fix the data.")
    nouns = NounPrompts.from_file(of_data.nouns, args.seed) if of_data.nouns else None
    if nouns:
        warn_of_unknown_labels(pairs, nouns)
    return Data(pairs, held_out, nouns, maps)


def train(
    arguments: Arguments, pairs: PairDataset | None = None, chosen: Mapping = MappingProxyType({})
) -> ICLIPTrainer:
    """Trains a model as the arguments say, from `pairs` if they are open already. Prints those that were `chosen`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import set_seed
    from transformers.utils import logging as transformers_logging

    from ..backends.identity import identity
    from ..backends.loading import load_iclip
    from ..hub.folders import join_towers, options_of_model
    from ..training.card import card_settings
    from ..training.collator import PairCollator, augmentation
    from ..training.datasets import CachedPairs, StreamedPairs
    from ..training.evaluation import report
    from ..training.features import FeatureCache, set_statistics
    from ..training.trainer import ICLIPTrainer, last_checkpoint, load_statistics

    transformers_logging.disable_progress_bar()
    set_seed(arguments.training.seed)  # of new projections
    of_model, of_data, of_evaluation, args = arguments

    pairs, held_out, nouns, maps = open_data(arguments, pairs)
    streamed = isinstance(pairs, PairStream)

    # Model
    try:
        model_options = options_of_model(of_model.model_options)
        if of_model.model:  # small steps are lost in half precision
            model, processor = load_iclip(of_model.model, dtype="float32", **model_options)
        else:
            folder, size = Path(of_model.config).parent, of_model.image_size or None
            towers = of_model.vision, of_model.text, size, of_model.feature_tower
            model, processor = join_towers(folder, *towers, **model_options)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    if model.recognition.logit_bias is not None and not (nouns or of_model.model):
        raise ValueError(
            "nouns: a logit bias learns from nouns alone; name a file of nouns, or set logit_bias_init_value to null."
        )
    if (of_data.cache_features or args.keep_presence) and (streamed or not model.config.lock_vision):
        raise ValueError(
            "cache_features, keep_presence: they need a locked image tower and local pairs; leave them out."
        )
    if chosen and args.process_index == 0:
        print("Chosen by the number of pairs; what you give takes precedence, and --config takes a recipe:")
        print(*(f"  {name:<28}  {value}" for name, value in chosen.items()), sep="\n", flush=True)
    if of_model.lock_text:
        model.text_model.requires_grad_(False)
    model.to(args.device).eval()
    if checkpoint := last_checkpoint(args.output_dir) if args.resume else None:
        load_statistics(model, checkpoint)
    set_statistics(model, processor, pairs)

    # Batches
    collator = PairCollator(processor, nouns)
    training, validation = pairs, held_out
    if of_data.cache_features:
        cache = FeatureCache(
            model, processor, of_data.cache_features, args.mixed_precision, args.dataloader_num_workers
        )
        args.dataloader_num_workers = 0
        if of_model.lock_text:
            collator.text_features = cache
            cache.texts(nouns.all_prompts() if nouns else ())
        training = CachedPairs(pairs, cache, collator)
        validation = held_out and CachedPairs(held_out, cache, collator.for_evaluation())
    else:
        collator.transform = augmentation(processor, of_data.crop_scale, of_data.auto_augment, of_data.random_erasing)
    if streamed:
        training = StreamedPairs(pairs, of_data.pairs_per_epoch // args.world_size)

    # Training
    card = {"training": card_settings(arguments, args.world_size), "source": of_model.model or None}
    if of_model.model:  # whose record is continued
        card["start"] = identity(model, processor)
    options = {"train_dataset": training, "eval_dataset": validation, "map_dataset": maps}
    try:
        trainer = ICLIPTrainer(model, args, collator, processing_class=processor, card=card, **options)
    except RuntimeError as error:  # a package of `report_to` is not installed
        raise ImportError(str(error)) from error
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
    save(trainer)
    if trainer.is_world_process_zero():
        lines = report(trainer.state, Path(args.output_dir), held_out, of_model.model if trainer.kept_start else "")
        print(*lines, sep="\n", flush=True)
    return trainer


def save(trainer: ICLIPTrainer) -> None:
    """Saves the trained model; in a temporary folder if its own is full and no checkpoint has the weights."""
    try:
        trainer.save_model()
    except OSError as error:
        if trainer.args.save_strategy != "no":
            raise
        folder = tempfile.mkdtemp(prefix="iclip-")
        trainer.save_model(folder)
        raise OSError(f"{error} The trained model is in {folder}.") from error


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
