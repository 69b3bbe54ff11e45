"""Faults: what users bring by mistake or in bad faith, at every door, either works or is refused in one clear sentence.

A case is a door and an input. It is run in an empty folder, and leaves nothing there; it does not take long, nor much memory.
"""

import ast
import contextlib
import io
import json
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import evaluate
import fault_inputs as inputs
import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from conftest import tiny_model
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_training import train

from iclip_hf import ICLIPConfig, ImageTextSimilarityMapPipeline, cli
from iclip_hf.data.pairs import load_pairs
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.demo import app
from iclip_hf.evaluation.metrics import (
    MeanForegroundMinusBackground,
    MeanMaxIoU,
    MultiLabelAveragePrecision,
    TextContrast,
)
from iclip_hf.explainers import make_explainer
from iclip_hf.images import load_image
from iclip_hf.localization.collection import explain_collection, open_images
from iclip_hf.localization.localizer import Localizer, explain
from iclip_hf.models.loading import load_pretrained
from iclip_hf.pooling import pool
from iclip_hf.regions import class_thresholds, find_regions, negative_points, positive_points, run_lengths
from iclip_hf.similarity import min_max_normalize, resize_and_normalize
from iclip_hf.training.feature_cache import FeatureShards
from iclip_hf.training.nouns import NounPrompts


REFUSALS = (ValueError, TypeError, OSError, StrictDataclassError)
WORKS, REFUSED, EITHER = "works", "is refused", "works or is refused"

# ---------------------------------------------------------------------------------------------------------- the machine


class Case(NamedTuple):
    """`run(world, folder)` with a fresh folder; what becomes of it; and what the error must name."""

    door: str
    name: str
    run: Callable
    fate: str = REFUSED
    names: str = ""


CASES: list[Case] = []


def cases(door: str, values: dict, run: Callable, fate: str = REFUSED, names: Callable = lambda name: "") -> None:
    """A case for each value by its name; `run(world, folder, value)`."""
    for name, value in values.items():
        CASES.append(Case(door, name, partial(_third, run, value), fate, names(name)))


def _third(run, value, world, folder):
    return run(world, folder, value)


class Refused(ValueError):
    """A command that printed one line and ended with exit code 2."""


def command(program: Callable, name: str, *arguments) -> None:
    """Runs a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = program([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    if code == 0:
        return
    lines = [line for line in err.getvalue().splitlines() if line.startswith(name)]
    assert code == 2 and len(lines) == 1 and not out.getvalue(), (code, out.getvalue(), err.getvalue())
    assert "Traceback" not in err.getvalue()
    raise Refused(lines[0])


iclip = partial(command, cli.main, "iclip")
settings_of = partial(command, lambda arguments: train.read_settings(arguments) and 0, "train.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_processor):
    """A tiny model behind every door, and a folder that nothing may change."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny_model()
    model.save_pretrained(folder / "model")
    tiny_processor.save_pretrained(folder / "model")
    inputs.PHOTO.save(folder / "photo.png")
    built = app.build_app(model, tiny_processor)
    built.upload_file_set.add(str(folder / "photo.png"))
    return SimpleNamespace(
        folder=folder,
        model=model,
        processor=tiny_processor,
        photo=folder / "photo.png",
        pipe=ImageTextSimilarityMapPipeline(model=model, processor=tiny_processor, device="cpu"),
        app=next(fn.fn for fn in built.fns.values() if fn.api_name == "explain"),
        uploads=built.upload_file_set,
    )


@pytest.fixture
def sandbox(monkeypatch):
    """A folder with that of the case; what is written without a name goes to an empty one beside it, caches to another."""
    # Not tmp_path: thousands of its numbered folders take longer than the cases.
    with tempfile.TemporaryDirectory() as name:
        for folder in ("here", "elsewhere", "case"):
            Path(name, folder).mkdir()
        for variable in ("ICLIP_CACHE", "TMPDIR"):
            monkeypatch.setenv(variable, f"{name}/elsewhere")
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.chdir(Path(name, "here"))
        yield Path(name)


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*") if "shards" not in path.parts}


# ---------------------------------------------------------------------------------------------------------------- images


def as_file(run: Callable) -> Callable:
    """A door for a path, given the file's content."""

    def write_and_run(world, folder, content):
        path = folder / "image.png"
        path.write_bytes(content)
        return run(world, folder, path)

    return write_and_run


def at_place(run: Callable) -> Callable:
    def make_and_run(world, folder, make):
        shutil.copy(world.photo, folder / "photo.png")
        return run(world, folder, make(folder))

    return make_and_run


def in_app(world, folder, path):
    world.uploads.add(str(path))
    try:
        return world.app({"path": str(path), "orig_name": "image.png"}, "dog", "itsm")
    except gr.Error as error:
        raise ValueError(error.message) from error


def in_shard(world, folder, content):
    (folder / "a.tar").write_bytes(inputs.tar(("image.png", content), ("image.txt", "a dog")))
    return load_pairs(folder / "a.tar").read(0)


def in_collection(world, folder, content):
    (folder / "images").mkdir()
    (folder / "images" / "image.png").write_bytes(content)
    localizer = Localizer(world.model, world.processor, ["dog"])
    report = explain_collection(localizer, open_images([folder / "images"]), folder / "maps", progress=False)
    if report.broken:
        raise ValueError(*report.broken)


def masks_folder(
    folder: Path, image: bytes | None = None, mask: bytes | None = None, classes: str | bytes = "dog\ncat\n"
):
    """A folder as `load_segmentation` takes it, of one image."""
    for name, content in (("images/image.png", image), ("masks/image.png", mask), ("classes.txt", classes)):
        (folder / name).parent.mkdir(exist_ok=True)
        content = inputs.BY_FORMAT["PNG"] if content is None else content
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def segmented_image(world, folder, content):
    index = inputs.encoded(Image.new("L", load_size(content), 1), "PNG")
    return load_segmentation("folder", masks_folder(folder, content, index))[0].image


def load_size(content: bytes) -> tuple[int, int]:
    with contextlib.suppress(ValueError):
        return load_image(content).size
    return 30, 24


def mask(world, folder, content):
    sample = load_segmentation("folder", masks_folder(folder, mask=content))[0]
    return sample.labels, sample.mask(1)


def explained(world, folder, image):
    return explain(world.model, world.processor, [image], ["dog"])


def explained_by_command(world, folder, image):
    return iclip("explain", image, "--text", "dog", "--model", world.folder / "model")


READERS = {
    "load_image": as_file(lambda world, folder, path: load_image(path)),
    "explain": as_file(explained),
    "pipeline": as_file(lambda world, folder, path: world.pipe(str(path), "dog")),
    "app": as_file(in_app),
    "image of a shard": in_shard,
    "image of a collection": in_collection,
    "image of a data set": segmented_image,
}
for door, run in READERS.items():
    cases(door, inputs.UNUSUAL_IMAGES, run, WORKS)
    cases(door, inputs.UNREADABLE_IMAGES, run, names=lambda name: "image")
    cases(door, inputs.DAMAGED_IMAGES, run, EITHER, names=lambda name: "image")
few = ("cmyk", "16-bit", "one row", "animated gif")
by_command = as_file(explained_by_command)
cases("iclip explain", {name: inputs.UNUSUAL_IMAGES[name] for name in few}, by_command, WORKS)
cases("iclip explain", inputs.UNREADABLE_IMAGES, by_command, names=lambda name: "image.png")
cases("mask of a data set", inputs.UNREADABLE_IMAGES, mask, names=lambda name: "image.png")
for door, run in (
    ("load_image", lambda world, folder, place: load_image(place)),
    ("explain", explained),
    ("pipeline", lambda world, folder, place: world.pipe(place if isinstance(place, str) else str(place), "dog")),
    ("iclip explain", explained_by_command),
    ("iclip compare", lambda w, f, place: iclip("compare", place, "--text", "dog", "--model", w.folder / "model")),
    ("iclip analyze channels", lambda w, f, place: iclip("analyze", "channels", place, "--model", w.folder / "model")),
):
    taken = {
        name: make for name, make in inputs.PLACES.items() if (door, name) != ("iclip explain", "folder")
    }  # of images
    cases(door, taken, at_place(run))

ARRAYS = {
    "NaN": np.full((3, 32, 32), np.nan),
    "one NaN": torch.ones(3, 32, 32).index_fill(2, torch.tensor(5), torch.nan),
    "infinity": np.full((32, 32, 3), np.inf, np.float32),
    "no colours": np.zeros((32, 32), np.uint8),
    "two colours": np.zeros((32, 32, 2), np.uint8),
    "five dimensions": np.zeros((1, 1, 3, 32, 32)),
    "a number": np.float64(1),
    "no height": np.zeros((3, 0, 32)),
    "no images": np.zeros((0, 3, 32, 32)),
    "objects": np.full((3, 3, 3), "a", object),
    "strings": np.full((3, 3, 3), "a"),
    "negative": np.full((3, 32, 32), -1.0),
    "huge": np.full((3, 32, 32), 3e38, np.float32),
    "floats up to 255": np.full((3, 32, 32), 255.0),
    "wide integers": np.zeros((3, 32, 32), np.int64),
    "complex numbers": np.zeros((3, 32, 32), complex),
    "none": [None],
    "empty list": [],
    "mapping": {},
    "integers": [1, 2],
    "path": "photo.png",
    "bytes": inputs.BY_FORMAT["PNG"],
    "one is missing": [inputs.PHOTO, None],
    "empty image": Image.new("RGB", (0, 3)),
    "floating-point image": Image.new("F", (3, 3)),
}
cases("processor", ARRAYS, lambda world, folder, images: world.processor(images=images))
cases(
    "processor and model",
    {
        "booleans": np.ones((3, 32, 32), bool),
        "16 bits": np.full((32, 32, 3), 65535, np.uint16),
        "half precision": torch.ones(3, 32, 32, dtype=torch.float16),
        "one pixel": np.ones((1, 1, 3), np.uint8),
        "one row": np.ones((3, 1, 5000), np.uint8),
    },
    lambda world, folder, images: world.model(
        **world.processor(images=images, text="dog"), output_similarity_maps=True
    ),
    WORKS,
)
IDS = torch.ones(2, 3, dtype=torch.long)
cases(
    "model",
    {
        "no batch": {"pixel_values": torch.zeros(3, 32, 32)},
        "no height": {"pixel_values": torch.zeros(1, 3, 0, 32)},
        "no images": {"pixel_values": torch.zeros(0, 3, 32, 32)},
        "one colour": {"pixel_values": torch.zeros(1, 1, 32, 32)},
        "a patch and a half": {"pixel_values": torch.zeros(1, 3, 12, 32)},
        "a number": {"pixel_values": torch.tensor(1.0)},
        "nothing": {"pixel_values": None},
        "no texts": {"input_ids": IDS[:0]},
        "no tokens": {"input_ids": IDS[:, :0]},
        "one dimension": {"input_ids": IDS[0]},
        "four dimensions": {"input_ids": IDS[None, None]},
        "neither ids nor features": {"input_ids": None},
        "templates that do not divide": {"num_templates": 3},
        "no templates": {"num_templates": 0},
        "a loss of unequal numbers": {"return_loss": True},
    },
    lambda world, folder, changes: world.model(
        **{"pixel_values": torch.zeros(1, 3, 32, 32), "input_ids": IDS} | changes
    ),
)

# ----------------------------------------------------------------------------------------------------- texts and options

TEXT_DOORS = {
    "text of processor": lambda world, folder, text: world.processor(text=[text]),
    "label of processor": lambda world, folder, text: world.processor(labels=["cat", text]),
    "text of explain": lambda world, folder, text: explain(world.model, world.processor, [world.photo], ["cat", text]),
    "label of pipeline": lambda world, folder, text: world.pipe(str(world.photo), ["cat", text]),
    "text of Localizer": lambda world, folder, text: Localizer(world.model, world.processor, ["cat", text]),
}
for door, run in TEXT_DOORS.items():
    cases(door, inputs.GOOD_TEXTS, run, WORKS)
    cases(door, inputs.BAD_TEXTS, run)
# For figures, which take their time, those that mean something to matplotlib.
drawn = {
    name: text
    for name, text in inputs.GOOD_TEXTS.items()
    if name not in ("html", "percent", "path", "special tokens", "shell")
}
typed = {name: text for name, text in inputs.BAD_TEXTS.items() if isinstance(text, str)}
for door, run in {
    "iclip explain --text": lambda w, f, text: iclip(
        "explain", w.photo, "--text", "cat", "--text", text, "--model", w.folder / "model"
    ),
    "iclip compare --text": lambda w, f, text: iclip(
        "compare", w.photo, "--text", text, "--model", w.folder / "model"
    ),
    "text of app": lambda w, f, text: w.app({"path": str(w.photo), "orig_name": "a.png"}, text, "itsm"),
}.items():
    cases(door, drawn if door != "iclip compare --text" else {"dollar signs": drawn["dollar signs"]}, run, WORKS)
    cases(door, typed, run)
TEMPLATE_DOORS = {
    "templates of processor": lambda world, folder, template: world.processor(labels="dog", templates=[template]),
    "templates of explain": lambda world, folder, template: explain(
        world.model, world.processor, [world.photo], ["dog"], templates=[template]
    ),
    "template of pipeline": lambda world, folder, template: world.pipe(str(world.photo), "dog", template=[template]),
}
for door, run in TEMPLATE_DOORS.items():
    cases(door, inputs.BAD_TEMPLATES, run)
    cases(door, {"a brace": "{} {", "a field": "{} {0.__class__}", "percent": "%s {}"}, run, WORKS)
cases(
    "explain",
    {
        "no images": ([], ["dog"]),
        "no texts": (["photo.png"], []),
        "texts as one string": ([inputs.PHOTO], "dog"),
        "one list too few": ([inputs.PHOTO] * 2, [["dog"]]),
        "an empty list": ([inputs.PHOTO], [[]]),
        "lists and texts": ([inputs.PHOTO] * 2, [["dog"], "cat"]),
        "an unknown method": ([inputs.PHOTO], ["dog"], "magic"),
        "an array": ([np.zeros((3, 3, 3))], ["dog"]),
    },
    lambda world, folder, arguments: explain(world.model, world.processor, *arguments),
)
cases(
    "options of explain",
    {
        "no size": {"target_sizes": [(0, 5)]},
        "sizes of others": {"target_sizes": [(5, 5), (5, 5)]},
        "a size of half a patch": {"size": {"height": 36, "width": 32}},
        "an unknown option": {"sharpness": 3},
        "no batch": {"batch_size": 0},
    },
    lambda world, folder, options: explain(world.model, world.processor, [inputs.PHOTO], ["dog"], **options)[0].maps,
)
cases(
    "make_explainer",
    {"no model": None, "a number": 3, "a module": torch.nn.Linear(2, 2), "a tower": "vision_model"},
    lambda world, folder, model: make_explainer(
        getattr(world.model, model) if isinstance(model, str) else model, world.processor
    ),
)
cases(
    "Localizer",
    {
        "a threshold too few": {"threshold": [0.5, 0.5]},
        "a threshold above 1": {"threshold": 1.1},
        "a threshold that is no number": {"threshold": float("nan")},
        "a negative presence": {"min_presence": -0.1},
        "a presence that is no number": {"min_presence": float("nan")},
        "no texts": {"texts": []},
    },
    lambda world, folder, options: Localizer(world.model, world.processor, **{"texts": ["dog"], **options}),
)
cases(
    "options of pipeline",
    {
        "a threshold above 1": {"threshold": 2},
        "a threshold that is no number": {"threshold": float("nan")},
        "thresholds of others": {"threshold": [0.1, 0.2, 0.3]},
        "no labels": {"candidate_labels": []},
        "an unknown option": {"min_score": 3},
        "a size of half a patch": {"size": {"height": 36, "width": 32}},
        "labels that are none": {"candidate_labels": None},
        "a number as label": {"candidate_labels": 3},
        "base64 of no image": {"images": "bm8gaW1hZ2U="},
        "data URL of no image": {"images": "data:image/png;base64,bm8gaW1hZ2U="},
    },
    lambda world, folder, options: world.pipe(**{"images": str(world.photo), "candidate_labels": ["dog"], **options}),
)
MAPS, MASKS = torch.rand(1, 2, 4, 4), [torch.ones(2, 8, 8, dtype=torch.bool)]
cases(
    "post-processing",
    {
        "maps without a batch": lambda p: p.post_process_similarity_maps(MAPS[0], [(8, 8)]),
        "one size too many": lambda p: p.post_process_similarity_maps(MAPS, [(8, 8)] * 2),
        "a size of nothing": lambda p: p.post_process_similarity_maps(MAPS, [(0, 8)]),
        "a negative size": lambda p: p.post_process_similarity_maps(MAPS, [(-3, 8)]),
        "an unknown order": lambda p: p.post_process_similarity_maps(MAPS, [(8, 8)], order="last"),
        "thresholds of others": lambda p: p.post_process_masks(list(MAPS), [0.1, 0.2, 0.3]),
        "a threshold that is no number": lambda p: p.post_process_masks(list(MAPS), float("nan")),
        "no thresholds": lambda p: p.post_process_masks(list(MAPS), []),
        "scores without a least one": lambda p: p.post_process_masks(list(MAPS), 0.5, scores=torch.ones(1, 2)),
        "masks of another size": lambda p: p.post_process_boxes(list(MAPS), MASKS),
        "more maps than masks": lambda p: p.post_process_boxes([*MAPS, *MAPS], MASKS),
        "an area above 1": lambda p: p.post_process_boxes(list(MAPS), [MAPS[0] > 0.5], min_area=2),
        "an area that is no number": lambda p: p.post_process_points(list(MAPS), [MAPS[0] > 0.5], float("nan")),
    },
    lambda world, folder, call: call(world.processor),
)
cases(
    "post-processing",
    {
        "maps that are no numbers": torch.full((1, 2, 4, 4), torch.nan),
        "constant maps": torch.zeros(1, 2, 4, 4),
        "maps of infinity": torch.full((1, 2, 4, 4), torch.inf),
        "maps of one patch": torch.ones(1, 1, 1, 1),
    },
    lambda world, folder, maps: world.processor.post_process_points(
        (processed := world.processor.post_process_similarity_maps(maps, [(9, 7)])),
        world.processor.post_process_masks(processed),
    ),
    WORKS,
)
cases(
    "ICLIPConfig",
    {
        "a misspelt option": {"poolings": "max"},
        "an unknown pooling": {"pooling": "median"},
        "a width of nothing": {"projection_dim": 0},
        "a width of text": {"projection_dim": "many"},
        "a quantile of nothing": {"attention_quantile": 0},
        "a quantile that is no number": {"attention_quantile": float("nan")},
        "a scale above 100": {"logit_scale_init_value": 5},
        "a negative affinity": {"map_affinity": -1},
        "an affinity that is no number": {"map_affinity": float("nan")},
        "a tower that is a number": {"vision_config": 3},
        "an unknown tower": {"text_config": {"model_type": "no such model"}},
    },
    lambda world, folder, options: ICLIPConfig(**options),
)


# --------------------------------------------------------------------------------------------------------- model folders


def damaged_model(run: Callable) -> Callable:
    def copy_damage_and_run(world, folder, damage):
        shutil.copytree(world.folder / "model", folder / "model")
        damage(folder / "model")
        return run(world, folder / "model")

    return copy_damage_and_run


for door, run, more in (
    ("load_pretrained", lambda world, model: load_pretrained(model), inputs.MODEL_JSON),
    (
        "iclip explain --model",
        lambda world, model: iclip("explain", world.photo, "--text", "dog", "--model", model),
        {},
    ),
    ("iclip export", lambda world, model: iclip("export", model, "exported"), {}),
):
    cases(door, {**inputs.MODEL_FOLDERS, **more}, damaged_model(run), names=lambda name: "model")


def tower(damage_name: str):
    """`iclip init` with a damaged image tower."""

    def run(world, folder, side):
        world.model.vision_model.save_pretrained(folder / "vision")
        world.model.text_model.save_pretrained(folder / "text")
        world.processor.tokenizer.save_pretrained(folder / "text")
        world.model.config.save_pretrained(folder / "config")
        world.processor.save_pretrained(folder / "config")
        inputs.MODEL_FOLDERS[damage_name](folder / side)
        iclip(
            "init",
            "--config",
            folder / "config",
            "--vision",
            folder / "vision",
            "--text",
            folder / "text",
            "--output",
            "new",
        )

    return run


for damage in (
    "missing",
    "empty",
    "no config",
    "no weights",
    "config is truncated",
    "config of an unknown model",
    "symlinked code",
    "weights are truncated",
    "weights are text",
    "pickled weights only",
):
    cases(f"iclip init, {damage}", {"in --vision": "vision", "in --text": "text"}, tower(damage))

# --------------------------------------------------------------------------------------------------------------- metrics

HEATMAP, LABELS = (
    np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4),
    np.array([[1] * 4, [0] * 4, [255] * 4], np.uint8),
)
BAD_PAIRS = {
    "map above 1": (HEATMAP * 1.01, LABELS, 1),
    "map below 0": (HEATMAP - 0.01, LABELS, 1),
    "map with NaN": (np.where(HEATMAP == 1, np.nan, HEATMAP), LABELS, 1),
    "map with infinity": (np.where(HEATMAP == 1, np.inf, HEATMAP), LABELS, 1),
    "map of 0 to 255": ((HEATMAP * 255).astype(np.uint8), LABELS, 1),
    "complex map": (HEATMAP.astype(complex), LABELS, 1),
    "map of strings": (HEATMAP.astype(str), LABELS, 1),
    "map of another size": (HEATMAP[:2], LABELS, 1),
    "map turned round": (HEATMAP.T, LABELS, 1),
    "map of one dimension": (HEATMAP[0], LABELS[0], 1),
    "batch of maps": (HEATMAP[None], LABELS[None], 1),
    "empty map": (HEATMAP[:0], LABELS[:0], 1),
    "map that is none": (None, LABELS, 1),
    "ragged map": ([[0.1], [0.2, 0.3]], LABELS, 1),
    "mask of floats": (HEATMAP, LABELS.astype(np.float32), 1),
    "mask of strings": (HEATMAP, LABELS.astype(str), 1),
    "mask of colours": (HEATMAP, np.stack([LABELS] * 3, -1), 1),
    "mask that is none": (HEATMAP, None, 1),
    "class that is void": (HEATMAP, LABELS, 255),
    "class with a fraction": (HEATMAP, LABELS, 1.5),
    "class by name": (HEATMAP, LABELS, "dog"),
    "no class": (HEATMAP, LABELS, None),
}
BORNE_PAIRS = {
    "all void": (HEATMAP, np.full_like(LABELS, 255), 1),
    "no foreground": (HEATMAP, np.zeros_like(LABELS), 1),
    "no background": (HEATMAP, np.ones_like(LABELS), 1),
    "a class beyond the mask's numbers": (HEATMAP, LABELS, 10**6),
    "signed mask": (HEATMAP, LABELS.astype(np.int64) - 1, -1),
    "hard map": ((HEATMAP > 0.5), LABELS, 1),
    "constant map": (HEATMAP * 0, LABELS, 1),
    "one pixel": (HEATMAP[:1, :1], LABELS[:1, :1], 1),
    "half precision": (HEATMAP.astype(np.float16), LABELS, 1),
    "tensors": (torch.from_numpy(HEATMAP), torch.from_numpy(LABELS), 1),
}


def measured(metric) -> Callable:
    def run(world, folder, pair):
        metric_of_pair = metric()
        metric_of_pair.update(*pair)
        return metric_of_pair.compute()

    return run


def measured_as_image(world, folder, pair):
    heatmap, mask, label = pair
    return measured(TextContrast)(world, folder, ([heatmap], mask, [label]))


def measured_by_module(name: str) -> Callable:
    script = Path(__file__).parents[1] / "evaluate_metrics" / name / f"{name}.py"

    def run(world, folder, pair):
        heatmap, mask, label = pair
        if name == "text_contrast":  # one image with one class
            heatmap, label = [heatmap], [label]
        module = evaluate.load(str(script), cache_dir=str(folder / "metrics"))
        return module.compute(predictions=[heatmap], references=[mask], labels=[label])

    return run


for door, run in {
    "MeanMaxIoU": measured(MeanMaxIoU),
    "MeanForegroundMinusBackground": measured(MeanForegroundMinusBackground),
    "TextContrast": measured_as_image,
    'evaluate.load("mmiou")': measured_by_module("mmiou"),
    'evaluate.load("mfmb")': measured_by_module("mfmb"),
    'evaluate.load("text_contrast")': measured_by_module("text_contrast"),
}.items():
    cases(door, BAD_PAIRS, run)
    cases(door, BORNE_PAIRS, run, WORKS)
SCORES, SHOWN = np.array([[0.9, 0.1], [0.8, 0.3]]), np.array([[1, 0], [0, 1]])
cases(
    "MultiLabelAveragePrecision",
    {
        "NaN": (SCORES * np.nan, SHOWN),
        "scores of one image": (SCORES[0], SHOWN[0]),
        "other sizes": (SCORES, SHOWN[:1]),
        "presence of 2": (SCORES, SHOWN * 2),
        "presence of strings": (SCORES, SHOWN.astype(str)),
        "scores of strings": (np.full((2, 2), "a"), SHOWN),
        "none": (None, None),
    },
    measured(MultiLabelAveragePrecision),
)
cases(
    "MultiLabelAveragePrecision",
    {
        "no positive": (SCORES, SHOWN * 0),
        "infinite scores": (SCORES * np.inf, SHOWN),
        "no images": (SCORES[:0], SHOWN[:0]),
    },
    measured(MultiLabelAveragePrecision),
    WORKS,
)

# ------------------------------------------------------------------------------------------------------------------ data


def index_mask(values: np.ndarray) -> bytes:
    return inputs.encoded(Image.fromarray(values), "PNG")


cases(
    "mask of a data set",
    {
        "a class that is not listed": index_mask(np.full((24, 30), 7, np.uint8)),
        "colours": inputs.BY_FORMAT["PNG"],
        "16 bits": index_mask(np.full((24, 30), 1, np.uint16)),
        "with alpha": inputs.encoded(inputs.PHOTO.convert("LA"), "PNG"),
    },
    mask,
    names=lambda name: "image.png",
)
cases(
    "mask of a data set",
    {
        "all void": index_mask(np.full((24, 30), 255, np.uint8)),
        "all background": index_mask(np.zeros((24, 30), np.uint8)),
    },
    mask,
    WORKS,
)
cases(
    "image of a data set",
    {"of another size than its mask": inputs.encoded(inputs.PHOTO.resize((31, 24)), "PNG")},
    lambda world, folder, image: (
        load_segmentation("folder", masks_folder(folder, image, index_mask(np.ones((24, 30), np.uint8))))[0].image
    ),
)
cases(
    "classes.txt",
    {
        "empty": "",
        "blank": "\n \n",
        "a blank line": "dog\n\ncat",
        "a name twice": "dog\ndog",
        "background": "background\ndog",
        "too many": "\n".join(map(str, range(300))),
        "UTF-16": "dog".encode("utf-16"),
        "no text": bytes(range(128, 200)),
    },
    lambda world, folder, classes: load_segmentation("folder", masks_folder(folder, classes=classes)),
    names=lambda name: "classes.txt",
)
cases(
    "classes.txt",
    {
        "Windows lines": "dog\r\ncat\r\n",
        "byte order mark": "\ufeffdog",
        "one huge name": "d" * 10**6,
        "controls": "d\x00g",
    },
    lambda world, folder, classes: load_segmentation("folder", masks_folder(folder, classes=classes)),
    WORKS,
)


def voc(world, folder, names: str | bytes):
    root = folder / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / part).mkdir(parents=True)
    (root / "JPEGImages" / "a.jpg").write_bytes(inputs.BY_FORMAT["JPEG"])
    (root / "SegmentationClass" / "a.png").write_bytes(index_mask(np.ones((24, 30), np.uint8)))
    (root / "ImageSets" / "Segmentation" / "val.txt").write_bytes(names.encode() if isinstance(names, str) else names)
    return len(load_segmentation("voc2012", folder))


cases(
    "list of VOC",
    {
        "empty": "",
        "blank": "\n \n\t",
        "an absent image": "a\nb",
        "two columns": "a 1",
        "a file name": "a.jpg",
        "a path out of the folder": "../../../../photo",
        "UTF-16": "a".encode("utf-16"),
        "no text": bytes(range(128, 200)),
        "null bytes": bytes(1000),
        "one endless line": "a" * 10**6,
    },
    voc,
)
cases("list of VOC", {"Windows lines": "a\r\n", "a name twice": "a\na", "byte order mark": "\ufeffa"}, voc, WORKS)

CATEGORY, PICTURE = {"id": 3, "name": "dog"}, {"id": 5, "file_name": "image.png", "height": 24, "width": 30}
POLYGON = {"id": 7, "image_id": 5, "category_id": 3, "iscrowd": 0, "segmentation": [[1, 1, 9, 1, 9, 9]]}
CROWD = {"id": 8, "iscrowd": 1, "segmentation": {"size": [24, 30], "counts": [700, 20]}}


def coco(world, folder, content):
    if isinstance(content, dict):
        parts = {"categories": [CATEGORY], "images": [PICTURE], "annotations": [POLYGON]}
        content = json.dumps(parts | content)
    (folder / "annotations").mkdir()
    (folder / "val2017").mkdir()
    shutil.copy(world.photo, folder / "val2017" / "image.png")
    (folder / "annotations" / "instances_val2017.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    sample = load_segmentation("coco2017", folder)[0]
    return sample.image, sample.mask(1)


def annotation(**changes) -> dict:
    return {"annotations": [{**POLYGON, **changes}]}


def run_lengths_of(counts, size=(24, 30)) -> dict:
    return annotation(segmentation={"size": list(size), "counts": counts}, iscrowd=1)


cases("JSON of COCO", inputs.BAD_JSON, coco, names=lambda name: "instances_val2017.json")
cases(
    "JSON of COCO",
    {
        "no categories": {"categories": []},
        "no images": {"images": []},
        "categories that are none": {"categories": None},
        "category without a name": {"categories": [{"id": 3}]},
        "category whose name is a number": {"categories": [{"id": 3, "name": 3}]},
        "ids of two types": {"categories": [CATEGORY, {"id": "x", "name": "cat"}]},
        "id that is a list": {"categories": [{"id": [3], "name": "dog"}]},
        "category twice": {"categories": [CATEGORY, {"id": 3, "name": "cat"}]},
        "image without a size": {"images": [{"id": 5, "file_name": "image.png"}]},
        "image whose size is text": {"images": [PICTURE | {"height": "24"}]},
        "image of no height": {"images": [PICTURE | {"height": 0}]},
        "image of a negative height": {"images": [PICTURE | {"height": -24}]},
        "image of a huge height": {"images": [PICTURE | {"height": 10**30}]},
        "image of another size": {"images": [PICTURE | {"height": 23}]},
        "image by a number": {"images": [PICTURE | {"file_name": 3}]},
        "image by a list": {"images": [PICTURE | {"file_name": ["image.png"]}]},
        "image out of the folder": {"images": [PICTURE | {"file_name": "../annotations/instances_val2017.json"}]},
        "absolute image": {"images": [PICTURE | {"file_name": "/etc/passwd"}]},
        "absent image": {"images": [PICTURE | {"file_name": "absent.png"}]},
        "unlisted category": annotation(category_id=4),
        "unlisted image": annotation(image_id=6),
        "crowd without a value": {"annotations": [{k: v for k, v in POLYGON.items() if k != "iscrowd"}]},
        "polygon of two points": annotation(segmentation=[[1, 1, 2, 2]]),
        "polygon of an odd number": annotation(segmentation=[[1, 1, 2, 2, 3, 3, 4]]),
        "polygon far outside": annotation(segmentation=[[0, 0, 10**9, 0, 0, 10**9]]),
        "polygon whose distance is no number": annotation(segmentation=[[-(2**63), 1, 9, 24, 9, 9]]),
        "polygon with NaN": annotation(segmentation=[[0, 0, float("nan"), 0, 0, 9]]),
        "polygon of text": annotation(segmentation=[["a"] * 6]),
        "polygon of nothing": annotation(segmentation=[[]]),
        "polygon of null": annotation(segmentation=None),
        "polygon as a number": annotation(segmentation=3),
        "runs of another size": run_lengths_of([720], (30, 24)),
        "runs that are too short": run_lengths_of([700]),
        "runs that are too long": run_lengths_of([0, 10**9]),
        "negative runs": run_lengths_of([-5, 725]),
        "runs of text": run_lengths_of("no runs"),
        "empty runs": run_lengths_of(""),
        "endless runs": run_lengths_of("o" * 10**6),
        "runs of null": run_lengths_of(None),
        "runs of floats": run_lengths_of([0.5, 719.5]),
    },
    coco,
)
cases(
    "JSON of COCO",
    {
        "as it should be": {},
        "no annotations": {"annotations": []},
        "empty polygons": annotation(segmentation=[]),
        "keys beside": annotation(score=0.5, bbox=None),
        "duplicate keys": f'{{"images": 3, "categories": {json.dumps([CATEGORY])}, "annotations": [], '
        f'"images": {json.dumps([PICTURE])}}}',
    },
    coco,
    WORKS,
)
cases(
    "overrides",
    {
        **{name: content for name, content in inputs.BAD_JSON.items() if name != "empty object"},
        "unknown key": {"name": {}},
        "names as a list": {"names": ["dog"]},
        "unknown name": {"names": {"no class": "dog"}},
        "name twice": {"names": {"dog": "cat"}},
        "blank name": {"names": {"dog": " "}},
        "name as a number": {"names": {"dog": 3}},
        "templates as text": {"templates": "a photo of the {}"},
        "no templates": {"templates": []},
        "template without a place": {"templates": ["a photo"]},
        "template with a field": {"templates": ["{} {0.__class__}"]},
        "template as a number": {"templates": [3]},
    },
    lambda world, folder, overrides: load_segmentation(
        "folder",
        masks_folder(folder),
        overrides=overrides if isinstance(overrides, dict) else written(folder, overrides),
    ),
)
cases(
    "overrides in YAML",
    {
        "an object of Python": "!!python/object/apply:os.mkdir [executed]",
        "bomb of aliases": f"a: {inputs.BOMB_OF_ALIASES}",
        "bomb as a name": f"names: {{dog: {inputs.BOMB_OF_ALIASES}}}",
        "bomb as a template": f"templates: {inputs.BOMB_OF_ALIASES}",
        "bomb as a key": f"{{[{inputs.BOMB_OF_ALIASES}]: 1}}",
        "deep lists": "[" * 400,
        "tabs": "\tnames: 3",
        "two documents": "names: {}\n---\nnames: {}",
        "no": "no",
    },
    lambda world, folder, text: load_segmentation(
        "folder", masks_folder(folder), overrides=written(folder, text, "overrides.yaml")
    ),
    names=lambda name: "overrides",
)


def written(folder: Path, content: str | bytes, name: str = "written.json") -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    return folder / name


GOOD_TAR = (("a.png", inputs.BY_FORMAT["PNG"]), ("a.txt", "a dog"))


def pairs(name: str) -> Callable:
    def run(world, folder, content):
        shutil.copy(world.photo, folder / "photo.png")
        source = written(folder, content, name)
        loaded = load_pairs(source)
        return [loaded.read(index) for index in range(len(loaded))]

    return run


def tar_of(caption: str | bytes, suffix: str = "json") -> bytes:
    return inputs.tar(("a.png", inputs.BY_FORMAT["PNG"]), (f"a.{suffix}", caption))


cases(
    "shard",
    {
        "empty": b"",
        "text": "no tar",
        "zip": inputs.archive("zip"),
        "compressed": inputs.tar(*GOOD_TAR, mode="w:gz"),
        "truncated": inputs.tar(*GOOD_TAR)[:700],
        "damaged header": inputs.damaged(inputs.tar(*GOOD_TAR)[:512], 3) + inputs.tar(*GOOD_TAR)[512:],
        "null bytes": bytes(10_240),
        "a member beyond all bounds": inputs.huge_member(2**80),
        "attributes beyond all bounds": inputs.huge_member(2**80, b"x"),
        "attributes beyond all memory": inputs.huge_member(2**60, b"x"),
        "a thousand long names": inputs.tar(*[("././@LongLink", "a.png\0")] * 1000, type=b"L"),
        "attributes that are none": inputs.tar(("a", "9 size=b\n"), ("a.png", ""), type=b"x"),
        "folders alone": inputs.archive("tar"),
        "links": inputs.tar(*GOOD_TAR, type=b"2", linkname="/etc/passwd"),
        "hard links": inputs.tar(*GOOD_TAR, type=b"1", linkname="/etc/passwd"),
        "devices": inputs.tar(*GOOD_TAR, type=b"3"),
        "images alone": inputs.tar(("a.png", inputs.BY_FORMAT["PNG"])),
        "texts alone": inputs.tar(("a.txt", "a dog")),
        "blank caption": tar_of(" \n", "txt"),
        "caption in UTF-16": tar_of("a dog".encode("utf-16"), "txt"),
        **{f"JSON that is {name}": tar_of(content) for name, content in inputs.BAD_JSON.items()},
        "captions as a number": tar_of('{"captions": 3}'),
        "captions of numbers": tar_of('{"captions": [3]}'),
        "caption of a lone surrogate": tar_of('{"caption": "\\ud800"}'),
    },
    pairs("a.tar"),
    names=lambda name: "",
)
cases(
    "shard",
    {
        "names out of the folder": inputs.tar(("../../a.png", GOOD_TAR[0][1]), ("../../a.txt", "a dog")),
        "absolute names": inputs.tar(("/etc/a.png", GOOD_TAR[0][1]), ("/etc/a.txt", "a dog")),
        "a name twice": inputs.tar(*GOOD_TAR, *GOOD_TAR),
        "a million characters": tar_of("dog " * 250_000, "txt"),
        "control characters": tar_of("dog\x00\x1b", "txt"),
    },
    pairs("a.tar"),
    WORKS,
)
HEADER = b"file_name,caption\n"
for suffix, separator in (("csv", b","), ("tsv", b"\t")):
    row = separator.join((b"photo.png", b"a dog"))
    head = HEADER.replace(b",", separator)
    cases(
        f".{suffix} table",
        {
            "empty": b"",
            "blank": b"\n\n",
            "header alone": head,
            "no header": row + b"\n",
            "other columns": b"a" + separator + b"b\n" + row,
            "a field too many": head + row + separator + b"x\n",
            "a field too few": head + b"photo.png\n",
            "no caption": head + b"photo.png" + separator + b"\n",
            "no image": head + separator + b"a dog\n",
            "absent image": head + row.replace(b"photo", b"absent") + b"\n",
            "URL": head + row.replace(b"photo.png", b"https://127.0.0.1:9/a.png") + b"\n",
            "UTF-16": (head + row).decode().encode("utf-16"),
            "no text": head + bytes(range(128, 200)) + separator + b"dog\n",
            "null bytes": bytes(1000),
            "pickle": inputs.UNREADABLE_IMAGES["pickle"],
            "device as image": head + row.replace(b"photo.png", b"/dev/zero") + b"\n",
        },
        pairs(f"a.{suffix}"),
    )
    cases(
        f".{suffix} table",
        {"Windows lines": (head + row).replace(b"\n", b"\r\n") + b"\r\n"},
        pairs(f"a.{suffix}"),
        WORKS,
    )
cases(
    ".csv table",
    {
        "open quote": HEADER + b'photo.png,"a dog\n',
        "a field of a million": HEADER + b"photo.png," + b"d" * 10**6 + b"\n",
    },
    pairs("a.csv"),
)
GOOD_LINE = '{"file_name": "photo.png", "caption": "a dog"}\n'
cases("lines of JSON", {f"{name} first": content for name, content in inputs.BAD_JSON.items()}, pairs("a.jsonl"))
cases(
    "lines of JSON",
    {
        **{
            f"{name} later": GOOD_LINE + text
            for name, text in inputs.BAD_JSON.items()
            if isinstance(text, str) and text.strip()
        },
        "captions as an object": '{"file_name": "photo.png", "captions": {"a": 1}}',
        "image as a number": '{"file_name": 3, "caption": "a dog"}',
        "image as a list": '{"file_name": ["photo.png"], "caption": "a dog"}',
        "folder as image": '{"file_name": ".", "caption": "a dog"}',
        "null character in the name": '{"file_name": "a\\u0000b.png", "caption": "a dog"}',
        "lone surrogate in the name": '{"file_name": "\\ud800.png", "caption": "a dog"}',
    },
    pairs("a.jsonl"),
)
cases(
    "lines of JSON",
    {"duplicate keys": '{"file_name": 3, "file_name": "photo.png", "caption": "a dog"}'},
    pairs("a.jsonl"),
    WORKS,
)
cases(
    "load_pairs",
    {
        "nothing": "",
        "absent file": "absent.tar",
        "absent folder": "absent/",
        "empty folder": ".",
        "endless pattern": "{0..3}/{0..3}.tar",
        "file of another kind": "../world.txt",
        "number": 3,
        "none": None,
        "empty list": [],
        "share above 1": ("a.tar", {"max_bad_share": 2}),
    },
    lambda world, folder, source: (
        load_pairs(source[0], **source[1]) if isinstance(source, tuple) else load_pairs(source)
    ),
)
cases(
    "nouns",
    {"no file": None, "empty": "", "blank": "\n \n", "UTF-16": "dog".encode("utf-16")},
    lambda world, folder, content: NounPrompts.from_file(
        folder / "absent.txt" if content is None else written(folder, content, "nouns.txt")
    ),
)
cases(
    "feature cache",
    inputs.BAD_JSON,
    lambda world, folder, content: FeatureShards(written(folder, content, "fingerprint.json").parent, {"tower": 1}, 3),
    names=lambda name: "case",
)


def cached_rows(world, folder, content):
    shards = FeatureShards(folder, {"tower": 1}, 3)
    shards.write(0, np.ones((3, 2), np.float16))
    (folder / "00000.npy").write_bytes(content)
    return FeatureShards(folder, {"tower": 1}, 3)[np.arange(3)]


buffer = io.BytesIO()
np.save(buffer, np.ones((3, 2), np.float16))
cases(
    "feature cache",
    {
        "empty shard": b"",
        "truncated shard": buffer.getvalue()[:-3],
        "shard of text": b"no numbers",
        "pickled shard": inputs.UNREADABLE_IMAGES["pickle"],
        "shard of other rows": buffer.getvalue().replace(b"(3, 2)", b"(2, 2)"),
    },
    cached_rows,
    names=lambda name: "00000.npy",
)

# -------------------------------------------------------------------------------------------------- JSON of an evaluation


def evaluation(**changes) -> str:
    row = {"name": "dog", "AP": 50.0, "MIoU": 20.0, "FMB": 0.1, "threshold": 0.4, **changes}
    return json.dumps({"per_class": {"itsm": [row, {**row, "name": "cat"}]}})


BAD_EVALUATIONS = inputs.BAD_JSON | {
    "no methods": '{"per_class": {}}',
    "methods as a list": '{"per_class": []}',
    "rows as a number": '{"per_class": {"itsm": 3}}',
    "rows of numbers": '{"per_class": {"itsm": [3]}}',
    "name as a list": evaluation(name=["dog"]),
    "scores as text": evaluation(AP="high", threshold="high"),
    "threshold above 1": evaluation(threshold=7, AP="high"),
    "no score at all": evaluation(AP=None, threshold=None),
}
for door, run in {
    "--threshold": lambda w, f, text: iclip(
        "explain", w.photo, "--text", "dog", "--model", w.folder / "model", "--threshold", written(f, text)
    ),
    "class_thresholds": lambda w, f, text: class_thresholds(written(f, text), ["dog"]),
    "iclip analyze relation": lambda w, f, text: iclip("analyze", "relation", written(f, text)),
    "iclip export --results": lambda w, f, text: iclip(
        "export", w.folder / "model", "new", "--results", written(f, text)
    ),
}.items():
    cases(door, BAD_EVALUATIONS, run)

# ------------------------------------------------------------------------------------------------------- command line

ARGUMENTS = {
    "nothing": "",
    "unknown command": "paint",
    "explain without image": "explain --text dog",
    "explain without text": "explain {photo}",
    "explain an unknown option": "explain {photo} --text dog --model {model} --sharpness 3",
    "explain by an unknown method": "explain {photo} --text dog --model {model} --method magic",
    "explain at half a patch": "explain {photo} --text dog --model {model} --image-size 12",
    "explain at no size": "explain {photo} --text dog --model {model} --image-size 0",
    "explain at a negative size": "explain {photo} --text dog --model {model} --image-size -8",
    "explain at a size of text": "explain {photo} --text dog --model {model} --image-size big",
    "explain with a presence above 1": "explain {photo} --text dog --model {model} --min-presence 2",
    "explain with a presence of nan": "explain {photo} --text dog --model {model} --min-presence nan",
    "explain with a threshold of nan": "explain {photo} --text dog --model {model} --threshold nan",
    "explain with a threshold of a folder": "explain {photo} --text dog --model {model} --threshold {folder}",
    "explain in unknown colours": "explain {photo} --text dog --model {model} --colormap mud",
    "explain without a place in the template": "explain {photo} --text dog --model {model} --template photo",
    "explain to a folder": "explain {photo} --text dog --model {model} --output {folder}",
    "explain to another kind": "explain {photo} --text dog --model {model} --output a.exe",
    "explain to nothing": "explain {photo} --text dog --model {model} --output /dev/null/a.png",
    "explain to a long name": "explain {photo} --text dog --model {model} --output {long}.png",
    "explain several to a file": "explain {photo} {photo} --text dog --model {model} --output a.png",
    "explain without a model": "explain {photo} --text dog --model {folder}/absent",
    "explain by an id of a hub that is not there": "explain {photo} --text dog --model no/such-model",
    "explain a folder without images": "explain {folder} --text dog --model {model}",
    "explain a folder beside an image": "explain {world} {photo} --text dog --model {model}",
    "explain a folder with arrays": "explain {world} --text dog --model {model} --npz",
    "explain a folder in batches of nothing": "explain {world} --text dog --model {model} --batch-size 0",
    "explain a folder into files of nothing": "explain {world} --text dog --model {model} --images-per-file -1",
    "compare without text": "compare {photo} --model {model}",
    "compare to another kind": "compare {photo} --text dog --model {model} --output a.txt",
    "compare at no resolution": "compare {photo} --text dog --model {model} --dpi 0",
    "compare with half a data set": "compare {photo} --text dog --model {model} --dataset folder",
    "compare with no data set": "compare {photo} --text dog --model {model} --dataset folder --data-root {folder}",
    "evaluate without a data set": "evaluate",
    "evaluate an unknown data set": "evaluate --dataset imagenet --data-root .",
    "evaluate an absent folder": "evaluate --dataset voc2012 --data-root {folder}/absent --model {model}",
    "evaluate an empty folder": "evaluate --dataset folder --data-root {folder} --model {model}",
    "evaluate an absent split": "evaluate --dataset coco2017 --data-root {folder} --split ../../etc --model {model}",
    "evaluate to another kind": "evaluate --dataset folder --data-root {folder} --output a.csv --model {model}",
    "evaluate no images": "evaluate --dataset folder --data-root {masks} --limit 0 --model {model}",
    "evaluate a part of an image": "evaluate --dataset folder --data-root {masks} --limit 0.5 --model {model}",
    "evaluate in batches of nothing": "evaluate --dataset folder --data-root {masks} --batch-size 0 --model {model}",
    "evaluate by an unknown aggregate": "evaluate --dataset folder --data-root {masks} --aggregate mean --model {model}",
    "evaluate at half a patch": "evaluate --dataset folder --data-root {masks} --image-size 12 --model {model}",
    "evaluate with absent overrides": "evaluate --dataset folder --data-root {masks} --overrides absent.json --model {model}",
    "analyze nothing": "analyze",
    "analyze shift without data": "analyze shift --model {model}",
    "analyze shift of no images": "analyze shift --dataset folder --data-root {masks} --limit 0 --model {model}",
    "analyze shift of an unknown pooling": "analyze shift --dataset folder --data-root {masks} --before mean",
    "analyze relation of nothing": "analyze relation absent.json",
    "analyze relation of a folder": "analyze relation {folder}",
    "init without a configuration": "init --output new",
    "init an unknown configuration": "init --config no-such --output new",
    "init into a full folder": "init --config iclip-vit-b16 --output {world}",
    "init from absent towers": "init --config iclip-vit-b16 --vision {folder}/a --text {folder}/b --output new",
    "init from a .pth that is none": "init --config iclip-vit-b16 --vision {pth} --text {model} --output new",
    "export without a folder": "export {model}",
    "export into a full folder": "export {model} {world}",
    "export an absent model": "export {folder}/absent new",
    "export in an unknown format": "export {model} new --format pickle",
    "export with absent results": "export {model} new --results absent.json",
    "push to a bad name": "push {model} a/b/c --dry-run",
    "push to a name with spaces": "push {model} my@model!",
    "push an absent model": "push {folder}/absent org/name --dry-run",
    "an unknown metric": "export-metric accuracy new",
    "a metric into a file": "export-metric mmiou {photo}",
    "demo of a folder as a Space": "demo --export-space new --model {model}",
    "demo into a file": "demo --export-space {photo}",
    "demo at a port of text": "demo --port http",
}


def by_command_line(world, folder, arguments):
    (folder / "masks").mkdir()
    masks_folder(folder / "masks", mask=index_mask(np.ones((24, 30), np.uint8)))
    (folder / "empty").mkdir()
    places = {
        "photo": world.photo,
        "model": world.folder / "model",
        "world": world.folder,
        "folder": folder / "empty",
        "masks": folder / "masks",
        "pth": written(folder, inputs.UNREADABLE_IMAGES["pickle"], "dino.pth"),
        "long": "x" * 300,
    }
    iclip(*(argument.format(**places) for argument in arguments.split()))


cases("iclip", ARGUMENTS, by_command_line)

# ------------------------------------------------------------------------------------------------------------- train.py

SETTINGS = {"vision": "v", "text": "t", "data": "[d]"}
cases(
    "train.yaml",
    {
        **inputs.BAD_JSON,
        "a list": "- vision\n- text",
        "an object of Python": "!!python/object/apply:os.mkdir [executed]",
        "bomb of aliases": f"a: {inputs.BOMB_OF_ALIASES}",
        "bomb as data": f"data: {inputs.BOMB_OF_ALIASES}",
        "tabs": "\tvision: x",
        "two documents": "vision: v\n---\ntext: t",
        "an open quote": 'vision: "v',
        "an unknown alias": "data: *data",
        **{
            f"{name}: {value}": "\n".join(f"{n}: {v}" for n, v in {**SETTINGS, name: value}.items())
            for name, value in (
                *(("config", "other.yaml"), ("learning_rates", 1), ("epochs", "many"), ("epochs", 0), ("epochs", 1.5)),
                *(
                    ("epochs", "[1, 2]"),
                    ("epochs", "{a: 1}"),
                    ("batch_size", -4),
                    ("batch_size", "1e3"),
                ),
                *(("learning_rate", 0), ("learning_rate", ".nan"), ("learning_rate", "-.inf"), ("adam_beta1", 1.5)),
                *(("crop_scale", -1), ("mixed_precision", "fp8"), ("eval_dataset", "imagenet"), ("data", "[]")),
                *(("data", "{a: b}"), ("data", "[[a]]"), ("model", "m"), ("vision", "''"), ("seed", "1.5")),
                *(("lock_text", "maybe"), ("model_options", "[pooling]"), ("model_options", "[sharpness=3]")),
                *(("max_bad_share", 7), ("num_workers", -1), ("keep_checkpoints", 0), ("noun_prompts", 0)),
            )
        },
    },
    lambda world, folder, content: settings_of("--config", written(folder, content, "train.yaml")),
)
cases(
    "train.yaml",
    {
        "as it should be": "vision: v\ntext: t\ndata: [d]",
        "a setting twice": "vision: a\nvision: v\ntext: t\ndata: d",
        "JSON": '{"vision": "v", "text": "t", "data": ["d"]}',
        "a blank": "vision: v\ntext: t\ndata: [d]\nepochs:\nnouns:",
        "an exponent": "vision: v\ntext: t\ndata: [d]\nlearning_rate: 1e-4",
    },
    lambda world, folder, content: settings_of("--config", written(folder, content, "train.yaml")),
    WORKS,
)
cases(
    "train.py",
    {
        "an absent config": ["--config", "absent.yaml"],
        "a folder as config": ["--config", "."],
        "an unknown setting": ["--sharpness", "3"],
        "a setting without a value": ["--epochs"],
        "a shortened setting": ["--learning_rat", "1"],
    },
    lambda world, folder, arguments: settings_of(*arguments),
)


# -------------------------------------------------------------------------------------------------------------- the test


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.door}: {case.name}") for case in CASES])
@pytest.mark.filterwarnings("ignore")
def test_a_fault_is_borne_or_refused_in_one_clear_sentence(case, world, sandbox):
    before, memory, began = (
        files(world.folder),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        time.process_time(),
    )
    try:
        case.run(world, sandbox / "case")
    except REFUSALS as error:
        assert case.fate != WORKS, repr(error)
        message = str(error)
        assert len(message.split()) >= 4 and case.names in message, message
        assert len(message) < 20_000
        assert not list((sandbox / "here").iterdir())
    else:
        assert case.fate != REFUSED
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000  # kB
    assert not {"unpickled", "executed", "escaped"} & set(os.listdir("."))
    assert not files(sandbox / "elsewhere") and files(world.folder) == before
    assert not [path for path in sandbox.rglob("*") if path.suffix == ".partial"]


def test_count():
    assert len(CASES) >= 300


# ------------------------------------------------------------------------------------------------ what hypothesis brings

PARSERS = {
    "list of VOC": (voc, b"a\n"),
    "classes.txt": (
        lambda w, f, content: load_segmentation("folder", masks_folder(f, classes=content)),
        b"dog\ncat\n",
    ),
    "nouns": (lambda w, f, content: NounPrompts.from_file(written(f, content)), b"dog\ncat\n"),
    "shard": (pairs("a.tar"), inputs.tar(*GOOD_TAR)),
    ".csv table": (pairs("a.csv"), b'file_name,caption\nphoto.png,"a dog"\n'),
    ".tsv table": (pairs("a.tsv"), b"file_name\tcaption\nphoto.png\ta dog\n"),
    "lines of JSON": (pairs("a.jsonl"), GOOD_LINE.encode()),
    "train.yaml": (
        lambda w, f, content: settings_of("--config", written(f, content, "train.yaml")),
        b"vision: v\ntext: t\ndata: [d]\nepochs: 3\nmodel_options: [pooling=max]\n",
    ),
    "overrides": (
        lambda w, f, content: load_segmentation("folder", masks_folder(f), overrides=written(f, content, "o.yaml")),
        b"names: {dog: cat, cat: dog}\ntemplates: ['a photo of the {}']\n",
    ),
    "image": (lambda w, f, content: load_image(content), inputs.BY_FORMAT["PNG"]),
}


@st.composite
def damaged_bytes(draw, whole: bytes) -> bytes:
    """Some bytes of a good file replaced by any others."""
    start = draw(st.integers(0, len(whole)))
    end = draw(st.integers(start, min(len(whole), start + 20)))
    put = draw(st.binary(max_size=20) | st.text(max_size=20).map(lambda text: text.encode(errors="ignore")))
    return whole[:start] + put + whole[end:]


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def damaged_json(draw, whole) -> object:
    """Good JSON in which one value, somewhere, became any other."""
    if isinstance(whole, (dict, list)) and whole and draw(st.integers(0, 5)):
        copy = whole.copy()
        key = draw(st.sampled_from(list(whole) if isinstance(whole, dict) else range(len(whole))))
        copy[key] = draw(damaged_json(whole[key]))
        return copy
    return draw(ANY_JSON)


def bears(run: Callable, world, content) -> None:
    """Runs in a folder of its own; only refusals get out."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(*REFUSALS):
        run(world, Path(folder), content)


any_fixture = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.filterwarnings("ignore")
@any_fixture
@given(data=st.data())
def test_parsers_bear_any_bytes(name, world, sandbox, data):
    run, whole = PARSERS[name]
    bears(run, world, data.draw(damaged_bytes(whole) | st.binary(max_size=50)))
    assert not list((sandbox / "here").iterdir())


JSON_READERS = {
    "COCO": (coco, {"categories": [CATEGORY], "images": [PICTURE], "annotations": [POLYGON, {**POLYGON, **CROWD}]}),
    "overrides": (
        lambda w, f, content: load_segmentation("folder", masks_folder(f), overrides=written(f, content)),
        {"names": {"dog": "wolf"}, "templates": ["a photo of the {}"]},
    ),
    "evaluation": (lambda w, f, content: class_thresholds(written(f, content), ["dog"]), json.loads(evaluation())),
    "captions": (
        lambda w, f, content: pairs("a.tar")(w, f, tar_of(content)),
        {"captions": ["a dog"], "caption": "a cat"},
    ),
    "feature cache": (
        lambda w, f, content: FeatureShards(written(f, content, "fingerprint.json").parent, {"tower": 1}, 3),
        {"tower": 1, "rows": 3, "version": 1},
    ),
}


@pytest.mark.parametrize("name", JSON_READERS)
@any_fixture
@given(data=st.data())
def test_readers_bear_any_json(name, world, sandbox, data):
    run, whole = JSON_READERS[name]
    bears(run, world, json.dumps(data.draw(damaged_json(whole))))


@given(data=st.data(), height=st.integers(1, 9), width=st.integers(1, 9))
def test_regions_are_the_mask_in_parts(data, height, width):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width)))
    mask = mask.reshape(height, width)
    heatmap = np.random.default_rng(height).random((height, width))
    regions = find_regions(heatmap, mask, min_area=0)
    together = np.zeros((height, width), int)
    for region in regions:
        x0, y0, x1, y1 = region.box
        together[y0:y1, x0:x1] += region.inside
        assert region.inside.any(0).all() and region.inside.any(1).all()  # no larger than need be
        assert all(region.inside[y - y0, x - x0] for x, y in positive_points(heatmap, region, 3))
    assert np.array_equal(together, mask)
    assert [region.score for region in regions] == sorted((region.score for region in regions), reverse=True)
    assert all(mask.all() or not mask[y, x] for x, y in negative_points(heatmap, mask, 1))
    lengths = run_lengths(mask)["counts"]
    assert np.array_equal(np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(mask.shape, order="F"), mask)


finite = st.floats(-(2.0**59), 2.0**59, width=32)


@given(
    data=st.data(), h=st.integers(1, 5), w=st.integers(1, 5), size=st.tuples(st.integers(1, 40), st.integers(1, 40))
)
def test_any_map_is_stretched_to_0_and_1(data, h, w, size):
    raw = torch.tensor(data.draw(st.lists(finite, min_size=h * w, max_size=h * w))).reshape(1, h, w)
    for stretched in (resize_and_normalize(raw, size), min_max_normalize(raw)):
        span = (stretched.min().item(), stretched.max().item())
        assert span == (0, 1) or not stretched.any()
    assert min_max_normalize(raw).any() == (raw.max() > raw.min())


@given(
    seed=st.integers(0, 2**32 - 1), patches=st.integers(1, 9), mode=st.sampled_from(["average", "max", "masked_max"])
)
def test_pooling_knows_no_order_and_stays_within_the_tokens(seed, patches, mode):
    draws = torch.Generator().manual_seed(seed)
    tokens, attention = torch.randn(2, patches, 4, generator=draws), torch.rand(2, patches, generator=draws)
    pooled = pool(tokens, tokens[:, 0], attention, mode)
    order = torch.randperm(patches, generator=draws)
    torch.testing.assert_close(pool(tokens[:, order], tokens[:, 0], attention[:, order], mode), pooled)
    lowest = tokens.amin(1).clamp(max=0) if mode == "masked_max" else tokens.amin(1)
    assert (pooled <= tokens.amax(1).clamp(min=0) + 1e-6).all() and (pooled >= lowest - 1e-6).all()


# -------------------------------------------------------------------------------------------------------------- security

ROOT = Path(__file__).parents[1]
SOURCES = [
    *(ROOT / "src").rglob("*.py"),
    *(ROOT / "evaluate_metrics").rglob("*.py"),
    ROOT / "train.py",
    ROOT / "setup.py",
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_a_file_is_executed(path):
    """No pickle, no code out of data, no shell: neither imported nor asked for."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = {alias.name.partition(".")[0] for alias in node.names} | {getattr(node, "module", None)}
            assert not imported & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
        if isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert (
                called not in ("eval", "exec", "os.system", "os.popen", "yaml.load")
                and "extract" not in called.split(".")[-1]
            )
            assert {"shell", "allow_pickle"}.isdisjoint(options) and options.get("trust_remote_code") in (
                None,
                "False",
            )
            assert called != "torch.load" or options.get("weights_only") == "True"
            assert not called.startswith("subprocess.") or path.name == "towers.py"  # pip, without a shell


@pytest.fixture(scope="module")
def server(world):
    running = app.launch(str(world.folder / "model"), "127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield running.local_url
    running.close()


def test_the_app_serves_only_its_own_files(server, world):
    for path in (
        "/etc/passwd",
        world.photo,
        world.folder / "model" / "config.json",
        "../../etc/passwd",
        ROOT / "train.py",
    ):
        for address in (f"gradio_api/file={path}", f"file={path}", f"static/{path}", f"gradio_api/stream/{path}"):
            answer = httpx.get(server + address)
            assert answer.status_code in (400, 403, 404, 405) and "root:" not in answer.text, address
    traversal = httpx.post(
        f"{server}gradio_api/upload", files={"files": ("../../escaped.png", inputs.BY_FORMAT["PNG"])}
    )
    assert traversal.status_code != 200 or ".." not in traversal.json()[0]


def test_the_app_fetches_nothing_from_elsewhere(server):
    """Whatever address a visitor names as an image, nobody is asked for it."""
    asked = []

    class Neighbour(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(inputs.BY_FORMAT["PNG"])

        def log_message(self, *arguments):
            pass

    neighbour = ThreadingHTTPServer(("127.0.0.1", 0), Neighbour)
    threading.Thread(target=neighbour.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{neighbour.server_port}/secret.png"
    try:
        for photo in (
            {"path": address},
            {"path": address, "url": address},
            {"path": None, "url": address},
            {"path": "photo.png", "url": address},
        ):
            call = f"{server}gradio_api/call/explain"
            body = {"data": [{**photo, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}, "dog", "itsm"]}
            answer = httpx.post(call, json=body)
            if answer.status_code == 200:
                event = httpx.get(f"{call}/{answer.json()['event_id']}", timeout=30).text
                assert event.startswith("event: error"), event[:200]
    finally:
        neighbour.shutdown()
    assert not asked
