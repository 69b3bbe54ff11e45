"""The training of `iclip train`, from its arguments to the saved model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from transformers import set_seed
from transformers.utils import logging as transformers_logging

from ...backends.identity import identity
from ...backends.loading import load_iclip
from ...data.pairs import PairDataset
from ...hub.folders import join_towers, options_of_model
from ...model.modeling_iclip import ICLIPModel
from ...model.processing_iclip import ICLIPProcessor
from ...training.arguments import training_recipe
from ...training.collator import PairCollator, augmentation
from ...training.datasets import CachedPairs, StreamedPairs
from ...training.features import FeatureCache
from ...training.statistics import load_statistics, set_statistics
from ...training.trainer import ICLIPTrainer, last_checkpoint
from ...utils.published import public_name
from .arguments import Arguments, ModelArguments
from .data import Data, open_data
from .summary import summary


def train(
    arguments: Arguments, pairs: PairDataset | None = None, chosen: Mapping = MappingProxyType({})
) -> ICLIPTrainer:
    """
    Trains a model by its arguments. `pairs` are the training pairs, if they are open already. The arguments in
    `chosen`, which the number of pairs decided, are printed.
    """
    transformers_logging.disable_progress_bar()
    args = arguments.training
    set_seed(args.seed)  # new projections depend on it
    data = open_data(arguments, pairs)
    model, processor = _open_model(arguments.model)
    _check(arguments, data, model)
    if chosen and args.process_index == 0:
        print(
            "Chosen by the number of pairs. Arguments that you give take precedence. --config uses a recipe instead:"
        )
        print(*(f"  {name:<28}  {value}" for name, value in chosen.items()), sep="\n", flush=True)
    model.to(args.device).eval()
    checkpoint = last_checkpoint(args.output_dir) if args.resume else None
    if checkpoint:
        load_statistics(model, checkpoint)
    set_statistics(model, processor, data.pairs)
    trainer = _make_trainer(arguments, data, model, processor)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        state, folder = trainer.state, Path(args.output_dir)
        best_step = state.best_global_step if args.load_best_model_at_end else None
        kept_source = arguments.model.model if trainer.kept_start else ""
        metric = (args.metric_for_best_model or "").removeprefix("eval_")
        lines = summary(state.log_history, best_step, metric, folder, data.held_out, kept_source)
        print(*lines, sep="\n", flush=True)
    return trainer


def _open_model(settings: ModelArguments) -> tuple[ICLIPModel, ICLIPProcessor]:
    """Returns a model to train further, or two towers with new projections, in single precision."""
    model_options = options_of_model(settings.model_options)
    if settings.model:  # small steps are lost in half precision
        model, processor = load_iclip(settings.model, dtype="float32", **model_options)
    else:
        towers = settings.vision, settings.text, settings.image_size or None, settings.feature_tower
        model, processor = join_towers(Path(settings.config).parent, *towers, **model_options)
    if settings.lock_text:
        model.text_model.requires_grad_(False)
    return model, processor


def _check(arguments: Arguments, data: Data, model: ICLIPModel) -> None:
    """Raises `ValueError` for arguments that need other data or another model."""
    if model.recognition.logit_bias is not None and not (data.nouns or arguments.model.model):
        raise ValueError(
            "nouns: a logit bias learns from nouns alone; name a file of nouns, or set logit_bias_init_value to null."
        )
    needs_locked_tower = arguments.data.cache_features or arguments.training.keep_presence
    if needs_locked_tower and (data.is_stream or not model.config.lock_vision):
        raise ValueError(
            "cache_features, keep_presence: they need a locked image tower and local pairs; leave them out."
        )


def _make_trainer(arguments: Arguments, data: Data, model: ICLIPModel, processor: ICLIPProcessor) -> ICLIPTrainer:
    """Returns the trainer. With `cache_features`, first computes the features that the cache does not have."""
    args, source = arguments.training, arguments.model.model
    collator, pairs, held_out = PairCollator(processor, data.nouns), data.pairs, data.held_out
    if folder := arguments.data.cache_features:
        cache = FeatureCache(model, processor, folder, args.mixed_precision, args.dataloader_num_workers)
        args.dataloader_num_workers = 0
        args.dataloader_persistent_workers = False  # torch refuses these without workers
        args.dataloader_prefetch_factor = args.dataloader_multiprocessing_context = None
        if arguments.model.lock_text:
            collator.text_features = cache
            cache.fill_texts(data.nouns.all_prompts() if data.nouns else ())
        pairs = CachedPairs(pairs, cache, collator)
        if held_out is not None:
            held_out = CachedPairs(held_out, cache, collator.for_evaluation())
    else:
        crop_scale, auto_augment = arguments.data.crop_scale, arguments.data.auto_augment
        collator.transform = augmentation(processor, crop_scale, auto_augment, arguments.data.random_erasing)
    if data.is_stream:
        pairs = StreamedPairs(pairs, arguments.data.pairs_per_epoch // args.world_size)
    card = {"training": card_settings(arguments, args.world_size), "source": source or None}
    if source:  # the record of this model is continued
        card["source_identity"] = identity(model, processor)
    try:
        return ICLIPTrainer(model, args, collator, pairs, held_out, processor, map_dataset=data.map_dataset, card=card)
    except RuntimeError as error:  # a package of `report_to` is not installed
        raise ImportError(str(error)) from error


# Cached features are of whole images, without augmentation.
_AUGMENTATION = {"crop_scale", "auto_augment", "random_erasing"}
_MAY_BE_PATHS = {"model", "vision", "text", "feature_tower", "nouns", "config"}


def card_settings(arguments: Arguments, num_processes: int) -> dict[str, object]:
    """Returns the arguments of `iclip train` that its model depends on, without paths of this machine."""
    settings = {**vars(arguments.model), **vars(arguments.data)}
    settings = {name: value for name, value in settings.items() if value or name in _AUGMENTATION}
    if arguments.data.cache_features:
        settings = {name: value for name, value in settings.items() if name not in _AUGMENTATION}
        settings["cache_features"] = True
    settings |= {name: public_name(settings[name]) for name in settings.keys() & _MAY_BE_PATHS}
    if settings.get("auto_augment") == "":
        settings["auto_augment"] = "none"
    settings["data"] = [public_name(name) for name in settings["data"]]
    return settings | training_recipe(arguments.training, num_processes)
