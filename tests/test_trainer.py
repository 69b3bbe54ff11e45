"""What a `Trainer` promises, of `ICLIPTrainer` in Python: its arguments, epochs, evaluations and callbacks."""

import inspect
import json
import logging
import math
import threading
from unittest.mock import patch

import datasets
import pytest
import torch
from conftest import WORDS, tiny_model, write_folder
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import ConcatDataset, Subset, random_split
from training_runs import write_table
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from iclip_hf import ICLIPModel
from iclip_hf.data.pairs import PairDataset, load_pairs
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.data.wrappers import leaf_of
from iclip_hf.training import (
    CachedPairs,
    FeatureCache,
    ICLIPTrainer,
    ICLIPTrainingArguments,
    PairCollator,
    StreamedPairs,
    augmentation,
    few_pairs,
)
from iclip_hf.training.datasets import NumberedRows


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> PairDataset:
    """Twenty pairs."""
    return load_pairs(write_table(tmp_path_factory.mktemp("pairs"), 20))


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a training of two steps of an epoch each."""
    fixed = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no"}
    return lambda **options: ICLIPTrainingArguments(
        str(tmp_path / "run"), **{**fixed, "use_cpu": True, "pictures": 0, "disable_tqdm": True, **options}
    )


def part(pairs: PairDataset, *indices: int) -> PairDataset:
    return pairs._select(list(indices))


# ---- the methods of `Trainer` that are overridden: a new version that changes one of them fails here ----

OVERRIDDEN = """
    __init__ train hyperparameter_search get_train_dataloader get_eval_dataloader get_test_dataloader compute_loss
    prediction_step create_scheduler get_decay_parameter_names evaluation_loop log floating_point_ops save_model
    create_model_card _load_from_checkpoint _get_grad_norm _determine_best_metric
    _run_epoch
""".split()


def test_methods_of_the_base_class_are_as_they_are_overridden():
    own = {name for name, value in vars(ICLIPTrainer).items() if callable(value) and hasattr(Trainer, name)}
    assert own == {*OVERRIDDEN}
    passing = {"__init__", "train", "hyperparameter_search", "create_model_card", "_run_epoch"}  # all arguments
    for name in {*OVERRIDDEN} - passing:
        base, ours = (list(inspect.signature(getattr(one, name)).parameters) for one in (Trainer, ICLIPTrainer))
        assert ours == base, name
    init = [*inspect.signature(Trainer.__init__).parameters]
    ours = [*inspect.signature(ICLIPTrainer.__init__).parameters]
    assert ours[: ours.index("arguments")] == init[: ours.index("arguments")]


# ---- what is given to the constructor ----


def test_arguments_are_taken_by_their_position(pairs, tiny_processor, arguments):
    collator = PairCollator(tiny_processor)
    trainer = ICLIPTrainer(tiny_model(), arguments(), collator, pairs, part(pairs, 0, 1), tiny_processor)
    assert trainer.train_dataset is pairs and len(trainer.eval_dataset) == 2
    assert ICLIPTrainer(tiny_model(), arguments(), collator).processing_class is tiny_processor
    with pytest.raises(TypeError, match="args: expected ICLIPTrainingArguments, got TrainingArguments"):
        ICLIPTrainer(tiny_model(), TrainingArguments("run"), collator)
    with pytest.raises(TypeError, match="processing_class"):
        ICLIPTrainer(tiny_model(), arguments())
    with pytest.raises(ValueError, match="push_to_hub: .*iclip push"):
        ICLIPTrainer(tiny_model(), arguments(push_to_hub=True), collator)
    with pytest.raises(TypeError, match="resume"):  # of the command line; here, `train` resumes
        arguments(resume=True)
    other = tiny_model()
    other.config.text_config.vocab_size = 2 * len(tiny_processor.tokenizer)
    with pytest.raises(ValueError, match="where the model has"):  # the tokenizer is of another model
        ICLIPTrainer(other, arguments(), collator)


def test_a_tower_that_learns_is_not_left_as_it_is(pairs, tiny_processor, arguments, tmp_path):
    """Features from a cache have no gradient, and the kept presence is that of the towers at the start."""
    cache = FeatureCache(tiny_model(), tiny_processor, tmp_path / "cache")
    collator = PairCollator(tiny_processor)
    cached = CachedPairs(pairs, cache, collator)
    unlocked, locked_text = tiny_model(lock_vision=False), tiny_model()
    locked_text.text_model.requires_grad_(False)
    with pytest.raises(ValueError, match="vision_model: the model locks it"):
        trainer = ICLIPTrainer(tiny_model(), arguments(), collator, pairs)
        trainer.model.vision_model.requires_grad_(True)
        trainer.train()
    args, features = arguments(keep_presence=1.0), PairCollator(tiny_processor, text_features=cache)
    for data in (cached, Subset(cached, [0, 1, 2, 3]), ConcatDataset([pairs, cached])):
        with pytest.raises(ValueError, match="CachedPairs: it needs a locked image tower"):
            ICLIPTrainer(unlocked, arguments(), collator, data).train()
    with pytest.raises(ValueError, match="keep_presence: it needs a locked image tower"):
        ICLIPTrainer(unlocked, args, collator, pairs).train()
    with pytest.raises(ValueError, match="keep_presence: it needs a locked text tower"):
        ICLIPTrainer(tiny_model(), args, collator, pairs).train()
    trainer = ICLIPTrainer(locked_text, arguments(), features, pairs)
    locked_text.text_model.requires_grad_(True)
    with pytest.raises(ValueError, match="text_features of the collator: it needs a locked text tower"):
        trainer.train()
    locked_text.text_model.requires_grad_(False)
    ICLIPTrainer(locked_text, args, collator, cached).train()


def test_a_model_is_made_anew_for_each_training(pairs, tiny_processor, arguments, monkeypatch):
    """As a search of hyperparameters needs it. The start is that of the new model."""
    made = [tiny_model(seed=seed) for seed in (2, 1, 0)]
    options = {"eval_on_start": True, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    args = arguments(**options, save_strategy="steps", save_steps=1, metric_for_best_model="loss", learning_rate=1e-9)
    monkeypatch.setattr("iclip_hf.training.callbacks.regressed_metrics", lambda *_: ["loss"])
    data = {"train_dataset": pairs, "eval_dataset": part(pairs, 0, 1, 2), "processing_class": tiny_processor}
    trainer = ICLIPTrainer(args=args, model_init=lambda: made.pop(), **data)
    for seed in (1, 2):
        trainer.train()
        expected = tiny_model(seed=seed).state_dict()
        assert trainer.kept_start and all(torch.equal(w, expected[n]) for n, w in trainer.model.state_dict().items())


def test_a_search_minimizes_the_loss(tiny_processor, arguments):
    """Not the sum of all metrics, of which most are to be large."""
    trainer = ICLIPTrainer(tiny_model(), arguments(), processing_class=tiny_processor)
    with patch.object(Trainer, "hyperparameter_search", autospec=True) as search:
        trainer.hyperparameter_search(backend="optuna")
        trainer.hyperparameter_search(compute_objective=len)
    own, given = (call.args[2] for call in search.call_args_list)
    assert own({"eval_loss": 2.0, "eval_text_to_image": 50.0}) == 2 and given is len


def test_a_loss_function_and_metrics_of_the_user_are_called(pairs, tiny_processor, arguments):
    def squared(outputs, labels, num_items_in_batch=None):
        assert labels is None
        return outputs["loss"] ** 2

    def spread(prediction):
        images, texts = prediction.predictions
        return {"spread": float((images[0] * texts[0]).sum()), "pairs": len(images)}

    trainer = ICLIPTrainer(
        tiny_model(),
        arguments(),
        eval_dataset=part(pairs, 0, 1, 2),
        processing_class=tiny_processor,
        compute_loss_func=squared,
        compute_metrics=spread,
    )
    batch = trainer.data_collator([pairs[0], pairs[1]])
    del batch["return_loss"]  # as a collator of the user may not give it
    with torch.no_grad():
        own = trainer.model(**batch, return_loss=True).loss.item()
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(own**2)
    metrics = trainer.evaluate()
    assert metrics["eval_pairs"] == 3
    with torch.no_grad():
        item = pairs[0]
        outputs = trainer.model(**tiny_processor(images=item["image"], text=[item["caption"]]))
    assert metrics["eval_spread"] == pytest.approx(outputs.logits_per_image.item(), abs=1e-4)
    predicted = trainer.predict(part(pairs, 4, 5))
    assert [len(vectors) for vectors in predicted.predictions] == [2, 2] and predicted.metrics["test_pairs"] == 2


def test_the_loss_of_a_step_is_the_mean_of_its_batches(pairs, tiny_processor, arguments):
    """Also if it is computed by a function of the user."""
    logged = []
    for function in (None, lambda outputs, labels, num_items_in_batch=None: outputs["loss"]):
        args = arguments(gradient_accumulation_steps=2, logging_steps=1)
        data = {"train_dataset": pairs, "processing_class": tiny_processor}
        trainer = ICLIPTrainer(tiny_model(), args, **data, compute_loss_func=function)
        trainer.train()
        logged.append([(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row])
    assert logged[0] == logged[1]


def test_rows_of_any_data_set_and_a_collator_of_the_user(pairs, tiny_processor, arguments):
    """They are evaluated as the pairs, and compared with the start."""
    rows = datasets.Dataset.from_list([{"image": pair["image"], "captions": [pair["caption"]]} for pair in pairs])
    collator = PairCollator(tiny_processor)
    args = arguments(eval_on_start=True, eval_strategy="steps", eval_steps=1)
    trainer = ICLIPTrainer(tiny_model(), args, lambda rows: collator(rows), rows, rows, tiny_processor)
    trainer.train()
    metrics, of_pairs = trainer.evaluate(), trainer.evaluate(pairs)
    assert "eval_loss_change_low" in metrics
    for name in ("eval_loss", "eval_image_to_text", "eval_text_to_image"):
        assert metrics[name] == pytest.approx(of_pairs[name], rel=1e-4)
    trainer = ICLIPTrainer(tiny_model(), arguments(), collator)
    several = [{"image": pair["image"], "captions": [pair["caption"], "a blue sky"]} for pair in pairs]
    loss = trainer.evaluate(several)["eval_loss"]
    trainer.args.per_device_eval_batch_size = 7
    assert trainer.evaluate(several)["eval_loss"] == pytest.approx(loss, rel=1e-5)  # by the same captions
    with pytest.raises(ValueError, match="requires an eval_dataset"):
        trainer.evaluate()
    for data in (rows.select([]), Subset(pairs, [])):
        with pytest.raises(ValueError, match="eval_dataset: it has no pairs"):
            trainer.predict(data)
    args = arguments(eval_strategy="steps", eval_steps=1)
    trainer = ICLIPTrainer(tiny_model(), args, collator, rows, {"near": rows, "none": rows.select([])})
    with pytest.raises(ValueError, match="eval_dataset: it has no pairs"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_collator_gets_the_columns_that_the_model_takes(pairs, tiny_processor, arguments):
    """In evaluations as in trainings, with `remove_unused_columns` and a collator of the user."""
    batch = PairCollator(tiny_processor)([*pairs])
    taken = {name: batch[name].tolist() for name in ("pixel_values", "input_ids", "attention_mask")}
    rows = datasets.Dataset.from_dict({**taken, "name": ["a pair"] * 20})

    def collator(rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    trainer = ICLIPTrainer(tiny_model(), arguments(remove_unused_columns=True), collator, rows, rows, tiny_processor)
    trainer.train()
    expected = ICLIPTrainer(trainer.model, arguments(), processing_class=tiny_processor).evaluate(pairs)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_are_loaded_by_the_arguments(pairs, tiny_processor, arguments, streamed):
    options = {"num_workers": 1, "prefetch_factor": 3, "multiprocessing_context": "spawn", "in_order": False}
    args = arguments(**{f"dataloader_{name}": value for name, value in options.items()})
    rows = StreamedPairs(None, 8) if streamed else pairs
    trainer = ICLIPTrainer(tiny_model(), args, None, rows, pairs, tiny_processor)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        context = loader.multiprocessing_context.get_start_method()
        found = {name: getattr(loader, name) for name in options} | {"multiprocessing_context": context}
        assert found == options


def test_rows_of_any_data_set_resume_with_the_same_captions(pairs, tiny_processor, arguments):
    """And the same augmentation, by the seed of the training."""
    rows = [{"image": pair["image"], "captions": [pair["caption"], "a blue sky", "the red car"]} for pair in pairs]
    rows = datasets.Dataset.from_list(rows)
    collator = PairCollator(tiny_processor, transform=augmentation(tiny_processor))
    args, weights = arguments(save_strategy="steps", save_steps=6, max_steps=8, learning_rate=1e-2), []
    for start in (None, f"{args.output_dir}/checkpoint-6"):
        trainer = ICLIPTrainer(tiny_model(), args, collator, rows)
        trainer.train(resume_from_checkpoint=start)
        weights.append(trainer.model.recognition.text_projection.weight)
    assert torch.equal(*weights)
    trainer.args.train_sampling_strategy = "group_by_length"
    trainer.train_dataset = rows.add_column("length", [*range(20)])
    assert trainer.get_train_dataloader().batch_sampler.sampler.lengths == [*range(20)]
    numbered = NumberedRows(ConcatDataset([rows, pairs]), seed=3)
    assert [row["draw"] for row in numbered.__getitems__([4, 24])] == [(3, 0, 4), (0, 0, 4)]


class Stop(TrainerCallback):
    """Ends a training at its second step by an error, once."""

    def on_step_end(self, args, state, control, **options):
        if state.global_step == 2:
            raise InterruptedError


def test_a_resumed_trainer_ends_as_its_start_where_nothing_is_better(pairs, tiny_processor, arguments):
    """Also if it is the trainer that was interrupted, whose model has learned."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    best = {"eval_on_start": True, "load_best_model_at_end": True, "metric_for_best_model": "same"}
    args = arguments(**steps, **best, greater_is_better=True)
    metrics = {"compute_metrics": lambda prediction: {"same": 0.0}, "callbacks": [Stop()]}
    trainer = ICLIPTrainer(tiny_model(), args, None, pairs, pairs, tiny_processor, **metrics)
    start = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    with pytest.raises(InterruptedError):
        trainer.train()
    trainer.remove_callback(Stop)
    with pytest.raises(ValueError, match="valid checkpoint at absent"):  # not that the options are others
        trainer.train(resume_from_checkpoint="absent")
    trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-1")
    assert trainer.kept_start
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, start[name]), name


def test_rates_are_those_of_the_arguments(pairs, tiny_processor, arguments):
    """Also if it trains twice. None is above the learning rate. A schedule with arguments is that of Transformers."""

    def rates(**options) -> list[float]:
        args = arguments(logging_steps=1, max_steps=4, **options)
        trainer = ICLIPTrainer(tiny_model(), args, train_dataset=pairs, processing_class=tiny_processor)
        found = []
        for _ in range(2):
            trainer.train()
            found.append([row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row])
        assert found[0] == found[1]
        return found[0]

    assert 0 < max(rates(learning_rate=1e-6)) <= 1e-6 and max(rates(learning_rate=0.0)) == 0
    assert max(rates(learning_rate=1e-4)) > 5e-5
    found = rates(learning_rate=1e-4, warmup_steps=0, lr_scheduler_kwargs={"num_cycles": 1})
    assert found == pytest.approx([1e-4, 5e-5, 0, 5e-5])


def test_an_evaluation_in_bfloat16(pairs, tiny_processor, arguments, tmp_path):
    """Also of maps alone."""
    maps = load_segmentation("folder", write_folder(tmp_path, [[1, 2], [0, 3]], 40))
    for data, name in ((pairs, "eval_loss"), (maps, "eval_mMIoU")):
        trainer = ICLIPTrainer(tiny_model(), arguments(bf16_full_eval=True), None, None, data, tiny_processor)
        assert math.isfinite(trainer.evaluate()[name]) and trainer.model.dtype == torch.bfloat16


def test_an_optimizer_and_a_schedule_of_the_user_stay(pairs, tiny_processor, arguments):
    model = tiny_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    schedule = ConstantLR(optimizer, factor=0.5, total_iters=100)
    trainer = ICLIPTrainer(
        model, arguments(), train_dataset=pairs, processing_class=tiny_processor, optimizers=(optimizer, schedule)
    )
    trainer.train()
    assert trainer.lr_scheduler is schedule and optimizer.param_groups[0]["lr"] == 0.05


# ---- training ----


def test_a_training_runs_in_any_thread(pairs, tiny_processor, arguments):
    """Only the main one can handle signals."""
    trainer = ICLIPTrainer(tiny_model(), arguments(), train_dataset=pairs, processing_class=tiny_processor)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("wrapped", [False, True])
def test_workers_that_persist_see_each_epoch(pairs, tiny_processor, arguments, wrapped):
    rows = [{"image": pair["image"], "caption": pair["caption"]} for pair in pairs]
    data = ConcatDataset(random_split(pairs, [0.6, 0.4])) if wrapped else rows
    args = arguments(max_steps=-1, num_train_epochs=3, dataloader_num_workers=1, dataloader_persistent_workers=True)
    args.per_device_train_batch_size = 10
    epochs = []

    class Told(PairCollator):
        def __call__(self, rows):
            return {"epochs": [row["draw"][1] for row in rows], **super().__call__(rows)}

    class Noted(ICLIPTrainer):
        def compute_loss(self, model, inputs, **options):
            epochs.append({*inputs.pop("epochs")})
            return super().compute_loss(model, inputs, **options)

    Noted(tiny_model(), args, Told(tiny_processor), data).train()
    assert epochs == [{0}, {0}, {1}, {1}, {2}, {2}]


def test_each_batch_of_a_step_has_its_own_dropout(pairs, tiny_processor, arguments, recorded):
    states = recorded(ICLIPTrainer, "compute_loss", lambda *_, **options: torch.get_rng_state())
    args = arguments(gradient_accumulation_steps=2)
    ICLIPTrainer(tiny_model(), args, train_dataset=pairs, processing_class=tiny_processor).train()
    assert len(states) == 4 and not any(torch.equal(states[0], other) for other in states[1:])


def test_images_are_encoded_in_chunks_beside_kept_presence(pairs, tiny_processor, arguments, recorded):
    model = tiny_model(logit_bias_init_value=-1)
    model.text_model.requires_grad_(False)
    args = arguments(max_steps=1, keep_presence=1.0, chunk_size=3)
    trainer = ICLIPTrainer(model, args, train_dataset=pairs, processing_class=tiny_processor)
    sizes = recorded(ICLIPModel, "encode_image", lambda self, images, **options: len(images))
    trainer.train()
    assert sizes == [3, 1]


def test_a_training_that_teaches_little_says_so(pairs, tiny_processor, arguments, caplog):
    def said(**options) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            ICLIPTrainer(
                tiny_model(), arguments(**options), train_dataset=pairs, processing_class=tiny_processor
            ).train()
        return caplog.text

    assert "1 steps" in said(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=16)
    of_pairs = said(max_steps=2, per_device_train_batch_size=2)
    assert "2 steps" in of_pairs and "negatives" not in of_pairs
    assert "no negatives" in said(max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2)


# ---- evaluation ----


def started(pairs, processor, arguments, eval_dataset, **options) -> ICLIPTrainer:
    """A trainer after a training with an evaluation of its start."""
    args = arguments(eval_on_start=True, eval_strategy="steps", eval_steps=1, **options)
    trainer = ICLIPTrainer(tiny_model(), args, None, pairs, eval_dataset, processor)
    trainer.train()
    return trainer


def test_other_pairs_are_evaluated_without_a_change(pairs, tiny_processor, arguments):
    """Those of the start alone can be compared with it, also if others are as many."""
    held_out = part(pairs, *range(12))
    trainer = started(pairs, tiny_processor, arguments, held_out)
    assert "eval_loss_change_low" in trainer.evaluate()
    for other in (part(pairs, *range(5)), part(pairs, *range(5, 17))):
        metrics = trainer.evaluate(other)
        assert "eval_loss" in metrics and not any("change" in name for name in metrics)
    assert {"eval_runtime", "eval_samples_per_second"} <= trainer.evaluate().keys()
    assert trainer.accelerator._dataloaders == [trainer.callback_handler.train_dataloader]


def test_a_caption_has_one_id_however_long_its_batch_is(pairs, tiny_processor, arguments):
    assert tiny_processor.tokenizer.pad_token_id
    trainer = ICLIPTrainer(tiny_model(), arguments(), None, pairs, None, tiny_processor)
    rows = [{"image": pairs[0]["image"], "caption": caption} for caption in ("a dog", "a photo of the red ball .")]
    batches = trainer.data_collator(rows[:1]), trainer.data_collator(rows)
    alone, beside = (trainer.prediction_step(trainer.model, batch, False)[2] for batch in batches)
    assert torch.equal(alone[0], beside[0]) and beside[0, 1] != beside[1, 1]


def test_held_out_pairs_can_have_names(pairs, tiny_processor, arguments, tmp_path):
    """With a segmentation data set among them, and the best by one of the names."""
    (tmp_path / "maps").mkdir()
    maps = load_segmentation("folder", write_folder(tmp_path / "maps", [[1, 2], [0, 3]], 40))
    named = {"near": part(pairs, *range(10)), "far": part(pairs, *range(10, 20))}
    args = arguments(eval_strategy="steps", eval_steps=1, eval_on_start=True, save_strategy="best")
    args.metric_for_best_model = "near_loss"
    data = {"train_dataset": pairs, "eval_dataset": named, "map_dataset": maps, "processing_class": tiny_processor}
    trainer = ICLIPTrainer(tiny_model(), args, **data, callbacks=[EarlyStoppingCallback(5)])
    trainer.train()
    metrics = trainer.evaluate()
    measured = {"eval_near_loss", "eval_far_text_to_image", "eval_maps_mMIoU", "eval_far_loss_change_high"}
    assert measured <= metrics.keys() and not any("loss" in name for name in metrics if "maps" in name)
    assert (tmp_path / "run" / "evaluations" / "2.json").is_file()
    assert trainer.evaluate(maps)["eval_mMIoU"] == metrics["eval_maps_mMIoU"]
    trainer.save_model(tmp_path / "elsewhere")
    assert "evaluation" in json.loads((tmp_path / "elsewhere" / "model_card.json").read_text())


def test_a_card_has_no_results_of_an_earlier_training_in_its_folder(pairs, tiny_processor, arguments, tmp_path):
    (tmp_path / "maps").mkdir()
    maps = load_segmentation("folder", write_folder(tmp_path / "maps", [[1, 2], [0, 3]], 40))
    data = {"train_dataset": pairs, "processing_class": tiny_processor}
    for map_dataset, has_results in ((maps, True), (None, False)):
        args = arguments(eval_strategy="no" if map_dataset is None else "steps", eval_steps=2, seed=int(has_results))
        trainer = ICLIPTrainer(tiny_model(), args, **data, map_dataset=map_dataset)
        trainer.train()
        trainer.save_model()
        assert ("evaluation" in json.loads((tmp_path / "run" / "model_card.json").read_text())) == has_results


def test_held_out_sets_with_the_same_captions_are_compared_apart(pairs, tiny_processor, arguments, tmp_path):
    """Each with its own start: a model that does not learn changes neither."""
    captions = [f"a {word}" for word in WORDS[1:13]]
    tables = [write_table(tmp_path / name, 12, captions, seed) for seed, name in enumerate(("photos", "sketches"))]
    photos, sketches = map(load_pairs, tables)
    named = {"photos": photos, "sketches": sketches}
    metrics = started(pairs, tiny_processor, arguments, named, learning_rate=1e-12).evaluate()
    assert abs(metrics["eval_photos_loss"] - metrics["eval_sketches_loss"]) > 1e-3
    for name in named:
        assert abs(metrics[f"eval_{name}_loss_change_low"]) + abs(metrics[f"eval_{name}_loss_change_high"]) < 1e-5


def test_pairs_inside_of_other_data_sets_are_held_out(tmp_path, tiny_processor, arguments):
    """Those that are held out share the pairs whose epoch is set."""
    table = write_table(tmp_path / "pairs", 24)
    table.write_text(table.read_text() + "".join(f"{number}.png,a blue sky {number}\n" for number in range(24)))
    pairs, collator = load_pairs(table), PairCollator(tiny_processor)
    learned, held_out = random_split(pairs, [0.5, 0.5], torch.Generator().manual_seed(0))
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    args = arguments(**evaluated, save_strategy="steps", save_steps=1, max_steps=4, pictures=2)
    trainer = ICLIPTrainer(tiny_model(), args, lambda rows: collator(rows), learned, held_out, tiny_processor)
    trainer.train()
    assert pairs.epoch == 1 and "eval_loss_change_low" in trainer.state.log_history[-2]  # of the same captions
    assert len([*tmp_path.glob("run/pictures/*.png")]) == 5
    cache = FeatureCache(tiny_model(), tiny_processor, tmp_path / "cache")
    both = ConcatDataset([held_out, CachedPairs(Subset(Subset(pairs, [5, 4, 3]), [2, 1]), cache, collator)])
    found = [leaf.captions(index) for leaf, index in (leaf_of(both, index) for index in range(len(both)))]
    assert found == [pairs.captions(index) for index in (*held_out.indices, 3, 4)]


def test_few_pairs_from_python(pairs, tiny_processor, tmp_path):
    args = ICLIPTrainingArguments(str(tmp_path), use_cpu=True, **few_pairs(54, 6, keep_presence=0.0))
    assert args.per_device_train_batch_size == 54 and args.max_steps == 200 and args.eval_steps == 40
    assert args.load_best_model_at_end and args.metric_for_best_model == "loss" and args.keep_presence == 0
    assert "eval_strategy" not in few_pairs(54)
    some = few_pairs(100, num_train_epochs=10)
    assert (some["num_train_epochs"], some["max_steps"], some["eval_steps"]) == (10, -1, 0.2)
    assert few_pairs(100, max_steps=7)["eval_steps"] == 2
    assert few_pairs(100_000)["max_steps"] == 100_000 // 256  # an epoch
