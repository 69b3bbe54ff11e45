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
    few,
    index_mask,
    masks_folder,
    test_of_cases,
    written,
)

from iclip_hf import cli


CASES = Cases()


iclip = partial(command, cli.main, "iclip")


def explained_by_command(world, folder, image):
    return iclip("explain", image, "--text", "dog", "--model", world.folder / "model")


CASES.add_images("iclip explain", as_file(explained_by_command))
places = {name: place for name, place in inputs.PLACES.items() if name != "folder"}  # which is a collection
CASES.add("iclip explain", places, at_place(explained_by_command))
for door in ("compare", "analyze channels"):
    text = ("--text", "dog") if door == "compare" else ()
    CASES.add(
        f"iclip {door}",
        few(inputs.PLACES, inputs.FEW_PLACES),
        at_place(
            lambda w, f, place, door=door, text=text: iclip(*door.split(), place, *text, "--model", w.folder / "model")
        ),
    )


for door, run in {
    "iclip explain --text": lambda w, f, text: iclip(
        "explain", w.photo, "--text", "cat", "--text", text, "--model", w.folder / "model"
    ),
    "iclip compare --text": lambda w, f, text: iclip(
        "compare", w.photo, "--text", text, "--model", w.folder / "model"
    ),
}.items():
    CASES.add(
        door,
        inputs.DRAWN_TEXTS if door != "iclip compare --text" else {"dollar signs": inputs.DRAWN_TEXTS["dollar signs"]},
        run,
        WORKS,
    )
    CASES.add(door, inputs.TYPED_TEXTS, run)


CASES.add(
    "iclip explain --model",
    few(inputs.MODEL_FOLDERS, inputs.FEW_MODEL_FOLDERS),
    damaged_model(lambda world, model: iclip("explain", world.photo, "--text", "dog", "--model", model)),
    file="model",
)
CASES.add(
    "iclip export",
    inputs.MODEL_FOLDERS,
    damaged_model(lambda world, model: iclip("export", model, "exported")),
    file="model",
)


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
    CASES.add(f"iclip init, {damage}", {"in --vision": "vision", "in --text": "text"}, tower(damage))


for door, run in {
    "--threshold": lambda w, f, text: iclip(
        "explain", w.photo, "--text", "dog", "--model", w.folder / "model", "--threshold", written(f, text)
    ),
    "iclip export --results": lambda w, f, text: iclip(
        "export", w.folder / "model", "new", "--results", written(f, text)
    ),
    "iclip analyze relation": lambda w, f, text: iclip("analyze", "relation", written(f, text)),
}.items():
    CASES.add(door, BAD_EVALUATIONS, run, file="written.json")


# What is typed, and what of it the error shows.
ARGUMENTS = {
    "unknown command": ("paint", "'paint'"),
    "explain without image": ("explain --text dog", "IMAGE"),
    "explain without text": ("explain {photo}", "--text"),
    "explain an unknown option": ("explain {photo} --text dog --model {model} --sharpness 3", "--sharpness 3"),
    "explain by an unknown method": ("explain {photo} --text dog --model {model} --method magic", "'magic'"),
    "explain at half a patch": ("explain {photo} --text dog --model {model} --image-size 12", "12"),
    "explain at no size": ("explain {photo} --text dog --model {model} --image-size 0", "got 0"),
    "explain at a negative size": ("explain {photo} --text dog --model {model} --image-size -8", "got -8"),
    "explain at a size of text": ("explain {photo} --text dog --model {model} --image-size big", "got big"),
    "explain with a presence above 1": ("explain {photo} --text dog --model {model} --min-presence 2", "got 2"),
    "explain with a presence of nan": ("explain {photo} --text dog --model {model} --min-presence nan", "got nan"),
    "explain with a threshold of nan": ("explain {photo} --text dog --model {model} --threshold nan", "got nan"),
    "explain with a threshold above 1": ("explain {photo} --text dog --model {model} --threshold 1.5", "got 1.5"),
    "explain with an absent threshold": ("explain {photo} --text dog --model {model} --threshold no.json", "no.json"),
    "explain with a threshold of a folder": (
        "explain {photo} --text dog --model {model} --threshold {folder}",
        "empty",
    ),
    "explain in unknown colours": ("explain {photo} --text dog --model {model} --colormap mud", "'mud'"),
    "explain without a place in the template": (
        "explain {photo} --text dog --model {model} --template photo",
        "['photo']",
    ),
    "explain to a folder": ("explain {photo} --text dog --model {model} --output {folder}", "/empty"),
    "explain to another kind": ("explain {photo} --text dog --model {model} --output a.exe", "a.exe"),
    "explain to nothing": ("explain {photo} --text dog --model {model} --output /dev/null/a.png", "/dev/null"),
    "explain to a long name": ("explain {photo} --text dog --model {model} --output {long}.png", "xxx.png"),
    "explain several to a file": ("explain {photo} {photo} --text dog --model {model} --output a.png", "a.png"),
    "explain without a model": ("explain {photo} --text dog --model {folder}/absent", "/absent"),
    "explain by an id of a hub that is not there": (
        "explain {photo} --text dog --model no/such-model",
        "no/such-model",
    ),
    "explain a folder without images": ("explain {folder} --text dog --model {model}", "/empty"),
    "explain a folder beside an image": ("explain {world} {photo} --text dog --model {model}", "photo.png"),
    "explain a folder with words": ("explain {world} --text dog --model {model} --words", "--words"),
    "explain a folder with arrays": ("explain {world} --text dog --model {model} --npz", "--npz"),
    "explain a folder in batches of nothing": ("explain {world} --text dog --model {model} --batch-size 0", "got 0"),
    "explain a folder into files of nothing": (
        "explain {world} --text dog --model {model} --images-per-file -1",
        "got -1",
    ),
    "segment without text": ("segment {photo} --model {model}", "--text"),
    "segment with a threshold of nan": ("segment {photo} --text dog --model {model} --threshold nan", "got nan"),
    "segment with a presence above 1": ("segment {photo} --text dog --model {model} --min-presence 2", "got 2"),
    "segment to another kind": ("segment {photo} --text dog --model {model} --output a.exe", "a.exe"),
    "segment several to a file": ("segment {photo} {photo} --text dog --model {model} --output a.png", "a.png"),
    "segment a folder": ("segment {folder} --text dog --model {model}", "/empty"),
    "compare without text": ("compare {photo} --model {model}", "neither"),
    "compare to another kind": ("compare {photo} --text dog --model {model} --output a.txt", "a.txt"),
    "compare at no resolution": ("compare {photo} --text dog --model {model} --dpi 0", "got 0"),
    "compare with half a data set": (
        "compare {photo} --text dog --model {model} --dataset folder",
        "got folder alone",
    ),
    "compare with no data set": (
        "compare {photo} --text dog --model {model} --dataset folder --data-root {folder}",
        "/empty",
    ),
    "evaluate without a data set": ("evaluate", "--dataset"),
    "evaluate an unknown task": ("evaluate --task dreams --dataset folder --data-root {masks}", "'dreams'"),
    "evaluate an unknown measure": (
        "evaluate --task faithfulness --dataset folder --data-root {masks} --measures luck",
        "'luck'",
    ),
    "evaluate in no steps": (
        "evaluate --task faithfulness --dataset folder --data-root {masks} --steps 0 --model {model}",
        "got 0",
    ),
    "evaluate with a seed of text": (
        "evaluate --task faithfulness --dataset folder --data-root {masks} --seed often",
        "invalid int value: 'often'",
    ),
    "evaluate interpretability in steps": (
        "evaluate --dataset folder --data-root {masks} --steps 3 --model {model}",
        "--steps",
    ),
    "evaluate faithfulness without masks": (
        "evaluate --task faithfulness --dataset folder --data-root {folder} --model {model}",
        "/empty",
    ),
    "evaluate an unknown data set": ("evaluate --dataset imagenet --data-root .", "'imagenet'"),
    "evaluate an absent folder": ("evaluate --dataset voc2012 --data-root {folder}/absent --model {model}", "/absent"),
    "evaluate an empty folder": ("evaluate --dataset folder --data-root {folder} --model {model}", "/empty"),
    "evaluate an absent split": (
        "evaluate --dataset coco2017 --data-root {folder} --split ../../etc --model {model}",
        "../../etc",
    ),
    "evaluate to another kind": (
        "evaluate --dataset folder --data-root {folder} --output a.csv --model {model}",
        "a.csv",
    ),
    "evaluate no images": ("evaluate --dataset folder --data-root {masks} --limit 0 --model {model}", "got 0"),
    "evaluate a part of an image": (
        "evaluate --dataset folder --data-root {masks} --limit 0.5 --model {model}",
        "got 0.5",
    ),
    "evaluate another layout": (
        "evaluate --task segmentation --dataset ade20k --data-root {masks} --model {model}",
        "annotations/validation",
    ),
    "evaluate with windows below a patch": (
        "evaluate --task segmentation --dataset folder --data-root {masks} --threshold 0.5 --window 4 --model {model}",
        "got 4",
    ),
    "evaluate with gaps between windows": (
        "evaluate --task segmentation --dataset folder --data-root {masks} --threshold 0.5 --window 16 --stride 32 --model {model}",
        "got 32",
    ),
    "evaluate with the options of another task": (
        "evaluate --dataset folder --data-root {masks} --window 16 --model {model}",
        "--window",
    ),
    "evaluate with other classes": (
        "evaluate --task segmentation --dataset folder --data-root {masks} --overrides {names} --model {model}",
        "got 4",
    ),
    "evaluate in batches of nothing": (
        "evaluate --dataset folder --data-root {masks} --batch-size 0 --model {model}",
        "got 0",
    ),
    "evaluate by an unknown aggregate": (
        "evaluate --dataset folder --data-root {masks} --aggregate mean --model {model}",
        "'mean'",
    ),
    "evaluate at half a patch": (
        "evaluate --dataset folder --data-root {masks} --image-size 12 --model {model}",
        "12",
    ),
    "evaluate with absent overrides": (
        "evaluate --dataset folder --data-root {masks} --overrides absent.json --model {model}",
        "absent.json",
    ),
    "analyze nothing": ("analyze", "ANALYSIS"),
    "analyze shift without data": ("analyze shift --model {model}", "--dataset"),
    "analyze shift of no images": (
        "analyze shift --dataset folder --data-root {masks} --limit 0 --model {model}",
        "got 0",
    ),
    "analyze shift of an unknown pooling": (
        "analyze shift --dataset folder --data-root {masks} --before mean",
        "'mean'",
    ),
    "analyze relation of nothing": ("analyze relation absent.json", "absent.json"),
    "analyze relation of a folder": ("analyze relation {folder}", "/empty"),
    "init without a configuration": ("init --output new", "--config"),
    "init an unknown configuration": ("init --config no-such --output new", "no-such"),
    "init into a full folder": ("init --config iclip-vit-b16 --output {world}", "world"),
    "init from absent towers": (
        "init --config iclip-vit-b16 --vision {folder}/a --text {folder}/b --output new",
        "/a",
    ),
    "export without a folder": ("export {model}", "DIR"),
    "export into a full folder": ("export {model} {world}", "world"),
    "export an absent model": ("export {folder}/absent new", "/absent"),
    "export in an unknown format": ("export {model} new --format pickle", "'pickle'"),
    "export with absent results": ("export {model} new --results absent.json", "absent.json"),
    "push to a bad name": ("push {model} a/b/c --dry-run", "'a/b/c'"),
    "push to a name with spaces": ("push {model} my@model!", "'my@model!'"),
    "push an absent model": ("push {folder}/absent org/name --dry-run", "/absent"),
    "an unknown metric": ("export-metric accuracy new", "'accuracy'"),
    "a metric into a file": ("export-metric mmiou {photo}", "photo.png"),
    "demo of a folder as a Space": ("demo --export-space new --model {model}", "/model"),
    "demo into a file": ("demo --export-space {photo}", "photo.png"),
    "demo at a port of text": ("demo --port http", "got http"),
    "demo at a port beyond all": ("demo --port 65536", "1 to 65535, got 65536"),
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
    }
    iclip(*(argument.format(**places) for argument in arguments.split()))


for name, (arguments, shows) in ARGUMENTS.items():
    CASES.add("iclip", {name: arguments}, by_command_line, shows=shows)


test_a_fault_is_borne_or_refused_in_one_clear_sentence = test_of_cases(CASES)
