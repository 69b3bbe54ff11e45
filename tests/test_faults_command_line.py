"""Faults at the door of the command line. See faults.py."""

from functools import partial

import fault_inputs as inputs
import numpy as np
from faults import (
    BAD_EVALUATIONS,
    WORKS,
    Cases,
    as_file,
    at_place,
    command,
    damaged_model,
    evaluation,
    few,
    index_mask,
    masks_folder,
    test_of_cases,
    written,
)

from iclip_hf import cli


CASES = Cases()
iclip = partial(command, cli.main, "iclip")


def explained(world, folder, image, *more):
    return iclip("explain", image, "--text", "dog", "--model", world.folder / "model", *more)


CASES.add_images("iclip explain", as_file(explained))
places = {name: place for name, place in inputs.PLACES.items() if name != "folder"}  # which is a collection
CASES.add("iclip explain", places, at_place(explained))
for door in ("compare --text dog",):

    def read(world, folder, place, door=door):
        return iclip(*door.split(), place, "--model", world.folder / "model")

    CASES.add(f"iclip {door}", few(inputs.PLACES, inputs.FEW_PLACES), at_place(read))


def texts_explained(world, folder, text):
    return iclip("explain", world.photo, "--text", "cat", "--text", text, "--model", world.folder / "model")


CASES.add("iclip explain --text", inputs.DRAWN_TEXTS, texts_explained, WORKS)
CASES.add("iclip explain --text", inputs.TYPED_TEXTS, texts_explained)


for door, run in {
    "iclip explain --model": lambda world, model: iclip("explain", world.photo, "--text", "dog", "--model", model),
    "iclip export": lambda world, model: iclip("export", model, "exported"),
}.items():
    CASES.add(door, few(inputs.MODEL_FOLDERS, inputs.FEW_MODEL_FOLDERS), damaged_model(run), file="model")


def tower(damage_name: str):
    """`iclip init` with a damaged image tower."""

    def run(world, folder, side):
        world.model.vision_model.save_pretrained(folder / "vision")
        world.model.text_model.save_pretrained(folder / "text")
        world.processor.tokenizer.save_pretrained(folder / "text")
        world.model.config.save_pretrained(folder / "config")
        world.processor.save_pretrained(folder / "config")
        inputs.MODEL_FOLDERS[damage_name](folder / side)
        towers = ("--vision", folder / "vision", "--text", folder / "text")
        iclip("init", "--config", folder / "config", *towers, "--output", "new")

    return run


for damage in ("missing", "config is truncated", "symlinked code", "weights are truncated", "pickled weights only"):
    CASES.add(f"iclip init, {damage}", {"in --vision": "vision", "in --text": "text"}, tower(damage))


for door, run in {
    "export --results": lambda w, f, text: iclip("export", w.folder / "model", "new", "--results", written(f, text)),
}.items():
    CASES.add(door, BAD_EVALUATIONS, run, file="written.json")
CASES.add(  # `class_thresholds` has all of them
    "explain --threshold",
    few(BAD_EVALUATIONS, ["no json", "deep lists"]),
    lambda w, f, text: explained(w, f, w.photo, "--threshold", written(f, text)),
    file="written.json",
)


# By how a command begins: what else is typed, and what of it the error shows.
ARGUMENTS = {
    "explain {photo} --text dog --model {model}": {
        "--sharpness 3": "--sharpness 3",
        "--method magic": "'magic'",
        "--image-size 12": "12",
        "--image-size 0": "got 0",
        "--image-size -8": "got -8",
        "--image-size 0.5": "got 0.5",
        "--min-presence nan": "got nan",
        "--threshold 1.5": "got 1.5",
        "--threshold no.json": "no.json",
        "--threshold {folder}": "empty",
        "--template photo": "['photo']",
        "--output {folder}": "/empty",
        "--output a.exe": "a.exe",
        "--output /dev/null/a.png": "/dev/null",
        "--output {long}.png": "xxx.png",
        "--model {folder}/absent": "/absent",
        "--model no/such-model": "no/such-model",
        "--images-per-file 3": "--images-per-file",
    },
    "explain --text dog --model {model}": {
        "{folder}": "/empty",
        "{photo} {photo} --output a.png": "a.png",
        "{world} {photo}": "photo.png",
        "{world} --words": "--words",
        "{world} --npz": "--npz",
        "{world} --batch-size 0": "got 0",
    },
    "segment --text dog --model {model}": {
        "{photo} --threshold nan": "got nan",
        "{photo} --output a.exe": "a.exe",
        "{photo} {photo} --output a.png": "a.png",
        "{folder}": "/empty",
    },
    "compare {photo} --model {model}": {
        "": "neither",
        "--text dog --output a.txt": "a.txt",
        "--text dog --methods itsm,gem": "put spaces between",
        "--text dog --dpi 0": "got 0",
        "--text dog --dataset folder": "got folder alone",
        "--dataset folder --data-root {folder}": "/empty",
        "--dataset folder --data-root {masks}": "such as image, got",
    },
    "evaluate --model {model} --dataset folder --data-root {masks}": {
        "--task faithfulness --seed often": "invalid int value: 'often'",
        "--steps 3": "--steps",
        "--limit 0": "got 0",
        "--window 16": "--window",
        "--image-size 12": "12",
        "--overrides absent.json": "absent.json",
        "--output a.csv": "a.csv",
        "--task faithfulness --data-root {folder}": "/empty",
        "--dataset voc2012 --data-root {folder}/absent": "/absent",
        "--dataset coco2017 --split ../../etc": "../../etc",
        "--task segmentation --dataset ade20k": "annotations/validation",
        "--task segmentation --threshold 0.5 --window 4": "got 4",
        "--task segmentation --threshold 0.5 --window 16 --stride 32": "got 32",
        "--task segmentation --overrides {names}": "got 4",
        "--task segmentation --threshold 0.5 --window 20": "got 20",
        "--task segmentation --threshold 0.5 --window 16 --stride 12": "got 12",
        "--task segmentation --threshold 0.5 --stride 16": "a stride of 16 alone",
        "--task segmentation --threshold 1.5": "got 1.5",
        "--task segmentation": "two images or more",
        "--measures luck": "'luck'",
        "--measures stuff_contrast": "names the background",
        "--batch-size 0": "got 0",
    },
    "init --output new": {
        "--config no-such": "no-such",
        "--config iclip-vit-b16 --output {world}": "world",
        "--config iclip-vit-b16 --vision {folder}/a --text {folder}/b": "/a",
    },
    "export": {
        "{model} {world}": "world",
        "{folder}/absent new": "/absent",
        "{model} new --results absent.json": "absent.json",
        "{model} new --format onnx --vendor": "got onnx",
        "{model} new --format web --results r.json": "got r.json",
    },
    "push --dry-run": {
        "{model} a/b/c": "'a/b/c'",
        "{model} my@model!": "'my@model!'",
        "{folder}/absent a/b": "/absent",
    },
    "export-metric": {"accuracy new": "'accuracy'", "mmiou {photo}": "photo.png"},
    "demo": {
        "--export-space new --model {model}": "/model",
        "--export-space {photo}": "photo.png",
        "--web {folder}": "/empty",
        "--web {folder} --model {model}": "--model",
        "--port http": "got http",
        "--port 65536": "1 to 65535, got 65536",
    },
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
        "long": "x" * 300,
        "names": written(folder, "dog\ncat\nball\nsky", "names.txt"),
        "results": written(folder, evaluation()),
    }
    iclip(*(argument.format(**places) for argument in arguments.split()))


for start, faults in ARGUMENTS.items():
    for rest, shows in faults.items():
        arguments = f"{start} {rest}"
        CASES.add("iclip", {arguments: arguments}, by_command_line, shows=shows)


test_a_fault_is_borne_or_refused_in_one_clear_sentence = test_of_cases(CASES)
